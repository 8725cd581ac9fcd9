package twin

import (
	"strings"
	"time"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// interruptRegisters plays with the interrupts.
func (g *guest) interruptRegisters() {
	vectors := uint32(g.rng.IntN(ixgbevf.VectorMask + 1))
	switch g.rng.IntN(10) {
	case 0, 1:
		g.write(ixgbevf.VTEIMS, vectors)
	case 2, 3:
		g.write(ixgbevf.VTEIMC, vectors)
	case 4:
		g.write(ixgbevf.VTEIAC, vectors)
	case 5:
		g.write(ixgbevf.VTEIAM, vectors)
	case 6:
		g.read(ixgbevf.VTEICR)
	case 7:
		g.write(ixgbevf.VTEICR, vectors)
	case 8:
		g.write(ixgbevf.VTEICS, vectors)
	case 9:
		g.write(ixgbevf.VTEITR(g.rng.IntN(3)), g.interval())
	}
}

// interval is a value for VTEITR: often none.
func (g *guest) interval() uint32 {
	return pick(g.rng, 0, uint32(g.rng.IntN(1<<12))) | uint32(g.rng.IntN(2))*ixgbevf.EITRCountWDis
}

// longestInterval is more than VTEITR can say, whose field has 9 bits of 2
// microseconds.
const longestInterval = 2 * time.Millisecond

// timePasses ends some intervals of interrupt moderation.
func (g *guest) timePasses() {
	g.step()
	d := time.Duration(1+g.rng.IntN(600)) * time.Microsecond
	g.log.add("%v pass", d)
	g.fleet.clock.Advance(d)
}

// allIntervalsEnd lets so much time pass that no interval runs any more, also
// none that starts when the first ones end.
func (g *guest) allIntervalsEnd() {
	g.fleet.clock.Advance(longestInterval)
	g.fleet.clock.Advance(longestInterval)
}

// settings writes what a driver sets once, with values as they come.
func (g *guest) settings() {
	q := g.rng.IntN(len(g.rx))
	switch g.rng.IntN(12) {
	case 0:
		g.write(ixgbevf.VTIVAR(g.rng.IntN(4)), g.rng.Uint32())
	case 1:
		g.write(ixgbevf.VTIVARMisc, g.rng.Uint32())
	case 2:
		g.write(ixgbevf.VTRSCINT(g.rng.IntN(2)), g.rng.Uint32())
	case 3:
		g.write(ixgbevf.VFPSRTYPE, g.rng.Uint32())
	case 4:
		g.write(ixgbevf.VFDCARXCTRL(q), g.rng.Uint32())
	case 5:
		g.write(ixgbevf.VFDCATXCTRL(q), g.rng.Uint32())
	case 6:
		g.write(ixgbevf.VFRXDCTL(q), g.read(ixgbevf.VFRXDCTL(q))^ixgbevf.RXDCTLVME)
	case 7:
		g.write(ixgbevf.VFSRRCTL(q), g.read(ixgbevf.VFSRRCTL(q))^1<<28)
	case 8:
		g.write(ixgbevf.VFTDWBAL(q), g.read(ixgbevf.VFTDWBAL(q))^ixgbevf.TDWBALEnable)
	case 9:
		if length := g.packetLength(); g.fleet.member.PacketLength {
			const bits = ixgbevf.RXDCTLLength | ixgbevf.RXDCTLLengthEnable
			g.write(ixgbevf.VFRXDCTL(q), g.read(ixgbevf.VFRXDCTL(q))&^bits|length)
		}
	case 10, 11:
		g.changeRSS()
	}
}

// counters reads some statistics, both halves of a pair in either order, or
// one alone.
func (g *guest) counters() {
	if chance(g.rng, 1, 2) {
		g.latchedCounter()
		return
	}
	for range 1 + g.rng.IntN(3) {
		g.read(pick[uint32](g.rng, ixgbevf.VFGPRC, ixgbevf.VFGORCLSB, ixgbevf.VFGORCMSB, ixgbevf.VFMPRC,
			ixgbevf.VFGPTC, ixgbevf.VFGOTCLSB, ixgbevf.VFGOTCMSB))
	}
}

// latchedCounter reads the lower half of a counter, which often wraps then, and
// the upper one some time later.
func (g *guest) latchedCounter() {
	low, high := uint32(ixgbevf.VFGORCLSB), uint32(ixgbevf.VFGORCMSB)
	if chance(g.rng, 1, 2) {
		low, high = ixgbevf.VFGOTCLSB, ixgbevf.VFGOTCMSB
	}
	g.read(low)
	for range g.rng.IntN(4) {
		if chance(g.rng, 1, 2) {
			g.trafficIn()
		} else {
			g.trafficOut()
		}
	}
	g.read(high)
}

// oddAccess is one that no driver would make. What starts a ring somewhere
// else is among it; resets and the mailbox have their own.
func (g *guest) oddAccess() {
	r := pick(g.rng, g.regs...)
	switch {
	case chance(g.rng, 1, 4):
		off := uint32(g.rng.IntN(ixgbevf.BARSize/4)) * 4
		if off != ixgbevf.VFFRTIMER {
			g.read(off)
		}
		g.write(off&^0xfff|0xffc, g.rng.Uint32())
	case r.Offset == ixgbevf.VFFRTIMER, r.Offset == ixgbevf.VFCTRL, r.Offset == ixgbevf.VFMAILBOX:
	case g.isTail(r.Offset):
		// What is in the ring would be sent again, with contexts that the
		// driver has forgotten: see forgetContexts.
	case chance(g.rng, 1, 2):
		g.read(r.Offset)
	case r.Class == family.Copy || r.Class == family.Derive:
		old := g.read(r.Offset)
		value := g.rng.Uint32()
		if chance(g.rng, 1, 2) {
			value &= 0x3f
		}
		if strings.Contains(r.Name, "DLEN") {
			value &= uint32(g.fleet.ringStep) - 1 // a longer ring does not fit into the scratch memory
		}
		if g.fleet.headsVary && strings.Contains(r.Name, "XDCTL") {
			value = value&^ixgbevf.QueueEnable | old&ixgbevf.QueueEnable // see toggleQueue
		}
		if r.Class == family.Derive && r.Offset != ixgbevf.VTEICR {
			value = 0 // a head: whether another value is taken differs between VFs
		}
		g.write(r.Offset, value)
		if chance(g.rng, 7, 8) && r.Class == family.Copy {
			g.write(r.Offset, old)
		}
	default:
		g.write(r.Offset, g.rng.Uint32())
	}
}
