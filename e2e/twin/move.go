package twin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// spinClock waits by giving way: the model is never far behind, and a timer
// would take longer than it.
type spinClock struct{}

func (spinClock) Now() time.Time { return time.Now() }

func (spinClock) After(time.Duration) <-chan time.Time {
	runtime.Gosched()
	now := make(chan time.Time)
	close(now)
	return now
}

func engineFor(s *silicon, f family.Family) *compsc.VF {
	e := compsc.New(f, s.backend(), compsc.Options{
		VendorID: ixgbevf.VendorID, DeviceID: s.cfg.DeviceID,
		Clock: spinClock{}, Logger: slog.New(slog.DiscardHandler),
		// The model needs far less, but has to get the processor.
		DrainTimeout: 500 * time.Millisecond,
		// Nothing here takes long; these are for a machine that is busy. Where
		// a head cannot be advanced, only the first one tells.
		QueueTimeout: 300 * time.Millisecond, MailboxTimeout: settleLimit, ResetTimeout: settleLimit,
		Memory: &s.socket, Scratch: &s.socket,
	})
	s.engine.Store(e)
	return e
}

// Loss is something left out of every move, to show that it is missed.
type Loss struct {
	// Name of what is lost.
	Name string
	// State takes it out of a state; nil for nothing.
	State func(*compsc.State)
	// Message drops the operation of that name from the replay; "" for none.
	Message string
	// Unread are registers that the guest then reads the same on both twins: a
	// loss that shows in them must show in what the device does as well.
	Unread []uint32
}

// forgetful is a family whose replay lacks an operation.
type forgetful struct {
	family.Family
	message string
}

func (f forgetful) RestoreLog(b []byte) (family.Log, error) {
	l, err := f.Family.RestoreLog(b)
	return forgetfulLog{l, f.message}, err
}

type forgetfulLog struct {
	family.Log
	message string
}

func (l forgetfulLog) Replay() []family.Message {
	return slices.DeleteFunc(l.Log.Replay(), func(m family.Message) bool { return m.Name == l.message })
}

// mover moves the second twin of a guest.
type mover struct {
	ctx   context.Context
	rng   *rand.Rand
	guest *guest
	fleet *fleet
	lose  *Loss
	// spare are VFs that others have used.
	spare  []*silicon
	all    []*silicon
	report Report
	// want is why the move must be refused, "" for a target that is like the
	// others.
	want string
	// event is what a PF is going to do once this move has come to a stage.
	event func()
	stage int
	// inFlight tells that the device is at work: see maybeInFlight.
	inFlight bool
}

// maybe moves the twin now and then.
func (m *mover) maybe() {
	if chance(m.rng, 1, 60) {
		m.account()
		m.move()
	}
}

// account compares what would be another after a move. A relay may have the
// rest of what the guest has handed over still before it.
func (m *mover) account() {
	if m.guest.relayed() {
		m.guest.catchUp()
	}
	m.guest.compareWire()
	m.guest.compareInterrupts()
}

// maybeInFlight moves the twin while its device has something on its way out,
// or its PF a request. How far that has come is the one thing that no seed
// decides.
func (m *mover) maybeInFlight() {
	if chance(m.rng, 1, 20) {
		m.inFlight = true
		m.move()
		m.inFlight = false
	}
}

// Stages of a move at which a PF may do something.
const (
	stageRunning  = iota // the guest still runs
	stageQuiesced        // the VF is quiesced
	stageRestored        // the other VF has its state
	stages
)

// aroundEvent makes something happen to both twins, often while one moves.
func (m *mover) aroundEvent(event func()) {
	if chance(m.rng, 1, 2) {
		event()
		return
	}
	m.event, m.stage = event, m.rng.IntN(stages)
	m.account()
	m.move()
	if m.event != nil { // the move has not come that far
		m.reach(m.stage)
	}
}

