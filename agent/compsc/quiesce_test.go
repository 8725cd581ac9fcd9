package compsc

import (
	"context"
	"errors"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// everything is all that the device holds.
func (d *fakeVF) everything() map[uint32]uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	regs := maps.Clone(d.regs)
	maps.DeleteFunc(regs, func(_, value uint32) bool { return value == 0 })
	return regs
}

// A veto leaves no trace: not one register is different, and traffic goes on.
func TestVetoLeavesVFAsItWas(t *testing.T) {
	ctx := context.Background()
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	d.regs[ixgbevf.VTEICR] = 5
	before := d.everything()
	capture(t, v)
	if d.regs[ixgbevf.VTEIMS] != 0 || d.enabled(0x1000) || d.enabled(0x2000) || d.enabled(0x1040) || d.enabled(0x2040) {
		t.Fatal("the VF is not quiet")
	}
	if got := d.receive(1); got != 0 {
		t.Fatal("the quiesced VF receives")
	}
	if err := v.Quiesce(ctx); err != nil {
		t.Fatalf("second quiesce: %v", err)
	}
	if err := v.Unquiesce(ctx); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, d.everything()); diff != "" {
		t.Errorf("the device is different (-before +after):\n%s", diff)
	}
	if got := d.receive(7); got != 7 {
		t.Errorf("received %d of 7 frames", got)
	}
	if err := v.Unquiesce(ctx); err != nil {
		t.Errorf("unquiesce of a running VF: %v", err)
	}
}

func TestQuiesceFailureLeavesVFRunning(t *testing.T) {
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	request := func(v *VF, d *fakeVF) {
		d.mute = true
		v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgGetLinkState)
		v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	}
	for _, tc := range []struct {
		name  string
		ctx   context.Context
		spoil func(*VF, *fakeVF)
		text  string
	}{
		{"receive queue stays on", context.Background(), func(_ *VF, d *fakeVF) { d.stuck[ixgbevf.VFRXDCTL(1)] = true }, "rx queue 1 is off"},
		{"transmit queue stays on", context.Background(), func(_ *VF, d *fakeVF) { d.stuck[ixgbevf.VFTXDCTL(0)] = true }, "tx queue 0 is off"},
		{"no reply", context.Background(), request, "the PF has finished"},
		{"cancelled", cancelled, request, "context canceled"},
		{"PF holds the mailbox", context.Background(), func(_ *VF, d *fakeVF) { d.regs[ixgbevf.VFMAILBOX] |= ixgbevf.MailboxPFU }, "the PF has finished"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newFake()
			v, _ := newVF(d)
			boot(t, v, d)
			tc.spoil(v, d)
			before := d.everything()
			err := v.Quiesce(tc.ctx)
			if err == nil || !strings.Contains(err.Error(), tc.text) || strings.Contains(err.Error(), "may not run") {
				t.Fatalf("error %v, want one with %q", err, tc.text)
			}
			after := d.everything()
			delete(before, ixgbevf.VFMAILBOX)
			delete(after, ixgbevf.VFMAILBOX) // bits read here are kept for the guest
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("the device is different (-before +after):\n%s", diff)
			}
			if _, err := v.Capture(context.Background()); !errors.Is(err, ErrNotQuiesced) {
				t.Errorf("capture: %v, want %v", err, ErrNotQuiesced)
			}
		})
	}
}

func TestQuiesceSaysWhenVFCannotGoOn(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	d.mute, d.headsLost, d.fixedHeads = true, true, true
	v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgGetLinkState)
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if err := v.Quiesce(context.Background()); err == nil || !strings.Contains(err.Error(), "may not run") {
		t.Errorf("error %v, want one that says the VF may not run", err)
	}
}

