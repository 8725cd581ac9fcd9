package vfiouser

import (
	"runtime"
	"time"
)

const (
	// spinWindow is how long the reader looks for the next message before it goes
	// to sleep. Drivers read registers in a row, and the next read comes as soon as
	// the answer has reached the guest's processor: sooner than a thread is woken.
	spinWindow = 25 * time.Microsecond
	// maxSkip bounds the messages between two trials: with messages that never
	// come in time, the trials take one window in so many.
	maxSkip = 1 << 10
)

// spin decides whether it is worth while to look for the next message instead of
// sleeping until it comes, by what came of it before, as KVM's halt polling does
// for a processor (Linux, Documentation/virt/kvm/halt-polling.rst). After each
// failure twice as many messages pass before the next trial. Used by one
// goroutine.
type spin struct {
	off           bool
	skip, penalty int
}

// newSpin spins only where the client can run meanwhile.
func newSpin() spin { return spin{off: runtime.NumCPU() < 2} }

// try tells whether to look for the next message.
func (s *spin) try() bool {
	if s.off {
		return false
	}
	if s.skip > 0 {
		s.skip--
		return false
	}
	return true
}

// ended takes the outcome of a trial.
func (s *spin) ended(found bool) {
	if found {
		s.penalty = 0
		return
	}
	s.penalty = min(2*s.penalty+1, maxSkip)
	s.skip = s.penalty
}
