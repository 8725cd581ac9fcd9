package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"compsc.io/compsc/agent/compsc"
	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/qemu"
)

// targetRun is what the target gathers in one migration.
type targetRun struct {
	armed map[string]qemu.PCIState // to be replayed, then replayed, into QEMU
	done  bool                     // the replay is done
	hold  *hold

	states     map[string]*compsc.State
	acceptedAt time.Time
	// How long the VM and the VFs had been stopped when the state was sent.
	vmStopped, deviceStopped time.Duration

	restored  []*pb.InterfaceRestore
	steps     []*pb.Step
	activeAt  time.Time // the VFs run
	resumedAt time.Time // the VM runs
	// passedAt is when the last of the VFs passed its first frame, zero while one
	// has not; watched tells that it is not waited for any more.
	passedAt time.Time
	watched  bool
}

const (
	// maxHold is the longest that any gate may hold QEMU's main loop; libvirt
	// and KubeVirt tolerate 12 s.
	maxHold = 10 * time.Second
	// armTries is how often the replay into QEMU is tried.
	armTries = 3
	// armWait bounds how long a state waits for the PCI replay to be done.
	armWait = 2 * time.Second
	// activateTimeout bounds the restore of all VFs.
	activateTimeout = 3 * time.Second
)

// PrepareTarget implements the control service.
func (p *process) PrepareTarget(ctx context.Context, r *pb.PrepareTargetRequest) (*pb.PrepareTargetReply, error) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	hold := r.HoldTimeout.AsDuration()
	switch {
	case r.MigrationUid == "":
		return nil, status.Error(codes.InvalidArgument, "migration_uid is empty")
	case hold <= 0 || hold > maxHold:
		return nil, status.Errorf(codes.InvalidArgument, "hold_timeout %v is not within 0 and %v", hold, maxHold)
	case phase == pb.Phase_PHASE_TARGET_PREPARED && uid == r.MigrationUid:
		return p.accepted(), nil
	case phase != pb.Phase_PHASE_TARGET_SILENT:
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	armed := map[string]qemu.PCIState{}
	for _, src := range r.Interfaces {
		i := p.iface(src.Name)
		if i == nil {
			return refused("InterfaceNotFound", "the target pod has no interface %q: its domain differs from the source's", src.Name), nil
		}
		if err := i.judge(ctx, src); err != nil {
			var inc *compsc.IncompatibleError
			if errors.As(err, &inc) {
				return refused(inc.Reason, "interface %s: %s", src.Name, inc.Message), nil
			}
			return nil, status.Errorf(codes.Internal, "interface %s: %v", src.Name, err)
		}
		armed[src.Name] = qemu.PCIState{Config: src.PciConfig, MSIX: src.MsixTable}
	}
	if len(armed) != len(p.interfaces()) {
		return refused("InterfaceNotFound", "the target pod has %d interfaces with a VF, the source %d", len(p.interfaces()), len(armed)), nil
	}
	p.set(func() {
		p.phase, p.uid, p.holdFor = pb.Phase_PHASE_TARGET_PREPARED, r.MigrationUid, hold
		p.target = targetRun{armed: armed}
		p.lastError = ""
	})
	p.log.Info("target prepared", "migration", r.MigrationUid)
	go p.arm()
	return p.accepted(), nil
}

func (p *process) accepted() *pb.PrepareTargetReply {
	r := &pb.PrepareTargetReply{Accepted: true}
	for _, i := range p.interfaces() {
		r.Epochs = append(r.Epochs, &pb.InterfaceEpoch{Name: i.cfg.Name, Epoch: i.epoch()})
	}
	return r
}

