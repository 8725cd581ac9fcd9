package standin

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// vmiNameLabel is how virt-controller finds a VMI's migrations.
const vmiNameLabel = "kubevirt.io/vmi-name"

// errPodDown is KubeVirt's own wording.
var errPodDown = errors.New("target pod is down")

// migrationOfPod maps a target pod to its migration.
func migrationOfPod(_ context.Context, o client.Object) []reconcile.Request {
	name := o.GetAnnotations()[kubevirtv1.MigrationJobNameAnnotation]
	if name == "" {
		return nil
	}
	return []reconcile.Request{{NamespacedName: types.NamespacedName{Namespace: o.GetNamespace(), Name: name}}}
}

// scope is one look at a migration and what belongs to it.
type scope struct {
	m *kubevirtv1.VirtualMachineInstanceMigration
	// v and target are nil if they do not exist.
	v      *kubevirtv1.VirtualMachineInstance
	target *corev1.Pod
}

// reconcileMigration plays virt-controller, and virt-handler on both nodes.
func (s *StandIn) reconcileMigration(ctx context.Context, r reconcile.Request) (ctrl.Result, error) {
	x := &scope{m: &kubevirtv1.VirtualMachineInstanceMigration{}}
	if err := s.client.Get(ctx, r.NamespacedName, x.m); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	m := x.m
	if m.IsFinal() {
		err := update(ctx, s.client, m, func(m *kubevirtv1.VirtualMachineInstanceMigration) {
			controllerutil.RemoveFinalizer(m, kubevirtv1.VirtualMachineInstanceMigrationFinalizer)
		}, func(m *kubevirtv1.VirtualMachineInstanceMigration) error { return s.client.Update(ctx, m) })
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	v := &kubevirtv1.VirtualMachineInstance{}
	switch err := s.client.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.VMIName}, v); {
	case err == nil:
		x.v = v
	case !apierrors.IsNotFound(err):
		return ctrl.Result{}, err
	}
	if x.v != nil {
		o := &corev1.Pod{}
		switch err := s.client.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: launcherName(v, m)}, o); {
		case err == nil:
			x.target = o
		case !apierrors.IsNotFound(err):
			return ctrl.Result{}, err
		}
	}
	return s.step(ctx, x)
}

// step does what the migration's phase asks for.
func (s *StandIn) step(ctx context.Context, x *scope) (ctrl.Result, error) {
	phase := x.m.Status.Phase
	deleted := x.m.DeletionTimestamp != nil
	switch phase {
	case kubevirtv1.MigrationPhaseUnset, kubevirtv1.MigrationPending, kubevirtv1.MigrationScheduling, kubevirtv1.MigrationScheduled:
		// Before the hand-off, deletion is honoured at once.
		if deleted {
			return ctrl.Result{}, s.fail(ctx, x, errors.New("the migration was deleted"))
		}
	}
	if x.v == nil || !x.v.IsRunning() && phase == kubevirtv1.MigrationPhaseUnset {
		return ctrl.Result{}, s.fail(ctx, x, errors.New("the VMI is not running"))
	}
	switch phase {
	case kubevirtv1.MigrationPhaseUnset, kubevirtv1.MigrationPending:
	default:
		if phase != kubevirtv1.MigrationRunning && (x.target == nil || podDown(x.target)) {
			return ctrl.Result{}, s.fail(ctx, x, errPodDown)
		}
	}
	if s.isHeld(Point(phase)) {
		return ctrl.Result{RequeueAfter: retryInterval}, nil
	}
	switch phase {
	case kubevirtv1.MigrationPhaseUnset:
		if err := update(ctx, s.client, x.m, func(m *kubevirtv1.VirtualMachineInstanceMigration) {
			controllerutil.AddFinalizer(m, kubevirtv1.VirtualMachineInstanceMigrationFinalizer)
			setLabel(m, vmiNameLabel, m.Spec.VMIName)
		}, func(m *kubevirtv1.VirtualMachineInstanceMigration) error { return s.client.Update(ctx, m) }); err != nil {
			return ctrl.Result{}, err
		}
		return ctrl.Result{}, s.setPhase(ctx, x.m, kubevirtv1.MigrationPending)
	case kubevirtv1.MigrationPending:
		if err := s.createLauncher(ctx, x.v, x.m); err != nil {
			return ctrl.Result{}, err
		}
		return ctrl.Result{}, s.setPhase(ctx, x.m, kubevirtv1.MigrationScheduling)
	case kubevirtv1.MigrationScheduling:
		if !podReady(x.target) {
			return ctrl.Result{}, nil // the pod's next event comes here again
		}
		if err := s.writeNetworkInfo(ctx, x.target, x.v); err != nil {
			return ctrl.Result{}, err
		}
		return ctrl.Result{}, s.setPhase(ctx, x.m, kubevirtv1.MigrationScheduled)
	case kubevirtv1.MigrationScheduled:
		return ctrl.Result{}, s.handOff(ctx, x)
	case kubevirtv1.MigrationPreparingTarget:
		return ctrl.Result{}, s.publishTarget(ctx, x)
	case kubevirtv1.MigrationTargetReady:
		return ctrl.Result{}, s.startMigration(ctx, x)
	case kubevirtv1.MigrationRunning:
		return ctrl.Result{}, s.followMigration(ctx, x)
	}
	return ctrl.Result{}, fmt.Errorf("migration %s is in phase %q, which the stand-in does not know", x.m.Name, phase)
}

