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
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/gate"
	"compsc.io/compsc/agent/qemu"
)

// Names of the sockets in the directory of a device process; those of the VFs
// are told by VFSocket.
const (
	ControlSocket = "control.sock"
	HandoffSocket = "handoff.sock"
	GateSocket    = "gate.sock"
	MonitorSocket = "qmp.sock"
)

// VFSocket is the name of the vfio-user socket of the VF at the given device
// number of the guest. It does not depend on the interface's name, which may
// be longer than what is left of a unix socket's address.
func VFSocket(slot int) string { return fmt.Sprintf("vf%02x.sock", slot) }

// ReadyService is the gRPC health service that is SERVING once a primary has
// its VFs, or a target is prepared: the sidecar's readiness probe asks it.
const ReadyService = "compsc.Ready"

// Options of a device process.
type Options struct {
	// Dir holds the sockets; it must exist.
	Dir string
	// QEMUDir is that directory as QEMU sees it; empty if it is the same.
	QEMUDir string
	// Log takes what the process reports; never guest data.
	Log *slog.Logger
	// Faults are injected for tests of the tests.
	Faults Faults
	// Marked, if set, is told which pages of an interface's guest memory were
	// marked, at the end of each capture; for tests.
	Marked func(migration, iface string, pages []uint64) error
}

// Faults make a device process misbehave. Only builds that are not shipped
// can set them.
type Faults struct {
	// TamperState, if set, may change an encoded state before it is checked.
	TamperState func([]byte)
	// SkipMarking leaves the pages that the device wrote unmarked, as if QEMU
	// saw DMA through the shared mapping by itself.
	SkipMarking bool
	// TakeFilters leaves the model's PF without a free filter once the rehearsal
	// is over, as if its other VFs had taken them.
	TakeFilters bool
}

func (o Options) validate() error {
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
	opts Options
	log  *slog.Logger
	// ifaces are those that the agent handed over, ordered by name; a new
	// slice for each that comes.
	ifaces atomic.Pointer[[]*iface]
	// serve runs a server as long as the process runs.
	serve func(func(context.Context) error)

	switchMu sync.Mutex

	mu        sync.Mutex
	changed   chan struct{} // closed and replaced when a field below changes
	role      pb.Role
	phase     pb.Phase
	uid       string // the migration that phase, source and target belong to
	holdFor   time.Duration
	lastError string
	monitor   *qemu.Monitor
	following bool   // a goroutine follows QEMU's monitor
	migration string // QEMU's own word of its migration under way, empty if none is
	source    sourceRun
	target    targetRun
}

// Process is the device process of one VM.
type Process struct{ p *process }

// New makes a device process, which does nothing before Run. Which interfaces
// the VM has is told by the VFs that the agent hands over.
func New(o Options) (*Process, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	if o.QEMUDir == "" {
		o.QEMUDir = o.Dir
	}
	p := &process{
		opts:    o,
		log:     o.Log,
		changed: make(chan struct{}),
		phase:   pb.Phase_PHASE_UNATTACHED,
	}
	p.ifaces.Store(new([]*iface))
	return &Process{p}, nil
}

// Run serves until ctx ends. It may be called once.
func (x *Process) Run(ctx context.Context) error {
	p, o := x.p, x.p.opts
	defer p.close()
	g, ctx := errgroup.WithContext(ctx)
	p.serve = func(f func(context.Context) error) { g.Go(func() error { return f(ctx) }) }
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
	for _, i := range p.interfaces() {
		i.close()
	}
}