// reach has happen what happens at a stage.
func (m *mover) reach(stage int) {
	if m.event != nil && m.stage == stage {
		m.guest.log.add("== event")
		m.event()
		m.event = nil
	}
}

// newTwin puts a twin on a VF that was built.
func (m *mover) newTwin() *twin {
	s, err := m.fleet.build(m.rng, fmt.Sprintf("VF %d", len(m.all)))
	if err != nil {
		fail("a VF cannot be provisioned: %v", err)
	}
	m.all = append(m.all, s)
	return &twin{vf: s, host: s.socket.get(), engine: engineFor(s, m.fleet.family)}
}

// target finds a VF to move to: one just made, one whose tenant has left, or
// one that the guest has left before.
func (m *mover) target() *silicon {
	if len(m.spare) > 0 && chance(m.rng, 2, 3) {
		i := m.rng.IntN(len(m.spare))
		s := m.spare[i]
		m.spare = slices.Delete(m.spare, i, i+1)
		return s
	}
	t := m.newTwin()
	if chance(m.rng, 1, 2) {
		tenant := newGuest(m.rng, m.fleet, t)
		tenant.bringUp()
		for range 20 {
			tenant.operate()
		}
		m.release(t)
		m.spare = m.spare[:len(m.spare)-1]
	}
	return t.vf
}

// poorTarget makes a VF that must refuse the guest, nil if there is none.
func (m *mover) poorTarget(b *twin) *silicon {
	s, reason, err := m.fleet.buildPoor(m.rng, b.vf.Stats().PF, m.guest.told)
	if err != nil {
		fail("a VF cannot be provisioned: %v", err)
	}
	if s != nil {
		m.all = append(m.all, s)
		m.want = reason
	}
	return s
}

// release is what the device's process does with a VF that its tenant leaves.
func (m *mover) release(t *twin) {
	if err := t.engine.Scrub(m.ctx); err != nil {
		fail("scrub of %s: %v", t.vf.name, err)
	}
	t.vf.socket.plug(newHost(m.fleet.memorySize))
	if err := t.vf.provision(); err != nil {
		fail("provisioning of %s: %v", t.vf.name, err)
	}
	m.spare = append(m.spare, t.vf)
}

// move makes a whole migration, or as much of it as comes about.
func (m *mover) move() {
	g := m.guest
	b := g.twins[1]
	m.want = ""
	var target *silicon
	associated := b.vf.Stats().PF.Associations > 0
	switch {
	case associated:
		m.want = compsc.ReasonNotMigratable // no PF can be made to choose the same handles
	case chance(m.rng, 1, 8):
		target = m.poorTarget(b)
	}
	if target == nil {
		target = m.target()
	}
	name := target.name
	moved, causes := m.migrate(target)
	if !moved && (m.want == "" || associated) {
		m.spare = append(m.spare, target)
	}
	if moved && m.want != "" {
		fail("moved to %s in spite of %s", name, m.want)
	}
	kick := chance(m.rng, 1, 2)
	if kick {
		g.twins[1].engine.Kick()
	}
	g.twins[1].settle()
	g.log.add("== to %s: moved %v, causes %#x, kick %v", name, moved, causes, kick)
	g.handleInterrupts(causes)
}

