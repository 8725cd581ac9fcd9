package twin

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// twin is one of the two: an engine in front of a VF in front of a host.
type twin struct {
	engine *compsc.VF
	vf     *silicon
	host   *host
	// seen are the VF's interrupts already accounted for.
	seen [ixgbevf.MSIXVectors]uint64
}

// guest is a driver that does the same on all of its twins. There are two, or
// one if it merely leaves something behind for another.
type guest struct {
	rng   *rand.Rand
	twins []*twin
	fleet *fleet
	regs  []family.Register
	names map[uint32]string
	log   tape
	// before runs before every access: that is where a twin moves.
	before func()
	// during runs between an access that has the device work on and the end of
	// that work.
	during func()
	// around makes what a PF does happen, maybe while a twin moves.
	around func(event func())
	sweeps int
	// hurry leaves out moves.
	hurry bool
	// relayLimit bounds how long the guest waits for a relay.
	relayLimit time.Duration
	// unread are registers that are not compared.
	unread []uint32

	driver
}

// failure ends a run. It is thrown with panic, so that a driver's operations
// need not check every access, and caught in Run.
type failure struct{ text string }

func fail(format string, args ...any) { panic(failure{fmt.Sprintf(format, args...)}) }

// tape keeps the last entries of a log.
type tape struct {
	entries []string
	dropped int
}

const tapeLength = 400

func (t *tape) add(format string, args ...any) {
	if len(t.entries) == 2*tapeLength {
		t.dropped += tapeLength
		t.entries = slices.Delete(t.entries, 0, tapeLength)
	}
	t.entries = append(t.entries, fmt.Sprintf(format, args...))
}

func (t *tape) tail(n int) string {
	from := max(0, len(t.entries)-n)
	var b strings.Builder
	for i, e := range t.entries[from:] {
		fmt.Fprintf(&b, "  %5d %s\n", t.dropped+from+i, e)
	}
	return b.String()
}

func newGuest(r *rand.Rand, f *fleet, twins ...*twin) *guest {
	g := &guest{rng: r, fleet: f, twins: twins, names: map[uint32]string{}, relayLimit: relayLimit}
	g.regs = f.family.Registers()
	for _, reg := range g.regs {
		g.names[reg.Offset] = reg.Name
	}
	g.driver.init(f.cfg.QueuePairs)
	return g
}

func (g *guest) name(off uint32) string {
	if n, ok := g.names[off]; ok {
		return n
	}
	return fmt.Sprintf("%#x", off)
}

func (g *guest) step() {
	if g.before != nil && !g.hurry {
		g.before()
	}
}

// write writes a register.
func (g *guest) write(off, value uint32) {
	g.step()
	g.log.add("write %s = %#x", g.name(off), value)
	g.forgetContexts(off, value)
	request := off == ixgbevf.VFMAILBOX && value&ixgbevf.MailboxREQ != 0
	var asked []pending
	for _, t := range g.twins {
		asked = append(asked, pending{t.vf, t.vf.Stats().Messages})
		t.engine.GuestWrite(off, value)
	}
	if g.during != nil && (request || g.isTail(off)) {
		g.twins[0].settle()
		g.during()
	}
	for i, t := range g.twins {
		if request {
			asked[i].await(t)
		}
		t.settle()
	}
}

// isTail tells whether a register is the doorbell of a transmit queue.
func (g *guest) isTail(off uint32) bool {
	for q := range g.tx {
		if off == ixgbevf.VFTDT(q) {
			return true
		}
	}
	return false
}

// pending is a request to the PF behind a VF that had so many before.
type pending struct {
	vf       *silicon
	messages uint64
}

// await waits until the PF has answered. If the twin has moved since, it has:
// no VF is captured before.
func (p pending) await(t *twin) {
	for end := time.Now().Add(settleLimit); t.vf == p.vf && t.vf.Stats().Messages == p.messages; runtime.Gosched() {
		if time.Now().After(end) {
			fail("the PF of %s has not answered after %v", t.vf.name, settleLimit)
		}
	}
}

