package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/api/v1alpha1"
)

// +kubebuilder:rbac:groups=compsc.io,resources=vfnodes,verbs=get

// reconcileSource plays the source's part:
//  1. A migration that failed is undone.
//  2. Once the target's VFs are pinned, a worker takes the rest in hand.
func (a *agent) reconcileSource(ctx context.Context, m *vfMigration) (ctrl.Result, error) {
	if m.Status.Failure != nil {
		return a.undoSource(ctx, m)
	}
	if is(m, v1alpha1.ConditionTargetPinned) && !isFalse(m, v1alpha1.ConditionPrepared) &&
		!is(m, v1alpha1.ConditionCaptured) && !isFalse(m, v1alpha1.ConditionCaptured) {
		m := m.DeepCopy()
		a.work.ensure(workKey{m.UID, source}, func(ctx context.Context) { newSourceRun(a, m).run(ctx) })
	}
	return ctrl.Result{}, nil
}

// sourceRun is one pass through the source's part of a migration.
type sourceRun struct {
	*agent
	m    *vfMigration
	uid  string
	hold time.Duration
	dev  *device
	peer *peer.Conn
}

func newSourceRun(a *agent, m *vfMigration) *sourceRun {
	return &sourceRun{agent: a, m: m, uid: string(m.UID), hold: m.Spec.Timeouts.HoldTimeout()}
}

// failure is an error with the reason that a condition will have for it.
type failure struct {
	reason string
	err    error
}

func (f *failure) Error() string { return say(f.err) }

func failed(reason, format string, args ...any) *failure {
	return &failure{reason, fmt.Errorf(format, args...)}
}

func (r *sourceRun) run(ctx context.Context) {
	log := r.log.With("migration", r.m.Namespace+"/"+r.m.Name, "side", "source")
	var err error
	if r.dev, err = r.devices.get(podUID(r.m.Status.Source)); err != nil {
		log.Error("source", "error", err)
		return
	}
	defer r.dev.Close()
	defer func() {
		if r.peer != nil {
			r.peer.Close()
		}
	}()
	condition := v1alpha1.ConditionPrepared
	f := r.prepare(ctx)
	if f == nil {
		condition = v1alpha1.ConditionCaptured
		f = r.capture(ctx)
	}
	if f == nil || errors.Is(f.err, errOver) || ctx.Err() != nil {
		return
	}
	log.Warn("step failed", "condition", condition, "reason", f.reason, "error", f)
	if err := r.record(ctx, r.m, forward(func(m *vfMigration) { setFalse(m, condition, f.reason, "%s", f) })); err != nil {
		log.Warn("status not written", "error", err)
	}
}