// migrate reports whether the twin is on the target now. If not, it goes on
// where it was.
func (m *mover) migrate(target *silicon) (moved bool, causes uint32) {
	g, b := m.guest, m.guest.twins[1]
	var f family.Family = m.fleet.familyOf(target.cfg)
	if m.lose != nil && m.lose.Message != "" {
		f = forgetful{f, m.lose.Message}
	}
	engine := engineFor(target, f)
	caps, err := engine.Probe(m.ctx)
	if err != nil {
		fail("probe of %s: %v", target.name, err)
	}
	if chance(m.rng, 1, 2) {
		if err := compsc.CheckSummary(f, b.engine.Summary(), b.engine.HeadsInUse(), caps); err != nil {
			m.refused(err, target, false)
			return false, 0
		}
	}
	m.reach(stageRunning)
	if err := b.engine.Quiesce(m.ctx); err != nil {
		m.notQuiesced(err)
		return false, ixgbevf.VectorMask
	}
	g.log.add("== quiesced")
	had := g.twins[0].vf.Stats().Interrupts
	m.reach(stageQuiesced)
	g.allIntervalsEnd()
	m.late(had != g.twins[0].vf.Stats().Interrupts)
	state := m.capture(b, target)
	if state == nil || chance(m.rng, 1, 5) {
		m.report.Vetoes++
		return m.undo(b, ixgbevf.VectorMask)
	}
	if m.lose != nil && m.lose.State != nil {
		m.lose.State(state)
	}
	if err := engine.Check(state, caps); err != nil {
		m.refused(err, target, true)
		return m.undo(b, state.Causes)
	}
	home := newHost(m.fleet.memorySize)
	copy(home.memory, b.host.memory)
	home.frames = b.host.takeFrames()
	target.socket.plug(home)
	next := &twin{engine: engine, vf: target, host: home, seen: target.Stats().Interrupts}
	if chance(m.rng, 1, 4) {
		target.pingAfter = 1 + m.rng.IntN(8)
	}
	how, err := engine.Restore(m.ctx, state)
	target.pingAfter = 0
	if err != nil {
		m.refused(err, target, true)
		b.host.frames = home.takeFrames()
		target.socket.plug(newHost(m.fleet.memorySize))
		return m.undo(b, state.Causes)
	}
	for n, had := range b.interrupts() {
		next.seen[n] -= had // not accounted for yet
	}
	old := *b
	*b = *next
	m.release(&old)
	m.reach(stageRestored)
	m.report.Moves++
	m.met(how)
	return true, state.Causes
}

// met counts what a move had to do with.
func (m *mover) met(how compsc.RestoreReport) {
	for way := range strings.SplitSeq(how.HeadsStrategy, ",") {
		m.report.Met["heads "+way]++
	}
	pf, f := m.guest.twins[0].vf.Stats().PF, m.fleet
	if pf.ClearToSend {
		m.report.Met[fmt.Sprintf("API code %d", pf.API)]++
	}
	m.report.Met[f.member.Name]++
	m.report.Met[fmt.Sprintf("queue pairs %d", f.cfg.QueuePairs)]++
	for _, r := range append(slices.Clone(m.guest.rx), m.guest.tx...) {
		if r.size == longRing {
			m.report.Met["longest ring"]++
			break
		}
	}
	if f.unplugged {
		m.report.Met["link down"]++
	}
}

// capture takes the state through its encoding; nil if it cannot be had.
func (m *mover) capture(b *twin, target *silicon) *compsc.State {
	state, err := b.engine.Capture(m.ctx)
	if err != nil {
		m.refused(err, target, true)
		return nil
	}
	encoded, err := state.Encode()
	if err != nil {
		fail("encode: %v", err)
	}
	if state, err = compsc.Decode(encoded); err != nil {
		fail("decode: %v", err)
	}
	if again, err := state.Encode(); err != nil || !bytes.Equal(again, encoded) {
		fail("a state decoded and encoded again is another (%v)", err)
	}
	m.report.LargestState = max(m.report.LargestState, len(encoded))
	return state
}

func (m *mover) undo(b *twin, causes uint32) (bool, uint32) {
	if err := b.engine.Unquiesce(m.ctx); err != nil {
		fail("unquiesce: %v", err)
	}
	return false, causes
}