// read reads a register; the twins must agree.
func (g *guest) read(off uint32) uint32 {
	g.step()
	if g.relayed() {
		g.catchUp()
		if off == ixgbevf.VTEICR || off == ixgbevf.VTEIMS {
			g.handleInterrupts(ixgbevf.VectorMask)
		}
	}
	return g.agree(off)
}

// agree reads a register of all twins.
func (g *guest) agree(off uint32) uint32 {
	value := g.twins[0].engine.GuestRead(off)
	g.log.add("read %s: %#x", g.name(off), value)
	if q := g.partAt(off); q >= 0 {
		g.tx[q].told = true
	}
	for _, t := range g.twins[1:] {
		if other := t.engine.GuestRead(off); other != value && !g.idleHead(off) && !g.relayRaised(off, value, other) && !slices.Contains(g.unread, off) {
			fail("%s reads %#x on the twin that stayed and %#x on the one that moved", g.name(off), value, other)
		}
	}
	return value
}

// relayed tells that the engine of the twin that moves may be relaying rings,
// since not all heads of its VF can be written. What the device does reaches
// the guest a little later then, with interrupts of the engine's own among the
// device's.
func (g *guest) relayed() bool {
	if len(g.twins) < 2 {
		return false
	}
	cfg := g.twins[1].vf.cfg
	return !cfg.WritableRXHead || !cfg.WritableTXHead
}

// relayRaised tells whether a register may differ because a relay has just
// raised an interrupt, which it does when it gets the processor: a cause more,
// or a vector that was masked with it. What is none of its is found when the
// interrupts are compared next.
func (g *guest) relayRaised(off, stayed, moved uint32) bool {
	return g.relayed() && (off == ixgbevf.VTEICR && stayed&^moved == 0 || off == ixgbevf.VTEIMS && moved&^stayed == 0)
}

// relayLimit bounds how long a relay may take to bring the guest what it
// waits for, relayLimitLost the same where something is left out, so that the
// twins are soon found to differ.
const relayLimit, relayLimitLost = 5 * time.Second, time.Second

// catchUp waits until relays have brought the guest what the device did. What
// is still different after that shows in the comparison. Frames that are being
// put together would differ: a relay may end and with it they, and it shows
// the guest nothing of them before they are whole.
func (g *guest) catchUp() {
	a, b := g.twins[0], g.twins[1]
	if a.vf.Stats().RXHeld > 0 || b.vf.Stats().RXHeld > 0 {
		g.allIntervalsEnd()
	}
	for end := time.Now().Add(g.relayLimit); time.Now().Before(end); runtime.Gosched() {
		same := true
		for q := range g.rx {
			for _, off := range []uint32{ixgbevf.VFRDH(q), ixgbevf.VFTDH(q)} {
				same = same && (g.idleHead(off) || a.engine.GuestRead(off) == b.engine.GuestRead(off))
			}
		}
		if same && g.sameMemory() {
			return
		}
	}
}

// sameMemory is for while the engine may be writing.
func (g *guest) sameMemory() bool {
	b := g.twins[1].host
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Equal(g.twins[0].host.memory, b.memory)
}

// idleHead tells whether a register is the head of a queue that is off, on VFs
// whose heads may not take a value. Those may stay different, for a driver
// writes zero there, which they all take, before it turns the queue on. So may
// that of a queue with a part of a packet, which a relay keeps back.
func (g *guest) idleHead(off uint32) bool {
	if !g.fleet.headsVary {
		return false
	}
	if g.partAt(off) >= 0 {
		return true
	}
	vf := g.twins[0].vf
	for q := range g.rx {
		if off == ixgbevf.VFRDH(q) && vf.Read(ixgbevf.VFRXDCTL(q))&ixgbevf.QueueEnable == 0 ||
			off == ixgbevf.VFTDH(q) && vf.Read(ixgbevf.VFTXDCTL(q))&ixgbevf.QueueEnable == 0 {
			return true
		}
	}
	return false
}

