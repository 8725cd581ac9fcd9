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

// sourceRun is what the source gathers in one migration.
type sourceRun struct {
	hold       *hold
	stoppedAt  time.Time // QEMU flushed the gate: the VM has stopped
	quiescedAt time.Time // the first VF was told to stop
	states     map[string]*compsc.State
	steps      []*pb.Step
	marked     chan struct{} // closed when every page is marked
	pages      []*pb.InterfacePages
	markError  error
	ended      string // why AwaitCapture must give up, if it must
	giveUp     bool   // QEMU is to give its migration up
}

// quiesceTimeout bounds each VF's quiesce and capture; both take well below
// a millisecond on sound silicon, except for a mailbox transaction that the
// PF is slow to answer (the driver itself waits up to 1 s).
const quiesceTimeout = 1500 * time.Millisecond

// errNoMigration is what calls for a migration get that is not this one.
func errNoMigration(uid, have string, phase pb.Phase) error {
	if have == "" {
		have = "none"
	}
	return status.Errorf(codes.FailedPrecondition, "migration %s is not under way here: the device process is in %s, migration %s", uid, phase, have)
}

// PrepareSource implements the control service.
func (p *process) PrepareSource(ctx context.Context, r *pb.PrepareSourceRequest) (*pb.PrepareSourceReply, error) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	hold := r.HoldTimeout.AsDuration()
	switch {
	case r.MigrationUid == "":
		return nil, status.Error(codes.InvalidArgument, "migration_uid is empty")
	case hold <= 0 || hold > maxHold:
		return nil, status.Errorf(codes.InvalidArgument, "hold_timeout %v is not within 0 and %v", hold, maxHold)
	case phase == pb.Phase_PHASE_SOURCE_PREPARED && uid == r.MigrationUid:
	case phase != pb.Phase_PHASE_RUNNING:
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	reply := &pb.PrepareSourceReply{}
	for _, i := range p.interfaces() {
		s, err := i.describe(ctx)
		if err != nil {
			return nil, status.Errorf(codes.Unavailable, "interface %s: %v", i.cfg.Name, err)
		}
		reply.Interfaces = append(reply.Interfaces, s)
	}
	if phase == pb.Phase_PHASE_RUNNING {
		ifaces := p.interfaces()
		for n, i := range ifaces {
			if err := i.track(); err != nil {
				for _, i := range ifaces[:n+1] {
					i.untrack()
				}
				return nil, status.Errorf(codes.Internal, "interface %s: %v", i.cfg.Name, err)
			}
		}
	}
	p.set(func() {
		p.phase, p.uid, p.holdFor = pb.Phase_PHASE_SOURCE_PREPARED, r.MigrationUid, hold
		p.source, p.lastError = sourceRun{}, ""
	})
	p.log.Info("source prepared", "migration", r.MigrationUid)
	return reply, nil
}

// flush decides what a flush of the gate node means. QEMU flushes at every
// stop of the VM, more than once for each, and also at its end.
func (p *process) flush(ctx context.Context) error {
	p.switchMu.Lock()
	var (
		phase     pb.Phase
		migrating bool
		blind     bool
		h         *hold
	)
	p.get(func() {
		phase, migrating, blind, h = p.phase, p.migration != "", p.monitor == nil, p.source.hold
	})
	switch {
	case phase == pb.Phase_PHASE_SOURCE_PREPARED && (migrating || blind):
		// Without a monitor a pause cannot be told from a switchover;
		// capturing for a pause is harmless, missing a switchover is not.
		h = p.capture(ctx)
	case phase == pb.Phase_PHASE_RUNNING && migrating:
		p.switchMu.Unlock()
		err := errors.New("QEMU migrates without a VFMigration having been prepared; the VM would arrive without its VFs' state, so the switchover is vetoed")
		p.fail(err)
		return err
	case phase == pb.Phase_PHASE_CAPTURED:
	default:
		h = nil
	}
	p.switchMu.Unlock()
	if h == nil {
		return nil
	}
	return h.wait(ctx)
}

// capture stops the VFs, reads their state, and begins to mark the pages they
// wrote. Whatever fails leaves the VFs running and the stop vetoed. Called
// with switchMu held.
func (p *process) capture(ctx context.Context) *hold {
	var run sourceRun
	var holdFor time.Duration
	var uid string
	p.get(func() { holdFor, uid = p.holdFor, p.uid })
	run.stoppedAt = time.Now()
	run.hold = newHold(holdFor, func() { p.veto(uid, fmt.Sprintf("the source gate was held for %v and nobody released it", holdFor)) })
	run.marked = make(chan struct{})

	cctx, cancel := context.WithTimeout(ctx, quiesceTimeout)
	defer cancel()
	states, steps, quiescedAt, err := p.quiesceAll(cctx, uid)
	if err != nil {
		err = fmt.Errorf("capture: %w", err)
		p.fail(err)
		run.hold.decide(err)
		close(run.marked)
		p.stopTracking()
		p.set(func() {
			run.ended = err.Error()
			p.source = run
			p.phase = pb.Phase_PHASE_RUNNING
		})
		return run.hold
	}
	run.states, run.steps, run.quiescedAt = states, steps, quiescedAt
	p.set(func() {
		p.source = run
		p.phase = pb.Phase_PHASE_CAPTURED
	})
	go p.mark(run.hold, run.marked)
	return run.hold
}

