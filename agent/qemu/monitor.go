// Package qemu speaks to one QEMU process: through a QMP monitor of our own
// beside libvirt's, and by replaying into a QEMU that waits for an incoming
// migration what stock vfio-user-pci does not carry over: the VF's
// configuration space and its MSI-X table.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/digitalocean/go-qemu/qmp"
)

// Names of the QMP events that matter to a VF.
const (
	EventStop      = "STOP"
	EventResume    = "RESUME"
	EventMigration = "MIGRATION"
	EventShutdown  = "SHUTDOWN"
)

// Event is an asynchronous QMP message.
type Event struct {
	// Name of the event.
	Name string
	// MigrationStatus is the status a MIGRATION event carries, else empty.
	MigrationStatus string
}

// ErrClosed is returned once QEMU has closed the monitor, or Close was called.
var ErrClosed = errors.New("QMP monitor is closed")

// Monitor is a QMP connection. It is safe for concurrent use; QEMU handles
// one command at a time, and none while its main loop is held in a gate.
type Monitor struct {
	mon    *qmp.SocketMonitor
	closed chan struct{}
	once   sync.Once
}

const (
	dialRetry      = 20 * time.Millisecond
	commandTimeout = 10 * time.Second
)

// Dial connects to the monitor socket at path, waiting for QEMU to create it,
// and calls onEvent for each event, in order, from one goroutine; after the
// last one, when the connection has ended, it calls onClose. Dial is bounded
// by ctx alone: QEMU makes its monitors before its devices, and greets only
// when all of them are there, which takes as long as the kernel needs to pin
// the guest's memory.
func Dial(ctx context.Context, path string, onEvent func(Event), onClose func()) (*Monitor, error) {
	var sm *qmp.SocketMonitor
	for {
		var err error
		if sm, err = qmp.NewSocketMonitor("unix", path, time.Second); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("QMP monitor %s: %w (last error: %w)", path, ctx.Err(), err)
		case <-time.After(dialRetry):
		}
	}
	m := &Monitor{mon: sm, closed: make(chan struct{})}
	if err := m.bounded(ctx, sm.Connect); err != nil {
		return nil, fmt.Errorf("QMP monitor %s: handshake: %w", path, err)
	}
	events, err := sm.Events(ctx)
	if err != nil {
		m.Close()
		return nil, fmt.Errorf("QMP monitor %s: %w", path, err)
	}
	go func() {
		for e := range events {
			status, _ := e.Data["status"].(string)
			if e.Event != EventMigration {
				status = ""
			}
			onEvent(Event{Name: e.Event, MigrationStatus: status})
		}
		m.Close()
		onClose()
	}()
	return m, nil
}

// Close ends the connection. Commands under way fail with ErrClosed.
func (m *Monitor) Close() {
	m.once.Do(func() {
		close(m.closed)
		// Disconnect waits for the reader, which may be waiting for us.
		go m.mon.Disconnect() //nolint:errcheck // nothing is left to be done
	})
}

// bounded runs fn, whose only way to end early is a closed connection, and
// closes it when ctx ends first.
func (m *Monitor) bounded(ctx context.Context, fn func() error) error {
	select {
	case <-m.closed:
		return ErrClosed
	default:
	}
	done := make(chan error, 1)
	go func() { done <- fn() }()
	select {
	case err := <-done:
		return err
	case <-m.closed:
		return ErrClosed
	case <-ctx.Done():
		m.Close()
		return ctx.Err()
	}
}

// Run executes one QMP command and decodes its return value into out, unless
// out is nil. A command that outlives ctx, or 10 s, closes the monitor: its
// late answer could not be told from the next one's.
func (m *Monitor) Run(ctx context.Context, command string, args, out any) error {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	var raw []byte
	if err := m.bounded(ctx, func() error {
		r, err := m.mon.Run(append(b, '\n'))
		// The library's reader reuses the buffer for the next line.
		raw = append([]byte(nil), r...)
		return err
	}); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	if out == nil {
		return nil
	}
	reply := struct {
		Return any `json:"return"`
	}{out}
	if err := json.Unmarshal(raw, &reply); err != nil {
		return fmt.Errorf("QMP %s: reply: %w", command, err)
	}
	return nil
}

// Status returns QEMU's run state, such as "running", "paused", "inmigrate".
func (m *Monitor) Status(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := m.Run(ctx, "query-status", nil, &s)
	return s.Status, err
}

// hmp runs a human monitor command; some of what is needed has no QMP form.
func (m *Monitor) hmp(ctx context.Context, line string) (string, error) {
	var out string
	err := m.Run(ctx, "human-monitor-command", map[string]string{"command-line": line}, &out)
	return out, err
}
