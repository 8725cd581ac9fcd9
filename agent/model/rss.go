package model

import (
	"encoding/binary"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// RSS types of the advanced receive descriptor.
const (
	rssTCPv4 = 1
	rssIPv4  = 2
	rssTCPv6 = 3
	rssIPv6  = 5
	rssUDPv4 = 7
	rssUDPv6 = 8
)

// What is hashed, in VFMRQC and the PF's MRQC.
const (
	hashTCPv4 = 1 << 16
	hashIPv4  = 1 << 17
	hashIPv6  = 1 << 20
	hashTCPv6 = 1 << 21
	hashUDPv4 = 1 << 22
	hashUDPv6 = 1 << 23
	// pfHashes is what the Linux PF driver hashes by default: no UDP ports.
	pfHashes = hashTCPv4 | hashIPv4 | hashIPv6 | hashTCPv6
)

// retaEntries is the size of the PF's redirection table. Entry i leads to
// queue i modulo the number of queues, as the Linux PF driver fills it.
const retaEntries = 128

// rssKey is the PF's key. The VFs of an 82599 share it and cannot see it; the
// Linux driver makes it up at random. This one is from Microsoft's "Verifying
// the RSS Hash Calculation".
var rssKey = [40]byte{
	0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
	0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
	0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
}

// rssType tells what of a frame is hashed, given the fields of MRQC; 0 for
// nothing.
func (h headers) rssType(fields uint32) (kind uint32, ports bool) {
	if h.ip == 0 {
		return 0, false
	}
	types := []struct {
		field, kind uint32
		proto       byte
	}{{hashTCPv4, rssTCPv4, protoTCP}, {hashUDPv4, rssUDPv4, protoUDP}, {hashIPv4, rssIPv4, 0}}
	if h.v6 {
		types[0].field, types[0].kind = hashTCPv6, rssTCPv6
		types[1].field, types[1].kind = hashUDPv6, rssUDPv6
		types[2].field, types[2].kind = hashIPv6, rssIPv6
	}
	for _, t := range types {
		if fields&t.field != 0 && (t.proto == 0 || t.proto == h.proto) {
			return t.kind, t.proto != 0
		}
	}
	return 0, false
}

// rss returns a frame's hash and its type, 0 for frames that have none.
func (h headers) rss(f []byte, key *[40]byte, fields uint32) (hash, kind uint32) {
	kind, ports := h.rssType(fields)
	if kind == 0 {
		return 0, 0
	}
	src, dst := h.addresses(f)
	in := append(append(make([]byte, 0, 36), src...), dst...)
	if ports {
		in = append(in, f[h.l4:h.l4+4]...)
	}
	return toeplitz(in, key), kind
}

// toeplitz hashes at most 36 bytes.
func toeplitz(in []byte, key *[40]byte) uint32 {
	var hash uint32
	window := be.Uint32(key[:])
	for i, b := range in {
		next := key[i+4]
		for bit := 7; bit >= 0; bit-- {
			if b>>bit&1 != 0 {
				hash ^= window
			}
			window = window<<1 | uint32(next>>bit&1)
		}
	}
	return hash
}

// ownRSS spreads a frame by the VF's own key and table, which an X550 and its
// successors have, and tells whether that is on.
func (v *VF) ownRSS(h headers, f []byte) (queue int, hash, kind uint32, on bool) {
	fields := v.regs[ixgbevf.VFMRQC/4]
	if fields&ixgbevf.MRQCEnable == 0 {
		return 0, 0, 0, false
	}
	var key [40]byte
	for n := range ixgbevf.RSSKeyWords {
		binary.LittleEndian.PutUint32(key[4*n:], v.regs[ixgbevf.VFRSSRK(n)/4])
	}
	hash, kind = h.rss(f, &key, fields)
	if kind == 0 {
		return 0, 0, 0, true
	}
	entry := hash % (4 * ixgbevf.RSSTableWords)
	queue = int(v.regs[ixgbevf.VFRETA(int(entry/4))/4] >> (8 * (entry % 4)) & 0xff)
	return queue % len(v.rx), hash, kind, true
}