// partAt is the queue of which the register is the head, if it has a part of a
// packet, and -1 otherwise.
func (g *guest) partAt(off uint32) int {
	for q, r := range g.tx {
		if r.part && off == ixgbevf.VFTDH(q) {
			return q
		}
	}
	return -1
}

// poke writes the guest's memory.
func (g *guest) poke(addr uint64, p []byte) {
	for _, t := range g.twins {
		t.host.mu.Lock()
		t.host.access(addr, p, func(memory, p []byte) int { return copy(memory, p) })
		t.host.mu.Unlock()
	}
}

// receive has a frame arrive from the network.
func (g *guest) receive(frame []byte) {
	g.step()
	if g.relayed() {
		g.catchUp()
		if !g.twins[1].roomFor(uint32(len(frame)/1024+1), false) {
			g.log.add("not while a relay lacks descriptors: receive %d bytes", len(frame))
			return
		}
	}
	g.arrive(frame)
}

func (g *guest) arrive(frame []byte) {
	g.log.add("receive %d bytes, headers % x", len(frame), frame[:min(len(frame), 18)])
	for _, t := range g.twins {
		t.vf.Receive(frame)
	}
}

// receiveBurst has frames arrive that may be coalesced, with moves between
// them as well, unless they go through a relay: that may end before the
// frames that are being put together do, where it lacks descriptors. Then they
// arrive one by one.
func (g *guest) receiveBurst(frames [][]byte) {
	if g.relayed() {
		g.step()
	}
	if !g.relayed() {
		for _, f := range frames {
			g.receive(f)
		}
		return
	}
	g.catchUp()
	need := uint32(relayFew)
	for _, f := range frames {
		need += uint32(len(f)/1024 + 1)
	}
	together := g.twins[1].roomFor(need, true)
	for _, f := range frames {
		switch {
		case together:
			g.arrive(f)
		case g.twins[1].roomFor(uint32(len(f)/1024+1), false):
			g.arrive(f)
			g.catchUp()
		}
	}
}

// relayFew is more than the number of descriptors with which a relay is near
// its end.
const relayFew = 16

// roomFor waits until the device behind a relay has so many descriptors, or
// has as many as the guest gave it, and tells whether it has enough: near the
// end of its shadow ring it has fewer, and what comes then is lost as on a
// wire. All that the guest gave are not enough if strict is set.
func (t *twin) roomFor(need uint32, strict bool) bool {
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); runtime.Gosched() {
		enough := true
		for q := range t.vf.cfg.QueuePairs {
			given := free(t.engine.GuestRead, q)
			has := free(t.vf.Read, q)
			enough = enough && (has >= need || has == given && (!strict || given == 0))
		}
		if enough {
			return true
		}
	}
	return false
}

// free counts the descriptors between head and tail of a receive queue.
func free(read func(uint32) uint32, q int) uint32 {
	size := read(ixgbevf.VFRDLEN(q)) / descriptorSize
	head, tail := read(ixgbevf.VFRDH(q)), read(ixgbevf.VFRDT(q))
	if read(ixgbevf.VFRXDCTL(q))&ixgbevf.QueueEnable == 0 || head >= size || tail >= size {
		return 0
	}
	return (tail + size - head) % size
}

// functionReset resets the function, as a monitor's reset of the device does.
func (g *guest) functionReset() {
	g.step()
	g.log.add("function level reset")
	g.forgetContexts(ixgbevf.VFCTRL, 0)
	for _, t := range g.twins {
		t.engine.FunctionReset(t.vf.FLR)
	}
}

// settleLimit bounds how long the model's transmit engine may take.
const settleLimit = 20 * time.Second

// settle waits until the VF has sent what it will send: the model does it in
// a goroutine of its own, and what comes next must find it the same in both
// twins.
func (t *twin) settle() {
	if !t.sending() {
		return
	}
	for end := time.Now().Add(settleLimit); t.sending(); runtime.Gosched() {
		if time.Now().After(end) {
			fail("%s has not finished its transmit rings after %v", t.vf.name, settleLimit)
		}
	}
}

