package controllers

import (
	"context"
	"fmt"
	"strings"

	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// rollback takes back what was asked of KubeVirt, once the intent to undo is
// written. The agents undo the rest of their own accord.
func (r *VFMigrationReconciler) rollback(ctx context.Context, s *scope) (ctrl.Result, error) {
	if s.base.Status.Failure == nil || s.vmim == nil || s.vmim.IsFinal() || s.committed() {
		return ctrl.Result{}, nil
	}
	if err := r.deleteTargetPod(ctx, s); err != nil {
		return ctrl.Result{}, err
	}
	if !s.vmim.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	if wait := s.mayFailByItself(); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	return ctrl.Result{}, r.deleteMigration(ctx, s.vmim)
}

// deleteTargetPod ends a migration whose VM KubeVirt has not begun to send.
// Between PreparingTarget and Running KubeVirt does not act upon the deletion
// of a VirtualMachineInstanceMigration, only upon the end of its target pod.
// Once it runs the pod must not be touched: it may hold the VM.
func (r *VFMigrationReconciler) deleteTargetPod(ctx context.Context, s *scope) error {
	pod := s.targetPod
	if pod == nil || !pod.DeletionTimestamp.IsZero() || s.is(v1alpha1.ConditionCaptured) {
		return nil
	}
	live := &virtv1.VirtualMachineInstanceMigration{}
	if err := r.Live.Get(ctx, client.ObjectKeyFromObject(s.vmim), live); err != nil {
		return client.IgnoreNotFound(err)
	}
	switch live.Status.Phase {
	case virtv1.MigrationPhaseUnset, virtv1.MigrationPending, virtv1.MigrationScheduling, virtv1.MigrationScheduled,
		virtv1.MigrationPreparingTarget, virtv1.MigrationTargetReady:
	default:
		return nil
	}
	err := r.Client.Delete(ctx, pod, client.Preconditions{UID: &pod.UID})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete the target pod %s: %w", pod.Name, err)
	}
	return nil
}

// deleteMigration deletes a VirtualMachineInstanceMigration; one that is gone
// already is as good.
func (r *VFMigrationReconciler) deleteMigration(ctx context.Context, vmim *virtv1.VirtualMachineInstanceMigration) error {
	err := r.Client.Delete(ctx, vmim, client.Preconditions{UID: &vmim.UID})
	if client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete VirtualMachineInstanceMigration %s: %w", vmim.Name, err)
	}
	return nil
}

// finish ends a migration: well once it is finished, badly once its failure is
// written and undone, or cannot be undone, or nobody confirms it in time.
func (r *VFMigrationReconciler) finish(_ context.Context, s *scope) (ctrl.Result, error) {
	if s.outcome != underWay || !s.started() && s.vfm.Spec.MigrationRef == nil {
		return ctrl.Result{}, nil
	}
	if s.finished() && !s.is(v1alpha1.ConditionRolledBack) {
		s.outcome = succeeded
		return ctrl.Result{}, nil
	}
	failure := s.base.Status.Failure
	if failure == nil {
		return ctrl.Result{}, nil
	}
	end, waiting := failure.Time.Add(RollbackTimeout), s.undone()
	if s.committed() {
		waiting = []string{"the migration is past its point of no return, the target owns the VFs"}
		switch {
		case s.lost():
			end = s.now
		case s.vmim == nil || s.vmim.Status.Phase != virtv1.MigrationFailed:
			end = s.committedSince().Add(FinishTimeout)
		}
	}
	if len(waiting) == 0 {
		s.outcome = failed
		return ctrl.Result{}, nil
	}
	if wait := end.Sub(s.now); wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, nil
	}
	s.outcome = failed
	s.remark = strings.Join(waiting, "; ")
	return ctrl.Result{}, nil
}

// lost tells whether a migration past its point of no return can neither come
// to a good end any more nor be undone after all.
func (s *scope) lost() bool {
	return s.vmi == nil || s.vmi.IsFinal() || refused(s.condition(v1alpha1.ConditionVerified)) || s.vmim == nil && !s.onTarget()
}

// undone says in words what nobody has confirmed to be undone yet.
func (s *scope) undone() []string {
	var open []string
	if s.vmim != nil && !s.vmim.IsFinal() {
		open = append(open, fmt.Sprintf("KubeVirt has not ended VirtualMachineInstanceMigration %s (phase %s)", s.vmim.Name, s.vmim.Status.Phase))
	}
	if s.vmi != nil && !s.vmi.IsFinal() && s.sourceTouched() && !s.is(v1alpha1.ConditionRolledBack) {
		text := fmt.Sprintf("the agent of the source node %s has not confirmed that the VM's VFs work there", s.vfm.Status.Source.NodeName)
		if c := s.condition(v1alpha1.ConditionRolledBack); c.Message != "" {
			text += " (" + c.Message + ")"
		}
		open = append(open, text)
	}
	if s.is(v1alpha1.ConditionTargetPinned) && s.vfm.Status.Target != nil {
		open = append(open, fmt.Sprintf("the agent of the target node %s has not confirmed that the target's VFs are free", s.vfm.Status.Target.NodeName))
	}
	return open
}

// sourceTouched tells whether the source's agent may have begun its part,
// which it does once the target's VFs are pinned.
func (s *scope) sourceTouched() bool {
	return s.condition(v1alpha1.ConditionTargetPinned).Status != "" || s.condition(v1alpha1.ConditionPrepared).Status != ""
}
