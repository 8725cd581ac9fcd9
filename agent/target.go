package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/api/v1alpha1"
)

// reconcileTarget plays the target's part:
//  1. A migration that failed is undone, unless the VM runs here.
//  2. The target pod's VFs are leased and attached, silent.
//  3. Once the device process is prepared, a worker takes the rest in hand.
func (a *agent) reconcileTarget(ctx context.Context, m *vfMigration) (ctrl.Result, error) {
	if m.Status.Failure != nil {
		return a.undoTarget(ctx, m)
	}
	if isFalse(m, v1alpha1.ConditionTargetPinned) || isFalse(m, v1alpha1.ConditionRestored) || is(m, v1alpha1.ConditionVerified) {
		return ctrl.Result{}, nil
	}
	if !is(m, v1alpha1.ConditionTargetPinned) {
		return a.pinTarget(ctx, m)
	}
	// After a restart the device process tells how far this has come. Else
	// the source's agent asks, and Prepare starts the worker.
	d, err := a.devices.get(podUID(m.Status.Target))
	if err != nil {
		return ctrl.Result{}, err
	}
	defer d.Close()
	st, err := a.status(ctx, d)
	what := tryTarget + string(m.UID)
	if transient(err) {
		if a.tries.failed(what) < a.limits.retry {
			return ctrl.Result{RequeueAfter: a.limits.pause}, nil
		}
		condition := v1alpha1.ConditionRestored
		if is(m, condition) {
			condition = v1alpha1.ConditionVerified
		}
		f := a.targetFailure(m, err)
		return ctrl.Result{}, a.ignoreOver(a.update(ctx, m, always(func(m *vfMigration) { setFalse(m, condition, f.reason, "%s", f) })))
	}
	a.tries.worked(what)
	if err != nil {
		return ctrl.Result{}, err
	}
	if st.GetMigrationUid() == string(m.UID) {
		a.startTarget(m)
	}
	return ctrl.Result{}, nil
}

// pinTarget leases the target pod's VFs and attaches them.
func (a *agent) pinTarget(ctx context.Context, m *vfMigration) (ctrl.Result, error) {
	if statusOf(m, v1alpha1.ConditionTargetPinned) == "" {
		// Also asks the API server, which is ahead of the cache, whether the
		// migration still goes forward. If it ends later, what was attached
		// is silent, and is taken back.
		if err := a.update(ctx, m, forward(func(m *vfMigration) {
			setUnknown(m, v1alpha1.ConditionTargetPinned, v1alpha1.ReasonProgressing, "node %s looks for the VFs of pod %s", a.node, m.Status.Target.PodName)
		})); err != nil {
			return ctrl.Result{}, a.ignoreOver(err)
		}
	}
	pins, err := a.pinTargetPod(ctx, m)
	what := tryPin + string(m.UID)
	var w *waiting
	var held *heldError
	var f *failure
	switch {
	case errors.As(err, &w):
		// The manager bounds it; people are told what is waited for.
		message := cut(fmt.Sprintf("node %s waits: %s", a.node, err), maxMessage)
		if c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionTargetPinned); c != nil && c.Message == message {
			return ctrl.Result{RequeueAfter: w.again}, nil
		}
		return ctrl.Result{RequeueAfter: w.again}, a.ignoreOver(a.update(ctx, m, forward(func(m *vfMigration) {
			setUnknown(m, v1alpha1.ConditionTargetPinned, v1alpha1.ReasonProgressing, "%s", message)
		})))
	case err != nil:
		since := a.tries.failed(what)
		a.log.Warn("pinning", "migration", m.Namespace+"/"+m.Name, "error", err, "for", since)
		if !errors.As(err, &f) && since < a.limits.retry {
			return ctrl.Result{RequeueAfter: a.limits.pause}, nil
		}
		reason := v1alpha1.ReasonPinFailed
		if f != nil {
			reason = f.reason
		} else if transient(err) && !errors.As(err, &held) {
			reason = v1alpha1.ReasonDeviceUnavailable
		}
		return ctrl.Result{}, a.ignoreOver(a.update(ctx, m, forward(func(m *vfMigration) {
			setFalse(m, v1alpha1.ConditionTargetPinned, reason, "node %s: %s", a.node, err)
		})))
	}
	a.tries.worked(what)
	return ctrl.Result{}, a.ignoreOver(a.update(ctx, m, forward(func(m *vfMigration) {
		for _, p := range pins {
			ref := p.ref
			deviceOf(m, p.iface).Target = &ref
		}
		setTrue(m, v1alpha1.ConditionTargetPinned, "%d VF(s) leased to pod %s on node %s and attached, silent", len(pins), m.Status.Target.PodName, a.node)
	})))
}