// prepare arms the source's gate and asks for the target's verdict, unless
// both have been done.
func (r *sourceRun) prepare(ctx context.Context) *failure {
	var st *controlpb.StatusReply
	if err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) (err error) {
		st, err = r.status(ctx, r.dev)
		return err
	}); err != nil {
		return r.deviceFailure(err)
	}
	if f := r.understands(st.GetProtocols(), "the device process of pod "+r.m.Status.Source.PodName); f != nil {
		return f
	}
	switching := st.GetMigrationUid() == r.uid && (st.GetPhase() == controlpb.Phase_PHASE_CAPTURED || st.GetPhase() == controlpb.Phase_PHASE_RELINQUISHED)
	if f := r.connect(ctx); f != nil {
		return f
	}
	if err := r.clearOrphan(ctx, st); err != nil {
		return r.deviceFailure(err)
	}
	if switching || is(r.m, v1alpha1.ConditionPrepared) {
		return nil
	}

	// Written before anything is touched, so that nobody takes an undoing for
	// done that is not; refused if the migration is to be undone by now.
	if err := r.record(ctx, r.m, forward(func(m *vfMigration) {
		if statusOf(m, v1alpha1.ConditionPrepared) == "" {
			setUnknown(m, v1alpha1.ConditionPrepared, v1alpha1.ReasonProgressing, "node %s asks node %s for its verdict", r.node, m.Status.Target.NodeName)
		}
	})); err != nil {
		return &failure{v1alpha1.ReasonProgressing, err}
	}
	var described *controlpb.PrepareSourceReply
	if err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) (err error) {
		described, err = r.dev.PrepareSource(ctx, &controlpb.PrepareSourceRequest{MigrationUid: r.uid, HoldTimeout: durationpb.New(r.hold)})
		return err
	}); err != nil {
		return r.deviceFailure(err)
	}
	if err := r.addAdministration(ctx, st, described.GetInterfaces()); err != nil {
		return &failure{v1alpha1.ReasonDeviceUnavailable, err}
	}
	var verdict *peerpb.PrepareReply
	if err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) (err error) {
		verdict, err = r.peer.Prepare(ctx, &peerpb.PrepareRequest{Migration: named(r.m), Interfaces: described.GetInterfaces(), Protocols: ownProtocols()})
		return err
	}); err != nil {
		return r.peerFailure(err)
	}
	if !verdict.GetAccepted() && verdict.GetReason() == v1alpha1.ReasonVersionMismatch {
		return failed(v1alpha1.ReasonVersionMismatch, "node %s refuses: %s", r.m.Status.Target.NodeName, verdict.GetMessage())
	}
	if !verdict.GetAccepted() {
		return failed(v1alpha1.ReasonIncompatible, "node %s refuses: %s (%s); choose a target whose VFs match", r.m.Status.Target.NodeName, verdict.GetMessage(), verdict.GetReason())
	}
	if err := r.sameEpochs(verdict.GetEpochs()); err != nil {
		return &failure{v1alpha1.ReasonPinFailed, err}
	}
	pfs, _, err := r.inventory(ctx)
	if err != nil {
		return &failure{v1alpha1.ReasonDeviceUnavailable, err}
	}
	vlans := map[string]uint32{}
	for _, i := range described.GetInterfaces() {
		vlans[i.GetName()] = i.GetAdministration().GetVlan()
	}
	// Not awaited: pre-copy may begin, and end, at any moment from here.
	r.work.ensure(workKey{r.m.UID, preparedWriter}, func(ctx context.Context) {
		if err := r.record(ctx, r.m, forward(func(m *vfMigration) {
			for _, i := range st.GetInterfaces() {
				deviceOf(m, i.GetName()).FastPath = i.GetFastPath()
				deviceOf(m, i.GetName()).Source = &v1alpha1.VFReference{PF: pfs[i.GetVf()].Name, VF: i.GetVf(), MAC: i.GetMac(), VLAN: int32(vlans[i.GetName()]), Epoch: int64(i.GetEpoch())}
			}
			setPrepared(m)
		})); err != nil && !errors.Is(err, errOver) {
			r.log.Warn("Prepared not written", "migration", r.m.Name, "error", err)
		}
	})
	return nil
}

// clearOrphan ends a preparation whose VFMigration is no more, so that it does
// not stand in the way of this one.
func (r *sourceRun) clearOrphan(ctx context.Context, st *controlpb.StatusReply) error {
	uid := st.GetMigrationUid()
	if uid == r.uid || st.GetPhase() != controlpb.Phase_PHASE_SOURCE_PREPARED {
		return nil
	}
	var list v1alpha1.VFMigrationList
	if err := r.live.List(ctx, &list, client.InNamespace(r.m.Namespace)); err != nil {
		return fmt.Errorf("listing VFMigrations: %w", err)
	}
	for i := range list.Items {
		if string(list.Items[i].UID) == uid && !over(&list.Items[i]) {
			return fmt.Errorf("it is prepared for VFMigration %s; wait for its end, or abort it", list.Items[i].Name)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, r.limits.call)
	defer cancel()
	_, err := r.dev.CancelSource(ctx, &controlpb.CancelSourceRequest{MigrationUid: uid, Reason: "its VFMigration is no more"})
	return err
}

func setPrepared(m *vfMigration) {
	if !is(m, v1alpha1.ConditionPrepared) {
		setTrue(m, v1alpha1.ConditionPrepared, "node %s accepts the VFs; both gates are armed", m.Status.Target.NodeName)
	}
}

// connect begins to hold a connection to the target's agent. The address is
// looked up here, before anything stands still.
func (r *sourceRun) connect(ctx context.Context) *failure {
	err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) (err error) {
		r.peer, err = r.peerOf(ctx, r.m.Status.Target.NodeName)
		return err
	})
	if err != nil {
		return r.peerFailure(err)
	}
	return nil
}