// quiesceAll returns with every VF quiet and captured, or with every VF
// running as before.
func (p *process) quiesceAll(ctx context.Context, uid string) (map[string]*compsc.State, []*pb.Step, time.Time, error) {
	var steps []*pb.Step
	begin := time.Now()
	tables := map[*iface]qemu.PCIState{}
	for _, i := range p.interfaces() {
		// Reading the MSI-X table through QEMU is also the fence behind which
		// every posted doorbell has arrived.
		s, err := i.pciState(ctx)
		if err != nil {
			return nil, nil, begin, fmt.Errorf("interface %s: %w", i.cfg.Name, err)
		}
		tables[i] = s
	}
	steps = append(steps, step("source/drain", begin))

	quiescedAt := time.Now()
	undo := func(n int) {
		for _, i := range p.interfaces()[:n] {
			if err := i.unquiesce(); err != nil {
				p.fail(fmt.Errorf("interface %s does not run again: %w", i.cfg.Name, err))
			}
		}
	}
	for n, i := range p.interfaces() {
		if err := i.quiesce(ctx); err != nil {
			undo(n)
			return nil, nil, begin, fmt.Errorf("interface %s: quiesce: %w", i.cfg.Name, err)
		}
	}
	steps = append(steps, step("source/quiesce", quiescedAt))

	captureAt := time.Now()
	states := map[string]*compsc.State{}
	for _, i := range p.interfaces() {
		s, err := i.capture(ctx, tables[i])
		if err != nil {
			undo(len(p.interfaces()))
			return nil, nil, begin, fmt.Errorf("interface %s: %w", i.cfg.Name, err)
		}
		s.MigrationUID = uid
		states[i.cfg.Name] = s
	}
	steps = append(steps, step("source/capture", captureAt))
	return states, steps, quiescedAt, nil
}

// mark has QEMU mark every page the devices wrote.
func (p *process) mark(h *hold, marked chan struct{}) {
	ctx, cancel := context.WithTimeout(context.Background(), maxHold)
	defer cancel()
	begin := time.Now()
	var pages []*pb.InterfacePages
	g, ctx := errgroup.WithContext(ctx)
	for _, i := range p.interfaces() {
		n := &pb.InterfacePages{Name: i.cfg.Name}
		pages = append(pages, n)
		if p.opts.Faults.SkipMarking {
			continue
		}
		g.Go(func() (err error) {
			n.PagesMarked, err = i.markPages(ctx)
			return err
		})
	}
	err := g.Wait()
	if err != nil {
		err = fmt.Errorf("marking device-written pages: %w", err)
		p.fail(err)
	}
	p.set(func() {
		if p.source.hold == h {
			p.source.pages, p.source.markError = pages, err
			p.source.steps = append(p.source.steps, step("source/mark", begin))
		}
	})
	close(marked)
}

// AwaitCapture implements the control service.
func (p *process) AwaitCapture(ctx context.Context, r *pb.AwaitCaptureRequest) (*pb.AwaitCaptureReply, error) {
	epochs := map[string]uint64{}
	for _, e := range r.Epochs {
		epochs[e.Name] = e.Epoch
	}
	var run sourceRun
	err := p.await(ctx, func() (bool, error) {
		if p.uid != r.MigrationUid {
			return false, errNoMigration(r.MigrationUid, p.uid, p.phase)
		}
		if p.source.ended != "" {
			return false, status.Error(codes.Aborted, p.source.ended)
		}
		run = p.source
		run.steps = append([]*pb.Step(nil), p.source.steps...)
		switch p.phase {
		case pb.Phase_PHASE_CAPTURED, pb.Phase_PHASE_RELINQUISHED:
			return true, nil
		case pb.Phase_PHASE_SOURCE_PREPARED:
			return false, nil
		}
		return false, errNoMigration(r.MigrationUid, p.uid, p.phase)
	})
	if err != nil {
		return nil, rpcError(err)
	}
	reply := &pb.AwaitCaptureReply{Steps: run.steps}
	for _, i := range p.interfaces() {
		s := *run.states[i.cfg.Name]
		s.Epoch = epochs[i.cfg.Name]
		b, err := s.Encode()
		if err != nil {
			return nil, status.Errorf(codes.Internal, "interface %s: %v", i.cfg.Name, err)
		}
		reply.States = append(reply.States, &pb.InterfaceState{Name: i.cfg.Name, State: b, Epoch: s.Epoch})
	}
	reply.VmStoppedFor = durationpb.New(time.Since(run.stoppedAt))
	reply.DeviceStoppedFor = durationpb.New(time.Since(run.quiescedAt))
	return reply, nil
}

