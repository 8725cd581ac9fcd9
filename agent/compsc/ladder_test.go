package compsc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// txBase is where boot puts transmit ring 0.
const txBase = 1<<32 + 0x10000

// Slots hold what the device consumed last, over any number of laps, and
// nothing that it has yet to consume.
func TestContextsAreFollowed(t *testing.T) {
	d := newFake()
	v := newMemoryVF(d)
	put := func(i int, slot int, mark byte) {
		if err := d.mem.WriteAt(txBase+16*uint64(i), contextDescriptor(slot, mark)); err != nil {
			t.Fatal(err)
		}
	}
	put(3, 0, 1)
	put(4, 0, 2) // the later one counts
	put(7, 1, 3)
	boot(t, v, d)
	want := [][]byte{contextDescriptor(0, 2), contextDescriptor(1, 3)}
	if diff := cmp.Diff(want, capture(t, v).Queues[2].Contexts); diff != "" {
		t.Errorf("after boot (-want +got):\n%s", diff)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	// Two laps of plain data: the ring has forgotten the contexts.
	clear(d.mem)
	for _, tail := range []uint32{200, 100, 90, 20} {
		v.GuestWrite(ixgbevf.VFTDT(0), tail)
	}
	if diff := cmp.Diff(want, capture(t, v).Queues[2].Contexts); diff != "" {
		t.Errorf("two laps later (-want +got):\n%s", diff)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	// What the device has not consumed fills no slot yet, and is there later.
	d.linkDown = true
	put(22, 1, 9)
	v.GuestWrite(ixgbevf.VFTDT(0), 30)
	if diff := cmp.Diff(want, capture(t, v).Queues[2].Contexts); diff != "" {
		t.Errorf("with descriptors pending (-want +got):\n%s", diff)
	}
	d.linkDown = false
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	want[1] = contextDescriptor(1, 9)
	if diff := cmp.Diff(want, capture(t, v).Queues[2].Contexts); diff != "" {
		t.Errorf("once they are consumed (-want +got):\n%s", diff)
	}
}

// The slots outlive a queue that is turned off and on with another ring, and
// a reset, as they do in the device.
func TestContextsOutliveTheQueue(t *testing.T) {
	d := newFake()
	v := newMemoryVF(d)
	_ = d.mem.WriteAt(txBase+16*3, contextDescriptor(1, 5))
	boot(t, v, d)
	clear(d.mem)
	v.GuestWrite(ixgbevf.VFTXDCTL(0), 0)
	v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	v.GuestRead(ixgbevf.VFMAILBOX)
	v.GuestWrite(ixgbevf.VFTDBAL(0), 0x80000)
	v.GuestWrite(ixgbevf.VFTDH(0), 0)
	v.GuestWrite(ixgbevf.VFTDT(0), 0)
	v.GuestWrite(ixgbevf.VFTXDCTL(0), ixgbevf.QueueEnable)
	_ = d.mem.WriteAt(1<<32+0x80000, contextDescriptor(0, 6))
	v.GuestWrite(ixgbevf.VFTDT(0), 2)
	want := [][]byte{contextDescriptor(0, 6), contextDescriptor(1, 5)}
	if diff := cmp.Diff(want, capture(t, v).Queues[2].Contexts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// The slots of a queue that is off, its ring gone, move as well: they are
// there when it is turned on.
func TestContextsOfQueueThatIsOffMove(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, w := newMemoryVF(source), newMemoryVF(target)
	_ = source.mem.WriteAt(txBase+16*3, contextDescriptor(1, 5))
	boot(t, v, source)
	v.GuestWrite(ixgbevf.VFTXDCTL(0), 0)
	v.GuestWrite(ixgbevf.VFTDLEN(0), 0)
	if _, err := w.Restore(context.Background(), capture(t, v)); err != nil {
		t.Fatal(err)
	}
	if got := target.contexts[0x2000][1]; got != string(contextDescriptor(1, 5)) {
		t.Errorf("the device has context %x", got)
	}
	if target.regs[ixgbevf.VFTDLEN(0)] != 0 || target.regs[ixgbevf.VFTXDCTL(0)]&ixgbevf.QueueEnable != 0 || target.regs[ixgbevf.VFTDH(0)] != 20 {
		t.Errorf("length %d, control %#x, head %d, want it off as it was",
			target.regs[ixgbevf.VFTDLEN(0)], target.regs[ixgbevf.VFTXDCTL(0)], target.regs[ixgbevf.VFTDH(0)])
	}
}

// While the guest is within a reset the PF lets no VF send, also where there is
// something to replay: the slots are not waited for.
func TestContextsWithinAReset(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, w := newMemoryVF(source), newMemoryVF(target)
	_ = source.mem.WriteAt(txBase+16*3, contextDescriptor(1, 5))
	boot(t, v, source)
	v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	v.GuestRead(ixgbevf.VFMAILBOX)
	s := capture(t, v)
	if len(s.Queues[2].Contexts) == 0 {
		t.Fatal("the state has no contexts")
	}
	target.writes = nil
	report, err := w.Restore(context.Background(), s)
	if err != nil || report.ReplayedOperations == 0 {
		t.Fatalf("replayed %d operations: %v", report.ReplayedOperations, err)
	}
	lengths := slices.DeleteFunc(target.writes, func(off uint32) bool { return off != ixgbevf.VFTDLEN(0) })
	if len(lengths) != 1 {
		t.Errorf("the length of the ring was written %d times, want once: another ring was put there to load contexts", len(lengths))
	}
}

// dataDescriptor is the only one of its packet, and takes a tag from a slot.
func dataDescriptor(slot int) []byte {
	return []byte{1, 0, 0, 0, 0, 0, 0, 0, 60, 0, 3 << 4, 1<<6 | 1<<5 | 1, byte(slot << 4), 0, 0, 0}
}

// A driver that sends several packets with one context has damaged ones sent
// where that is not loaded: it is not moved there. One that fills the slot for
// each packet is.
func TestContextsThatAreReliedOn(t *testing.T) {
	ctx := context.Background()
	for _, tc := range []struct {
		name        string
		descriptors [][]byte
		relied      uint32
		pending     [][]byte
	}{
		{"filled for each packet", [][]byte{contextDescriptor(1, 1), dataDescriptor(1), contextDescriptor(1, 1), dataDescriptor(1)}, 0, nil},
		{"used twice", [][]byte{contextDescriptor(1, 1), dataDescriptor(1), dataDescriptor(1)}, 2, nil},
		{"filled for the next packet", [][]byte{dataDescriptor(1), contextDescriptor(0, 1)}, 1, nil},
		{"used by two queues' worth of slots", [][]byte{contextDescriptor(0, 1), contextDescriptor(1, 2), dataDescriptor(0), dataDescriptor(1), dataDescriptor(0)}, 1, nil},
		{"used by what is pending", [][]byte{contextDescriptor(1, 1), dataDescriptor(1)}, 2, [][]byte{dataDescriptor(1), contextDescriptor(1, 2)}},
		{"filled by what is pending", [][]byte{contextDescriptor(1, 1), dataDescriptor(1), dataDescriptor(1)}, 0, [][]byte{contextDescriptor(1, 2), dataDescriptor(1)}},
	} {
		source, target := newFake(), usedTarget()
		v, w := newMemoryVF(source), newMemoryVF(target)
		for i, d := range tc.descriptors {
			_ = source.mem.WriteAt(txBase+16*uint64(20-len(tc.descriptors)+i), d)
		}
		boot(t, v, source)
		source.linkDown = true
		for i, d := range tc.pending {
			_ = source.mem.WriteAt(txBase+16*uint64(20+i), d)
		}
		v.GuestWrite(ixgbevf.VFTDT(0), uint32(20+len(tc.pending)))
		s := capture(t, v)
		if got := s.Queues[2].Relied; got != tc.relied {
			t.Errorf("%s: slots %#b are relied on, want %#b", tc.name, got, tc.relied)
		}
		caps, err := w.Probe(ctx)
		if err != nil {
			t.Fatal(err)
		}
		w.o.Scratch = nil
		for what, err := range map[string]error{
			"check":   w.Check(s, caps),
			"restore": func() error { _, err := w.Restore(ctx, s); return err }(),
		} {
			var why *IncompatibleError
			if errors.As(err, &why); (why != nil && why.Reason == ReasonContextNotRestorable) != (tc.relied != 0) || err != nil && why == nil {
				t.Errorf("%s: %s without scratch memory: %v", tc.name, what, err)
			}
		}
		w.o.Scratch = fakeScratch{target.mem}
		if _, err := w.Restore(ctx, s); err != nil {
			t.Fatal(err)
		}
		if got := capture(t, w).Queues[2].Relied; got != tc.relied && tc.pending == nil {
			t.Errorf("%s: one move later slots %#b are relied on, want %#b", tc.name, got, tc.relied)
		}
		if err := w.Unquiesce(ctx); err != nil {
			t.Fatal(err)
		}
		w.GuestWrite(ixgbevf.VFTXDCTL(0), 0)
		if got := capture(t, w).Queues[2].Relied; got != 0 {
			t.Errorf("%s: slots %#b of a queue that is off are relied on", tc.name, got)
		}
	}
}

// A later hop captures what an earlier one restored, although the guest has
// not sent anything since.
func TestContextsTravelOn(t *testing.T) {
	d := newFake()
	v := newMemoryVF(d)
	_ = d.mem.WriteAt(txBase+16*3, contextDescriptor(1, 5))
	boot(t, v, d)
	s := capture(t, v)
	for hop := range 3 {
		next := usedTarget()
		v = newMemoryVF(next)
		if _, err := v.Restore(context.Background(), s); err != nil {
			t.Fatal(err)
		}
		if got := next.contexts[0x2000][1]; got != string(contextDescriptor(1, 5)) {
			t.Fatalf("hop %d: the device has context %x", hop, got)
		}
		s = capture(t, v)
	}
}

// forgetful devices take heads but lose them when the queue stops: what the
// ring shows tells where it was.
func TestHeadOfForgetfulDevice(t *testing.T) {
	d := newFake()
	d.headsLostOff = true
	v := newMemoryVF(d)
	boot(t, v, d)
	d.onOff = func(base uint32) {
		if base != 0x1000 {
			return
		}
		// Two more frames while the queue is being turned off.
		ring := uint64(d.regs[base+4])<<32 | uint64(d.regs[base])
		for range 2 {
			_ = d.mem.WriteAt(ring+16*uint64(d.regs[base+0x10]), bytes.Repeat([]byte{1}, 16))
			d.regs[base+0x10]++
		}
	}
	s := capture(t, v)
	if s.Queues[0].Head != 12 || s.Queues[2].Head != 20 {
		t.Errorf("captured heads %d and %d, want 12 and 20", s.Queues[0].Head, s.Queues[2].Head)
	}
	if got := v.GuestRead(ixgbevf.VFRDH(0)); got != 12 {
		t.Errorf("the guest reads head %d, want 12", got)
	}
	d.onOff = nil
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if rx, tx := d.regs[ixgbevf.VFRDH(0)], d.regs[ixgbevf.VFTDH(0)]; rx != 12 || tx != 20 {
		t.Errorf("after a veto the heads are %d and %d, want 12 and 20", rx, tx)
	}
}

// loopingVF is a device whose PF loops frames.
type loopingVF struct{ *fakeVF }

func (d loopingVF) Loop([]byte) error {
	d.receive(1)
	d.Write(ixgbevf.VTEICS, 1)
	return nil
}

// A device that takes no head advances it itself, and everything else is as
// if it had taken it.
func TestDummyAdvance(t *testing.T) {
	ctx := context.Background()
	source := newFake()
	v := newMemoryVF(source)
	_ = source.mem.WriteAt(txBase+16*3, contextDescriptor(1, 5))
	boot(t, v, source)
	v.GuestWrite(ixgbevf.VFRXDCTL(1), 0) // queue 1 cannot be looped to by the fake
	s := capture(t, v)
	s.Queues[1].Head = 0
	if err := v.Unquiesce(ctx); err != nil {
		t.Fatal(err)
	}
	before := guestView(v)

	target := newFake()
	target.fixedHeads = true
	w := newMemoryVF(target)
	w.b = loopingVF{target}
	caps, err := w.Probe(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if caps.WritableRXHeads || caps.WritableTXHeads || caps.RXHeads != HeadsDummyAdvance || caps.TXHeads != HeadsDummyAdvance {
		t.Fatalf("capabilities %+v, want dummy advance for both directions", caps)
	}
	if err := w.Check(s, caps); err != nil {
		t.Fatal(err)
	}
	report, err := w.Restore(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	if report.HeadsStrategy != HeadsDummyAdvance {
		t.Errorf("strategy %q, want %q", report.HeadsStrategy, HeadsDummyAdvance)
	}
	// Slots that the guest never filled have the idle context.
	for base, slots := range target.contexts {
		if slots[0] == string(v.f.Descriptors().IdleContext()) {
			target.contexts[base] = [2]string{"", slots[1]}
		}
	}
	delete(target.contexts, 0x2040)
	if diff := differences(t, source, target, before, guestView(w)); diff != "" {
		t.Errorf("the target differs (-source +target):\n%s", diff)
	}
	if cause := target.regs[ixgbevf.VTEICR]; cause != source.regs[ixgbevf.VTEICR] {
		t.Errorf("causes %#x", cause)
	}
}

// Frames that are looped to bring one ring's head back after a veto reach no
// other ring of the guest, and no counter.
func TestVetoLoopsNoFrameToTheGuest(t *testing.T) {
	d := newFake()
	v := newMemoryVF(d)
	boot(t, v, d)
	d.regs[ixgbevf.VFRDH(1)] = 20 // frames came there too
	d.zeroHeads, d.headsLostOff = true, true
	v.b = loopingVF{d}
	v.o.RelayPoll = time.Hour
	before := guestView(v)
	if err := v.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	v.heads[ixgbevf.VFRDH(1)] = 20
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, guestView(v)); diff != "" {
		t.Errorf("the guest sees another VF (-before +after):\n%s", diff)
	}
}

func TestNoFrameIsLoopedPastAQueueThatRuns(t *testing.T) {
	d := newFake()
	v := newMemoryVF(d)
	boot(t, v, d)
	v.b = loopingVF{d}
	v.GuestWrite(ixgbevf.VFRXDCTL(1), 0)
	at := d.regs[ixgbevf.VFRDH(0)]
	err := v.walkFrames(context.Background(), v.rings[ixgbevf.VFRXDCTL(1)], 5, broadcast)
	if err == nil || !strings.Contains(err.Error(), "is on") || d.regs[ixgbevf.VFRDH(0)] != at {
		t.Errorf("error %v, the other ring went from %d to %d", err, at, d.regs[ixgbevf.VFRDH(0)])
	}
}

// A doorbell of a queue that is off, on its way when the VF was quiesced.
func TestLateDoorbellOfQueueThatIsOff(t *testing.T) {
	d := newFake()
	v := newMemoryVF(d)
	boot(t, v, d)
	v.GuestWrite(ixgbevf.VFRXDCTL(1), 0)
	capture(t, v)
	v.GuestWrite(ixgbevf.VFRDT(1), 9)
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := d.regs[ixgbevf.VFRDT(1)]; got != 9 {
		t.Errorf("the tail is %d, want 9", got)
	}
}

// relayed restores a guest whose receive ring 0 stands at 10 on a device that
// needs a relay, which is only looked after when the test says so.
func relayed(t *testing.T) (d *fakeVF, v *VF) {
	t.Helper()
	source := newFake()
	s := newMemoryVF(source)
	boot(t, s, source)
	state := capture(t, s)
	for i := range state.Queues {
		if state.Queues[i].Head = 0; i == 0 {
			state.Queues[i].Head = 10
		}
	}
	d = newFake()
	d.zeroHeads = true
	v = newMemoryVF(d)
	v.o.RelayPoll = time.Hour
	report, err := v.Restore(context.Background(), state)
	if err != nil {
		t.Fatal(err)
	}
	if report.HeadsStrategy != "rx="+HeadsShadowRing+",tx="+HeadsWriteVerify {
		t.Fatalf("strategy %q", report.HeadsStrategy)
	}
	return d, v
}

// rxBase is where boot puts receive ring 0.
const rxBase = 3<<32 + 0x14000

// writeBack has the device write shadow descriptor i back.
func writeBack(d *fakeVF, i int, status byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.mem.WriteAt(1<<40+16*uint64(i), []byte{1, 2, 3, 4, 5, 6, 7, 8, status, 0, 0, 0, 60, 0, 0, 0})
	d.regs[ixgbevf.VFRDH(0)] = uint32(i + 1)
}

func guestStatus(d *fakeVF, i int) byte { return d.mem[rxBase/16+uint64(i)][8] }

// What the device wrote back is in the guest's ring when Interrupt returns, or
// else the guest is interrupted again once it is.
func TestInterruptBringsWriteBacks(t *testing.T) {
	d, v := relayed(t)
	writeBack(d, 0, 3)
	if got := guestStatus(d, 10); got != 0 {
		t.Fatalf("status %d before anybody looked", got)
	}
	d.regs[ixgbevf.VTEICR] = 0
	v.Interrupt(0)
	if got := guestStatus(d, 10); got != 3 || d.regs[ixgbevf.VTEICR] != 0 {
		t.Errorf("status %d, causes %#x after the interrupt, want 3 and none", got, d.regs[ixgbevf.VTEICR])
	}
	v.mu.Lock()
	writeBack(d, 1, 3)
	v.Interrupt(0)
	v.unlock()
	if got := guestStatus(d, 11); got != 3 || d.regs[ixgbevf.VTEICR] != 1 {
		t.Errorf("status %d, causes %#x after one that came amid a call, want 3 and that of the queue", got, d.regs[ixgbevf.VTEICR])
	}
}

// Of a frame that the device could not finish the guest sees nothing: it is
// received anew by the device that comes next.
func TestRelayTearsNoFrame(t *testing.T) {
	d, v := relayed(t)
	writeBack(d, 0, 3) // one frame
	writeBack(d, 1, 1) // half of one
	s := capture(t, v)
	if s.Queues[0].Head != 11 || guestStatus(d, 10) != 3 || guestStatus(d, 11) != 0 {
		t.Errorf("captured at head %d, with status %d and %d, want 11, 3 and 0", s.Queues[0].Head, guestStatus(d, 10), guestStatus(d, 11))
	}
	for _, r := range s.Registers {
		if r.Offset == ixgbevf.VFRDBAL(0) && r.Value != rxBase&0xffffffff {
			t.Errorf("captured with ring base %#x, want the guest's %#x", r.Value, uint32(rxBase&0xffffffff))
		}
	}
	// After a veto it goes on from there.
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	writeBack(d, 0, 3)
	v.Interrupt(0)
	if got := guestStatus(d, 11); got != 3 {
		t.Errorf("status %d of the frame received anew, want 3", got)
	}
}

// Of frames that are coalesced the descriptors come in turns: the guest sees
// all of them once all are whole, or none, and finds where each goes on.
func TestRelayTearsNoCoalescedFrame(t *testing.T) {
	const rscCount = 2 << 17
	for _, whole := range []bool{false, true} {
		d, v := relayed(t)
		coalesced := func(i int, status uint64) {
			d.mu.Lock()
			defer d.mu.Unlock()
			b := binary.LittleEndian.AppendUint64(nil, rscCount)
			_ = d.mem.WriteAt(1<<40+16*uint64(i), binary.LittleEndian.AppendUint64(b, 60<<32|status))
		}
		coalesced(0, 2<<4|1) // goes on at 2
		coalesced(1, 3)      // another one, whole
		want := uint32(10)
		if whole {
			coalesced(2, 3)
			want = 13
		}
		s := capture(t, v)
		if s.Queues[0].Head != want {
			t.Errorf("whole %v: captured at head %d, want %d", whole, s.Queues[0].Head, want)
		}
		first := d.mem[rxBase/16+10]
		if status := binary.LittleEndian.Uint32(first[8:]); whole && status != 12<<4|1 || !whole && status&1 != 0 {
			t.Errorf("whole %v: the guest's first descriptor has status %#x", whole, status)
		}
	}
}

// What the guest does to a queue under relay has the effect it has on any.
func TestGuestUsesRelayedQueue(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(*VF)
	}{
		{"turned off", func(v *VF) { v.GuestWrite(ixgbevf.VFRXDCTL(0), ixgbevf.RXDCTLVME) }},
		{"reset", func(v *VF) { v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST) }},
		{"function reset", func(v *VF) { v.FunctionReset(func() { v.b.Write(ixgbevf.VFCTRL, ixgbevf.CtrlRST) }) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, v := relayed(t)
			writeBack(d, 0, 3)
			tc.do(v)
			if head, base := v.GuestRead(ixgbevf.VFRDH(0)), d.regs[ixgbevf.VFRDBAL(0)]; head != 11 || base != 0x14000 {
				t.Errorf("head %d on base %#x, want 11 on the guest's", head, base)
			}
			if got := guestStatus(d, 10); got != 3 {
				t.Errorf("status %d, want the last write-back", got)
			}
			if n := v.relays.Load(); n != 0 {
				t.Errorf("%d relays left", n)
			}
			// Turned on as it is, it goes on there; told 0, it starts there.
			v.GuestWrite(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
			if head := v.GuestRead(ixgbevf.VFRDH(0)); head != 11 || v.relays.Load() != 1 {
				t.Errorf("turned on it stands at %d with %d relays, want 11 with one", head, v.relays.Load())
			}
			v.GuestWrite(ixgbevf.VFRXDCTL(0), 0)
			v.GuestWrite(ixgbevf.VFRDH(0), 0)
			v.GuestWrite(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
			if head := v.GuestRead(ixgbevf.VFRDH(0)); head != 0 || v.relays.Load() != 0 {
				t.Errorf("started anew it stands at %d with %d relays, want 0 without", head, v.relays.Load())
			}
		})
	}
}

// Without memory to work with there is no way, and a probe says so.
func TestNoWay(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"no scratch memory":       func(o *Options) { o.Scratch = nil },
		"too little of it":        func(o *Options) { o.Scratch = smallScratch{} },
		"guest's memory not seen": func(o *Options) { o.Memory = nil },
	} {
		t.Run(name, func(t *testing.T) {
			source := newFake()
			s := newMemoryVF(source)
			boot(t, s, source)
			state := capture(t, s)
			d := newFake()
			d.zeroHeads = true
			d.linkDown = true // contexts are not consumed either
			v := newMemoryVF(d)
			change(&v.o)
			caps, err := v.Probe(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			wantReason(t, CheckSummary(v.f, s.Summary(), true, caps), ReasonHeadNotRestorable)
			wantReason(t, v.Check(state, caps), ReasonHeadNotRestorable)
			_, err = v.Restore(context.Background(), state)
			var no *IncompatibleError
			if !errors.As(err, &no) || no.Reason != ReasonHeadNotRestorable {
				t.Errorf("restore: %v, want %s", err, ReasonHeadNotRestorable)
			}
			checkClean(t, d, "after the restore")
		})
	}
}

type smallScratch struct{ fakeScratch }

func (smallScratch) Range() (uint64, int) { return 1 << 40, 16 << 10 }

func TestHeadsReport(t *testing.T) {
	for want, by := range map[string]map[family.Direction]string{
		HeadsNone:                               {},
		HeadsWriteVerify:                        {family.RX: HeadsWriteVerify, family.TX: HeadsWriteVerify},
		HeadsDummyAdvance:                       {family.TX: HeadsDummyAdvance},
		"rx=write-verify,tx=" + "dummy-advance": {family.RX: HeadsWriteVerify, family.TX: HeadsDummyAdvance},
	} {
		if got := headsReport(by); got != want {
			t.Errorf("%v is reported as %q, want %q", by, got, want)
		}
	}
}