func (a *agent) ignoreOver(err error) error {
	if errors.Is(err, errOver) {
		return nil
	}
	return err
}

func (a *agent) pinTargetPod(ctx context.Context, m *vfMigration) ([]pinned, error) {
	t := m.Status.Target
	pod := &corev1.Pod{}
	err := a.client.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: t.PodName}, pod)
	if apierrors.IsNotFound(err) {
		return nil, wait(seldom, "pod %s is not known here yet", t.PodName)
	}
	if err != nil {
		return nil, err
	}
	switch {
	case pod.UID != t.PodUID:
		return nil, fmt.Errorf("pod %s has UID %s, the migration's had %s: it was made anew; start a new VFMigration", t.PodName, pod.UID, t.PodUID)
	case !kubevirt.IsTarget(pod):
		return nil, fmt.Errorf("pod %s was not made to receive a VM: it has no label %s", t.PodName, kubevirt.LabelMigrationJobUID)
	case kubevirt.Finished(pod) || !pod.DeletionTimestamp.IsZero():
		return nil, fmt.Errorf("pod %s has ended or is being deleted", t.PodName)
	}
	if has, err := a.hasVFIOUser(pod); err == nil && !has {
		return nil, failed(v1alpha1.ReasonIncompatible, "pod %s: %s", t.PodName, noVFIOUser)
	}
	pins, err := a.pin(ctx, pod, handoff.RoleTarget)
	if err == nil && len(pins) == 0 {
		err = fmt.Errorf("the VMI has no interface with the network binding %s", kubevirt.BindingName)
	}
	return pins, err
}

func (a *agent) startTarget(m *vfMigration) {
	m = m.DeepCopy()
	a.work.ensure(workKey{m.UID, target}, func(ctx context.Context) {
		r := &targetRun{agent: a, m: m, uid: string(m.UID), hold: m.Spec.Timeouts.HoldTimeout(),
			log: a.log.With("migration", m.Namespace+"/"+m.Name, "side", "target")}
		r.run(ctx)
	})
}

// targetRun is one pass through the target's part of a migration.
type targetRun struct {
	*agent
	m    *vfMigration
	uid  string
	hold time.Duration
	log  interface {
		Warn(msg string, args ...any)
	}
	dev  *device
	peer *peer.Conn
}

func (r *targetRun) run(ctx context.Context) {
	var err error
	if r.dev, err = r.devices.get(podUID(r.m.Status.Target)); err != nil {
		r.log.Warn("target", "error", err)
		return
	}
	defer r.dev.Close()
	// The address is looked up before anything stands still; without one the
	// failure shows when it is needed.
	if err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) (err error) {
		r.peer, err = r.peerOf(ctx, r.m.Status.Source.NodeName)
		return err
	}); err != nil {
		r.log.Warn("no way to the source's agent yet", "error", say(err))
	} else {
		defer r.peer.Close()
	}
	condition := v1alpha1.ConditionRestored
	f := r.restore(ctx)
	if f == nil {
		condition = v1alpha1.ConditionVerified
		f = r.verify(ctx)
	}
	if f == nil || errors.Is(f.err, errOver) || ctx.Err() != nil {
		return
	}
	r.log.Warn("step failed", "condition", condition, "reason", f.reason, "error", f)
	if err := r.record(ctx, r.m, always(func(m *vfMigration) { setFalse(m, condition, f.reason, "%s", f) })); err != nil {
		r.log.Warn("status not written", "error", err)
	}
}