// ReleaseSource implements the control service.
func (p *process) ReleaseSource(ctx context.Context, r *pb.ReleaseSourceRequest) (*pb.ReleaseSourceReply, error) {
	phase, uid := p.current()
	if uid != r.MigrationUid {
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	if r.Veto {
		p.veto(uid, r.Reason)
		return &pb.ReleaseSourceReply{}, nil
	}
	var run sourceRun
	p.get(func() { run = p.source })
	if run.hold == nil {
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	select {
	case <-run.marked:
	case <-ctx.Done():
		return nil, rpcError(ctx.Err())
	}
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	p.get(func() { run, phase = p.source, p.phase })
	if phase != pb.Phase_PHASE_CAPTURED && phase != pb.Phase_PHASE_RELINQUISHED {
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	if run.markError != nil {
		return nil, status.Error(codes.Internal, run.markError.Error())
	}
	if run.hold.pending() {
		p.set(func() { p.source.steps = append(p.source.steps, step("source/hold", run.hold.since)) })
		run.hold.decide(nil)
	}
	reply := &pb.ReleaseSourceReply{}
	p.get(func() {
		reply.Pages = p.source.pages
		reply.Steps = append(reply.Steps, p.source.steps...)
	})
	return reply, nil
}

// veto ends a hold of the source gate with the VFs running again.
func (p *process) veto(uid, reason string) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, have := p.current()
	if have != uid || phase != pb.Phase_PHASE_CAPTURED {
		return
	}
	p.backToRunning("vetoed: " + reason)
}

// backToRunning lets captured VFs run again as if nothing had been, and ends
// the migration here. A hold that is still pending is failed, so that QEMU
// resumes the VM. Called with switchMu held.
func (p *process) backToRunning(why string) {
	for _, i := range p.interfaces() {
		if err := i.unquiesce(); err != nil {
			p.fail(fmt.Errorf("interface %s does not run again: %w", i.cfg.Name, err))
		}
	}
	p.stopTracking()
	var h *hold
	p.set(func() {
		h = p.source.hold
		p.phase = pb.Phase_PHASE_RUNNING
		p.source.ended = why
		p.lastError = why
	})
	if h != nil {
		h.decide(errors.New(why))
	}
	for _, i := range p.interfaces() {
		i.kick()
	}
	p.log.Info("VFs run again on the source", "why", why)
}

func (p *process) stopTracking() {
	for _, i := range p.interfaces() {
		i.untrack()
	}
}

// Relinquish implements the control service: the point of no return.
func (p *process) Relinquish(_ context.Context, r *pb.RelinquishRequest) (*pb.RelinquishReply, error) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	if uid != r.MigrationUid {
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	var h *hold
	p.get(func() { h = p.source.hold })
	switch {
	case phase == pb.Phase_PHASE_RELINQUISHED:
	case phase == pb.Phase_PHASE_CAPTURED && !h.pending():
		p.set(func() { p.phase = pb.Phase_PHASE_RELINQUISHED })
		p.log.Info("VFs relinquished to the target", "migration", uid)
	default:
		return nil, errNoMigration(r.MigrationUid, uid, phase)
	}
	return &pb.RelinquishReply{}, nil
}

// CancelSource implements the control service.
func (p *process) CancelSource(_ context.Context, r *pb.CancelSourceRequest) (*pb.CancelSourceReply, error) {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, uid := p.current()
	if uid != r.MigrationUid {
		return &pb.CancelSourceReply{}, nil // never prepared here, or long over
	}
	switch phase {
	case pb.Phase_PHASE_SOURCE_PREPARED:
		p.stopTracking()
		p.set(func() {
			p.phase = pb.Phase_PHASE_RUNNING
			p.source.ended, p.source.giveUp = "cancelled: "+r.Reason, true
		})
		p.cancelMigration()
	case pb.Phase_PHASE_CAPTURED:
		p.backToRunning("cancelled: " + r.Reason)
	case pb.Phase_PHASE_RELINQUISHED:
		if !r.Reclaim {
			return nil, status.Error(codes.FailedPrecondition, "the VFs were relinquished to the target; they can be used here again only once the target's are known to be silent")
		}
		p.backToRunning("reclaimed: " + r.Reason)
	}
	return &pb.CancelSourceReply{}, nil
}

// resumed is called when the VM runs: QEMU said so, or the guest touched a VF
// that was stopped.
func (p *process) resumed() {
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	phase, _ := p.current()
	switch phase {
	case pb.Phase_PHASE_CAPTURED:
		p.backToRunning("QEMU resumed the VM on the source: its migration failed after the capture")
	case pb.Phase_PHASE_RELINQUISHED:
		p.fail(errors.New("QEMU resumed the VM on the source although its VFs were relinquished; they run again once the target confirms that its own are silent"))
	case pb.Phase_PHASE_TARGET_ACTIVE:
		p.targetRuns()
	}
}
