package compsc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// usedTarget is a device that another guest has left in disorder.
func usedTarget() *fakeVF {
	d := newFake()
	for n := range ixgbevf.DefaultQueuePairs {
		d.regs[ixgbevf.VFRDH(n)] = 99
		d.regs[ixgbevf.VFTDH(n)] = 98
		d.regs[ixgbevf.VFRDT(n)] = 97
		d.regs[ixgbevf.VFTDT(n)] = 96
		d.regs[ixgbevf.VFSRRCTL(n)] = 0x402
		d.regs[ixgbevf.VFRXDCTL(n)] = ixgbevf.QueueEnable
		d.regs[ixgbevf.VFTDWBAL(n)] = 0x1234
	}
	d.regs[ixgbevf.VTEIMS] = 7
	d.regs[ixgbevf.VTEICR] = 4
	d.regs[ixgbevf.VTEITR(0)] = 0x10
	d.regs[ixgbevf.VFGPRC] = 12345
	d.regs[ixgbevf.VFGORCLSB] = 0xfffffff0
	d.regs[ixgbevf.VFGPTC] = 5
	d.regs[ixgbevf.VFMBMEM] = 0xdead
	d.xcast = ixgbevf.XcastMulti // what the PF driver remembers of the other guest
	return d
}

// guestView is what the driver can find out through its registers.
func guestView(v *VF) map[string]uint32 {
	view := map[string]uint32{}
	for _, r := range v.f.Registers() {
		view[r.Name] = v.GuestRead(r.Offset)
	}
	return view
}

// differences tells how the target differs from what the source was.
func differences(t *testing.T, source *fakeVF, target *fakeVF, before, after map[string]uint32) string {
	t.Helper()
	wantRegs, wantPF := source.snapshot()
	gotRegs, gotPF := target.snapshot()
	return cmp.Diff(wantRegs, gotRegs) + cmp.Diff(source.contexts, target.contexts) +
		cmp.Diff(wantPF, gotPF, cmp.AllowUnexported(pfState{}), cmpopts.EquateEmpty()) +
		cmp.Diff(before, after)
}

// migrate moves a booted VF, with the given steps of the restore, and returns
// how the target differs. The source runs again afterwards, to compare with.
func migrate(t *testing.T, steps []step) (string, RestoreReport) {
	t.Helper()
	return migrateTo(t, steps, func(*fakeVF) {})
}