// What a link that is down leaves in a transmit ring is sent by the target.
func TestUnsentDescriptorsMove(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	boot(t, v, source)
	source.linkDown = true
	v.GuestWrite(ixgbevf.VFTDT(0), 25)
	s := capture(t, v)
	if s.Queues[2].Head != 20 || s.Queues[2].Tail != 25 {
		t.Fatalf("captured head %d and tail %d, want 20 and 25", s.Queues[2].Head, s.Queues[2].Tail)
	}
	w, _ := newVF(target)
	sent := target.regs[ixgbevf.VFGPTC]
	if _, err := w.Restore(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if got := target.regs[ixgbevf.VFGPTC] - sent; got != 5 || target.regs[ixgbevf.VFTDH(0)] != 25 {
		t.Errorf("the target sent %d, its head is %d, want 5 and 25", got, target.regs[ixgbevf.VFTDH(0)])
	}
}

// What can still be sent is sent before the queue is turned off.
func TestQuiesceDrainsTransmit(t *testing.T) {
	d := newFake()
	v, clock := newVF(d)
	boot(t, v, d)
	d.linkDown = true
	v.GuestWrite(ixgbevf.VFTDT(0), 25)
	ticks := 0
	clock.tick = func() {
		if ticks++; ticks == 3 {
			d.linkDown = false
			d.transmit(0x2000)
		}
	}
	if s := capture(t, v); s.Queues[2].Head != 25 {
		t.Errorf("captured head %d, want 25", s.Queues[2].Head)
	}
}

// A request that reaches the VF after the quiesce is answered before the
// capture.
func TestLateRequest(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	capture(t, v)
	d.replyAfter = 3
	v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgGetLinkState)
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	s := capture(t, v)
	if s.Mailbox.ReadClear&ixgbevf.MailboxPFSTS == 0 || s.Mailbox.Memory[0]&ixgbevf.MsgACK == 0 {
		t.Errorf("captured without the reply: %+v", s.Mailbox)
	}
}

func TestCaptureLeavesOutWhatIsNoState(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	if err := v.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	d.regs[ixgbevf.VTEITR(2)] = ixgbevf.EITRCountWDis | 0x10
	s, err := v.Capture(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := map[uint32]uint32{ixgbevf.VTEITR(2): 0x10, ixgbevf.VFTXDCTL(0): 0x00080120, ixgbevf.VFRXDCTL(0): ixgbevf.RXDCTLVME}
	for _, r := range s.Registers {
		if value, ok := want[r.Offset]; ok && r.Value != value {
			t.Errorf("register %#x is captured as %#x, want %#x", r.Offset, r.Value, value)
		}
	}
}

// A request whose reply is due is waited for, recorded, and its reply shown
// to the guest where it goes on.
func TestOpenRequestIsShownOnTarget(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	boot(t, v, source)
	source.replyAfter = 3
	v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgSetLPE)
	v.GuestWrite(ixgbevf.VFMBMEM+4, 9000)
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	s := capture(t, v)
	w, _ := newVF(target)
	if _, err := w.Restore(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if target.pf.maxFrame != 9000 {
		t.Errorf("the target's PF has %d as the largest frame, want 9000", target.pf.maxFrame)
	}
	for _, engine := range []*VF{v, w} { // also the source, should it go on
		const want = ixgbevf.MailboxPFSTS | ixgbevf.MailboxPFACK
		if got := engine.GuestRead(ixgbevf.VFMAILBOX); got&want != want {
			t.Errorf("VFMAILBOX reads %#x, want PFSTS and PFACK", got)
		}
		if got := engine.GuestRead(ixgbevf.VFMAILBOX); got&want != 0 {
			t.Errorf("VFMAILBOX reads %#x again, want neither PFSTS nor PFACK", got)
		}
		if got, want := engine.GuestRead(ixgbevf.VFMBMEM), uint32(ixgbevf.MsgSetLPE|ixgbevf.MsgACK|ixgbevf.MsgCTS); got != want {
			t.Errorf("the reply reads %#x, want %#x", got, want)
		}
	}
}

// A driver that holds the mailbox, or has half a message in it, goes on there.
func TestHeldMailboxMoves(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	boot(t, v, source)
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgSetLPE)
	w, _ := newVF(target)
	if _, err := w.Restore(context.Background(), capture(t, v)); err != nil {
		t.Fatal(err)
	}
	if w.GuestRead(ixgbevf.VFMAILBOX)&ixgbevf.MailboxVFU == 0 {
		t.Fatal("the guest does not hold the mailbox any more")
	}
	w.GuestWrite(ixgbevf.VFMBMEM+4, 4000)
	w.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if target.pf.maxFrame != 4000 {
		t.Errorf("the target's PF has %d as the largest frame, want 4000", target.pf.maxFrame)
	}
}