// restore waits for QEMU to start the VM, has the source give its VFs up, and
// enables those here. It enables nothing unless the source has agreed.
func (r *targetRun) restore(ctx context.Context) *failure {
	if f := r.awaitStart(ctx); f != nil {
		return f
	}
	begin := time.Now()
	// From here on to the activation nothing is broken off: the VM stands still.
	held := context.WithoutCancel(ctx)
	if ctx.Err() != nil {
		return &failure{v1alpha1.ReasonAborted, ctx.Err()}
	}
	if f := r.commit(held); f != nil {
		r.silence(held, f)
		return f
	}
	committed := time.Since(begin)
	active, err := r.activate(held)
	if err != nil {
		f := failed(v1alpha1.ReasonRestoreFailed, "the target's VFs did not take the state: %s", say(err))
		if !r.silence(held, f) {
			return f
		}
		// Only the answer was lost.
		if active, err = r.activate(held); err != nil {
			return f
		}
	}
	r.announce(held, active)
	err = r.record(ctx, r.m, always(func(m *vfMigration) {
		for _, i := range active.GetInterfaces() {
			d := deviceOf(m, i.GetName())
			d.ReplayedOperations, d.HeadsStrategy = int32(i.GetReplayedOperations()), i.GetHeadsStrategy()
		}
		addSteps(m, target, active.GetSteps())
		addSteps(m, target, []*controlpb.Step{timed("commit", committed)})
		setTrue(m, v1alpha1.ConditionRestored, "the VFs on node %s carry the state; the VM may start", r.node)
	}))
	if err != nil {
		return &failure{v1alpha1.ReasonRestoreFailed, err}
	}
	return nil
}

// announce tells the network where the guest's addresses are now, for VFs that
// cannot do so themselves.
func (r *targetRun) announce(ctx context.Context, active *controlpb.ActivateReply) {
	ctx, cancel := context.WithTimeout(ctx, r.limits.call)
	defer cancel()
	for _, i := range active.GetInterfaces() {
		t := deviceOf(r.m, i.GetName()).Target
		if len(i.GetAnnouncement()) == 0 || t == nil {
			continue
		}
		if err := r.host.Announce(ctx, t.VF, i.GetAnnouncement()); err != nil {
			// The guest's first frame will tell as well.
			r.log.Warn("the guest's address was not announced", "interface", i.GetName(), "error", err)
		}
	}
}

func (r *targetRun) awaitStart(ctx context.Context) *failure {
	for {
		wctx, cancel := context.WithTimeout(ctx, r.limits.watch)
		_, err := r.dev.AwaitStart(wctx, &controlpb.AwaitStartRequest{MigrationUid: r.uid})
		cancel()
		if f, again := r.waited(ctx, err); !again {
			if f != nil && f.reason == v1alpha1.ReasonRestoreFailed {
				// Nothing has been restored: the VM never came here.
				f.reason = v1alpha1.ReasonMigrationFailed
			}
			return f
		}
	}
}

// waited judges the end of a waiting call to the device process; again asks to
// make it anew.
func (r *targetRun) waited(ctx context.Context, err error) (f *failure, again bool) {
	switch {
	case err == nil:
		return nil, false
	case ctx.Err() != nil:
		return &failure{v1alpha1.ReasonAborted, ctx.Err()}, false
	case status.Code(err) == codes.DeadlineExceeded:
		return nil, true
	case transient(err):
		if err := persist(ctx, r.limits.retry, r.limits.pause, func(ctx context.Context) error {
			_, err := r.status(ctx, r.dev)
			return err
		}); err != nil {
			return r.targetFailure(r.m, err), false
		}
		return nil, true
	}
	return failed(v1alpha1.ReasonRestoreFailed, "the device process of the target: %s", say(err)), false
}