// interfaces are those that the agent handed over; the caller must not change
// the slice.
func (p *process) interfaces() []*iface { return *p.ifaces.Load() }

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
	i, known := p.iface(h.Interface), true
	if i == nil {
		var err error
		if i, err = p.newIface(h); err != nil {
			handoff.CloseAll(files)
			return err
		}
		known = false
	}
	role := pb.Role_ROLE_PRIMARY
	if h.Role == handoff.RoleTarget {
		role = pb.Role_ROLE_TARGET
	}
	var have pb.Role
	p.get(func() { have = p.role })
	if have != pb.Role_ROLE_UNSPECIFIED && have != role && !i.attached() {
		handoff.CloseAll(files)
		i.close()
		return fmt.Errorf("interface %s handed over as %s, the others as %s", h.Interface, role, have)
	}
	if err := i.attach(h, files); err != nil {
		if !known {
			i.close()
		}
		return err
	}
	if !known {
		all := append(slices.Clone(p.interfaces()), i)
		slices.SortFunc(all, func(a, b *iface) int { return strings.Compare(a.cfg.Name, b.cfg.Name) })
		p.ifaces.Store(&all)
		p.serve(i.server.Serve)
	}
	if err := trim(); err != nil {
		p.log.Warn("memory was not trimmed", "error", err)
	}
	p.set(func() {
		p.role = role
		if p.phase != pb.Phase_PHASE_UNATTACHED || len(p.interfaces()) < h.Of {
			return
		}
		p.phase = pb.Phase_PHASE_RUNNING
		if role == pb.Role_ROLE_TARGET {
			p.phase = pb.Phase_PHASE_TARGET_SILENT
		}
	})
	return nil
}

// newIface makes the interface that h is for, if it fits the others. The
// caller holds switchMu.
func (p *process) newIface(h handoff.Handoff) (*iface, error) {
	if h.Interface == "" || h.Slot < 1 || h.Slot > 31 || h.Of < 1 || h.Of > 31 {
		return nil, fmt.Errorf("interface %q in PCI slot %#x, one of %d: the name must not be empty, slot and number must be between 1 and 31", h.Interface, h.Slot, h.Of)
	}
	have := p.interfaces()
	for _, i := range have {
		switch {
		case i.cfg.Slot == h.Slot:
			return nil, fmt.Errorf("interface %s: PCI slot %#x is interface %s's", h.Interface, h.Slot, i.cfg.Name)
		case i.get().handoff.Of != h.Of:
			return nil, fmt.Errorf("interface %s is one of %d, but %s is one of %d", h.Interface, h.Of, i.cfg.Name, i.get().handoff.Of)
		}
	}
	if len(have) >= h.Of {
		return nil, fmt.Errorf("interface %s: this VM has all of its %d interfaces already, without one of that name", h.Interface, h.Of)
	}
	return newIface(p, interfaceConfig{Name: h.Interface, Slot: h.Slot}, p.log.With("interface", h.Interface))
}

func (p *process) iface(name string) *iface {
	for _, i := range p.interfaces() {
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
	p.set(func() { p.monitor, p.following, p.migration = nil, false, "" })
}

// event follows QEMU's run state and its migration.
func (p *process) event(e qemu.Event) {
	defer p.log.Info("QEMU event", "event", e.Name, "status", e.MigrationStatus)
	switch e.Name {
	case qemu.EventMigration:
		p.set(func() {
			switch p.migration = e.MigrationStatus; p.migration {
			case "completed", "failed", "cancelled", "none":
				p.migration, p.source.giveUp = "", false
			}
		})
		p.cancelMigration()
	case qemu.EventResume:
		p.resumed()
	}
}

// cancelMigration has QEMU give up a migration that was undone here. Without it
// the migration would go on until the gate vetoes its end, and KubeVirt 1.8
// loses track of one that fails by itself while it aborts it: the VM could
// never be moved again (asyncMigrationAbort and setMigrationResultHelper in
// pkg/virt-launcher/virtwrap/live-migration-source.go). One that was cancelled,
// by whomever, it takes for aborted.
func (p *process) cancelMigration() {
	p.get(func() {
		// QEMU 11.1.3 may hang for ever if it is cancelled within its set-up.
		if p.monitor == nil || p.migration != "active" || p.phase != pb.Phase_PHASE_RUNNING || !p.source.giveUp {
			return
		}
		m := p.monitor
		go func() {
			// Nobody waits for it: QEMU takes it in once it stands in no gate.
			if err := m.Run(context.Background(), "migrate_cancel", nil, nil); err != nil {
				p.fail(fmt.Errorf("cancelling QEMU's migration: %w; it is vetoed at its end", err))
			}
		}()
	})
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
