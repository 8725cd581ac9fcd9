package compsc

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
)

// usedIGB is a device that another guest has left in disorder, and whose PF
// has never been told that it is gone.
func usedIGB(device uint16) *fakeIGB {
	d := newFakeIGB(device)
	for n := range d.queues {
		d.regs[igbvf.RDH(n)], d.regs[igbvf.TDH(n)] = 99, 98
		d.regs[igbvf.RDT(n)], d.regs[igbvf.TDT(n)] = 97, 96
		d.regs[igbvf.SRRCTL(n)] = 0x402
		d.regs[igbvf.RXDCTL(n)] = igbvf.QueueEnable
		d.regs[igbvf.TDWBAL(n)] = 0x1234
		d.regs[igbvf.RQDPC(n)] = 7
	}
	d.mask, d.regs[igbvf.EICR], d.regs[igbvf.EITR(0)] = 7, 4, 0x10
	d.regs[igbvf.VFGPRC], d.regs[igbvf.VFGOTC], d.regs[igbvf.VFGPRLBC] = 12345, 0xfffffff0, 9
	d.regs[igbvf.VMBMEM], d.regs[igbvf.V2PMAILBOX] = 0xdead, igbvf.MailboxRSTD
	return d
}

// differencesIGB tells how the target differs from what the source was.
func differencesIGB(source, target *fakeIGB, before, after map[string]uint32) string {
	wantRegs, wantPF := source.snapshot()
	gotRegs, gotPF := target.snapshot()
	return cmp.Diff(wantRegs, gotRegs) + cmp.Diff(source.contexts, target.contexts) +
		cmp.Diff(wantPF, gotPF, cmp.AllowUnexported(igbPF{}), cmpopts.EquateEmpty()) + cmp.Diff(before, after)
}

// forgetfulIGB is the family with a replay that lacks one message.
type forgetfulIGB struct {
	family.Family
	lacks int
}

type forgetfulIGBLog struct {
	family.Log
	lacks int
}

func (f forgetfulIGB) RestoreLog(b []byte) (family.Log, error) {
	l, err := f.Family.RestoreLog(b)
	return forgetfulIGBLog{l, f.lacks}, err
}

func (l forgetfulIGBLog) Replay() []family.Message {
	return slices.Delete(l.Log.Replay(), l.lacks, l.lacks+1)
}

