package twin

import (
	"compsc.io/compsc/agent/family/ixgbevf"
)

// packetLength is what goes into VFRXDCTL to bound the length of packets: often
// nothing, as with Linux's driver, and nothing on an 82599, which has no such
// bits. What passes nothing at all is not among it.
func (g *guest) packetLength() uint32 {
	if !g.fleet.member.PacketLength || chance(g.rng, 1, 2) {
		return 0
	}
	return pick[uint32](g.rng, 1518, 9018, 300, 100, ixgbevf.RXDCTLLength) | uint32(g.rng.IntN(4)&1)*ixgbevf.RXDCTLLengthEnable
}

// setUpRSS programs the VF's own RSS where there is such: a key, a table that
// spreads over some of the queues, and what is hashed.
func (g *guest) setUpRSS() {
	if !g.fleet.member.RSS {
		return
	}
	for n := range ixgbevf.RSSKeyWords {
		g.write(ixgbevf.VFRSSRK(n), g.rng.Uint32())
	}
	queues := 1 + g.rng.IntN(len(g.rx))
	for n := range ixgbevf.RSSTableWords {
		entry := uint32(0)
		for b := range 4 {
			entry |= uint32((4*n+b)%queues) << (8 * b)
		}
		g.write(ixgbevf.VFRETA(n), entry)
	}
	g.write(ixgbevf.VFMRQC, g.hashed()|pick[uint32](g.rng, 0, ixgbevf.MRQCEnable, ixgbevf.MRQCEnable))
}

// hashed are the fields of VFMRQC that say what is hashed.
func (g *guest) hashed() uint32 {
	return pick(g.rng, 0x00330000, 0x00330000, g.rng.Uint32()&0x00ff0000)
}

// changeRSS changes one register of the VF's own RSS, as ethtool -X has
// drivers do.
func (g *guest) changeRSS() {
	if !g.fleet.member.RSS {
		return
	}
	switch g.rng.IntN(3) {
	case 0:
		g.write(ixgbevf.VFRSSRK(g.rng.IntN(ixgbevf.RSSKeyWords)), g.rng.Uint32())
	case 1:
		g.write(ixgbevf.VFRETA(g.rng.IntN(ixgbevf.RSSTableWords)), g.rng.Uint32())
	case 2:
		g.write(ixgbevf.VFMRQC, g.hashed()|uint32(g.rng.IntN(2)))
	}
}
