package compsc_test

import (
	"context"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// interval is that of a vector's moderation, 100 microseconds.
const (
	interval      = 100 * time.Microsecond
	intervalValue = 50 << 3
)

// A cause that waits for the end of an interval when the VF is stopped is
// raised, on the target or, after a veto, on the source.
func TestModelModeration(t *testing.T) {
	for name, veto := range map[string]bool{"moved": false, "vetoed": true} {
		t.Run(name, func(t *testing.T) {
			clock := model.NewManualClock()
			spoil := func(c *model.Config) { c.Clock = clock }
			g := &traveller{guest: &guest{t: t, mem: &guestMemory{data: make([]byte, 1<<20)}}, irq: make(chan struct{}, 1),
				out: make(wire, 64), poll: true}
			g.srrctl = oneBuffer
			g.attach(spoil)
			g.boot()
			g.vf.GuestWrite(ixgbevf.VTEIAC, 3)
			g.vf.GuestWrite(ixgbevf.VTEITR(0), intervalValue)
			g.vf.GuestRead(ixgbevf.VTEICR)
			g.take(64, 1)
			before := g.m.Stats().Interrupts
			g.take(64, 2)
			if got := g.m.Stats().Interrupts; got != before || before[0] == 0 {
				t.Fatalf("interrupts %v, then %v: no interval runs", before, got)
			}
			ctx := context.Background()
			if err := g.vf.Quiesce(ctx); err != nil {
				t.Fatal(err)
			}
			clock.Advance(interval)
			s, err := g.vf.Capture(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if s.Causes != 1 {
				t.Fatalf("causes %#x captured, want 1", s.Causes)
			}
			if veto {
				if err := g.vf.Unquiesce(ctx); err != nil {
					t.Fatal(err)
				}
			} else {
				source := g.vf
				g.attach(spoil)
				before = g.m.Stats().Interrupts
				// Its last user left an interval running on the target.
				g.m.Write(ixgbevf.VTEITR(0), intervalValue)
				g.m.Write(ixgbevf.VTEIMS, 1)
				g.m.Write(ixgbevf.VTEICS, 1)
				before[0]++
				if _, err := g.vf.Restore(ctx, s); err != nil {
					t.Fatal(err)
				}
				if err := source.Scrub(ctx); err != nil {
					t.Fatal(err)
				}
			}
			clock.Advance(interval)
			before[0]++
			if got := g.m.Stats().Interrupts; got != before {
				t.Errorf("interrupts %v, want %v", got, before)
			}
			if got := g.vf.GuestRead(ixgbevf.VTEITR(0)); got != intervalValue {
				t.Errorf("VTEITR(0) reads %#x, want %#x", got, intervalValue)
			}
			// The interval holds from the next interrupt on.
			g.take(64, 3)
			g.take(64, 4)
			before[0]++
			if got := g.m.Stats().Interrupts; got != before {
				t.Errorf("interrupts %v within the interval, want %v", got, before)
			}
			clock.Advance(interval)
			before[0]++
			if got := g.m.Stats().Interrupts; got != before {
				t.Errorf("interrupts %v after the interval, want %v", got, before)
			}
		})
	}
}