// migrateTo is migrate to a target that was changed.
func migrateTo(t *testing.T, steps []step, change func(*fakeVF)) (string, RestoreReport) {
	t.Helper()
	source, target := newFake(), usedTarget()
	change(target)
	v := newMemoryVF(source)
	for n := range uint64(ixgbevf.DefaultQueuePairs) {
		ring := 1<<32 + 0x10000*(n+1)
		_ = source.mem.WriteAt(ring+5*16, contextDescriptor(1, 77))
		_ = source.mem.WriteAt(ring+6*16, contextDescriptor(1, byte(n+1)))
	}
	boot(t, v, source)
	source.ping() // a message and a cause that the driver has not seen
	s := capture(t, v)
	w := newMemoryVF(target)
	report, err := w.restore(context.Background(), s, steps)
	if err != nil {
		return err.Error(), report
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	want, got := source.regs[ixgbevf.VTEICR], target.regs[ixgbevf.VTEICR]
	diff := differences(t, source, target, guestView(v), guestView(w))
	return diff + cmp.Diff(want, got) + cmp.Diff(v.Summary(), w.Summary()), report
}

func TestRestoreMakesTargetEqual(t *testing.T) {
	diff, report := migrate(t, restoreSteps)
	if diff != "" {
		t.Errorf("the target differs from the source (-source +target):\n%s", diff)
	}
	want := RestoreReport{ReplayedOperations: 12, HeadsStrategy: HeadsWriteVerify}
	if report != want {
		t.Errorf("report %+v, want %+v", report, want)
	}
}

// The PF talks whenever its link changes, also over each of the requests of a
// replay. The target is as without that, whatever became of the request.
func TestRestoreTalkedOver(t *testing.T) {
	const requests = 12 + 1 // RESET goes twice
	for talk, name := range map[overTalk]string{forgets: "forgets", overwrites: "overwrites", lostSilently: "silent"} {
		for n := range requests {
			t.Run(fmt.Sprintf("%s/%d", name, n), func(t *testing.T) {
				asked := 0
				diff, report := migrateTo(t, restoreSteps, func(d *fakeVF) {
					d.talkOver = func() overTalk {
						if asked++; asked == n+1 {
							return talk
						}
						return noTalk
					}
				})
				if diff != "" {
					t.Errorf("the target differs from the source (-source +target):\n%s", diff)
				}
				if want := n + 1 + requests; asked != want || report.ReplayedOperations != requests-1 {
					t.Errorf("%d requests, %d of them replayed, want %d and %d", asked, report.ReplayedOperations, want, requests-1)
				}
			})
		}
	}
}

// A PF that is busy with other VFs may find the reset after the RESET message.
func TestRestoreBesideOthers(t *testing.T) {
	asked := 0
	diff, _ := migrateTo(t, restoreSteps, func(d *fakeVF) {
		d.lateResets = true
		d.talkOver = func() overTalk { asked++; return noTalk }
	})
	if diff != "" {
		t.Errorf("the target differs from the source (-source +target):\n%s", diff)
	}
	if asked != 13 {
		t.Errorf("the PF answered %d requests, want 13: the replay did not succeed at once", asked)
	}
}

// A PF that goes on talking is no PF to move to.
func TestRestoreTalkedDown(t *testing.T) {
	diff, _ := migrateTo(t, restoreSteps, func(d *fakeVF) {
		d.talkOver = func() overTalk { return forgets }
	})
	if !strings.Contains(diff, "of its own") {
		t.Errorf("restore: %q, want that the PF sent messages of its own", diff)
	}
}

// Each step carries a kind of state that nothing else does.
func TestRestoreNeedsEveryStep(t *testing.T) {
	for i, s := range restoreSteps {
		t.Run(s.name, func(t *testing.T) {
			steps := slices.Delete(slices.Clone(restoreSteps), i, i+1)
			if diff, _ := migrate(t, steps); diff == "" {
				t.Errorf("the target equals the source without step %q", s.name)
			}
		})
	}
}

// Each item of a state of every class is carried: with another value for it,
// the target differs.
func TestRestoreNeedsEveryItem(t *testing.T) {
	source := newFake()
	v, _ := newVF(source)
	boot(t, v, source)
	source.ping()
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
		target := usedTarget()
		w, _ := newVF(target)
		if _, err := w.Restore(context.Background(), s); err != nil {
			return err.Error()
		}
		return differences(t, source, target, before, guestView(w))
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
	for i, r := range s.Registers {
		if r.Value != 0 {
			check(v.regs[r.Offset].Name, func(s *State) { s.Registers[i].Value = 0 })
		}
	}
	for i, q := range s.Queues {
		name := q.Direction.String()
		check(name+" head", func(s *State) { s.Queues[i].Head++ })
		check(name+" tail", func(s *State) { s.Queues[i].Tail-- })
		check(name+" enable", func(s *State) { s.Queues[i].Enabled = false })
	}
	for i, c := range s.Counters {
		check(v.counterAt[c.Offset].Name, func(s *State) { s.Counters[i].Value++ })
	}
	for i, w := range s.Mailbox.Memory {
		if w != 0 {
			check("mailbox memory", func(s *State) { s.Mailbox.Memory[i] = 0 })
		}
	}
	check("unseen mailbox bits", func(s *State) { s.Mailbox.ReadClear = 0 })
	check("hold of the mailbox", func(s *State) { s.Mailbox.Held = !s.Mailbox.Held })
	check("record", func(s *State) { s.Log = ixgbevf.New(0).NewLog().Marshal() })
	check("causes", func(s *State) { s.Causes = 0 })
}

func TestRestoreOrder(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	boot(t, v, source)
	w, _ := newVF(target)
	target.writes = nil
	if _, err := w.Restore(context.Background(), capture(t, v)); err != nil {
		t.Fatal(err)
	}
	if target.countdownsLost != 0 {
		t.Errorf("%d writes to VTEITR would restart a countdown", target.countdownsLost)
	}
	for _, off := range w.lateRegisters() {
		if n := len(slices.DeleteFunc(slices.Clone(target.writes), func(o uint32) bool { return o != off })); n != 1 {
			t.Errorf("register %#x is written %d times, want once and late", off, n)
		}
	}
	last := func(off uint32) int {
		at := -1
		for i, o := range target.writes {
			if o == off {
				at = i
			}
		}
		return at
	}
	order := []struct {
		name string
		off  uint32
	}{
		{"VFCTRL", ixgbevf.VFCTRL}, {"VFTDWBAL", ixgbevf.VFTDWBAL(0)}, {"VFTDH", ixgbevf.VFTDH(0)},
		{"VFTXDCTL", ixgbevf.VFTXDCTL(0)}, {"VFRXDCTL", ixgbevf.VFRXDCTL(0)}, {"VFTDT", ixgbevf.VFTDT(0)},
		{"VTEIAC", ixgbevf.VTEIAC}, {"VTEIAM", ixgbevf.VTEIAM}, {"VTEIMS", ixgbevf.VTEIMS},
	}
	for i := 1; i < len(order); i++ {
		if a, b := order[i-1], order[i]; last(a.off) >= last(b.off) {
			t.Errorf("%s is written last after %s", a.name, b.name)
		}
	}
}

func TestRestoreFailsSilent(t *testing.T) {
	ctx := context.Background()
	for _, tc := range []struct {
		name   string
		spoil  func(*fakeVF)
		reason string
		text   string
	}{
		{"heads cannot be written", func(d *fakeVF) { d.fixedHeads = true }, ReasonHeadNotRestorable, "once written"},
		{"heads fall when enabled", func(d *fakeVF) { d.headsLost = true }, ReasonHeadNotRestorable, "once the queue is on"},
		{"tails stay elsewhere", func(d *fakeVF) { d.deafTails = true }, ReasonHeadNotRestorable, "tail was written"},
		{"other filter type", func(d *fakeVF) { d.mo = 2 }, ReasonMailboxRefused, "multicast filter type"},
		{"VLAN refused", func(d *fakeVF) { d.refuse[ixgbevf.MsgSetVLAN] = true }, ReasonMailboxRefused, "SET_VLAN"},
		{"API refused", func(d *fakeVF) { d.refuse[ixgbevf.MsgAPINegotiate] = true }, ReasonMailboxRefused, "API_NEGOTIATE"},
		{"PF mute", func(d *fakeVF) { d.mute = true }, "", "the PF has answered"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			source, target := newFake(), usedTarget()
			v, _ := newVF(source)
			boot(t, v, source)
			w, _ := newVF(target)
			tc.spoil(target)
			_, err := w.Restore(ctx, capture(t, v))
			if err == nil || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("error %v, want one with %q", err, tc.text)
			}
			var incompatible *IncompatibleError
			if errors.As(err, &incompatible) != (tc.reason != "") || tc.reason != "" && incompatible.Reason != tc.reason {
				t.Errorf("error %v, want reason %q", err, tc.reason)
			}
			checkClean(t, target, tc.name)
		})
	}
}