// late makes accesses that were on their way when the guest was stopped: the
// twin that moves gets them when it is quiesced.
// None is about interrupts if the twin that stayed had one meanwhile: the
// other will have it once it goes on.
func (m *mover) late(interrupted bool) {
	g, r := m.guest, m.rng
	for q := range g.rx {
		for _, off := range []uint32{ixgbevf.VFRXDCTL(q), ixgbevf.VFRDH(q), ixgbevf.VFRDT(q), ixgbevf.VFTDT(q), ixgbevf.VFTDH(q)} {
			g.agree(off)
		}
	}
	if m.inFlight || interrupted {
		return // an interrupt may come before an access on one twin and after it on the other
	}
	g.agree(ixgbevf.VTEIMS)
	if !chance(r, 1, 3) {
		return
	}
	off := pick[uint32](r, ixgbevf.VTEIMS, ixgbevf.VTEIMC, ixgbevf.VTEICS, ixgbevf.VTEITR(1), ixgbevf.VTIVARMisc)
	value := uint32(r.IntN(ixgbevf.VectorMask + 1))
	g.log.add("late write %s = %#x", g.name(off), value)
	for _, t := range g.twins {
		t.engine.GuestWrite(off, value)
	}
}

// handleInterrupts is the guest's handler after a move. An interrupt that the
// twin that stayed has had, or has pending, must be there on the other; one
// more is allowed on a vector that is in use. Such a one is handled by both,
// so that nothing remains of it: causes are read, which clears them, and what
// was masked with the interrupt is unmasked.
func (g *guest) handleInterrupts(causes uint32) {
	g.allIntervalsEnd()
	a, b := g.twins[0], g.twins[1]
	hadA, hadB := a.interrupts(), b.interrupts()
	var lost, more uint32
	for n := range hadA {
		if hadA[n] > 0 && hadB[n] == 0 {
			lost |= 1 << n
		}
		if hadA[n] != hadB[n] {
			more |= 1 << n
		}
	}
	used := causes
	for _, off := range []uint32{ixgbevf.VTIVAR(0), ixgbevf.VTIVAR(1), ixgbevf.VTIVAR(2), ixgbevf.VTIVAR(3), ixgbevf.VTIVARMisc} {
		for v := a.engine.GuestRead(off); v != 0; v >>= 8 {
			if v&ixgbevf.IVARValid != 0 {
				used |= 1 << (v & ixgbevf.IVARVector)
			}
		}
	}
	if lost != 0 {
		fail("interrupts lost in the move: vectors %#x, had %v and %v", lost, hadA, hadB)
	}
	if more&^used != 0 {
		fail("interrupts on vectors %#x that nothing uses, had %v and %v", more&^used, hadA, hadB)
	}
	pendingA, pendingB := a.engine.GuestRead(ixgbevf.VTEICR), b.engine.GuestRead(ixgbevf.VTEICR)
	if gone := pendingA &^ pendingB &^ more; gone != 0 {
		fail("causes lost in the move: %#x, pending %#x and %#x", gone, pendingA, pendingB)
	}
	if extra := pendingB &^ pendingA &^ used; extra != 0 {
		fail("causes %#x that nothing uses are pending", extra)
	}
	maskA, maskB := a.engine.GuestRead(ixgbevf.VTEIMS), b.engine.GuestRead(ixgbevf.VTEIMS)
	masked := maskA &^ maskB
	if maskB&^maskA != 0 || masked&^(more&a.engine.GuestRead(ixgbevf.VTEIAM)) != 0 {
		fail("VTEIMS reads %#x on the twin that stayed and %#x on the one that moved", maskA, maskB)
	}
	for _, t := range g.twins {
		if more == 0 && pendingA == pendingB {
			// Nothing of the move is left: the causes are put back, to be
			// found later. None of them is unmasked, or it would be an
			// interrupt now.
			t.engine.GuestWrite(ixgbevf.VTEICS, pendingA&^maskA)
		} else {
			t.engine.GuestWrite(ixgbevf.VTEIMS, masked)
		}
		t.interrupts()
	}
}