// peerOf connects to the agent of a node.
func (a *agent) peerOf(ctx context.Context, node string) (*peer.Conn, error) {
	n := &v1alpha1.VFNode{}
	if err := a.live.Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
		return nil, status.Errorf(codes.Unavailable, "address of the agent of node %s: %v", node, err)
	}
	if n.Status.PeerAddress == "" {
		return nil, status.Errorf(codes.Unavailable, "VFNode %s has no peerAddress: its agent has not registered", node)
	}
	return a.peers.Connect(node, n.Status.PeerAddress)
}

func (r *sourceRun) sameEpochs(got []*controlpb.InterfaceEpoch) error {
	want := map[string]uint64{}
	for _, e := range targetEpochs(r.m) {
		want[e.GetName()] = e.GetEpoch()
	}
	for _, e := range got {
		if want[e.GetName()] != e.GetEpoch() {
			return fmt.Errorf("interface %s: the target's device process has its VF at epoch %d, its agent leased it at epoch %d; start a new VFMigration",
				e.GetName(), e.GetEpoch(), want[e.GetName()])
		}
	}
	return nil
}

func targetEpochs(m *vfMigration) []*controlpb.InterfaceEpoch {
	var out []*controlpb.InterfaceEpoch
	for _, d := range m.Status.Devices {
		if d.Target != nil {
			out = append(out, &controlpb.InterfaceEpoch{Name: d.Interface, Epoch: uint64(d.Target.Epoch)})
		}
	}
	return out
}

// capture waits for the VM's stop and sees the state to the target. Between
// the device process's answer and the release of its hold there is nothing
// but the delivery.
func (r *sourceRun) capture(ctx context.Context) *failure {
	captured, f := r.awaitCapture(ctx)
	if f != nil {
		return f
	}
	begin := time.Now()
	// From here on to the release nothing is broken off: the VM stands still.
	held := context.WithoutCancel(ctx)
	f = &failure{v1alpha1.ReasonAborted, context.Canceled}
	if ctx.Err() == nil {
		f = r.deliver(held, captured)
	}
	if f != nil && r.relinquished(held) {
		f = nil // it was delivered before this agent was restarted
	}
	delivered := time.Since(begin)
	release := &controlpb.ReleaseSourceRequest{MigrationUid: r.uid}
	if f != nil {
		release.Veto, release.Reason = true, f.Error()
	}
	rctx, cancel := context.WithTimeout(held, r.hold+r.limits.call)
	defer cancel()
	released, err := r.dev.ReleaseSource(rctx, release)
	if f != nil {
		return f
	}
	if err != nil {
		return failed(v1alpha1.ReasonCaptureFailed, "the device process could not let QEMU go on: %s", say(err))
	}
	err = r.record(ctx, r.m, always(func(m *vfMigration) {
		for _, s := range captured.GetStates() {
			deviceOf(m, s.GetName()).StateBytes = int64(len(s.GetState()))
		}
		for _, p := range released.GetPages() {
			deviceOf(m, p.GetName()).PagesMarked = int64(p.GetPagesMarked())
		}
		addSteps(m, source, captured.GetSteps())
		addSteps(m, source, released.GetSteps())
		addSteps(m, source, []*controlpb.Step{timed("deliver", delivered)})
		setPrepared(m) // if its own writer has not come to it
		setTrue(m, v1alpha1.ConditionCaptured, "the VM is stopped; node %s has the state of its VFs", m.Status.Target.NodeName)
	}))
	if err != nil {
		return &failure{v1alpha1.ReasonCaptureFailed, err}
	}
	return nil
}

// relinquished tells whether the VFs are known to belong to the target.
func (r *sourceRun) relinquished(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, r.limits.call)
	defer cancel()
	st, err := r.status(ctx, r.dev)
	return err == nil && st.GetMigrationUid() == r.uid && st.GetPhase() == controlpb.Phase_PHASE_RELINQUISHED
}

