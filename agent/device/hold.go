package device

import (
	"context"
	"sync"
	"time"
)

// hold keeps QEMU waiting in a gate until somebody decides, or its time is
// up. The first decision stands.
type hold struct {
	once  sync.Once
	done  chan struct{}
	err   error
	timer *time.Timer
	since time.Time
}

// newHold starts a hold; expired is called once if nobody decides within d,
// and should decide then.
func newHold(d time.Duration, expired func()) *hold {
	return &hold{done: make(chan struct{}), timer: time.AfterFunc(d, expired), since: time.Now()}
}

// decide ends the hold; nil lets QEMU go on, an error fails what it does.
func (h *hold) decide(err error) {
	h.once.Do(func() {
		h.timer.Stop()
		h.err = err
		close(h.done)
	})
}

// pending tells whether nobody has decided yet.
func (h *hold) pending() bool {
	select {
	case <-h.done:
		return false
	default:
		return true
	}
}

// wait returns the decision.
func (h *hold) wait(ctx context.Context) error {
	select {
	case <-h.done:
		return h.err
	case <-ctx.Done():
		return ctx.Err()
	}
}