// targetFailure is for a device process that cannot be spoken to.
func (a *agent) targetFailure(m *vfMigration, err error) *failure {
	return failed(v1alpha1.ReasonDeviceUnavailable, "the device process of pod %s on the target node %s: %s; see the log of its compsc container", m.Status.Target.PodName, a.node, say(err))
}

// commit has the source give its VFs up for good, the point of no return, and
// those here answer to the VM's addresses. It is not asked for again once the
// VFs are active here.
func (r *targetRun) commit(ctx context.Context) *failure {
	sctx, cancel := context.WithTimeout(ctx, r.limits.call)
	st, err := r.status(sctx, r.dev)
	cancel()
	if err == nil && st.GetMigrationUid() == r.uid && runsHere(st) {
		return nil
	}
	if r.peer == nil {
		return failed(v1alpha1.ReasonPeerUnavailable, "the address of the agent of the source node %s is not known; see that it runs and has a VFNode", r.m.Status.Source.NodeName)
	}
	err = persist(ctx, r.hold*3/4, min(r.limits.pause, 20*time.Millisecond), func(ctx context.Context) error {
		_, err := r.peer.Commit(ctx, &peerpb.CommitRequest{Migration: named(r.m)})
		return err
	})
	switch {
	case transient(err):
		return failed(v1alpha1.ReasonPeerUnavailable, "the agent of the source node %s could not be asked to give its VFs up: %s; see that it runs, and that node %s reaches it", r.m.Status.Source.NodeName, say(err), r.node)
	case err != nil:
		return failed(v1alpha1.ReasonRestoreFailed, "the source node %s does not give its VFs up: %s", r.m.Status.Source.NodeName, say(err))
	}
	if err := r.answerAttached(ctx, r.dev, true); err != nil {
		return failed(v1alpha1.ReasonRestoreFailed, "the target's VFs cannot have the VM's addresses: %s", say(err))
	}
	return nil
}

func runsHere(st *controlpb.StatusReply) bool {
	switch st.GetPhase() {
	case controlpb.Phase_PHASE_TARGET_ACTIVE, controlpb.Phase_PHASE_RUNNING, controlpb.Phase_PHASE_SOURCE_PREPARED,
		controlpb.Phase_PHASE_CAPTURED, controlpb.Phase_PHASE_RELINQUISHED:
		return true
	}
	return false
}

func (r *targetRun) activate(ctx context.Context) (reply *controlpb.ActivateReply, err error) {
	err = persist(ctx, r.limits.call, min(r.limits.pause, 20*time.Millisecond), func(ctx context.Context) (err error) {
		reply, err = r.dev.Activate(ctx, &controlpb.ActivateRequest{MigrationUid: r.uid})
		if gone, gerr := r.dev.gone(ctx); transient(err) && gerr == nil && gone {
			// Its VFs went with it, and the source waits to have its own back.
			return fmt.Errorf("the device process has ended: %s", say(err))
		}
		return err
	})
	return reply, err
}

// silence makes sure that the VFs here are silent, and that QEMU learns that
// the VM must not start here. It returns true when it is too late for that.
func (r *targetRun) silence(ctx context.Context, f *failure) (tooLate bool) {
	ctx, cancel := context.WithTimeout(ctx, r.limits.call)
	defer cancel()
	_, err := r.dev.CancelTarget(ctx, &controlpb.CancelTargetRequest{MigrationUid: r.uid, Reason: f.Error()})
	if err != nil {
		r.log.Warn("cancelling the target", "error", say(err))
	}
	return status.Code(err) == codes.FailedPrecondition
}