func (r *sourceRun) awaitCapture(ctx context.Context) (*controlpb.AwaitCaptureReply, *failure) {
	for {
		wctx, cancel := context.WithTimeout(ctx, r.limits.watch)
		reply, err := r.dev.AwaitCapture(wctx, &controlpb.AwaitCaptureRequest{MigrationUid: r.uid, Epochs: targetEpochs(r.m)})
		cancel()
		switch {
		case err == nil:
			return reply, nil
		case ctx.Err() != nil:
			return nil, &failure{v1alpha1.ReasonAborted, ctx.Err()}
		case status.Code(err) == codes.DeadlineExceeded:
			continue
		case transient(err):
			// Only its socket knows whether the process lives.
			if err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) error {
				_, err := r.status(ctx, r.dev)
				return err
			}); err != nil {
				return nil, r.deviceFailure(err)
			}
		default:
			return nil, failed(v1alpha1.ReasonCaptureFailed, "the device process of the source: %s", say(err))
		}
	}
}

// deliver gives the state to the target's agent, within the time that the
// hold leaves: a quarter of it is kept for the marking of pages.
func (r *sourceRun) deliver(ctx context.Context, captured *controlpb.AwaitCaptureReply) *failure {
	budget := max(r.hold*3/4-captured.GetVmStoppedFor().AsDuration(), 100*time.Millisecond)
	begin := time.Now()
	var verdict *peerpb.DeliverReply
	err := persist(ctx, budget, min(r.limits.pause, 20*time.Millisecond), func(ctx context.Context) (err error) {
		sofar := time.Since(begin)
		verdict, err = r.peer.Deliver(ctx, &peerpb.DeliverRequest{Migration: named(r.m), States: captured.GetStates(),
			VmStoppedFor:     durationpb.New(captured.GetVmStoppedFor().AsDuration() + sofar),
			DeviceStoppedFor: durationpb.New(captured.GetDeviceStoppedFor().AsDuration() + sofar)})
		return err
	})
	switch {
	case err != nil:
		return r.peerFailure(err)
	case !verdict.GetAccepted():
		return failed(v1alpha1.ReasonStateRejected, "node %s rejects the captured state: %s (%s); the VM goes on at the source", r.m.Status.Target.NodeName, verdict.GetMessage(), verdict.GetReason())
	}
	return nil
}

func (r *sourceRun) deviceFailure(err error) *failure {
	return failed(v1alpha1.ReasonDeviceUnavailable, "the device process of pod %s on the source node %s: %s; see the log of its compsc container", r.m.Status.Source.PodName, r.node, say(err))
}

func (r *sourceRun) peerFailure(err error) *failure {
	reason := v1alpha1.ReasonPeerUnavailable
	return failed(reason, "the agent of node %s: %s; see that it runs, and that node %s reaches it", r.m.Status.Target.NodeName, say(err), r.node)
}

