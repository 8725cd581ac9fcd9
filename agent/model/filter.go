package model

import (
	"slices"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// accepts tells whether the PF's filters send a frame to the VF.
func (p *pf) accepts(cfg Config, f []byte, h headers) bool {
	limit := int(p.maxFrame) - fcs
	if h.tagged {
		limit += vlanTag
	}
	if len(f) > limit {
		return false
	}
	if h.tagged && !p.vlans[h.tag&0xfff] || !h.tagged && !p.aupe {
		return false
	}
	dst := macAddr(f[:6])
	switch {
	case dst == macAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}:
		return p.bam
	case dst[0]&1 != 0:
		return p.mpe || p.rompe && slices.Contains(p.multicast, multicastHash(cfg.MulticastFilterType, dst))
	default:
		return p.owns(dst)
	}
}

// owns tells whether a unicast address is filtered for the VF.
func (p *pf) owns(a macAddr) bool {
	return p.macOn && a == p.mac || slices.Contains(p.macvlans, a)
}

// spoofed tells whether a frame with that source must not leave.
func (p *pf) spoofed(src []byte) bool {
	return p.spoofCheck && !p.owns(macAddr(src))
}

// multicastHash takes 12 of the address's last 16 bits, as MCSTCTRL.MO says
// (ixgbe_mta_vector in the Linux drivers).
func multicastHash(mo uint32, a macAddr) uint16 {
	low, high := uint16(a[4]), uint16(a[5])
	var hash uint16
	switch mo & 3 {
	case 0:
		hash = low>>4 | high<<4
	case 1:
		hash = low>>3 | high<<5
	case 2:
		hash = low>>2 | high<<6
	case 3:
		hash = low | high<<8
	}
	return hash & (1<<ixgbevf.MulticastHashBits - 1)
}