// handOff is virt-controller's hand-off to the target node.
func (s *StandIn) handOff(ctx context.Context, x *scope) error {
	source, err := s.activePod(x.v)
	if err != nil {
		return err
	}
	if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
		v.Status.MigrationState = &kubevirtv1.VirtualMachineInstanceMigrationState{
			MigrationUID: x.m.UID,
			SourceNode:   v.Status.NodeName, SourcePod: source.name,
			TargetNode: x.target.Spec.NodeName, TargetPod: x.target.Name,
		}
		v.Status.ActivePods[x.target.UID] = x.target.Spec.NodeName
		setLabel(v, kubevirtv1.MigrationTargetNodeNameLabel, x.target.Spec.NodeName)
	}); err != nil {
		return err
	}
	return s.setPhase(ctx, x.m, kubevirtv1.MigrationPreparingTarget)
}

// publishTarget is what the target's virt-handler says once its
// virt-launcher is ready to receive. It asks the sidecar for a domain that
// nobody uses: only an error counts, and is tried again.
func (s *StandIn) publishTarget(ctx context.Context, x *scope) error {
	p := s.podOf(x.target.UID)
	if p == nil {
		return s.fail(ctx, x, errPodDown)
	}
	if _, err := s.define(ctx, p, x.v); err != nil {
		return fmt.Errorf("migration %s: %w", x.m.Name, err)
	}
	n := s.cfg.Lab.Nodes[x.target.Spec.NodeName]
	if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
		v.Status.MigrationState.TargetNodeAddress = n.IP.String()
		v.Status.MigrationState.TargetDirectMigrationNodePorts = map[string]int{"49152": 0}
	}); err != nil {
		return err
	}
	return s.setPhase(ctx, x.m, kubevirtv1.MigrationTargetReady)
}

// startMigration is where the source's virt-handler has libvirt migrate.
func (s *StandIn) startMigration(ctx context.Context, x *scope) error {
	if err := s.startJob(x); err != nil {
		return s.fail(ctx, x, err)
	}
	if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
		now := metav1.Now()
		v.Status.MigrationState.StartTimestamp = &now
		v.Status.MigrationState.Mode = kubevirtv1.MigrationPreCopy
	}); err != nil {
		return err
	}
	return s.setPhase(ctx, x.m, kubevirtv1.MigrationRunning)
}

// followMigration passes a deletion on as an abort, and libvirt's verdict
// back.
func (s *StandIn) followMigration(ctx context.Context, x *scope) error {
	j := s.job(x.m.UID)
	if j == nil {
		return s.fail(ctx, x, errors.New("libvirt knows no such job"))
	}
	if x.m.DeletionTimestamp != nil && !x.v.Status.MigrationState.AbortRequested {
		if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
			v.Status.MigrationState.AbortRequested = true
			v.Status.MigrationState.AbortStatus = kubevirtv1.MigrationAbortInProgress
		}); err != nil {
			return err
		}
		j.abort(s.ctx)
	}
	select {
	case <-j.done:
	default:
		return nil // its end comes here again
	}
	if j.err != nil {
		return s.fail(ctx, x, j.err)
	}
	// The VMI is the target's first, and only then is the migration over.
	if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
		now := metav1.Now()
		v.Status.NodeName = j.target.node
		setLabel(v, kubevirtv1.NodeNameLabel, j.target.node)
		delete(v.Labels, kubevirtv1.MigrationTargetNodeNameLabel)
		delete(v.Status.ActivePods, j.source.uid)
		v.Status.MigrationState.TargetNodeDomainDetected = true
		v.Status.MigrationState.TargetNodeDomainReadyTimestamp = &now
	}); err != nil {
		return err
	}
	if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
		now := metav1.Now()
		v.Status.MigrationState.EndTimestamp = &now
		v.Status.MigrationState.Completed = true
		if v.Status.MigrationState.AbortRequested {
			v.Status.MigrationState.AbortStatus = kubevirtv1.MigrationAbortFailed
		}
	}); err != nil {
		return err
	}
	return s.endMigration(ctx, x, kubevirtv1.MigrationSucceeded)
}