// undoSource lets the VM go on at the source. Once the VFs were given up for
// good, only the target can say whether that is still possible.
func (a *agent) undoSource(ctx context.Context, m *vfMigration) (ctrl.Result, error) {
	tooLate := isFalse(m, v1alpha1.ConditionRolledBack) && reasonOf(m, v1alpha1.ConditionRolledBack) == v1alpha1.ReasonPointOfNoReturn
	if is(m, v1alpha1.ConditionRolledBack) || tooLate && !isFalse(m, v1alpha1.ConditionRestored) {
		return ctrl.Result{}, nil
	}
	for _, s := range []side{source, preparedWriter} {
		if err := a.work.stop(ctx, workKey{m.UID, s}); err != nil {
			return ctrl.Result{}, err
		}
	}
	f := a.takeBack(ctx, m)
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctrl.Result{}, ctx.Err()
	}
	what := tryCancelSource + string(m.UID)
	mutate := func(m *vfMigration) {
		setTrue(m, v1alpha1.ConditionRolledBack, "the VM's VFs work on the source node %s", a.node)
	}
	var result ctrl.Result
	switch {
	case f == nil:
		a.tries.worked(what)
	case f.reason == v1alpha1.ReasonPointOfNoReturn:
		a.tries.worked(what)
		mutate = func(m *vfMigration) { setFalse(m, v1alpha1.ConditionRolledBack, f.reason, "%s", f) }
	default:
		result.RequeueAfter = a.limits.pause
		mutate = func(m *vfMigration) { setUnknown(m, v1alpha1.ConditionRolledBack, f.reason, "%s", f) }
		// A peer may come back; a device process that ended will not.
		if a.tries.failed(what) > a.limits.retry {
			result.RequeueAfter = a.limits.pause * 8
			if f.reason == v1alpha1.ReasonDeviceUnavailable {
				mutate = func(m *vfMigration) { setFalse(m, v1alpha1.ConditionRolledBack, f.reason, "%s", f) }
			}
		}
	}
	err := a.update(ctx, m, always(mutate))
	if errors.Is(err, errOver) {
		return ctrl.Result{}, nil
	}
	return result, err
}

// takeBack returns nil once the source's device process is in plain running.
func (a *agent) takeBack(ctx context.Context, m *vfMigration) *failure {
	ctx, cancel := context.WithTimeout(ctx, 3*a.limits.call)
	defer cancel()
	r := newSourceRun(a, m)
	var err error
	if r.dev, err = a.devices.get(podUID(m.Status.Source)); err != nil {
		return r.deviceFailure(err)
	}
	defer r.dev.Close()
	cancelSource := func(reclaim bool) error {
		ctx, cancel := context.WithTimeout(ctx, a.limits.call)
		defer cancel()
		_, err := r.dev.CancelSource(ctx, &controlpb.CancelSourceRequest{MigrationUid: r.uid, Reason: why(m), Reclaim: reclaim})
		return err
	}
	err = cancelSource(false)
	if status.Code(err) == codes.FailedPrecondition {
		if f := r.withdraw(ctx); f != nil {
			return f
		}
		if err := a.answerAttached(ctx, r.dev, true); err != nil {
			return r.deviceFailure(err)
		}
		err = cancelSource(true)
	}
	if err != nil {
		return r.deviceFailure(err)
	}
	st, err := a.status(ctx, r.dev)
	if err != nil {
		return r.deviceFailure(err)
	}
	if st.GetMigrationUid() == r.uid && st.GetPhase() != controlpb.Phase_PHASE_RUNNING {
		return failed(v1alpha1.ReasonRollingBack, "the source's device process is in %s: %s", st.GetPhase(), st.GetLastError())
	}
	for _, i := range st.GetInterfaces() {
		if i.GetLost() {
			return failed(v1alpha1.ReasonDeviceUnavailable, "interface %s: VF %s was taken away on node %s while the VM had it; the VM has no VF until it is restarted", i.GetName(), i.GetVf(), a.node)
		}
	}
	if !st.GetQemuConnected() {
		return failed(v1alpha1.ReasonDeviceUnavailable, "QEMU of pod %s is not connected to its VFs any more: the VM has no VF until it is restarted", m.Status.Source.PodName)
	}
	return nil
}

// withdraw has the target's VFs silenced for good.
func (r *sourceRun) withdraw(ctx context.Context) *failure {
	if r.m.Status.Target == nil {
		return failed(v1alpha1.ReasonPeerUnavailable, "the VFs were given up, but status.target names no node to ask")
	}
	conn, err := r.peerOf(ctx, r.m.Status.Target.NodeName)
	if err != nil {
		return r.peerFailure(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, r.limits.call)
	defer cancel()
	_, err = conn.Withdraw(ctx, &peerpb.WithdrawRequest{Migration: named(r.m), Reason: why(r.m)})
	switch {
	case status.Code(err) == codes.FailedPrecondition:
		return failed(v1alpha1.ReasonPointOfNoReturn, "node %s owns the VFs: %s; the migration goes on to its end", r.m.Status.Target.NodeName, say(err))
	case err != nil:
		return r.peerFailure(err)
	}
	return nil
}
