package standin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

// commandTimeout bounds a monitor command that QEMU answers at once.
const commandTimeout = 20 * time.Second

// errMonitorClosed: QEMU is gone, or its monitor was given up after it did
// not answer in time.
var errMonitorClosed = errors.New("QEMU's monitor is closed")

// monitor is a monitor of QEMU beside libvirt's. Unlike the library's it is
// bounded by contexts, and it keeps all events.
type monitor struct {
	m *qmp.SocketMonitor

	ended chan struct{} // closed when QEMU is gone

	mu     sync.Mutex
	events []qmp.Event
	closed bool
	news   chan struct{} // closed and replaced at each event
}

// gone is closed when QEMU is gone, or the monitor was closed.
func (m *monitor) gone() <-chan struct{} { return m.ended }

// openMonitor connects to QEMU's monitor at path, which may not exist yet,
// until ctx ends or QEMU does.
func openMonitor(ctx context.Context, path string, gone <-chan struct{}) (*monitor, error) {
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		m, err := qmp.NewSocketMonitor("unix", path, time.Second)
		if err == nil {
			return startMonitor(ctx, m)
		}
		select {
		case <-t.C:
		case <-gone:
			return nil, errors.New("QEMU ended at once")
		case <-ctx.Done():
			return nil, fmt.Errorf("QEMU's monitor: %w", errors.Join(err, ctx.Err()))
		}
	}
}

func startMonitor(ctx context.Context, s *qmp.SocketMonitor) (*monitor, error) {
	m := &monitor{m: s, news: make(chan struct{}), ended: make(chan struct{})}
	if err := m.bounded(ctx, s.Connect); err != nil {
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	events, err := s.Events(ctx)
	if err != nil {
		return nil, err
	}
	go func() {
		for e := range events {
			m.record(&e)
		}
		m.record(nil)
		close(m.ended)
	}()
	return m, nil
}

func (m *monitor) record(e *qmp.Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e != nil {
		m.events = append(m.events, *e)
	} else {
		m.closed = true
	}
	close(m.news)
	m.news = make(chan struct{})
}

// bounded runs a call of the library, which knows no contexts. If it does not
// return in time the connection is closed, which ends it: answers could not
// be told apart afterwards.
func (m *monitor) bounded(ctx context.Context, call func() error) error {
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		go m.close()
		return ctx.Err()
	}
}

func (m *monitor) close() {
	// The connection may be closed already.
	_ = m.m.Disconnect()
}

// run executes a command and stores its result in out, if that is not nil.
func (m *monitor) run(ctx context.Context, command string, args, out any) error {
	request, err := json.Marshal(qmp.Command{Execute: command, Args: args})
	if err != nil {
		return err
	}
	var b []byte
	if err := m.bounded(ctx, func() (err error) {
		b, err = m.m.Run(request)
		return err
	}); err != nil {
		return fmt.Errorf("QEMU's %s: %w", command, err)
	}
	if out == nil {
		return nil
	}
	var r struct{ Return json.RawMessage }
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("QEMU's %s: %w", command, err)
	}
	return json.Unmarshal(r.Return, out)
}

// mark returns the place of the next event, for wait.
func (m *monitor) mark() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.events)
}

// wait returns the first event from the mark on that matches, and the mark
// behind it.
func (m *monitor) wait(ctx context.Context, from int, match func(qmp.Event) bool) (qmp.Event, int, error) {
	for {
		m.mu.Lock()
		events, closed, news := m.events, m.closed, m.news
		m.mu.Unlock()
		if i := slices.IndexFunc(events[from:], match); i >= 0 {
			return events[from+i], from + i + 1, nil
		}
		if closed {
			return qmp.Event{}, from, errMonitorClosed
		}
		select {
		case <-news:
		case <-ctx.Done():
			return qmp.Event{}, from, ctx.Err()
		}
	}
}

// last returns the time of the last event of that name since the mark.
func (m *monitor) last(from int, name string) (time.Time, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := len(m.events) - 1; i >= from; i-- {
		if e := m.events[i]; e.Event == name {
			return time.Unix(e.Timestamp.Seconds, e.Timestamp.Microseconds*1000), true
		}
	}
	return time.Time{}, false
}

// migrationStatus matches the event that says so (needs the capability
// "events").
func migrationStatus(want ...string) func(qmp.Event) bool {
	return func(e qmp.Event) bool {
		status, _ := e.Data["status"].(string)
		return e.Event == "MIGRATION" && slices.Contains(want, status)
	}
}