// refused tells whether there was a reason to refuse a move, and fails if
// there was none.
func (m *mover) refused(err error, target *silicon, captured bool) {
	var why *compsc.IncompatibleError
	if !errors.As(err, &why) {
		fail("a move ended with %v", err)
	}
	m.guest.log.add("== refused: %v", err)
	m.report.Refusals++
	ok := false
	switch why.Reason {
	case m.want, compsc.ReasonMailboxRefused:
		ok = m.want != "" || why.Reason == compsc.ReasonMailboxRefused && m.trustWasTaken()
	case compsc.ReasonHeadNotRestorable:
		ok = m.headsRefusable(target, captured)
	case compsc.ReasonStateInvalid:
		ok = m.ringOutOfBounds()
	case compsc.ReasonNotMigratable:
		// A request that was open may have ended in an association.
		ok = captured && m.guest.twins[0].vf.Stats().PF.Associations > 0
	}
	if !ok {
		fail("a move to %s was refused without need: %v", target.name, err)
	}
}

// trustWasTaken tells whether a PF of now refuses what the guest's has granted:
// since it heeds the guest no longer, which has not noticed, or since it
// remembers what it has granted a VF that was trusted.
func (m *mover) trustWasTaken() bool {
	pf, f := m.guest.twins[0].vf.Stats().PF, m.fleet
	taken := f.trustTaken && !f.trusted && (pf.XcastMode > ixgbevf.XcastMulti || f.cfg.AdminMAC != nil)
	return m.guest.revoked || taken
}

// notQuiesced fails unless the guest was told of a part of a packet that the
// device has: that part cannot be had again.
func (m *mover) notQuiesced(err error) {
	var why *compsc.IncompatibleError
	told := slices.ContainsFunc(m.guest.tx, func(r ring) bool { return r.part && r.told })
	if !told || !errors.As(err, &why) || why.Reason != compsc.ReasonHeadNotRestorable {
		fail("quiesce: %v", err)
	}
	m.guest.log.add("== not quiesced: %v", err)
	m.report.Parts++
}

// headsRefusable tells whether a ring stands where the target cannot be
// brought to.
func (m *mover) headsRefusable(target *silicon, captured bool) bool {
	vf, pf := m.guest.twins[0].vf, m.guest.twins[0].vf.Stats().PF
	// Frames are looped untagged to the guest's address, and to everybody's
	// when the VF is probed: both must pass the PF's filters.
	silent := m.fleet.cfg.PFMaxFrame > 1514 && m.fleet.cfg.DeviceID == ixgbevf.DeviceID
	walkRX := target.loops && m.fleet.portVLAN == 0 && !silent && pf.ReceiveEnabled && pf.MAC != nil
	walkTX := pf.TransmitEnabled
	for q := range target.cfg.QueuePairs {
		rx := vf.Read(ixgbevf.VFRXDCTL(q))&ixgbevf.QueueEnable != 0 && (!captured || vf.Read(ixgbevf.VFRDH(q)) != 0)
		tx := vf.Read(ixgbevf.VFTXDCTL(q))&ixgbevf.QueueEnable != 0 && (!captured || vf.Read(ixgbevf.VFTDH(q)) != 0)
		if rx && !target.cfg.WritableRXHead && !walkRX || tx && !target.cfg.WritableTXHead && !walkTX {
			return true
		}
		// Before the capture it is not known which rings have moved.
		if !captured && (rx || tx) && !target.cfg.WritableRXHead && !walkRX {
			return true
		}
	}
	return false
}

// ringOutOfBounds tells whether a ring is on whose position is outside of it,
// which no driver's is.
func (m *mover) ringOutOfBounds() bool {
	vf := m.guest.twins[0].vf
	for _, q := range m.fleet.family.Queues() {
		size := vf.Read(q.LEN) / descriptorSize
		if vf.Read(q.Ctl)&q.Enable != 0 && (vf.Read(q.Head) >= size || vf.Read(q.Tail) > size) {
			return true
		}
	}
	return false
}
