package model

import (
	"slices"
	"sync"
	"time"
)

// Clock measures the intervals of interrupt moderation. Its methods must be
// safe for concurrent use. They are called with the model's lock held: they
// must not call the VF and must not wait for anybody who does.
type Clock interface {
	// Now tells the time.
	Now() time.Time
	// AfterFunc has f called once when d has passed, but never before it has
	// returned. stop takes that back, unless f has been called already.
	AfterFunc(d time.Duration, f func()) (stop func())
}

// systemClock is the clock of the machine.
type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) AfterFunc(d time.Duration, f func()) (stop func()) {
	t := time.AfterFunc(d, f)
	return func() { t.Stop() }
}

// ManualClock is a Clock that stands still until it is told to advance. It is
// for tests that must not depend on how fast they run. Its methods are safe
// for concurrent use.
type ManualClock struct {
	mu     sync.Mutex
	now    time.Time
	timers []*manualTimer
}

type manualTimer struct {
	at time.Time
	f  func()
}

// NewManualClock returns a clock at some time other than zero.
func NewManualClock() *ManualClock { return &ManualClock{now: time.Unix(1, 0)} }

// Now tells the time.
func (c *ManualClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// AfterFunc has f called by the Advance that brings the clock there.
func (c *ManualClock) AfterFunc(d time.Duration, f func()) (stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := &manualTimer{c.now.Add(d), f}
	c.timers = append(c.timers, t)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.timers = slices.DeleteFunc(c.timers, func(o *manualTimer) bool { return o == t })
	}
}

// Advance lets d pass. It returns once all that became due has been called, in
// the order of time, each at the time at which it was due. Concurrent calls
// may overtake each other.
func (c *ManualClock) Advance(d time.Duration) {
	end := c.Now().Add(d)
	for {
		f := c.next(end)
		if f == nil {
			return
		}
		f()
	}
}

// next brings the clock to the next timer that is due by end and takes it, or
// to end.
func (c *ManualClock) next(end time.Time) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := -1
	for i, t := range c.timers {
		if !t.at.After(end) && (first < 0 || t.at.Before(c.timers[first].at)) {
			first = i
		}
	}
	if first < 0 {
		if end.After(c.now) {
			c.now = end
		}
		return nil
	}
	t := c.timers[first]
	c.timers = slices.Delete(c.timers, first, first+1)
	if t.at.After(c.now) {
		c.now = t.at
	}
	return t.f
}
