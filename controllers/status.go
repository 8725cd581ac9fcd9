package controllers

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// Reasons of the manager's events.
const (
	// EventStarted: a migration was accepted. Also on the VMI.
	EventStarted = "MigrationStarted"
	// EventPreflightFailed: a migration was refused. Also on the VMI, and on
	// the VirtualMachineInstanceMigration if it was adopted.
	EventPreflightFailed = "PreflightFailed"
	// EventTargetChosen: KubeVirt chose the target node.
	EventTargetChosen = "TargetChosen"
	// EventRollback: a migration is being undone. Also on the VMI.
	EventRollback = "VFRollback"
	// EventAdopted: a VirtualMachineInstanceMigration of somebody else got its
	// VFMigration. On the VirtualMachineInstanceMigration.
	EventAdopted = "MigrationAdopted"
	// EventBlocked: a VMI cannot be moved as things are. On the VMI.
	EventBlocked = "MigrationBlocked"
	// EventSucceeded: a migration ended well. Also on the VMI.
	EventSucceeded = "MigrationSucceeded"
	// EventFailed: a migration ended badly. Also on the VMI.
	EventFailed = "MigrationFailed"
)

// summarise computes the summary from what the phases found.
func (s *scope) summarise() {
	st := &s.vfm.Status
	st.ObservedGeneration = s.vfm.Generation
	switch s.outcome {
	case succeeded:
		message := fmt.Sprintf("The VM runs on node %s with its VFs.", st.Target.NodeName)
		if st.Failure != nil {
			message += " The wish to undo the migration (" + st.Failure.Reason + ") came past its point of no return."
		}
		s.set(v1alpha1.ConditionSucceeded, metav1.ConditionTrue, v1alpha1.ConditionSucceeded, message)
	case failed:
		message := st.Failure.Message
		if s.remark != "" {
			message += ". Not undone: " + s.remark
		}
		s.set(v1alpha1.ConditionSucceeded, metav1.ConditionFalse, st.Failure.Reason, message)
	default:
		reason, message := v1alpha1.ReasonProgressing, "The migration is under way."
		if st.Failure != nil {
			reason, message = v1alpha1.ReasonRollingBack, "Being undone: "+st.Failure.Message
		}
		s.set(v1alpha1.ConditionSucceeded, metav1.ConditionUnknown, reason, message)
	}
	if s.outcome != underWay && st.CompletionTime == nil {
		now := metav1.NewTime(s.now)
		st.CompletionTime = &now
	}
	st.Phase = s.phase()
}

// phase is the word for how the migration stands.
func (s *scope) phase() v1alpha1.VFMigrationPhase {
	switch {
	case s.outcome == succeeded:
		return v1alpha1.PhaseSucceeded
	case s.outcome == failed:
		return v1alpha1.PhaseFailed
	case s.vfm.Status.Failure != nil && !s.committed():
		return v1alpha1.PhaseRollingBack
	case !s.is(v1alpha1.ConditionAccepted):
		return v1alpha1.PhasePending
	case s.is(v1alpha1.ConditionRestored) || s.is(v1alpha1.ConditionVerified):
		return v1alpha1.PhaseVerifying
	case s.is(v1alpha1.ConditionCaptured) || s.committed():
		return v1alpha1.PhaseSwitching
	case s.is(v1alpha1.ConditionPrepared):
		return v1alpha1.PhaseCopying
	case s.is(v1alpha1.ConditionTargetPinned):
		return v1alpha1.PhasePreparing
	default:
		return v1alpha1.PhasePinning
	}
}

// patchStatus writes the status if it changed, provided that nobody else has
// written the object since it was read: the conditions are one list, of which
// the agents own a part.
func (r *VFMigrationReconciler) patchStatus(ctx context.Context, s *scope) (changed bool, err error) {
	if equality.Semantic.DeepEqual(s.base.Status, s.vfm.Status) {
		return false, nil
	}
	err = r.Client.Status().Patch(ctx, s.vfm.DeepCopy(), client.MergeFromWithOptions(s.base, client.MergeFromWithOptimisticLock{}))
	return true, client.IgnoreNotFound(err)
}

// tell emits events and metrics for what this reconcile changed. It runs after
// the change is written, so that each is told once.
func (r *VFMigrationReconciler) tell(s *scope) {
	was, is := &s.base.Status, &s.vfm.Status
	name := s.vfm.Spec.VMIName
	failedNow := was.Failure == nil && is.Failure != nil
	refused := is.Failure != nil && !s.is(v1alpha1.ConditionAccepted)
	if was.StartTime == nil && is.StartTime != nil {
		r.event(s, true, corev1.EventTypeNormal, EventStarted, "Moving VirtualMachineInstance %s with its VFs away from node %s", name, is.Source.NodeName)
	}
	if was.Target == nil && is.Target != nil {
		r.event(s, false, corev1.EventTypeNormal, EventTargetChosen, "KubeVirt chose node %s, pod %s", is.Target.NodeName, is.Target.PodName)
	}
	if failedNow && refused {
		r.event(s, true, corev1.EventTypeWarning, EventPreflightFailed, "%s: %s", is.Failure.Reason, is.Failure.Message)
	} else if failedNow {
		r.event(s, true, corev1.EventTypeWarning, EventRollback, "%s: %s", is.Failure.Reason, is.Failure.Message)
	}
	summary := s.condition(v1alpha1.ConditionSucceeded)
	switch {
	case s.outcome == underWay:
		return
	case refused: // and told when it was found
	case s.outcome == failed:
		r.event(s, true, corev1.EventTypeWarning, EventFailed, "%s: %s", summary.Reason, summary.Message)
	default:
		r.event(s, true, corev1.EventTypeNormal, EventSucceeded, "%s", summary.Message)
	}
	observeEnd(s)
}

// event emits an event on the VFMigration, and if asked to on its VMI and on
// the VirtualMachineInstanceMigration that it adopted. The events API bounds
// the note to 1024 bytes.
func (r *VFMigrationReconciler) event(s *scope, alsoVMI bool, typ, reason, format string, args ...any) {
	note := bounded(fmt.Sprintf(format, args...), 1000)
	var vmi runtime.Object
	if s.vmi != nil {
		vmi = s.vmi
		if alsoVMI {
			r.Recorder.Eventf(s.vmi, s.vfm, typ, reason, "Migrate", "%s", note)
		}
	}
	if alsoVMI && s.vfm.Spec.MigrationRef != nil && s.vmim != nil {
		r.Recorder.Eventf(s.vmim, s.vfm, typ, reason, "Migrate", "%s", note)
	}
	r.Recorder.Eventf(s.vfm, vmi, typ, reason, "Migrate", "%s", note)
}
