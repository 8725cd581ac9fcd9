package compsc

import (
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// directIGB puts an engine on a device whose guest reaches the rings by itself.
func directIGB(t *testing.T, d *fakeIGB, b Backend) *VF {
	t.Helper()
	o := newIGB(t, d, igbvf.DeviceID).o
	o.Direct = true
	return New(igbvf.New(), b, o)
}

// postDirect is postIGB past the engine.
func postDirect(d *fakeIGB, n int) {
	tail := d.regs[igbvf.TDT(0)]
	ring := uint64(d.regs[igbvf.TDBAH(0)])<<32 | uint64(d.regs[igbvf.TDBAL(0)])
	for range n {
		desc := binary.LittleEndian.AppendUint64(nil, igbBuffers+uint64(tail)*2048)
		desc = binary.LittleEndian.AppendUint32(desc, 0x2b300000|60)
		_ = d.mem.WriteAt(ring+16*uint64(tail), binary.LittleEndian.AppendUint32(desc, 60<<14))
		tail = (tail + 1) % ringSize
	}
	d.Write(igbvf.TDT(0), tail)
}

// A guest gives its queues other rings, fills context slots and rings doorbells,
// and the engine sees nothing of it. All the same it moves.
func TestDirectGuestMoves(t *testing.T) {
	source, target := newFakeIGB(igbvf.DeviceID), usedIGB(igbvf.DeviceID)
	v := directIGB(t, source, source)
	bootIGB(t, v, source)
	source.Write(igbvf.TXDCTL(0), 0)
	source.Write(igbvf.TDBAL(0), 0x700000)
	source.Write(igbvf.TDH(0), 0)
	source.Write(igbvf.TDT(0), 0)
	source.Write(igbvf.TXDCTL(0), 0x00020304|igbvf.QueueEnable)
	_ = source.mem.WriteAt(1<<32+0x700000, contextDescriptor(0, 9))
	source.Write(igbvf.TDT(0), 1)
	postDirect(source, ringSize-1) // once around
	postDirect(source, 30)
	_ = source.mem.WriteAt(1<<32+0x700000+16*30, contextDescriptor(1, 8))
	source.Write(igbvf.TDT(0), 31)
	source.linkDown, target.linkDown = true, true
	postDirect(source, 2)
	_ = source.mem.WriteAt(1<<32+0x700000+16*33, contextDescriptor(1, 7)) // not consumed yet
	source.Write(igbvf.TDT(0), 34)
	_ = source.mem.WriteAt(1<<32+0x700000+16*34, contextDescriptor(1, 6)) // not handed over
	source.Write(igbvf.RDT(0), 5)
	s := capture(t, v)
	w := directIGB(t, target, target)
	if _, err := w.Restore(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := v.Unquiesce(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantRegs, wantPF := source.snapshot()
	gotRegs, gotPF := target.snapshot()
	want := source.contexts[igbvf.TXDCTL(0)]
	// The ring remembers one lap: of the context that was set before, nothing.
	want[0] = ""
	diff := cmp.Diff(wantRegs, gotRegs) + cmp.Diff(want, target.contexts[igbvf.TXDCTL(0)]) +
		cmp.Diff(wantPF, gotPF, cmp.AllowUnexported(igbPF{}), cmpopts.EquateEmpty())
	if diff != "" {
		t.Errorf("the target differs from the source (-source +target):\n%s", diff)
	}
}

// What was restored is known although the guest has sent nothing since.
func TestDirectContextsTravelOn(t *testing.T) {
	d := newFakeIGB(igbvf.DeviceID)
	v := directIGB(t, d, d)
	bootIGB(t, v, d)
	s := capture(t, v)
	for hop := range 3 {
		next := usedIGB(igbvf.DeviceID) // whose memory has no such ring
		v = directIGB(t, next, next)
		if _, err := v.Restore(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if got := next.contexts[igbvf.TXDCTL(0)][1]; got != string(contextDescriptor(1, 1)) {
			t.Fatalf("hop %d: the device has context %x", hop, got)
		}
		s = capture(t, v)
	}
}

// ringing has the guest do something whenever a register is written.
type ringing struct {
	*fakeIGB
	at  uint32
	now func()
}

func (r *ringing) Write(off, value uint32) {
	r.fakeIGB.Write(off, value)
	if off == r.at && value&igbvf.QueueEnable != 0 && r.now != nil {
		now := r.now
		r.now = nil
		now()
	}
}

// txQueue is the place of the first transmit queue in a state.
func txQueue(v *VF) int {
	return slices.IndexFunc(v.queues, func(q family.Queue) bool { return q.Direction == family.TX })
}

// A guest that runs again before its VF does loses no doorbell.
func TestDirectDoorbellsAreHeeded(t *testing.T) {
	for _, fixedHeads := range []bool{false, true} {
		d := newFakeIGB(igbvf.DeviceID)
		d.fixedHeads = fixedHeads
		b := &ringing{fakeIGB: d, at: igbvf.TXDCTL(0)}
		v := directIGB(t, d, b)
		if _, err := v.Probe(t.Context()); err != nil {
			t.Fatal(err)
		}
		bootIGB(t, v, d)
		d.regs[igbvf.RXDCTL(0)] &^= igbvf.QueueEnable // whose head could be brought nowhere
		d.linkDown = true
		postDirect(d, 3)
		at := capture(t, v).Queues[txQueue(v)].Tail
		d.linkDown, d.sent = false, nil
		postDirect(d, 2) // while the queue is off
		s, err := v.Capture(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if now := s.Queues[txQueue(v)].Tail; now != at+2 {
			t.Errorf("captured is the doorbell at %d, it was at %d and 2 frames came since", now, at)
		}
		want := 5
		if !fixedHeads { // where the queue need not work on another ring first
			b.now = func() { postDirect(d, 4) } // while it is being turned on
			want = 9
		}
		if err := v.Unquiesce(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(d.sent) != want || d.regs[igbvf.TDT(0)] != d.regs[igbvf.TDH(0)] || !slices.IsSorted(d.sent) {
			t.Errorf("fixed heads %v: sent were %d frames (%#x), want %d; the queue stands at %d of %d",
				fixedHeads, len(d.sent), d.sent, want, d.regs[igbvf.TDH(0)], d.regs[igbvf.TDT(0)])
		}
	}
}

// A counter that the guest reads by itself is the device's: not read by the
// engine if that clears it, and not made to go on.
func TestDirectCounters(t *testing.T) {
	d := newFakeIGB(igbvf.DeviceID)
	v := directIGB(t, d, d)
	bootIGB(t, v, d)
	d.regs[igbvf.RQDPC(0)], d.read = 5, nil
	capture(t, v)
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	v.FunctionReset(func() { d.Write(igbvf.CTRL, igbvf.CtrlRST) })
	if slices.Contains(d.read, igbvf.RQDPC(0)) || d.Read(igbvf.RQDPC(0)) != 5 {
		t.Error("the engine read RQDPC, which clears it")
	}

	source, target := newFake(), usedTarget()
	from, to := directVF(source), directVF(target)
	boot(t, from, source)
	target.regs[ixgbevf.VFGPRC] = 12345
	if _, err := to.Restore(t.Context(), capture(t, from)); err != nil {
		t.Fatal(err)
	}
	if got := to.GuestRead(ixgbevf.VFGPRC); got != 12345 || got != target.Read(ixgbevf.VFGPRC) {
		t.Errorf("VFGPRC reads %d past the mapping, and %d in the device", got, target.Read(ixgbevf.VFGPRC))
	}
	s := capture(t, to)
	i := slices.IndexFunc(s.Counters, func(c CounterValue) bool { return c.Offset == ixgbevf.VFGPRC })
	if got := s.Counters[i].Value; got != 12345 {
		t.Errorf("VFGPRC is captured as %d, the guest reads 12345", got)
	}
}

func directVF(d *fakeVF) *VF {
	o := newMemoryVF(d).o
	o.Direct, o.Clock = true, &testClock{now: time.Unix(1000, 0), tick: d.tick}
	return New(ixgbevf.New(0), d, o)
}

// Where only a relay would bring a head to its place, a guest that rings its
// doorbells by itself is refused; another is not.
func TestDirectHasNoRelay(t *testing.T) {
	for _, direct := range []bool{false, true} {
		d := usedIGB(igbvf.DeviceID)
		d.fixedHeads = true
		o := newIGB(t, d, igbvf.DeviceID).o
		o.Direct = direct
		v := New(igbvf.New(), d, o)
		caps, err := v.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := HeadsShadowRing
		if direct {
			want = ""
		}
		if caps.WritableRXHeads || caps.RXHeads != want {
			t.Errorf("direct %v: receive heads by %q, want %q", direct, caps.RXHeads, want)
		}
		err = CheckSummary(v.f, family.Summary{}, true, caps)
		if direct {
			wantReason(t, err, ReasonHeadNotRestorable)
		} else if err != nil {
			t.Error(err)
		}
	}
}

// A part of a packet goes back into the ring of a guest that rings by itself,
// too: its last lap tells where the packet begins.
func TestDirectPartOfAPacket(t *testing.T) {
	d := newFakeIGB(igbvf.DeviceID)
	v := directIGB(t, d, d)
	bootIGB(t, v, d)
	postDirect(d, 3)
	d.regs[igbvf.TDWBAL(0)] = 0
	begin := d.regs[igbvf.TDT(0)]
	part := func(command uint32) {
		postDirect(d, 2)
		ring := uint64(d.regs[igbvf.TDBAH(0)])<<32 | uint64(d.regs[igbvf.TDBAL(0)])
		for i := range uint64(2) {
			_ = d.mem.WriteAt(ring+16*(uint64(begin)+i)+8, binary.LittleEndian.AppendUint32(nil, command|60))
		}
	}
	part(0x22300000) // without EOP and RS
	s := capture(t, v)
	tx := s.Queues[slices.IndexFunc(s.Queues, func(q QueueState) bool { return q.Direction == family.TX && q.Index == 0 })]
	if tx.Head != begin || tx.Tail != begin+2 || v.GuestRead(igbvf.TDH(0)) != begin+2 {
		t.Errorf("captured at %d of %d with head %d for the guest, want %d of %d and %d",
			tx.Head, tx.Tail, v.GuestRead(igbvf.TDH(0)), begin, begin+2, begin+2)
	}
	if err := v.Unquiesce(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.regs[igbvf.TDT(0)], d.regs[igbvf.TDH(0)] = begin, begin
	part(0x2a300000) // with RS
	var why *IncompatibleError
	if err := v.Quiesce(t.Context()); !errors.As(err, &why) || why.Reason != ReasonHeadNotRestorable {
		t.Errorf("with a part that was reported: %v, want %s", err, ReasonHeadNotRestorable)
	}
}
