// Package device is the process beside one VM that mediates its VFs: QEMU
// reaches each VF through a vfio-user server here, the switchover gate stops
// and starts a migration at exactly the right moment, and the node agent
// drives it all through a control socket. It joins the engine, the gate, the
// vfio-user server, the backends and QEMU; it is passive and keeps the VF's
// descriptors, so that an agent's restart never disturbs the VM.
//
// Phases of the process, all VFs of a VM together:
//
//	UNATTACHED -> RUNNING <-> SOURCE_PREPARED -> CAPTURED -> RELINQUISHED
//	     |           ^               ^______________|             |
//	     |           |___________________________________________| reclaimed
//	     v
//	TARGET_SILENT -> TARGET_PREPARED -> TARGET_LOADED -> TARGET_HELD
//	     -> TARGET_ACTIVE -> RUNNING, or CANCELLED from any but the last two
package device

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/gate"
	"compsc.io/compsc/agent/qemu"
)

// Names of the sockets in the directory of a device process. An interface's
// vfio-user socket is its name with SocketSuffix.
const (
	ControlSocket = "control.sock"
	HandoffSocket = "handoff.sock"
	GateSocket    = "gate.sock"
	MonitorSocket = "qmp.sock"
	SocketSuffix  = ".sock"
)

// ReadyService is the gRPC health service that is SERVING once a primary has
// its VFs, or a target is prepared: the sidecar's readiness probe asks it.
const ReadyService = "compsc.Ready"

// InterfaceConfig is one interface of the VM with a VF.
type InterfaceConfig struct {
	// Name of the VMI's interface.
	Name string
	// Slot is the VF's device number on bus 0 of the guest, 1 to 31.
	Slot int
}

// Options of a device process.
type Options struct {
	// Dir holds the sockets; it must exist.
	Dir string
	// Interfaces of the VM, at least one.
	Interfaces []InterfaceConfig
	// Log takes what the process reports; never guest data.
	Log *slog.Logger
	// Faults are injected for tests of the tests.
	Faults Faults
}

// Faults make a device process misbehave. Only builds that are not shipped
// can set them.
type Faults struct {
	// TamperState, if set, may change an encoded state before it is checked.
	TamperState func([]byte)
	// SkipMarking leaves the pages that the device wrote unmarked, as if QEMU
	// saw DMA through the shared mapping by itself.
	SkipMarking bool
}

