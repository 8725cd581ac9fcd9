package model

import (
	"maps"
	"net"
	"slices"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Largest frames, with FCS.
const (
	fcs           = 4
	maxStandard   = 1514 // without FCS: what the jumbo rule calls a standard frame
	maxJumboFrame = 9728
	minLPE        = 68
)

type macAddr [6]byte

// usable tells whether a VF may use the address.
func (m macAddr) usable() bool { return m != macAddr{} && m[0]&1 == 0 }

// pf is what the PF's driver and its filters hold for the VF. What it does is
// what ixgbe_sriov.c of the Linux PF driver does.
type pf struct {
	cts        bool
	vfre, vfte bool
	api        uint32
	// mac is remembered over resets; macOn tells that its filter is installed.
	mac       macAddr
	macOn     bool
	adminMAC  bool
	macvlans  []macAddr
	vlans     map[uint16]bool
	portVLAN  uint16
	multicast []uint16
	xcast     uint32
	bam       bool // receive broadcast
	rompe     bool // receive what hits the multicast table
	mpe       bool // receive all multicast
	aupe      bool // receive untagged frames
	qde       bool // queues drop what finds no descriptor
	maxFrame  uint32
	// associations has the handles of security associations.
	associations map[uint32]bool
	trusted      bool
	spoofCheck   bool
}

func (p *pf) powerOn(cfg Config) {
	*p = pf{maxFrame: uint32(cfg.PFMaxFrame) + fcs, spoofCheck: cfg.SpoofCheck}
	if len(cfg.AdminMAC) == len(p.mac) {
		p.setAdminMAC(macAddr(cfg.AdminMAC))
	}
	p.wipe()
}

// wipe drops what a reset of the VF takes from the PF: filters, VLANs and the
// API version. The remembered MAC, the xcast mode and the administrator's
// settings stay.
func (p *pf) wipe() {
	p.vlans = map[uint16]bool{p.portVLAN: true}
	p.bam, p.aupe = true, p.portVLAN == 0
	p.multicast, p.macvlans, p.macOn, p.associations = nil, nil, false, nil
	p.api = ixgbevf.API10
}

// vflr is the PF's reaction to a reset of the VF.
func (p *pf) vflr(cfg Config) {
	p.wipe()
	p.vfre, p.vfte = false, false
	p.cts = p.cts && cfg.ClearToSendSurvivesFLR
	if cfg.FilterModesClearedByReset {
		p.rompe, p.mpe = false, false
	}
}

// reset serves the RESET message and turns it into its reply, which has no
// CTS bit.
func (p *pf) reset(cfg Config, m *[ixgbevf.MailboxWords]uint32) {
	p.wipe()
	p.macOn = p.mac != macAddr{}
	p.cts, p.vfte = true, true
	p.qde = cfg.ForceDropEnable
	p.vfre = cfg.PFMaxFrame <= maxStandard || cfg.DeviceID != ixgbevf.DeviceID
	m[0] = ixgbevf.MsgReset | ixgbevf.MsgNACK
	if p.macOn && p.adminMAC {
		m[0] = ixgbevf.MsgReset | ixgbevf.MsgACK
		putMAC(m, p.mac)
	}
	m[3] = cfg.MulticastFilterType & 3
}

func putMAC(m *[ixgbevf.MailboxWords]uint32, a macAddr) {
	m[1] = uint32(a[0]) | uint32(a[1])<<8 | uint32(a[2])<<16 | uint32(a[3])<<24
	m[2] = uint32(a[4]) | uint32(a[5])<<8
}

func getMAC(m *[ixgbevf.MailboxWords]uint32) macAddr {
	return macAddr{byte(m[1]), byte(m[1] >> 8), byte(m[1] >> 16), byte(m[1] >> 24), byte(m[2]), byte(m[2] >> 8)}
}

// handle serves any other message, changes m into the body of the reply, and
// reports whether the PF agreed.
func (p *pf) handle(cfg Config, id uint32, m *[ixgbevf.MailboxWords]uint32) bool {
	info := m[0] >> ixgbevf.MsgInfoShift & ixgbevf.MsgInfoMask
	switch id {
	case ixgbevf.MsgSetMAC:
		return p.setMAC(getMAC(m))
	case ixgbevf.MsgSetMulticast:
		p.setMulticast(int(info), m[1:])
		return true
	case ixgbevf.MsgSetVLAN:
		return p.setVLAN(cfg, uint16(m[1]&0xfff), info != 0)
	case ixgbevf.MsgSetLPE:
		return p.setLPE(cfg, m[1])
	case ixgbevf.MsgSetMACVLAN:
		return p.setMACVLAN(cfg, info, getMAC(m))
	case ixgbevf.MsgAPINegotiate:
		if !slices.Contains(cfg.APIs, m[1]) {
			return false
		}
		p.api = m[1]
		return true
	case ixgbevf.MsgGetQueues:
		if !p.atLeast(ixgbevf.API11) {
			return false
		}
		m[1], m[2], m[3], m[4] = uint32(cfg.QueuePairs), uint32(cfg.QueuePairs), 0, 0
		if p.portVLAN != 0 {
			m[3] = 1
		}
		return true
	case ixgbevf.MsgUpdateXcastMode:
		return p.setXcast(&m[1])
	case ixgbevf.MsgGetLinkState:
		if !p.atLeast(ixgbevf.API12) {
			return false
		}
		m[1] = 1
		return true
	case ixgbevf.MsgIPsecAdd:
		return p.addAssociation(cfg, m)
	case ixgbevf.MsgIPsecDel:
		// Asking for what is not there is no error.
		delete(p.associations, m[1])
		return p.trusted
	case ixgbevf.MsgFeaturesNegotiate:
		if !p.atLeast(ixgbevf.API17) {
			return false
		}
		m[1] &= cfg.Features
		return true
	}
	// GET_RETA and GET_RSS_KEY need the administrator's leave,
	// GET_PF_LINK_STATE is another device's.
	return false
}

// atLeast compares API versions, whose codes ascend with them but for 2.0.
func (p *pf) atLeast(code uint32) bool {
	return p.api >= code && p.api != ixgbevf.API20
}

func (p *pf) setMAC(a macAddr) bool {
	if !a.usable() || p.adminMAC && !p.trusted && a != p.mac {
		return false
	}
	p.mac, p.macOn = a, true
	return true
}

// addAssociation puts the handle of a security association in the place of its
// SPI. The parts of the request that say what to do to packets are left alone.
func (p *pf) addAssociation(cfg Config, m *[ixgbevf.MailboxWords]uint32) bool {
	if !p.trusted || len(p.associations) >= cfg.Associations {
		return false
	}
	if p.associations == nil {
		p.associations = make(map[uint32]bool)
	}
	handle := uint32(0)
	if m[2]&0xff == associationOut {
		handle = firstOut
	}
	for p.associations[handle] {
		handle++
	}
	p.associations[handle] = true
	m[1] = handle
	return true
}

// Of a security association: the direction in its request, and the first handle
// of those that are for sending.
const (
	associationOut = 2
	firstOut       = 1024
)

func (p *pf) setMulticast(n int, words []uint32) {
	p.multicast = nil
	for i := range min(n, ixgbevf.MaxMulticast) {
		hash := words[i/2] >> (16 * uint(i%2)) & (1<<ixgbevf.MulticastHashBits - 1)
		p.multicast = append(p.multicast, uint16(hash))
	}
	p.rompe = true
}

func (p *pf) setVLAN(cfg Config, vid uint16, add bool) bool {
	switch {
	case p.portVLAN != 0:
		return false
	case !add && vid != 0: // VLAN 0 cannot be removed, and asking is no error
		delete(p.vlans, vid)
	case add && !p.vlans[vid]:
		if len(p.vlans) >= cfg.VLANs {
			return false
		}
		p.vlans[vid] = true
	}
	return true
}

// setLPE follows the 82599's rule that jumbo frames are for the PF and all of
// its VFs or for none (specification update, clarification 14). Its successors
// bound them for each queue instead.
func (p *pf) setLPE(cfg Config, frame uint32) bool {
	pfJumbo := cfg.PFMaxFrame > maxStandard
	ok := frame >= minLPE && frame <= maxJumboFrame
	if cfg.DeviceID != ixgbevf.DeviceID {
		if ok {
			p.maxFrame = max(p.maxFrame, frame)
		}
		return ok
	}
	if ok && (!p.atLeast(ixgbevf.API11) || !pfJumbo) {
		ok = !pfJumbo && frame <= maxStandard+fcs
	}
	p.vfre = ok
	if ok {
		p.maxFrame = max(p.maxFrame, frame)
	}
	return ok
}

// setMACVLAN: 0 clears the list, 1 starts a new one, anything else adds.
func (p *pf) setMACVLAN(cfg Config, index uint32, a macAddr) bool {
	if index > 0 && (p.adminMAC && !p.trusted || !a.usable()) {
		return false
	}
	if index > 0 {
		p.spoofCheck = false
	}
	if index <= 1 {
		p.macvlans = nil
	}
	if index == 0 {
		return true
	}
	if len(p.macvlans) >= cfg.MACVLANs {
		return false
	}
	p.macvlans = append(p.macvlans, a)
	return true
}

// setXcast grants a mode, which it leaves in mode. The mode granted last is
// remembered over resets, and asking for it again does nothing.
func (p *pf) setXcast(mode *uint32) bool {
	want := *mode
	if !p.atLeast(ixgbevf.API12) || want == ixgbevf.XcastPromisc && !p.atLeast(ixgbevf.API13) {
		return false
	}
	if want > ixgbevf.XcastMulti && !p.trusted {
		want = ixgbevf.XcastMulti
	}
	if want != p.xcast {
		switch want {
		case ixgbevf.XcastNone:
			p.bam, p.rompe, p.mpe = false, false, false
		case ixgbevf.XcastMulti:
			p.bam, p.rompe, p.mpe = true, true, false
		case ixgbevf.XcastAllMulti:
			p.bam, p.rompe, p.mpe = true, true, true
		default: // an 82599 has no promiscuous pools
			return false
		}
		p.xcast = want
	}
	*mode = want
	return true
}

func (p *pf) setAdminMAC(a macAddr) {
	p.mac, p.adminMAC = a, a != macAddr{}
	p.macOn = p.adminMAC
}

func (p *pf) setPortVLAN(vid uint16) {
	delete(p.vlans, p.portVLAN)
	p.portVLAN = vid
	p.vlans[vid] = true
	p.aupe = vid == 0
}

func (p *pf) snapshot() PFState {
	s := PFState{
		ClearToSend: p.cts, ReceiveEnabled: p.vfre, TransmitEnabled: p.vfte,
		API: p.api, AdminMAC: p.adminMAC,
		VLANs:    slices.Sorted(maps.Keys(p.vlans)),
		PortVLAN: p.portVLAN, Multicast: slices.Clone(p.multicast), XcastMode: p.xcast,
		Broadcast: p.bam, MulticastHash: p.rompe, AllMulticast: p.mpe, Untagged: p.aupe,
		Associations: len(p.associations), MaxFrame: p.maxFrame, Trusted: p.trusted, SpoofCheck: p.spoofCheck,
	}
	if p.macOn {
		s.MAC = net.HardwareAddr(slices.Clone(p.mac[:]))
	}
	for _, a := range p.macvlans {
		s.MACVLANs = append(s.MACVLANs, net.HardwareAddr(slices.Clone(a[:])))
	}
	return s
}