// fail ends a migration that did not work. Its target pod goes: by itself
// once it had a domain or was handed over to, else it is deleted.
func (s *StandIn) fail(ctx context.Context, x *scope, why error) error {
	s.log.Info("migration failed", "migration", x.m.Name, "phase", x.m.Status.Phase, "reason", why)
	if x.v != nil && x.v.Status.MigrationState != nil && x.v.Status.MigrationState.MigrationUID == x.m.UID {
		if err := s.updateVMI(ctx, x.v, func(v *kubevirtv1.VirtualMachineInstance) {
			st := v.Status.MigrationState
			now := metav1.Now()
			st.Failed, st.Completed, st.EndTimestamp = true, true, &now
			st.FailureReason = why.Error()
			if st.AbortRequested {
				st.AbortStatus = kubevirtv1.MigrationAbortSucceeded
			}
			delete(v.Labels, kubevirtv1.MigrationTargetNodeNameLabel)
			if x.target != nil {
				delete(v.Status.ActivePods, x.target.UID)
			}
		}); err != nil {
			return err
		}
	}
	if x.target != nil {
		switch x.m.Status.Phase {
		case kubevirtv1.MigrationPending, kubevirtv1.MigrationScheduling, kubevirtv1.MigrationScheduled:
			if err := client.IgnoreNotFound(s.client.Delete(ctx, x.target)); err != nil {
				return err
			}
		default:
			s.finishPod(s.podOf(x.target.UID), corev1.PodFailed)
		}
	}
	return s.endMigration(ctx, x, kubevirtv1.MigrationFailed)
}

func (s *StandIn) endMigration(ctx context.Context, x *scope, phase kubevirtv1.VirtualMachineInstanceMigrationPhase) error {
	var state *kubevirtv1.VirtualMachineInstanceMigrationState
	if x.v != nil && x.v.Status.MigrationState != nil && x.v.Status.MigrationState.MigrationUID == x.m.UID {
		state = x.v.Status.MigrationState
	}
	return s.updateMigration(ctx, x.m, func(m *kubevirtv1.VirtualMachineInstanceMigration) {
		m.Status.MigrationState = state
		movePhase(m, phase)
	})
}

func (s *StandIn) setPhase(ctx context.Context, m *kubevirtv1.VirtualMachineInstanceMigration, phase kubevirtv1.VirtualMachineInstanceMigrationPhase) error {
	s.log.Info("migration", "migration", m.Name, "phase", phase)
	return s.updateMigration(ctx, m, func(m *kubevirtv1.VirtualMachineInstanceMigration) { movePhase(m, phase) })
}

func movePhase(m *kubevirtv1.VirtualMachineInstanceMigration, phase kubevirtv1.VirtualMachineInstanceMigrationPhase) {
	if m.Status.Phase == phase {
		return
	}
	m.Status.Phase = phase
	m.Status.PhaseTransitionTimestamps = append(m.Status.PhaseTransitionTimestamps,
		kubevirtv1.VirtualMachineInstanceMigrationPhaseTransitionTimestamp{Phase: phase, PhaseTransitionTimestamp: metav1.Now()})
}

func (s *StandIn) updateMigration(ctx context.Context, m *kubevirtv1.VirtualMachineInstanceMigration, mutate func(*kubevirtv1.VirtualMachineInstanceMigration)) error {
	err := update(ctx, s.client, m, mutate, func(m *kubevirtv1.VirtualMachineInstanceMigration) error {
		return s.client.Status().Update(ctx, m)
	})
	if err != nil {
		return fmt.Errorf("migration %s: %w", m.Name, err)
	}
	return nil
}