func refused(reason, format string, args ...any) *pb.PrepareTargetReply {
	return &pb.PrepareTargetReply{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// arm replays the PCI state into QEMU, once both are there.
func (p *process) arm() {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	var m *qemu.Monitor
	var ready bool
	var armed map[string]qemu.PCIState
	p.get(func() {
		m, armed = p.monitor, p.target.armed
		ready = p.phase == pb.Phase_PHASE_TARGET_PREPARED && m != nil && !p.target.done
	})
	if !ready {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), monitorWait)
	defer cancel()
	begin := time.Now()
	var err error
	for range armTries {
		if err = p.replayPCI(ctx, m, armed); err == nil || errors.Is(err, qemu.ErrClosed) {
			break
		}
		p.log.Warn("replaying the PCI state into QEMU", "error", err)
	}
	if err != nil {
		p.fail(fmt.Errorf("replaying the PCI state into QEMU: %w", err))
		return
	}
	p.set(func() {
		p.target.done = true
		p.target.steps = append(p.target.steps, step("target/arm", begin))
	})
	p.log.Info("PCI state replayed into QEMU")
}

// replayPCI writes what the source's QEMU held of each VF into this one. It can
// be repeated.
func (p *process) replayPCI(ctx context.Context, m *qemu.Monitor, armed map[string]qemu.PCIState) error {
	s, err := m.Status(ctx)
	if err != nil {
		return err
	}
	if s != "inmigrate" {
		return fmt.Errorf("QEMU is %q, not waiting for an incoming migration", s)
	}
	for _, i := range p.interfaces() {
		if err := qemu.Arm(ctx, m, qemu.Function{Slot: i.cfg.Slot}, i.server, armed[i.cfg.Name]); err != nil {
			return fmt.Errorf("interface %s: %w", i.cfg.Name, err)
		}
	}
	return nil
}

// AcceptState implements the control service.
func (p *process) AcceptState(ctx context.Context, r *pb.AcceptStateRequest) (*pb.AcceptStateReply, error) {
	// The replay takes milliseconds once QEMU is there, and pre-copy has
	// passed since; still, a state must not overtake it.
	actx, cancel := context.WithTimeout(ctx, armWait)
	defer cancel()
	err := p.await(actx, func() (bool, error) {
		if p.uid != r.MigrationUid {
			return false, errNoMigration(r.MigrationUid, p.uid, p.phase)
		}
		return p.target.done, nil
	})
	if errors.Is(err, context.DeadlineExceeded) {
		var why string
		p.get(func() { why = p.lastError })
		return &pb.AcceptStateReply{Reason: "NotArmed", Message: "the PCI state was not replayed into the target's QEMU: " + why}, nil
	}
	if err != nil {
		return nil, rpcError(err)
	}
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	switch {
	case uid != r.MigrationUid:
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	case phase == pb.Phase_PHASE_TARGET_LOADED:
		return &pb.AcceptStateReply{Accepted: true}, nil
	case phase != pb.Phase_PHASE_TARGET_PREPARED:
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	states := map[string]*compsc.State{}
	for _, is := range r.States {
		s, err := p.checkState(is)
		if err != nil {
			p.fail(err)
			return &pb.AcceptStateReply{Reason: "StateRejected", Message: err.Error()}, nil
		}
		states[is.Name] = s
	}
	if len(states) != len(p.interfaces()) {
		return &pb.AcceptStateReply{Reason: "StateRejected", Message: fmt.Sprintf("%d states for %d interfaces", len(states), len(p.interfaces()))}, nil
	}
	p.set(func() {
		p.phase = pb.Phase_PHASE_TARGET_LOADED
		p.target.states = states
		p.target.acceptedAt = time.Now()
		p.target.vmStopped = r.VmStoppedFor.AsDuration()
		p.target.deviceStopped = r.DeviceStoppedFor.AsDuration()
	})
	return &pb.AcceptStateReply{Accepted: true}, nil
}

// checkState decodes a state and judges whether it belongs here.
func (p *process) checkState(is *pb.InterfaceState) (*compsc.State, error) {
	i := p.iface(is.Name)
	if i == nil {
		return nil, fmt.Errorf("state for interface %q, which this VM does not have", is.Name)
	}
	b := append([]byte(nil), is.State...)
	if tamper := p.opts.Faults.TamperState; tamper != nil {
		tamper(b)
	}
	s, err := compsc.Decode(b)
	if err != nil {
		return nil, fmt.Errorf("interface %s: state: %w", is.Name, err)
	}
	_, uid := p.current()
	if s.MigrationUID != uid || s.Interface != is.Name {
		return nil, fmt.Errorf("interface %s: the state is of interface %q in migration %q", is.Name, s.Interface, s.MigrationUID)
	}
	if e := i.epoch(); s.Epoch != e {
		return nil, fmt.Errorf("interface %s: the state was made for epoch %d of the VF's lease, which is at %d", is.Name, s.Epoch, e)
	}
	if err := i.check(s); err != nil {
		return nil, fmt.Errorf("interface %s: %w", is.Name, err)
	}
	return s, nil
}

// read decides what a read of the gate image means. QEMU reads it when it
// opens it, before any VF is connected, and again right before it starts the
// VM after a migration.
func (p *process) read(ctx context.Context) error {
	p.switchMu.Lock()
	var (
		phase pb.Phase
		uid   string
		h     *hold
		d     time.Duration
	)
	p.get(func() { phase, uid, h, d = p.phase, p.uid, p.target.hold, p.holdFor })
	opening := true
	for _, i := range p.interfaces() {
		opening = opening && !i.server.Connected()
	}
	switch phase {
	case pb.Phase_PHASE_TARGET_LOADED:
		h = newHold(d, func() { p.expireTarget(uid, d) })
		p.set(func() {
			p.phase = pb.Phase_PHASE_TARGET_HELD
			p.target.hold = h
			p.target.steps = append(p.target.steps, step("target/load", p.target.acceptedAt))
		})
	case pb.Phase_PHASE_TARGET_HELD:
	case pb.Phase_PHASE_TARGET_SILENT, pb.Phase_PHASE_TARGET_PREPARED, pb.Phase_PHASE_CANCELLED:
		p.switchMu.Unlock()
		if opening {
			return nil
		}
		err := errors.New("QEMU wants to start the VM, but its VFs' state has not arrived here: start refused")
		p.fail(err)
		return err
	default:
		h = nil
	}
	p.switchMu.Unlock()
	if h == nil {
		return nil
	}
	return h.wait(ctx)
}

func (p *process) expireTarget(uid string, d time.Duration) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	if phase, have := p.current(); have == uid && phase == pb.Phase_PHASE_TARGET_HELD {
		p.cancelTarget(fmt.Sprintf("the target gate was held for %v and nobody activated the VFs", d))
	}
}

// AwaitStart implements the control service.
func (p *process) AwaitStart(ctx context.Context, r *pb.AwaitStartRequest) (*pb.AwaitStartReply, error) {
	err := p.await(ctx, func() (bool, error) {
		if p.uid != r.MigrationUid {
			return false, errNoMigration(r.MigrationUid, p.uid, p.phase)
		}
		switch p.phase {
		case pb.Phase_PHASE_TARGET_PREPARED, pb.Phase_PHASE_TARGET_LOADED:
			return false, nil
		case pb.Phase_PHASE_CANCELLED:
			return false, status.Error(codes.Aborted, p.lastError)
		}
		return true, nil
	})
	if err != nil {
		return nil, rpcError(err)
	}
	return &pb.AwaitStartReply{}, nil
}

// Activate implements the control service.
func (p *process) Activate(ctx context.Context, r *pb.ActivateRequest) (*pb.ActivateReply, error) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	var run targetRun
	p.get(func() { run = p.target })
	switch {
	case uid != r.MigrationUid:
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	case phase == pb.Phase_PHASE_TARGET_ACTIVE || phase == pb.Phase_PHASE_RUNNING:
		return &pb.ActivateReply{Interfaces: run.restored, Steps: run.steps}, nil
	case phase != pb.Phase_PHASE_TARGET_HELD || !run.hold.pending():
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	if p.opts.Faults.TakeFilters {
		p.takeFilters()
	}
	// Not the caller's context: a restore once begun is finished or undone.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), activateTimeout)
	defer cancel()
	begin := time.Now()
	restored := make([]*pb.InterfaceRestore, len(p.interfaces()))
	g, gctx := errgroup.WithContext(ctx)
	for n, i := range p.interfaces() {
		g.Go(func() (err error) {
			name := i.cfg.Name
			s := run.states[name]
			final := qemu.PCIState{Config: s.PCIConfig, MSIX: s.MSIXTable}
			if err := qemu.Finish(gctx, qemu.Function{Slot: i.cfg.Slot}, i.server, run.armed[name], final); err != nil {
				return fmt.Errorf("interface %s: %w", name, err)
			}
			if restored[n], err = i.restore(gctx, s); err != nil {
				return fmt.Errorf("interface %s: restore: %w", name, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		p.fail(err)
		p.cancelTarget(err.Error())
		return nil, status.Error(codes.Aborted, err.Error())
	}
	reply := &pb.ActivateReply{Interfaces: restored}
	p.set(func() {
		p.phase = pb.Phase_PHASE_TARGET_ACTIVE
		p.target.restored = restored
		p.target.activeAt = time.Now()
		p.target.steps = append(p.target.steps, step("target/restore", begin), step("target/hold", run.hold.since))
		reply.Steps = append(reply.Steps, p.target.steps...)
	})
	go p.watchFrames(uid)
	run.hold.decide(nil)
	return reply, nil
}

// targetRuns notes that the VM runs here. Called with switchMu held.
func (p *process) targetRuns() {
	p.set(func() {
		p.phase = pb.Phase_PHASE_RUNNING
		p.target.resumedAt = time.Now()
		p.target.steps = append(p.target.steps, step("target/resume", p.target.activeAt))
	})
	for _, i := range p.interfaces() {
		i.watchDriver()
		if i.get().handoff.FastPath {
			p.serve(i.watchDoorbells)
		}
		// An interrupt raised after the source had saved its interrupt
		// controllers is lost; a spurious one is harmless.
		i.kick()
	}
	p.log.Info("the VM runs here")
}

// AwaitRunning implements the control service.
func (p *process) AwaitRunning(ctx context.Context, r *pb.AwaitRunningRequest) (*pb.AwaitRunningReply, error) {
	var run targetRun
	err := p.await(ctx, func() (bool, error) {
		if p.uid != r.MigrationUid {
			return false, errNoMigration(r.MigrationUid, p.uid, p.phase)
		}
		run = p.target
		switch p.phase {
		case pb.Phase_PHASE_RUNNING:
			seen := true
			for _, i := range p.interfaces() {
				if i.lost.Load() {
					return false, status.Error(codes.Aborted, p.lastError)
				}
				seen = seen && i.driverSeen.Load()
			}
			return seen && run.watched, nil
		case pb.Phase_PHASE_TARGET_ACTIVE:
			return false, nil
		}
		return false, status.Error(codes.Aborted, p.lastError)
	})
	if err != nil {
		return nil, rpcError(err)
	}
	reply := &pb.AwaitRunningReply{
		VmStopped:     durationpb.New(run.vmStopped + run.resumedAt.Sub(run.acceptedAt)),
		DeviceStopped: durationpb.New(run.deviceStopped + run.activeAt.Sub(run.acceptedAt)),
		Steps:         run.steps,
	}
	if !run.passedAt.IsZero() {
		reply.LinkGap = durationpb.New(run.deviceStopped + run.passedAt.Sub(run.acceptedAt))
	}
	return reply, nil
}

// CancelTarget implements the control service.
func (p *process) CancelTarget(_ context.Context, r *pb.CancelTargetRequest) (*pb.CancelTargetReply, error) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	switch phase {
	case pb.Phase_PHASE_RUNNING, pb.Phase_PHASE_SOURCE_PREPARED, pb.Phase_PHASE_CAPTURED, pb.Phase_PHASE_RELINQUISHED:
		return nil, status.Error(codes.FailedPrecondition, "the VM runs here")
	case pb.Phase_PHASE_TARGET_ACTIVE:
		return nil, status.Error(codes.FailedPrecondition, "the VFs are restored and the VM is about to run here")
	case pb.Phase_PHASE_UNATTACHED, pb.Phase_PHASE_TARGET_SILENT, pb.Phase_PHASE_CANCELLED:
	default:
		if uid != r.MigrationUid {
			return nil, errNoMigration(r.MigrationUid, uid, phase)
		}
	}
	p.cancelTarget("cancelled: " + r.Reason)
	return &pb.CancelTargetReply{}, nil
}

// cancelTarget silences the VFs for good and fails a held start. Called with
// switchMu held.
func (p *process) cancelTarget(why string) {
	for _, i := range p.interfaces() {
		i.silence()
	}
	var h *hold
	p.set(func() {
		h = p.target.hold
		p.phase = pb.Phase_PHASE_CANCELLED
		p.lastError = why
	})
	if h != nil {
		h.decide(errors.New(why))
	}
	p.log.Info("target cancelled", "why", why)
}