// verify waits until the VM runs and its driver uses every VF.
func (r *targetRun) verify(ctx context.Context) *failure {
	for {
		wctx, cancel := context.WithTimeout(ctx, r.limits.watch)
		reply, err := r.dev.AwaitRunning(wctx, &controlpb.AwaitRunningRequest{MigrationUid: r.uid})
		cancel()
		if f, again := r.waited(ctx, err); again {
			continue
		} else if f != nil {
			return f
		}
		err = r.record(ctx, r.m, always(func(m *vfMigration) {
			addSteps(m, target, reply.GetSteps())
			m.Status.Downtime = &v1alpha1.Downtime{}
			m.Status.Downtime.VMStopped.Duration = reply.GetVmStopped().AsDuration()
			m.Status.Downtime.DeviceStopped.Duration = reply.GetDeviceStopped().AsDuration()
			if gap := reply.GetLinkGap(); gap != nil {
				m.Status.Downtime.LinkGap = &metav1.Duration{Duration: gap.AsDuration()}
			}
			setTrue(m, v1alpha1.ConditionVerified, "the VM runs on node %s and its driver uses every VF", r.node)
		}))
		if err != nil {
			return &failure{v1alpha1.ReasonRestoreFailed, err}
		}
		return nil
	}
}

// undoTarget gives the target pod's VFs back, unless the VM runs with them.
func (a *agent) undoTarget(ctx context.Context, m *vfMigration) (ctrl.Result, error) {
	if isFalse(m, v1alpha1.ConditionTargetPinned) && reasonOf(m, v1alpha1.ConditionTargetPinned) == v1alpha1.ReasonReleased {
		return ctrl.Result{}, nil
	}
	what := tryCancelTarget + string(m.UID)
	err := a.cancelTarget(ctx, m, why(m))
	switch {
	case status.Code(err) == codes.FailedPrecondition:
		a.tries.worked(what)
		if !is(m, v1alpha1.ConditionVerified) {
			a.startTarget(m) // the migration goes on to its end
			return ctrl.Result{RequeueAfter: a.limits.pause * 8}, nil
		}
		return ctrl.Result{}, nil
	case err != nil:
		a.log.Warn("undoing the target", "migration", m.Namespace+"/"+m.Name, "error", say(err), "for", a.tries.failed(what))
		return ctrl.Result{RequeueAfter: a.limits.pause * 2}, nil
	}
	a.tries.worked(what)
	t := m.Status.Target
	if err := a.release(ctx, holder{m.Namespace, t.PodName, t.PodUID}); err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{}, a.ignoreOver(a.update(ctx, m, always(func(m *vfMigration) {
		setFalse(m, v1alpha1.ConditionTargetPinned, v1alpha1.ReasonReleased, "the VFs on node %s are silent and free", a.node)
	})))
}

// cancelTarget returns nil once the target's VFs are silent for good, and
// answer to no address of the VM's, and an error with code FailedPrecondition
// when the VM runs with them. It ends the migration's worker, unless the VM is
// known to run.
func (a *agent) cancelTarget(ctx context.Context, m *vfMigration, reason string) error {
	d, err := a.devices.get(podUID(m.Status.Target))
	if err != nil {
		return err
	}
	defer d.Close()
	if st, err := a.status(ctx, d); err == nil && st.GetMigrationUid() == string(m.UID) && runsHere(st) {
		return status.Errorf(codes.FailedPrecondition, "the device process of the target is in %s", st.GetPhase())
	}
	if err := a.work.stop(ctx, workKey{m.UID, target}); err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	ctx, cancel := context.WithTimeout(ctx, a.limits.call)
	defer cancel()
	gone, err := d.gone(ctx)
	if err != nil || !gone { // if it is, its descriptors went with it
		if _, err = d.CancelTarget(ctx, &controlpb.CancelTargetRequest{MigrationUid: string(m.UID), Reason: reason}); err != nil {
			return err
		}
	}
	return a.answerNoMore(ctx, holder{m.Namespace, m.Status.Target.PodName, m.Status.Target.PodUID})
}
