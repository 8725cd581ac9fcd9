package controllers

import (
	"context"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// intent turns the user's wish to stop into a failure, unless it is too late.
func (r *VFMigrationReconciler) intent(_ context.Context, s *scope) (ctrl.Result, error) {
	if s.vfm.Status.Failure != nil || s.committed() {
		return ctrl.Result{}, nil
	}
	if !s.vfm.DeletionTimestamp.IsZero() {
		s.fail(v1alpha1.ReasonDeleted, "the VFMigration was deleted before its end")
	} else if s.vfm.Spec.Abort {
		s.fail(v1alpha1.ReasonAborted, "spec.abort was set; to move the VM, create a new VFMigration")
	}
	return ctrl.Result{}, nil
}

// accept decides whether the migration may begin. A refusal ends it at once.
func (r *VFMigrationReconciler) accept(ctx context.Context, s *scope) (ctrl.Result, error) {
	if s.is(v1alpha1.ConditionAccepted) {
		return ctrl.Result{}, nil
	}
	if s.vfm.Status.Failure == nil {
		if waiting := s.adoptable(); waiting != "" {
			s.set(v1alpha1.ConditionAccepted, metav1.ConditionUnknown, v1alpha1.ReasonProgressing, waiting)
			return ctrl.Result{}, nil
		}
	}
	if s.vfm.Status.Failure == nil {
		source, open, err := r.preflight(ctx, s.vfm)
		if wait := (*notYet)(nil); errors.As(err, &wait) && s.now.Before(s.patience()) {
			s.set(v1alpha1.ConditionAccepted, metav1.ConditionUnknown, v1alpha1.ReasonProgressing, "Waiting: "+wait.message)
			return ctrl.Result{RequeueAfter: returnLook}, nil
		} else if no := (*refusal)(nil); errors.As(err, &no) {
			s.fail(no.reason, "%s", no.message)
		} else if err != nil {
			return ctrl.Result{}, fmt.Errorf("preflight: %w", err)
		} else {
			s.vfm.Status.Source = source
			start := metav1.NewTime(s.now)
			s.vfm.Status.StartTime = &start
			s.set(v1alpha1.ConditionAccepted, metav1.ConditionTrue, v1alpha1.ConditionAccepted,
				"Everything known beforehand allows the migration."+open)
			return ctrl.Result{}, nil
		}
	}
	s.set(v1alpha1.ConditionAccepted, metav1.ConditionFalse, s.vfm.Status.Failure.Reason, s.vfm.Status.Failure.Message)
	if s.vfm.Spec.MigrationRef == nil || s.vmim == nil || s.vmim.IsFinal() {
		s.outcome = failed
	} // else KubeVirt is to be stopped first
	return ctrl.Result{}, nil
}

// ensureMigration has KubeVirt move the VM.
func (r *VFMigrationReconciler) ensureMigration(ctx context.Context, s *scope) (ctrl.Result, error) {
	if !s.proceeding() {
		return ctrl.Result{}, nil
	}
	switch ref := s.vfm.Status.MigrationRef; {
	case s.vmim != nil && ref == nil:
		s.vfm.Status.MigrationRef = &v1alpha1.MigrationReference{Name: s.vmim.Name, UID: s.vmim.UID}
	case s.vfm.Spec.MigrationRef != nil:
		if s.vmimDeleted() && !s.committed() {
			s.failDeleted()
		}
	case s.vmim != nil && !s.vmim.DeletionTimestamp.IsZero() && !s.vmim.IsFinal() && !s.committed(),
		s.vmim == nil && ref != nil && !s.committed():
		s.fail(v1alpha1.ReasonMigrationFailed,
			"VirtualMachineInstanceMigration %s was deleted by somebody else; to undo a migration, set spec.abort of its VFMigration", s.vfm.Name)
	case s.vmim == nil && ref == nil && s.vmi != nil:
		return r.createMigration(ctx, s)
	}
	return ctrl.Result{}, nil
}

// createMigration creates the VirtualMachineInstanceMigration.
func (r *VFMigrationReconciler) createMigration(ctx context.Context, s *scope) (ctrl.Result, error) {
	if f := s.foreign; f != nil {
		if f.Labels[kubevirt.LabelVFMigrationUID] == "" || !f.IsFinal() {
			s.fail(v1alpha1.ReasonMigrationInProgress,
				"a VirtualMachineInstanceMigration %s exists that is not this VFMigration's; delete it, or create a VFMigration of another name", f.Name)
			return ctrl.Result{}, nil
		}
		// The remains of an earlier VFMigration of the same name.
		if err := r.deleteMigration(ctx, f); err != nil {
			return ctrl.Result{}, err
		}
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	// Nothing is created on the word of a cache that may not know of an abort.
	live := &v1alpha1.VFMigration{}
	if err := r.Live.Get(ctx, client.ObjectKeyFromObject(s.vfm), live); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if live.ResourceVersion != s.base.ResourceVersion {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	selector, err := r.nodeSelector(ctx, s.vfm.Spec.Target)
	if err != nil {
		return ctrl.Result{}, err
	}
	vmim := &virtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.vfm.Namespace,
			Name:      s.vfm.Name,
			Labels:    map[string]string{kubevirt.LabelVFMigrationUID: string(s.vfm.UID)},
		},
		Spec: virtv1.VirtualMachineInstanceMigrationSpec{VMIName: s.vfm.Spec.VMIName, AddedNodeSelector: selector},
	}
	if err := controllerutil.SetControllerReference(s.vfm, vmim, r.Client.Scheme()); err != nil {
		return ctrl.Result{}, err
	}
	switch err := r.Client.Create(ctx, vmim); {
	case apierrors.IsBadRequest(err), apierrors.IsInvalid(err), apierrors.IsForbidden(err):
		s.fail(v1alpha1.ReasonMigrationFailed, "KubeVirt does not accept the migration: %v", err)
	case err != nil:
		return ctrl.Result{}, fmt.Errorf("create VirtualMachineInstanceMigration %s: %w", vmim.Name, err)
	default:
		s.vfm.Status.MigrationRef = &v1alpha1.MigrationReference{Name: vmim.Name, UID: vmim.UID}
	}
	return ctrl.Result{}, nil
}

// nodeSelector is what restricts KubeVirt's choice of the target node.
func (r *VFMigrationReconciler) nodeSelector(ctx context.Context, t *v1alpha1.VFMigrationTarget) (map[string]string, error) {
	if t == nil {
		return nil, nil
	}
	if t.NodeName == "" {
		return t.NodeSelector, nil
	}
	set, err := r.nodeLabels(ctx, t.NodeName)
	if err != nil {
		return nil, err
	}
	return map[string]string{kubevirt.LabelHostname: set[kubevirt.LabelHostname]}, nil
}

// followAgents takes an agent's bad news for the migration's.
func (r *VFMigrationReconciler) followAgents(_ context.Context, s *scope) (ctrl.Result, error) {
	if !s.proceeding() {
		return ctrl.Result{}, nil
	}
	for _, typ := range []string{
		v1alpha1.ConditionTargetPinned, v1alpha1.ConditionPrepared, v1alpha1.ConditionCaptured,
		v1alpha1.ConditionRestored, v1alpha1.ConditionVerified,
	} {
		c := s.condition(typ)
		if !refused(c) {
			continue
		}
		reason := c.Reason
		if reason == v1alpha1.ReasonReleased {
			reason = v1alpha1.ReasonPinFailed
		}
		s.fail(reason, "%s: %s", typ, c.Message)
	}
	return ctrl.Result{}, nil
}

// followKubeVirt takes the failure of the VirtualMachineInstanceMigration, or
// the loss of the VM, for the migration's.
func (r *VFMigrationReconciler) followKubeVirt(_ context.Context, s *scope) (ctrl.Result, error) {
	if !s.proceeding() {
		return ctrl.Result{}, nil
	}
	switch {
	case s.vmi == nil:
		s.fail(v1alpha1.ReasonVMINotFound, "VirtualMachineInstance %s was deleted during its migration", s.vfm.Spec.VMIName)
	case s.vmi.IsFinal():
		s.fail(v1alpha1.ReasonVMINotRunning, "VirtualMachineInstance %s came to phase %s during its migration; start the VM again",
			s.vmi.Name, s.vmi.Status.Phase)
	case s.postCopy() && !s.committed() && s.vmim.Status.Phase != virtv1.MigrationFailed:
		s.fail(v1alpha1.ReasonPostCopyAllowed, "KubeVirt allows post-copy for VirtualMachineInstanceMigration %s, which the VM's VFs do not survive; "+
			"forbid it in the MigrationPolicy that matches the VM", s.vmim.Name)
	case s.vmim != nil && s.vmim.Status.Phase == virtv1.MigrationFailed:
		if wait := s.migrationEnd().Add(FailureGrace).Sub(s.now); wait > 0 && wait <= FailureGrace {
			return ctrl.Result{RequeueAfter: wait}, nil
		}
		cause := "no cause is given"
		if st := s.migrationState(); st != nil && st.FailureReason != "" {
			cause = st.FailureReason
		}
		s.fail(v1alpha1.ReasonMigrationFailed,
			"KubeVirt reports VirtualMachineInstanceMigration %s failed: %s; see its events and the target pod's, then create a new VFMigration",
			s.vmim.Name, cause)
	}
	return ctrl.Result{}, nil
}

// followTarget notes where KubeVirt takes the VM. That the target pod ends is
// left for KubeVirt to report; that it is another one cannot be.
func (r *VFMigrationReconciler) followTarget(ctx context.Context, s *scope) (ctrl.Result, error) {
	if !s.proceeding() || s.targetPod == nil || s.targetPod.Spec.NodeName == "" {
		return ctrl.Result{}, nil
	}
	pod, target := s.targetPod, s.vfm.Status.Target
	if target != nil {
		if target.PodUID != pod.UID && !s.committed() {
			s.fail(v1alpha1.ReasonMigrationFailed, "the target pod %s was replaced by %s on node %s; create a new VFMigration",
				target.PodName, pod.Name, pod.Spec.NodeName)
		}
		return ctrl.Result{}, nil
	}
	if kubevirt.Finished(pod) || !pod.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	// KubeVirt lets the VM's own node selector win over the one that is added.
	ok, err := r.allows(ctx, s.vfm.Spec.Target, pod.Spec.NodeName)
	if err != nil {
		return ctrl.Result{}, err
	}
	if !ok {
		s.fail(v1alpha1.ReasonTargetNotFound,
			"KubeVirt placed the target pod %s on node %s, which spec.target does not allow; the VM's own nodeSelector or affinity contradicts spec.target",
			pod.Name, pod.Spec.NodeName)
		return ctrl.Result{}, nil
	}
	s.vfm.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: pod.Spec.NodeName, PodName: pod.Name, PodUID: pod.UID}
	return ctrl.Result{}, nil
}

