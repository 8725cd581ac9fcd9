package model

import (
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// eitr is the value of VTEITR for an interval.
func eitr(d time.Duration) uint32 { return uint32(d/eitrUnit) << eitrShift }

// moderated is a driver whose vectors do not mask themselves, on a clock of
// the test's.
func moderated(t *testing.T) (*driver, *ManualClock) {
	c := NewManualClock()
	d := newDriver(t, func(cfg *Config) { cfg.Clock = c })
	d.up()
	d.v.Write(ixgbevf.VTEIAM, 0)
	d.v.Write(ixgbevf.VTEIMS, ixgbevf.VectorMask)
	return d, c
}

// want checks how many interrupts there were since it was last called.
func (d *driver) wantInterrupts(want int, when string) {
	d.t.Helper()
	for n := 0; ; n++ {
		select {
		case <-d.irqs:
		default:
			if n != want {
				d.t.Fatalf("%d interrupts %s, want %d", n, when, want)
			}
			return
		}
	}
}

func TestModeration(t *testing.T) {
	d, c := moderated(t)
	in := func() { d.v.Receive(frame(guestMAC, peerMAC, 100)) }
	d.v.Write(ixgbevf.VTEITR(0), eitr(100*time.Microsecond))
	in()
	d.wantInterrupts(1, "at the first frame")
	for range 3 {
		in()
		c.Advance(33 * time.Microsecond)
	}
	d.wantInterrupts(0, "99 microseconds after the last")
	c.Advance(time.Microsecond)
	d.wantInterrupts(1, "at the end of the interval")
	c.Advance(time.Second)
	d.wantInterrupts(0, "without a cause")
	in()
	d.wantInterrupts(1, "at a frame long after the last")
	if d.v.Read(ixgbevf.VTEITR(0)) != eitr(100*time.Microsecond) {
		t.Errorf("VTEITR(0) reads %#x", d.v.Read(ixgbevf.VTEITR(0)))
	}
	// Other vectors are on their own, those set by software too.
	in()
	d.v.Write(ixgbevf.VTEICS, 2)
	d.wantInterrupts(1, "on a vector without an interval")
	d.v.Write(ixgbevf.VTEITR(1), eitr(40*time.Microsecond))
	d.v.Write(ixgbevf.VTEICS, 2)
	d.wantInterrupts(1, "on a vector whose interval did not start")
	d.v.Write(ixgbevf.VTEICS, 2)
	c.Advance(40 * time.Microsecond)
	d.wantInterrupts(1, "at the end of the second vector's interval")
	c.Advance(60 * time.Microsecond)
	d.wantInterrupts(1, "at the end of the first vector's interval")
}

func TestModerationWhileItRuns(t *testing.T) {
	const interval = 100 * time.Microsecond
	for _, tc := range []struct {
		name string
		act  func(d *driver, c *ManualClock)
		// want interrupts at once, and when the interval would have ended.
		now, then int
	}{
		{"nothing", func(*driver, *ManualClock) {}, 0, 1},
		{"cause read", func(d *driver, _ *ManualClock) { d.v.Read(ixgbevf.VTEICR) }, 0, 0},
		{"cause cleared", func(d *driver, _ *ManualClock) { d.v.Write(ixgbevf.VTEICR, 1) }, 0, 0},
		{"masked", func(d *driver, _ *ManualClock) { d.v.Write(ixgbevf.VTEIMC, 1) }, 0, 0},
		{"masked and unmasked", func(d *driver, _ *ManualClock) {
			d.v.Write(ixgbevf.VTEIMC, 1)
			d.v.Write(ixgbevf.VTEIMS, 1)
		}, 0, 1},
		{"masked until after the interval", func(d *driver, c *ManualClock) {
			d.v.Write(ixgbevf.VTEIMC, 1)
			c.Advance(interval)
			d.v.Write(ixgbevf.VTEIMS, 1)
		}, 1, 0},
		{"new interval, counter left alone", func(d *driver, c *ManualClock) {
			d.v.Write(ixgbevf.VTEITR(0), eitr(interval/2)|ixgbevf.EITRCountWDis)
			c.Advance(interval - time.Microsecond)
		}, 0, 1},
		{"new interval, counter written", func(d *driver, _ *ManualClock) {
			d.v.Write(ixgbevf.VTEITR(0), eitr(interval/2))
		}, 1, 0},
		{"reset", func(d *driver, _ *ManualClock) { d.v.FLR() }, 0, 0},
		{"closed", func(d *driver, _ *ManualClock) { d.v.Close() }, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, c := moderated(t)
			d.v.Write(ixgbevf.VTEITR(0), eitr(interval))
			for range 2 {
				d.v.Receive(frame(guestMAC, peerMAC, 100))
			}
			d.wantInterrupts(1, "at the first frame")
			tc.act(d, c)
			d.wantInterrupts(tc.now, "at once")
			c.Advance(interval)
			d.wantInterrupts(tc.then, "at the end of the interval")
		})
	}
}

// On the clock of the machine the end of the interval comes by itself.
func TestModerationBySystemClock(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Write(ixgbevf.VTEIAM, 0)
	d.v.Write(ixgbevf.VTEIMS, ixgbevf.VectorMask)
	d.v.Write(ixgbevf.VTEITR(0), eitr(time.Millisecond))
	start := time.Now()
	for range 2 {
		d.v.Receive(frame(guestMAC, peerMAC, 100))
	}
	for range 2 {
		select {
		case <-d.irqs:
		case <-time.After(waitLimit):
			t.Fatal("no interrupt at the end of the interval")
		}
	}
	if passed := time.Since(start); passed < time.Millisecond {
		t.Errorf("two interrupts within %v", passed)
	}
}