// A driver gives a request up after a second; it must not block for ever.
func TestRequestGivenUp(t *testing.T) {
	d := newFake()
	v, clock := newVF(d)
	boot(t, v, d)
	d.mute = true
	v.GuestWrite(ixgbevf.VFMBMEM, ixgbevf.MsgGetLinkState)
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if err := v.Quiesce(context.Background()); err == nil {
		t.Fatal("quiesced with a request that is still awaited")
	}
	clock.now = clock.now.Add(2 * time.Second)
	if err := v.Quiesce(context.Background()); err != nil {
		t.Error(err)
	}
}

// The driver's reset may be under way: its end is shown where it goes on.
func TestResetUnderWayMoves(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	boot(t, v, source)
	v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	w, _ := newVF(target)
	if _, err := w.Restore(context.Background(), capture(t, v)); err != nil {
		t.Fatal(err)
	}
	if w.GuestRead(ixgbevf.VFMAILBOX)&ixgbevf.MailboxRSTD == 0 {
		t.Error("the guest does not see the end of its reset")
	}
	if target.pf.cts {
		t.Error("the target's PF was told that the driver is there")
	}
}

// QEMU may have had writes on their way when the VM stopped.
func TestLateWritesWaitForTheEnd(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	boot(t, v, source)
	capture(t, v)
	v.GuestWrite(ixgbevf.VFTDT(0), 30)
	v.GuestWrite(ixgbevf.VTEIMC, 1)
	v.GuestWrite(ixgbevf.VTEICS, 4)
	v.GuestWrite(ixgbevf.VFRXDCTL(1), ixgbevf.RXDCTLVME|ixgbevf.QueueFlush)
	if got := v.GuestRead(ixgbevf.VFRXDCTL(1)); got != ixgbevf.RXDCTLVME {
		t.Errorf("the control reads %#x, want a flush to be over", got)
	}
	if got := v.GuestRead(ixgbevf.VFTDT(0)); got != 30 {
		t.Errorf("the tail reads %d, want 30", got)
	}
	if source.regs[ixgbevf.VFTDT(0)] == 30 || source.regs[ixgbevf.VTEICR] != 0 {
		t.Error("a write reached the quiet device")
	}
	s := capture(t, v)
	w, _ := newVF(target)
	if _, err := w.Restore(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	for name, d := range map[string]*fakeVF{"source": source, "target": target} {
		got := []uint32{d.regs[ixgbevf.VFTDH(0)], d.regs[ixgbevf.VTEIMS], d.regs[ixgbevf.VTEICR], d.regs[ixgbevf.VFRXDCTL(1)]}
		if diff := cmp.Diff([]uint32{30, 6, 4, ixgbevf.RXDCTLVME}, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// A queue that the driver programs anew while the VF is quiet keeps its head.
func TestLateHeadIsKept(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	capture(t, v)
	v.GuestWrite(ixgbevf.VFRDH(0), 0)
	v.GuestWrite(ixgbevf.VFRDT(0), 0)
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if d.regs[ixgbevf.VFRDH(0)] != 0 || !d.enabled(0x1000) {
		t.Errorf("head %d, on %v, want 0 and true", d.regs[ixgbevf.VFRDH(0)], d.enabled(0x1000))
	}
}

// A late reset leaves nothing to turn on again.
func TestLateReset(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	capture(t, v)
	v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	s := capture(t, v)
	for _, q := range s.Queues {
		if q.Enabled {
			t.Errorf("%s queue %d is captured as enabled", q.Direction, q.Index)
		}
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if d.regs[ixgbevf.VTEIMS] != 0 || d.enabled(0x1000) || d.enabled(0x2000) {
		t.Error("the VF runs after a reset")
	}
}

func TestCaptureVetoesWhatCannotMove(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	send(t, v, ixgbevf.MsgIPsecAdd, 1, 2, 3)
	if err := v.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	_, err := v.Capture(context.Background())
	wantReason(t, err, ReasonNotMigratable)
	if err := v.Unquiesce(context.Background()); err != nil || d.receive(1) != 1 {
		t.Errorf("the VF does not go on: %v", err)
	}
}