// sending tells whether a transmit queue that may run has descriptors.
func (t *twin) sending() bool {
	for q := range t.vf.cfg.QueuePairs {
		head, tail := t.vf.Read(ixgbevf.VFTDH(q)), t.vf.Read(ixgbevf.VFTDT(q))
		size := t.vf.Read(ixgbevf.VFTDLEN(q)) / descriptorSize
		if head != tail && head < size && tail < size &&
			t.vf.Read(ixgbevf.VFTXDCTL(q))&ixgbevf.QueueEnable != 0 && t.vf.Stats().PF.TransmitEnabled {
			return true
		}
	}
	return false
}

// interrupts takes the interrupts since it was last called.
func (t *twin) interrupts() (n [ixgbevf.MSIXVectors]uint64) {
	now := t.vf.Stats().Interrupts
	for i := range n {
		n[i] = now[i] - t.seen[i]
	}
	t.seen = now
	return n
}

// compare looks at all that the guest can observe without an access that
// changes it.
func (g *guest) compare() {
	if g.relayed() {
		g.catchUp()
	}
	g.compareWire()
	if len(g.twins) < 2 {
		g.twins[0].interrupts()
		return
	}
	g.compareInterrupts()
	g.compareMemory()
	g.sweep()
}

// compareInterrupts wants the same interrupts on both twins, unless rings are
// relayed: an interrupt more is allowed then as after a move.
func (g *guest) compareInterrupts() {
	if g.relayed() {
		g.handleInterrupts(ixgbevf.VectorMask)
		return
	}
	a, b := g.twins[0].interrupts(), g.twins[1].interrupts()
	if a != b {
		fail("interrupts by vector: %v on the twin that stayed, %v on the one that moved", a, b)
	}
}

func (g *guest) compareWire() {
	first := g.twins[0].host.takeFrames()
	for _, t := range g.twins[1:] {
		frames := t.host.takeFrames()
		for i := range min(len(first), len(frames)) {
			if !bytes.Equal(first[i], frames[i]) {
				fail("frame %d of %d on the wire differs:\n   stayed % x\n   moved  % x", i, len(first), clip(first[i]), clip(frames[i]))
			}
		}
		if len(first) != len(frames) {
			fail("%d frames on the wire of the twin that stayed, %d of the one that moved", len(first), len(frames))
		}
	}
}

func clip(b []byte) []byte { return b[:min(len(b), 80)] }

func (h *host) takeFrames() [][]byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	frames := h.frames
	h.frames = nil
	return frames
}

func (g *guest) compareMemory() {
	if g.sameMemory() {
		return
	}
	a, b := g.twins[0].host.memory, g.twins[1].host.memory
	for i := range a {
		if a[i] != b[i] {
			i &^= 15
			fail("memory at %#x (%s) differs:\n   stayed % x\n   moved  % x", i, g.fleet.region(uint64(i)), a[i:i+16], b[i:i+16])
		}
	}
}

// sweep reads every register that a read does not change. Counters are left
// out most times: a read of a lower half latches the upper one.
func (g *guest) sweep() {
	g.sweeps++
	counters := g.sweeps%3 == 0
	for _, r := range g.regs {
		switch {
		case r.Access&family.Readable == 0, r.Access&family.ReadClears != 0, r.Offset == ixgbevf.VFFRTIMER,
			r.Class == family.Emulate && !counters, slices.Contains(g.unread, r.Offset),
			g.partAt(r.Offset) >= 0: // who reads it is told of the part
			continue
		}
		value := g.twins[0].engine.GuestRead(r.Offset)
		if other := g.twins[1].engine.GuestRead(r.Offset); other != value && !g.idleHead(r.Offset) && !g.relayRaised(r.Offset, value, other) {
			fail("%s reads %#x on the twin that stayed and %#x on the one that moved", r.Name, value, other)
		}
	}
}