// migrateIGB moves a booted VF whose last frames are not sent yet, and returns
// how the target differs. The source runs again afterwards, to compare with.
func migrateIGB(t *testing.T, device uint16, adapt func(*VF), steps []step) (string, RestoreReport) {
	t.Helper()
	source, target := newFakeIGB(device), usedIGB(device)
	v := newIGB(t, source, device)
	bootIGB(t, v, source)
	source.linkDown = true
	postIGB(v, source, 0, 3)
	s := capture(t, v)
	target.linkDown = true // the frames are for later
	w := newIGB(t, target, device)
	if adapt != nil {
		adapt(w)
	}
	report, err := w.restore(context.Background(), s, steps)
	if err != nil {
		return err.Error(), report
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	causes := cmp.Diff(source.regs[igbvf.EICR], target.regs[igbvf.EICR])
	return differencesIGB(source, target, guestView(v), guestView(w)) + causes + cmp.Diff(v.Summary(), w.Summary()), report
}

func TestIGBRestoreMakesTargetEqual(t *testing.T) {
	for _, m := range igbvf.Members() {
		diff, report := migrateIGB(t, m.Device, nil, restoreSteps)
		if diff != "" {
			t.Errorf("%s: the target differs from the source (-source +target):\n%s", m.Name, diff)
		}
		want := RestoreReport{ReplayedOperations: 9, HeadsStrategy: HeadsWriteVerify}
		if report != want {
			t.Errorf("%s: report %+v, want %+v", m.Name, report, want)
		}
	}
}

// Each step carries a kind of state that nothing else does, and each message
// of the replay one that no other does.
func TestIGBRestoreNeedsEverything(t *testing.T) {
	for i, s := range restoreSteps {
		steps := slices.Delete(slices.Clone(restoreSteps), i, i+1)
		if diff, _ := migrateIGB(t, igbvf.DeviceID, nil, steps); diff == "" {
			t.Errorf("the target equals the source without step %q", s.name)
		}
	}
	_, report := migrateIGB(t, igbvf.DeviceID, nil, restoreSteps)
	for i := range report.ReplayedOperations {
		diff, _ := migrateIGB(t, igbvf.DeviceID, func(v *VF) { v.f = forgetfulIGB{v.f, i} }, restoreSteps)
		// A target that has no stale addresses does without their removal.
		if clear := i == 3; (diff == "") != clear {
			t.Errorf("without message %d of the replay the target differs by:\n%s", i, diff)
		}
	}
}

// Each item of a state is carried: with another value for it, the target
// differs.
func TestIGBRestoreNeedsEveryItem(t *testing.T) {
	source := newFakeIGB(igbvf.DeviceID)
	v := newIGB(t, source, igbvf.DeviceID)
	bootIGB(t, v, source)
	source.regs[igbvf.EICR] |= 4
	source.regs[igbvf.V2PMAILBOX] |= igbvf.MailboxPFSTS
	encoded, err := capture(t, v).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	before := guestView(v)
	result := func(change func(*State)) string {
		s, err := Decode(encoded)
		if err != nil {
			t.Fatal(err)
		}
		change(s)
		target := usedIGB(igbvf.DeviceID)
		w := newIGB(t, target, igbvf.DeviceID)
		target.mem = source.mem
		w.o.Memory, w.o.Scratch = target.mem, fakeScratch{target.mem}
		if _, err := w.Restore(context.Background(), s); err != nil {
			return err.Error()
		}
		return differencesIGB(source, target, before, guestView(w))
	}
	if diff := result(func(*State) {}); diff != "" {
		t.Fatalf("differs without a change:\n%s", diff)
	}
	s, _ := Decode(encoded)
	check := func(what string, change func(*State)) {
		if result(change) == "" {
			t.Errorf("%s is not restored", what)
		}
	}
	unset := []string{"TDWBAL(1)", "TDWBAH(1)"}
	for i, r := range s.Registers {
		if name := v.regs[r.Offset].Name; r.Value != 0 {
			check(name, func(s *State) { s.Registers[i].Value = 0 })
		} else if !slices.Contains(unset, name) {
			t.Errorf("%s is 0: it may not be restored at all", name)
		}
	}
	for i, q := range s.Queues {
		name := q.Direction.String()
		check(name+" head", func(s *State) { s.Queues[i].Head++ })
		check(name+" tail", func(s *State) { s.Queues[i].Tail-- })
		check(name+" enable", func(s *State) { s.Queues[i].Enabled = false })
		if q.Direction == family.TX {
			check("contexts", func(s *State) { s.Queues[i].Contexts = nil })
		}
	}
	for i, c := range s.Counters {
		check(v.counterAt[c.Offset].Name, func(s *State) { s.Counters[i].Value ^= 1 })
	}
	check("mailbox memory", func(s *State) { clear(s.Mailbox.Memory) })
	check("unseen mailbox bits", func(s *State) { s.Mailbox.ReadClear = 0 })
	check("hold of the mailbox", func(s *State) { s.Mailbox.Held = !s.Mailbox.Held })
	check("record", func(s *State) { s.Log = igbvf.New().NewLog().Marshal() })
	check("causes", func(s *State) { s.Causes = 0 })
}

// The state of a booted VF, as this and every later release must read it.
func TestIGBGoldenState(t *testing.T) {
	source := newFakeIGB(igbvf.DeviceID)
	v := newIGB(t, source, igbvf.DeviceID)
	bootIGB(t, v, source)
	s := golden(t, v, "state-igbvf-v2.bin")
	target := usedIGB(igbvf.DeviceID)
	w := newIGB(t, target, igbvf.DeviceID)
	if _, err := w.Restore(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if diff := differencesIGB(source, target, guestView(v), guestView(w)); diff != "" {
		t.Errorf("restored differently (-want +got):\n%s", diff)
	}
}

// Frames that the source did not send are sent by the target, in order, before
// later ones; on a device whose heads cannot be written as on one whose can.
func TestIGBUnsentFramesMove(t *testing.T) {
	for _, tc := range []struct {
		fixed bool
		heads string
	}{{false, HeadsWriteVerify}, {true, "rx=" + HeadsShadowRing + ",tx=" + HeadsDummyAdvance}} {
		source, target := newFakeIGB(igbvf.DeviceID), usedIGB(igbvf.DeviceID)
		target.fixedHeads, target.mem = tc.fixed, source.mem
		for n := range target.queues { // as if it had never been used
			target.regs[igbvf.RDH(n)], target.regs[igbvf.TDH(n)] = 0, 0
		}
		v, w := newIGB(t, source, igbvf.DeviceID), newIGB(t, target, igbvf.DeviceID)
		bootIGB(t, v, source)
		source.linkDown = true
		sent := len(source.sent)
		postIGB(v, source, 0, 3)
		s := capture(t, v)
		if s.Queues[2].Head == s.Queues[2].Tail {
			t.Fatalf("nothing is left to send: %+v", s.Queues[2])
		}
		report, err := w.Restore(context.Background(), s)
		if err != nil || report.HeadsStrategy != tc.heads {
			t.Fatalf("restored by %s, %v; want %s", report.HeadsStrategy, err, tc.heads)
		}
		postIGB(w, target, 0, 2)
		var want []uint64
		for i := range uint64(5) {
			want = append(want, igbBuffers+(21+i)*2048)
		}
		if diff := cmp.Diff(want, target.sent); diff != "" || len(source.sent) != sent {
			t.Errorf("fixed heads %v: sent (-want +got), and %d by the source:\n%s", tc.fixed, len(source.sent)-sent, diff)
		}
		if got := target.receive(4); got != 4 {
			t.Errorf("fixed heads %v: received %d of 4 frames", tc.fixed, got)
		}
		w.Interrupt(0)
		if head := w.GuestRead(igbvf.RDH(0)); head != 14 {
			t.Errorf("fixed heads %v: the guest's receive ring stands at %d, want 14", tc.fixed, head)
		}
		for i := range uint64(14) {
			var status [1]byte
			if _ = source.mem.ReadAt(igbRXRing(0)+16*i+8, status[:]); status[0] != 3 {
				t.Errorf("fixed heads %v: descriptor %d has status %#x", tc.fixed, i, status[0])
			}
		}
	}
}

// No read-clear bit is lost to a register outside of the table, or to a read
// of the whole BAR.
func TestIGBReadsTheTableOnly(t *testing.T) {
	source, target := newFakeIGB(igbvf.DeviceID), usedIGB(igbvf.DeviceID)
	v, w := newIGB(t, source, igbvf.DeviceID), newIGB(t, target, igbvf.DeviceID)
	if _, err := w.Probe(context.Background()); err != nil {
		t.Fatal(err)
	}
	bootIGB(t, v, source)
	if _, err := w.Restore(context.Background(), capture(t, v)); err != nil {
		t.Fatal(err)
	}
	for _, off := range slices.Concat(source.read, target.read) {
		if r, ok := v.regs[off]; !ok || r.Access&family.Readable == 0 {
			t.Fatalf("register %#x was read", off)
		}
	}
}

// The mask is what the guest set, whatever the device says, also after a move.
func TestIGBMaskIsTheGuests(t *testing.T) {
	source := newFakeIGB(igbvf.DeviceID)
	v := newIGB(t, source, igbvf.DeviceID)
	bootIGB(t, v, source)
	v.GuestWrite(igbvf.EIMC, 4)
	v.GuestWrite(igbvf.EIMS, 1)
	if got := v.GuestRead(igbvf.EIMS); got != 3 {
		t.Errorf("EIMS reads %#x, want 3", got)
	}
	for hop := range 2 {
		s := capture(t, v)
		target := usedIGB(igbvf.DeviceID)
		v = newIGB(t, target, igbvf.DeviceID)
		if _, err := v.Restore(context.Background(), s); err != nil {
			t.Fatal(err)
		}
		if got := v.GuestRead(igbvf.EIMS); got != 3 || target.mask != 3 {
			t.Errorf("hop %d: EIMS reads %#x, the device has %#x enabled; want 3", hop, got, target.mask)
		}
	}
	v.GuestWrite(igbvf.CTRL, igbvf.CtrlRST)
	if got := v.GuestRead(igbvf.EIMS); got != 0 {
		t.Errorf("EIMS reads %#x after a reset", got)
	}
}

// What the guest has not read of a counter that a read clears moves once.
func TestIGBDroppedPacketsMove(t *testing.T) {
	source, target := newFakeIGB(igbvf.DeviceID), usedIGB(igbvf.DeviceID)
	v := newIGB(t, source, igbvf.DeviceID)
	bootIGB(t, v, source)
	source.receive(ringSize)
	dropped := source.regs[igbvf.RQDPC(0)]
	if dropped == 0 {
		t.Fatal("nothing was dropped")
	}
	s := capture(t, v)
	again, err := v.Capture(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s.Counters, again.Counters); diff != "" {
		t.Errorf("captured again (-first +second):\n%s", diff)
	}
	w := newIGB(t, target, igbvf.DeviceID)
	if _, err := w.Restore(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	target.regs[igbvf.RQDPC(0)] += 2
	w.FunctionReset(target.reset)
	for i, want := range []uint32{dropped + 2, 0} {
		if got := w.GuestRead(igbvf.RQDPC(0)); got != want {
			t.Errorf("read %d: RQDPC reads %d, want %d", i, got, want)
		}
	}
	target.regs[igbvf.RQDPC(0)] = 0xffe
	w.FunctionReset(target.reset)
	target.regs[igbvf.RQDPC(0)] = 0x10
	if got := w.GuestRead(igbvf.RQDPC(0)); got != 0xfff {
		t.Errorf("RQDPC reads %#x, want its largest value", got)
	}
}

// A reset is over at once, unless the PF is being reset.
func TestIGBReset(t *testing.T) {
	ctx := context.Background()
	d := newFakeIGB(igbvf.DeviceID)
	v := newIGB(t, d, igbvf.DeviceID)
	bootIGB(t, v, d)
	v.GuestWrite(igbvf.CTRL, igbvf.CtrlRST)
	if err := v.Quiesce(ctx); err != nil {
		t.Errorf("quiesce after a reset: %v", err)
	}
	d.inReset = 50
	before := v.o.Clock.Now()
	if err := v.Scrub(ctx); err != nil || d.inReset != 0 {
		t.Errorf("scrub while the PF is reset: %v; %d reads too early", err, d.inReset)
	}
	if waited := v.o.Clock.Now().Sub(before); waited < 48*v.o.Poll || waited > 60*v.o.Poll {
		t.Errorf("waited for %v", waited)
	}
	d.inReset = -1
	if err := v.Scrub(ctx); !errors.Is(err, errTimeout) {
		t.Errorf("scrub while the PF stays in reset: %v", err)
	}
}

// After a scrub the PF has no filter of the guest's; if it does not answer,
// that is an error, and the next scrub asks again. The next guest finds nothing
// either.
func TestIGBScrub(t *testing.T) {
	ctx := context.Background()
	d := newFakeIGB(igbvf.DeviceID)
	v := newIGB(t, d, igbvf.DeviceID)
	bootIGB(t, v, d)
	if len(d.pf.filters) != 1 || d.pf.rar == [2]uint32{} {
		t.Fatalf("the PF filters nothing for the guest: %+v", d.pf)
	}
	d.mute = true
	if err := v.Scrub(ctx); err == nil || !strings.Contains(err.Error(), "may still keep frames") {
		t.Errorf("scrub with a mute PF: %v", err)
	}
	v.GuestWrite(igbvf.EIMS, 7)
	d.mute, d.regs[igbvf.RQDPC(0)] = false, 5
	if err := v.Scrub(ctx); err != nil {
		t.Fatal(err)
	}
	if mask, dropped := v.GuestRead(igbvf.EIMS), v.GuestRead(igbvf.RQDPC(0)); mask != 0 || dropped != 0 {
		t.Errorf("the next guest finds EIMS %#x and RQDPC %d", mask, dropped)
	}
	if diff := cmp.Diff(igbPF{maxFrame: 1522}, d.pf, cmp.AllowUnexported(igbPF{}), cmpopts.EquateEmpty()); diff != "" || d.serving {
		t.Errorf("the PF still serves the VF (%v):\n%s", d.serving, diff)
	}
	requests := len(d.writesOf[igbvf.V2PMAILBOX])
	if err := v.Scrub(ctx); err != nil || len(d.writesOf[igbvf.V2PMAILBOX]) != requests {
		t.Errorf("scrub of a clean VF: %v, and the PF is asked again", err)
	}
}

// Probe also frees addresses that an earlier guest has left, and finds heads
// writable or not.
func TestIGBProbe(t *testing.T) {
	d := usedIGB(igbvf.DeviceID)
	d.pf.filters, d.pf.maxFrame = [][2]uint32{{1, 1}}, 600
	v := newIGB(t, d, igbvf.DeviceID)
	caps, err := v.Probe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := Capabilities{WritableRXHeads: true, WritableTXHeads: true, Offer: family.Offer{APIs: []uint32{0}}}
	if diff := cmp.Diff(want, caps); diff != "" || len(d.pf.filters) != 0 || d.pf.maxFrame != 1522 {
		t.Errorf("filters %v left, frames of %d; capabilities (-want +got):\n%s", d.pf.filters, d.pf.maxFrame, diff)
	}
	d.fixedHeads = true
	if caps, err = v.Probe(context.Background()); err != nil {
		t.Fatal(err)
	}
	if caps.WritableRXHeads || caps.WritableTXHeads || caps.TXHeads != HeadsDummyAdvance || caps.RXHeads != HeadsShadowRing {
		t.Errorf("fixed heads: capabilities %+v", caps)
	}
}

// An address that the target's administrator set is as good as one that the
// guest sets, if it is the same.
func TestIGBAdministratorsAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		mac     [2]uint32
		trusted bool
		ok      bool
	}{
		"the guest's": {[2]uint32{macLow, macHigh}, false, true},
		"another":     {[2]uint32{1, 1}, false, false},
		"trusted":     {[2]uint32{1, 1}, true, true},
	} {
		source, target := newFakeIGB(igbvf.DeviceID), usedIGB(igbvf.DeviceID)
		v, w := newIGB(t, source, igbvf.DeviceID), newIGB(t, target, igbvf.DeviceID)
		bootIGB(t, v, source)
		sendIGB(t, v, igbvf.MsgSetMAC|igbvf.MACFilterClear<<16, macLow, macHigh)
		target.adminMAC, target.trusted = &tc.mac, tc.trusted
		_, err := w.Restore(context.Background(), capture(t, v))
		var no *IncompatibleError
		if (err == nil) != tc.ok || err != nil && (!errors.As(err, &no) || no.Reason != ReasonMailboxRefused) {
			t.Errorf("%s: error %v", name, err)
		}
		if err == nil && target.pf.rar != [2]uint32{macLow, macHigh} {
			t.Errorf("%s: the PF filters for %x", name, target.pf.rar)
		}
	}
}

func TestIGBGone(t *testing.T) {
	d := newFakeIGB(igbvf.DeviceID)
	v := newIGB(t, d, igbvf.DeviceID)
	bootIGB(t, v, d)
	d.gone = true
	if got := v.GuestRead(igbvf.EIMS); got != allOnes {
		t.Errorf("EIMS reads %#x of a device that is gone", got)
	}
	if err := v.Quiesce(context.Background()); !errors.Is(err, ErrGone) {
		t.Errorf("quiesce: %v", err)
	}
	if err := v.Scrub(context.Background()); !errors.Is(err, ErrGone) {
		t.Errorf("scrub: %v", err)
	}
}