// timeouts bounds the steps by spec.timeouts up to the point of no return, and
// by FinishTimeout after it.
func (r *VFMigrationReconciler) timeouts(ctx context.Context, s *scope) (ctrl.Result, error) {
	if !s.proceeding() || s.finished() {
		return ctrl.Result{}, nil
	}
	end, what := s.deadline()
	if s.committed() {
		end, what = s.committedSince().Add(FinishTimeout), fmt.Sprintf("%s passed since the target took over the VFs", FinishTimeout)
	}
	if wait := end.Sub(s.now); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	awaited, err := r.awaited(ctx, s)
	if err != nil {
		return ctrl.Result{}, err
	}
	s.fail(v1alpha1.ReasonTimeout, "%s while waiting for %s", what, awaited)
	return ctrl.Result{}, nil
}

// awaited says in words what the migration waits for, and what stands in its way.
func (r *VFMigrationReconciler) awaited(ctx context.Context, s *scope) (string, error) {
	var node, what string
	switch target := s.vfm.Status.Target; {
	case s.vmim == nil && !s.committed():
		return "the VirtualMachineInstanceMigration to be created", nil
	case target == nil && s.targetPod == nil:
		return fmt.Sprintf("KubeVirt to create a target pod; see the events of VirtualMachineInstanceMigration %s", s.migrationName()), nil
	case target == nil:
		return fmt.Sprintf("the target pod %s to be scheduled; see its events", s.targetPod.Name), nil
	case s.committed():
		node, what = target.NodeName, "the agent of node "+target.NodeName+" to verify the VFs"
		if s.is(v1alpha1.ConditionVerified) {
			return "KubeVirt to finish VirtualMachineInstanceMigration " + s.migrationName() + "; the VM runs on node " + node, nil
		}
	case !s.is(v1alpha1.ConditionTargetPinned):
		node, what = target.NodeName, "the agent of node "+target.NodeName+" to attach VFs to the target pod "+target.PodName
	case !s.is(v1alpha1.ConditionPrepared):
		node, what = s.vfm.Status.Source.NodeName, "the agents to agree that the VFs can be moved"
	default:
		return "the end of pre-copy and the switchover; give more time, or let KubeVirt's migration policy converge the VM's memory", nil
	}
	why, err := r.agentDown(ctx, &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: node}})
	if err != nil {
		return "", err
	}
	if why != "" {
		return fmt.Sprintf("%s, which is not available: %s; see that the compsc agent runs on node %s", what, why, node), nil
	}
	return fmt.Sprintf("%s; see the compsc agent's log on node %s", what, node), nil
}

// set writes one of the manager's own conditions.
func (s *scope) set(typ string, status metav1.ConditionStatus, reason, message string) {
	meta.SetStatusCondition(&s.vfm.Status.Conditions, metav1.Condition{
		Type: typ, Status: status, Reason: reason, Message: message,
		ObservedGeneration: s.vfm.Generation, LastTransitionTime: metav1.NewTime(s.now),
	})
}

// finished tells whether the migration came to its good end: the VF works on
// the target, and KubeVirt agrees that the VM is there. A
// VirtualMachineInstanceMigration that was cleaned up after its end is no obstacle.
func (s *scope) finished() bool {
	return s.is(v1alpha1.ConditionVerified) && s.onTarget() &&
		(s.vmim == nil || s.vmim.Status.Phase == virtv1.MigrationSucceeded)
}