func (o Options) validate() error {
	if len(o.Interfaces) == 0 {
		return errors.New("no interface given: name at least one with its PCI slot, such as net1=0x5")
	}
	names, slots := map[string]bool{}, map[int]bool{}
	for _, i := range o.Interfaces {
		if i.Name == "" || strings.ContainsAny(i.Name, "/\x00") || names[i.Name] {
			return fmt.Errorf("interface name %q is empty, given twice, or not a file name", i.Name)
		}
		if name := i.Name + SocketSuffix; slices.Contains([]string{ControlSocket, HandoffSocket, GateSocket, MonitorSocket}, name) {
			return fmt.Errorf("interface name %q is reserved: choose another", i.Name)
		}
		if i.Slot < 1 || i.Slot > 31 || slots[i.Slot] {
			return fmt.Errorf("interface %s: PCI slot %#x is not between 0x1 and 0x1f, or given twice", i.Name, i.Slot)
		}
		names[i.Name], slots[i.Slot] = true, true
	}
	st, err := os.Stat(o.Dir)
	if err != nil {
		return fmt.Errorf("socket directory: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("socket directory %s is not a directory", o.Dir)
	}
	return nil
}

// process is the state machine. Two locks: switchMu serialises the operations
// that change phase and touch VFs, and may be held for as long as silicon and
// QEMU need; mu guards the fields and is held for moments only. switchMu is
// never taken inside a vfio-user callback, because its holder may be waiting
// for QEMU.
type process struct {
	pb.UnimplementedDeviceServer
	opts   Options
	log    *slog.Logger
	ifaces []*iface

	switchMu sync.Mutex

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when a field below changes
	role      pb.Role
	phase     pb.Phase
	uid       string // the migration that phase, source and target belong to
	holdFor   time.Duration
	lastError string
	monitor   *qemu.Monitor
	following bool // a goroutine follows QEMU's monitor
	migrating bool // QEMU's own word: a migration is under way
	source    sourceRun
	target    targetRun
}

// Run serves until ctx ends.
func Run(ctx context.Context, o Options) error {
	if err := o.validate(); err != nil {
		return err
	}
	p := &process{
		opts:    o,
		log:     o.Log,
		changed: make(chan struct{}),
		phase:   pb.Phase_PHASE_UNATTACHED,
	}
	defer p.close()
	for _, c := range o.Interfaces {
		i, err := newIface(p, c, o.Log.With("interface", c.Name))
		if err != nil {
			return err
		}
		p.ifaces = append(p.ifaces, i)
	}
	slices.SortFunc(p.ifaces, func(a, b *iface) int { return strings.Compare(a.cfg.Name, b.cfg.Name) })

	g, ctx := errgroup.WithContext(ctx)
	for _, i := range p.ifaces {
		g.Go(func() error { return i.server.Serve(ctx) })
	}
	gl, err := listen(o.Dir, GateSocket)
	if err != nil {
		return err
	}
	g.Go(func() error { return gate.New(p, o.Log.With("part", "gate")).Serve(ctx, gl) })
	hl, err := listen(o.Dir, HandoffSocket)
	if err != nil {
		return err
	}
	g.Go(func() error { return handoff.Serve(ctx, hl, o.Log.With("part", "handoff"), p.attach) })
	cl, err := listen(o.Dir, ControlSocket)
	if err != nil {
		return err
	}
	g.Go(func() error { return p.serveControl(ctx, cl) })
	o.Log.Info("device process ready for its VFs", "dir", o.Dir)
	return g.Wait()
}

func (p *process) close() {
	p.mu.Lock()
	mon := p.monitor
	p.mu.Unlock()
	if mon != nil {
		mon.Close()
	}
	for _, i := range p.ifaces {
		i.close()
	}
}

// path of a socket in the process's directory.
func (p *process) path(name string) string { return filepath.Join(p.opts.Dir, name) }

// set changes fields under the lock and wakes everyone who waits.
func (p *process) set(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	close(p.changed)
	p.changed = make(chan struct{})
}

// get reads fields under the lock.
func (p *process) get(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
}

// current returns the phase and the migration it belongs to.
func (p *process) current() (pb.Phase, string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.phase, p.uid
}

// await blocks until done, called under the lock, says so.
func (p *process) await(ctx context.Context, done func() (bool, error)) error {
	for {
		p.mu.Lock()
		ok, err := done()
		ch := p.changed
		p.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (p *process) fail(err error) {
	p.log.Error("failure", "error", err)
	p.set(func() { p.lastError = err.Error() })
}

// attach takes a VF that the agent hands over.
func (p *process) attach(h handoff.Handoff, files []*os.File) error {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	i := p.iface(h.Interface)
	if i == nil {
		handoff.CloseAll(files)
		return fmt.Errorf("this VM has no interface %q", h.Interface)
	}
	role := pb.Role_ROLE_PRIMARY
	if h.Role == handoff.RoleTarget {
		role = pb.Role_ROLE_TARGET
	}
	var have pb.Role
	p.get(func() { have = p.role })
	if have != pb.Role_ROLE_UNSPECIFIED && have != role && !i.attached() {
		handoff.CloseAll(files)
		return fmt.Errorf("interface %s handed over as %s, the others as %s", h.Interface, role, have)
	}
	if err := i.attach(h, files); err != nil {
		return err
	}
	if err := trim(); err != nil {
		p.log.Warn("memory was not trimmed", "error", err)
	}
	p.set(func() {
		p.role = role
		if p.phase != pb.Phase_PHASE_UNATTACHED || slices.ContainsFunc(p.ifaces, func(i *iface) bool { return !i.attached() }) {
			return
		}
		p.phase = pb.Phase_PHASE_RUNNING
		if role == pb.Role_ROLE_TARGET {
			p.phase = pb.Phase_PHASE_TARGET_SILENT
		}
	})
	return nil
}

func (p *process) iface(name string) *iface {
	for _, i := range p.ifaces {
		if i.cfg.Name == name {
			return i
		}
	}
	return nil
}

// connected is called when QEMU has connected to an interface; it follows
// QEMU's monitor from then on.
func (p *process) connected() {
	start := false
	p.set(func() {
		start = !p.following
		p.following = true
	})
	if start {
		go p.followMonitor()
	}
}

// monitorWait bounds how long QEMU may take from connecting to a VF until its
// monitor answers; it creates the socket before, and answers once started.
const monitorWait = time.Minute

func (p *process) followMonitor() {
	ctx, cancel := context.WithTimeout(context.Background(), monitorWait)
	defer cancel()
	ended := make(chan struct{})
	m, err := qemu.Dial(ctx, p.path(MonitorSocket), p.event, func() { close(ended) })
	if err != nil {
		p.set(func() { p.following = false })
		p.fail(fmt.Errorf("QEMU's monitor: %w; check that the domain has its second -qmp at %s", err, p.path(MonitorSocket)))
		return
	}
	p.set(func() { p.monitor = m })
	p.log.Info("QEMU's monitor connected")
	p.arm()
	<-ended
	p.set(func() { p.monitor, p.following, p.migrating = nil, false, false })
}

// event follows QEMU's run state and its migration.
func (p *process) event(e qemu.Event) {
	defer p.log.Info("QEMU event", "event", e.Name, "status", e.MigrationStatus)
	switch e.Name {
	case qemu.EventMigration:
		p.set(func() {
			switch e.MigrationStatus {
			case "completed", "failed", "cancelled", "none":
				p.migrating = false
			default:
				p.migrating = true
			}
		})
	case qemu.EventResume:
		p.resumed()
	}
}

// disconnected is called when QEMU is gone from an interface: its VF must
// fall silent, because nobody takes its interrupts and its memory is going.
func (p *process) disconnected(i *iface) {
	go func() {
		p.switchMu.Lock()
		defer p.switchMu.Unlock()
		if i.server.Connected() {
			return // another QEMU has come meanwhile
		}
		i.silence()
		phase, _ := p.current()
		switch phase {
		case pb.Phase_PHASE_TARGET_PREPARED, pb.Phase_PHASE_TARGET_LOADED,
			pb.Phase_PHASE_TARGET_HELD, pb.Phase_PHASE_TARGET_ACTIVE:
			p.cancelTarget("QEMU ended before the VM ran here")
		}
	}()
}

// Flush is the source gate: QEMU flushes it at every stop of the VM.
func (p *process) Flush(ctx context.Context) error { return p.flush(ctx) }

// Read is the target gate: QEMU reads the image again right before it starts
// the VM after a migration.
func (p *process) Read(ctx context.Context, _ int64, _ int) error { return p.read(ctx) }