// checkClean fails unless the device is silent and has nothing of a guest.
func checkClean(t *testing.T, d *fakeVF, when string) {
	t.Helper()
	regs, pf := d.snapshot()
	if d.fixedHeads || d.deafTails {
		maps.DeleteFunc(regs, func(off, _ uint32) bool {
			_, inner, ok := queueOf(off)
			return ok && (inner == 0x10 && d.fixedHeads || inner == 0x18 && d.deafTails)
		})
	}
	if len(regs) > 0 {
		t.Errorf("%s: registers left: %#x", when, regs)
	}
	if diff := cmp.Diff(pfState{}, pf, cmp.AllowUnexported(pfState{})); diff != "" {
		t.Errorf("%s: left in the PF:\n%s", when, diff)
	}
}

// A device that takes no head is good enough when the heads are there.
func TestRestoreHeadsInPlace(t *testing.T) {
	source, target := newFake(), newFake()
	v, _ := newVF(source)
	boot(t, v, source)
	for n := range ixgbevf.DefaultQueuePairs {
		target.regs[ixgbevf.VFRDH(n)] = source.regs[ixgbevf.VFRDH(n)]
		target.regs[ixgbevf.VFTDH(n)] = source.regs[ixgbevf.VFTDH(n)]
	}
	target.fixedHeads = true
	w, _ := newVF(target)
	if _, err := w.Restore(context.Background(), capture(t, v)); err != nil {
		t.Error(err)
	}
}

// A VF whose driver is not loaded must not be brought up by the move.
func TestRestoreOfUnusedVFStaysSilent(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, _ := newVF(source)
	w, _ := newVF(target)
	report, err := w.Restore(context.Background(), capture(t, v))
	if err != nil {
		t.Fatal(err)
	}
	if want := (RestoreReport{HeadsStrategy: HeadsNone}); report != want {
		t.Errorf("report %+v, want %+v", report, want)
	}
	checkClean(t, target, "after the restore")
}

func TestScrub(t *testing.T) {
	d := newFake()
	v, _ := newVF(d)
	boot(t, v, d)
	v.counters[0].offset = 5
	if err := v.Scrub(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := v.GuestRead(ixgbevf.VFGPRC); got != d.regs[ixgbevf.VFGPRC] {
		t.Errorf("VFGPRC reads %d, want the hardware's %d", got, d.regs[ixgbevf.VFGPRC])
	}
	checkClean(t, d, "after the scrub")
	if sum := v.Summary(); sum.MAC != nil {
		t.Errorf("the record still knows MAC %x", sum.MAC)
	}
	d.gone = true
	if err := v.Scrub(context.Background()); !errors.Is(err, ErrGone) {
		t.Errorf("scrub of a device that is gone: %v, want %v", err, ErrGone)
	}
}
