package twin

import (
	"net"
	"slices"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// mailboxPolls is how often the driver looks for an answer. write returns once
// the PF has answered a request.
const mailboxPolls = 3

func (g *guest) readMailbox() uint32 {
	value := g.read(ixgbevf.VFMAILBOX)
	g.bits |= value & ixgbevf.MailboxReadClear
	return value
}

func (g *guest) awaitMailbox(bit uint32) bool {
	for range mailboxPolls {
		g.readMailbox()
		if g.bits&bit != 0 {
			g.bits &^= bit
			return true
		}
	}
	return false
}

// call sends a message as the driver does and returns the reply, nil for none.
func (g *guest) call(words ...uint32) []uint32 {
	g.write(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	if g.readMailbox()&ixgbevf.MailboxVFU == 0 {
		return nil
	}
	g.bits &^= ixgbevf.MailboxPFSTS | ixgbevf.MailboxPFACK
	for i, w := range words {
		g.write(ixgbevf.VFMBMEM+4*uint32(i), w)
	}
	g.forget(words[0] & ixgbevf.MsgIDMask)
	g.write(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if !g.awaitMailbox(ixgbevf.MailboxPFACK) || !g.awaitMailbox(ixgbevf.MailboxPFSTS) {
		return nil
	}
	reply := make([]uint32, max(len(words), 4))
	for i := range reply {
		reply[i] = g.read(ixgbevf.VFMBMEM + 4*uint32(i))
	}
	g.write(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	g.note(words, reply)
	return reply
}

// forget drops what a message that is about to be sent may change: the twin may
// move before the answer is known.
func (g *guest) forget(id uint32) {
	switch id {
	case ixgbevf.MsgReset:
		g.told = told{}
	case ixgbevf.MsgFeaturesNegotiate:
		g.told.asked = 0
	}
}

// note remembers what the PF has told.
func (g *guest) note(request, reply []uint32) {
	switch id := request[0] & ixgbevf.MsgIDMask; {
	case !agreed(reply):
		g.refusedMAC = g.refusedMAC || id == ixgbevf.MsgSetMACVLAN
	case id == ixgbevf.MsgGetQueues:
		g.told.queues = true
	case id == ixgbevf.MsgFeaturesNegotiate:
		g.told.asked, g.told.granted = request[1], reply[1]
	}
}

func agreed(reply []uint32) bool { return reply != nil && reply[0]&ixgbevf.MsgACK != 0 }

// resetHandshake resets the VF and asks the PF for its address.
func (g *guest) resetHandshake() {
	g.write(ixgbevf.VTEIMC, ixgbevf.VectorMask)
	g.write(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	g.maxFrame, g.macVLANs, g.bits = 1518, 0, 0
	g.awaitMailbox(ixgbevf.MailboxRSTD)
	reply := g.call(ixgbevf.MsgReset)
	if reply == nil {
		return
	}
	g.mo = reply[3]
	switch {
	case agreed(reply):
		g.mac = 0
	case chance(g.rng, 1, 3):
		g.mac = g.rng.IntN(len(stations))
	}
}

// negotiate settles on an API version. Drivers do it once after a reset,
// before they ask for anything that depends on it.
func (g *guest) negotiate() {
	code := pick[uint32](g.rng, ixgbevf.API10, ixgbevf.API11, ixgbevf.API12, ixgbevf.API13,
		ixgbevf.API13, ixgbevf.API14, ixgbevf.API15, ixgbevf.API16, ixgbevf.API17, ixgbevf.API17, ixgbevf.API20)
	if agreed(g.call(ixgbevf.MsgAPINegotiate, code, 0)) && code == ixgbevf.API17 && chance(g.rng, 2, 3) {
		g.call(ixgbevf.MsgFeaturesNegotiate, uint32(g.rng.IntN(4)))
	}
}

func macWords(a net.HardwareAddr) (low, high uint32) {
	return le.Uint32(a), uint32(le.Uint16(a[4:]))
}

func (g *guest) setMAC(station int) {
	low, high := macWords(stations[station])
	if agreed(g.call(ixgbevf.MsgSetMAC, low, high)) {
		g.mac = station
	}
}

// mailboxCall makes one of the calls a driver makes while it runs.
func (g *guest) mailboxCall() {
	info := func(n int) uint32 { return uint32(n) << ixgbevf.MsgInfoShift }
	switch g.rng.IntN(14) {
	case 0, 1:
		g.setMAC(g.rng.IntN(len(stations)))
	case 2, 3:
		g.call(g.multicastList()...)
	case 4, 5:
		g.call(ixgbevf.MsgSetVLAN|info(g.rng.IntN(4)&1|g.rng.IntN(2)), uint32(pick(g.rng, vlans...)))
	case 6:
		frame := pick[uint32](g.rng, 1518, 1518, 1522, 9018, 68, 1000, 20000)
		g.maxFrame = 1518
		if agreed(g.call(ixgbevf.MsgSetLPE, frame)) {
			g.maxFrame = int(frame)
		}
	case 7, 8:
		index := 0
		if chance(g.rng, 3, 4) {
			index = 1 + g.macVLANs
		}
		low, high := macWords(pick(g.rng, stations...))
		reply := g.call(ixgbevf.MsgSetMACVLAN|info(index), low, high)
		if index == 0 {
			g.macVLANs = 0
		} else if agreed(reply) {
			g.macVLANs++
		}
	case 9, 10:
		g.call(ixgbevf.MsgUpdateXcastMode, uint32(g.rng.IntN(4)))
	case 11:
		g.call(ixgbevf.MsgFeaturesNegotiate, uint32(g.rng.IntN(4)))
	case 12:
		g.call(pick[uint32](g.rng, ixgbevf.MsgGetQueues, ixgbevf.MsgGetRETA, ixgbevf.MsgGetRSSKey, ixgbevf.MsgGetLinkState,
			ixgbevf.MsgGetPFLinkState), 0, 0, 0, 0)
	case 13:
		g.association()
	}
}

// association adds or removes a security association, now and then one that is
// not there. A guest that has one cannot be moved: most soon have none.
func (g *guest) association() {
	if n := len(g.associations); n > 0 && chance(g.rng, 3, 4) {
		g.call(ixgbevf.MsgIPsecDel, g.associations[n-1-g.rng.IntN(min(n, 3))])
		return
	}
	reply := g.call(ixgbevf.MsgIPsecAdd, g.rng.Uint32(), 1+uint32(g.rng.IntN(2))|50<<8|2<<16, 10, 0, 0, 0, 1, 2, 3, 4, 5)
	if agreed(reply) {
		g.associations = append(g.associations, reply[1])
	}
}

func (g *guest) multicastList() []uint32 {
	words := slices.Repeat([]uint32{0}, ixgbevf.MailboxWords)
	n := 0
	add := func(hash uint32) {
		words[1+n/2] |= hash << (16 * (n % 2))
		n++
	}
	for _, group := range groups {
		if chance(g.rng, 1, 2) {
			add(groupHash(g.mo, group))
		}
	}
	if chance(g.rng, 1, 8) {
		for n < ixgbevf.MaxMulticast {
			add(uint32(g.rng.IntN(1 << 12)))
		}
	}
	words[0] = ixgbevf.MsgSetMulticast | uint32(n)<<ixgbevf.MsgInfoShift
	return words
}

// rawMailbox is a piece of a transaction, or an odd one.
func (g *guest) rawMailbox() {
	switch g.rng.IntN(6) {
	case 0:
		g.readMailbox()
	case 1:
		g.write(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	case 2:
		g.write(ixgbevf.VFMAILBOX, 0)
	case 3:
		g.write(ixgbevf.VFMBMEM+4*uint32(g.rng.IntN(ixgbevf.MailboxWords)), g.rng.Uint32())
	case 4:
		g.write(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	case 5: // something the PF refuses
		g.call(0x40|g.rng.Uint32()&0x00ff0000, g.rng.Uint32())
	}
}
