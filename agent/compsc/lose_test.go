package compsc

import (
	"context"
	"errors"
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// A device that was given up is never touched again, and the guest finds one
// whose link is down.
func TestLose(t *testing.T) {
	ctx := context.Background()
	for _, quiet := range []bool{false, true} {
		d := newFake()
		v, _ := newVF(d)
		d.regs[ixgbevf.VFLINKS] = 1 << 30 // up
		if quiet {
			if err := v.Quiesce(ctx); err != nil {
				t.Fatal(err)
			}
		}
		counters := map[uint32]uint64{}
		for _, c := range v.f.Counters() {
			d.regs[c.Low] = 4711
			counters[c.Low] = readCounter(v, c)
		}
		released := 0
		v.Lose(func() { released++ })
		d.gone = true
		d.writes = nil
		v.Lose(func() { released++ })
		if released != 1 {
			t.Errorf("released %d times", released)
		}
		if v.GuestRead(ixgbevf.VFLINKS) != 0 || v.GuestRead(ixgbevf.VFSTATUS) != 0 {
			t.Errorf("the link is %#x, the status %#x, want 0 for down", v.GuestRead(ixgbevf.VFLINKS), v.GuestRead(ixgbevf.VFSTATUS))
		}
		if got := v.GuestRead(ixgbevf.VFMAILBOX); got != ixgbevf.MailboxRSTI {
			t.Errorf("the mailbox is %#x, want a PF that resets", got)
		}
		for _, c := range v.f.Counters() {
			if got := readCounter(v, c); got != counters[c.Low] || got == 0 {
				t.Errorf("counter %s is %d, and was %d", c.Name, got, counters[c.Low])
			}
		}
		v.GuestWrite(ixgbevf.VFTDT(0), 3)
		v.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
		v.FunctionReset(func() { t.Error("what was given up was reset") })
		v.Kick()
		for what, do := range map[string]func() error{
			"quiesce":   func() error { return v.Quiesce(ctx) },
			"unquiesce": func() error { return v.Unquiesce(ctx) },
			"capture":   func() error { _, err := v.Capture(ctx); return err },
			"scrub":     func() error { return v.Scrub(ctx) },
			"probe":     func() error { _, err := v.Probe(ctx); return err },
			"rehearse":  func() error { return v.Rehearse(ctx, v.Record(), Rights{}) },
			"restore":   func() error { _, err := v.Restore(ctx, &State{}); return err },
		} {
			if err := do(); !errors.Is(err, ErrGone) {
				t.Errorf("%s: %v, want %v", what, err, ErrGone)
			}
		}
		if len(d.writes) > 0 {
			t.Errorf("what was given up was written to: %v", d.writes)
		}
	}
}
