package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
)

// side is one end of a migration.
type side string

const (
	source side = "source"
	target side = "target"
	// preparedWriter writes that the source is prepared, beside its work.
	preparedWriter side = "source, prepared"
)

type workKey struct {
	uid  types.UID
	side side
}

// workers are the goroutines that play this node's part in migrations: one
// for each migration and side. Nothing depends on one having run before.
type workers struct {
	log *slog.Logger

	mu      sync.Mutex
	running map[workKey]*worker
	closed  bool
}

type worker struct {
	cancel context.CancelFunc
	done   chan struct{}
}

func newWorkers(log *slog.Logger) *workers {
	return &workers{log: log, running: map[workKey]*worker{}}
}

// ensure runs f unless the key's worker runs already. f must end soon after
// its context does.
func (w *workers) ensure(k workKey, f func(context.Context)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.running[k] != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	me := &worker{cancel: cancel, done: make(chan struct{})}
	w.running[k] = me
	go func() {
		defer func() {
			if p := recover(); p != nil {
				w.log.Error("panic in a migration", "migration", k.uid, "side", k.side, "panic", p, "stack", string(debug.Stack()))
			}
			cancel()
			w.mu.Lock()
			delete(w.running, k)
			w.mu.Unlock()
			close(me.done)
		}()
		f(ctx)
	}()
}

// stop ends the key's worker and waits for its end, or for ctx's.
func (w *workers) stop(ctx context.Context, k workKey) error {
	w.mu.Lock()
	me := w.running[k]
	w.mu.Unlock()
	if me == nil {
		return nil
	}
	me.cancel()
	select {
	case <-me.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the %s's part of migration %s is still under way: %w", k.side, k.uid, ctx.Err())
	}
}

// close ends all workers for good and waits until they have ended, or ctx has.
func (w *workers) close(ctx context.Context) error {
	w.mu.Lock()
	w.closed = true
	var keys []workKey
	for k, me := range w.running {
		me.cancel()
		keys = append(keys, k)
	}
	w.mu.Unlock()
	var errs []error
	for _, k := range keys {
		errs = append(errs, w.stop(ctx, k))
	}
	return errors.Join(errs...)
}

// transient tells whether an error of a call may pass: the other side could
// not be reached, broke off, or did not answer in time.
func transient(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return errors.Is(err, context.DeadlineExceeded)
}

// persist repeats f while its error is transient, until bound has passed.
// Each attempt may last until then. It returns f's last error, but one that
// tells more than that the time was up.
func persist(ctx context.Context, bound, pause time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	var last error
	for {
		err := f(ctx)
		if err == nil || !transient(err) {
			return err
		}
		timedOut := status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded)
		if last == nil || !timedOut {
			last = err
		}
		if ctx.Err() != nil || !pauseFor(ctx, pause) {
			return last
		}
	}
}

// pauseFor waits; false means that ctx ended first.
func pauseFor(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// say returns an error's text without gRPC's decoration.
func say(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

// tries remembers since when something has been failing, to bound how long it
// is tried again. Losing this memory only prolongs the trying.
type tries struct {
	mu    sync.Mutex
	since map[string]time.Time
}

func newTries() *tries { return &tries{since: map[string]time.Time{}} }

// failed notes a failure and returns how long it has been failing.
func (t *tries) failed(what string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	first, ok := t.since[what]
	if !ok {
		first = time.Now()
		t.since[what] = first
	}
	return time.Since(first)
}

// worked forgets failures.
func (t *tries) worked(what string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.since, what)
}
