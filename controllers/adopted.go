package controllers

import (
	"context"
	"fmt"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// What follows is how a VFMigration goes with a VirtualMachineInstanceMigration
// that somebody else created (spec.migrationRef).

// stopGrace is how long a VirtualMachineInstanceMigration that was stopped may take
// to fail before it is deleted.
const stopGrace = RollbackTimeout / 2

// migrationName is the name of the VFMigration's VirtualMachineInstanceMigration.
func (s *scope) migrationName() string {
	if ref := s.vfm.Spec.MigrationRef; ref != nil {
		return ref.Name
	}
	return s.vfm.Name
}

// vmimDeleted tells whether the VirtualMachineInstanceMigration was deleted
// before its good end. KubeVirt may have failed it for that by the time it is seen.
func (s *scope) vmimDeleted() bool {
	return s.vmim == nil || !s.vmim.DeletionTimestamp.IsZero() && s.vmim.Status.Phase != virtv1.MigrationSucceeded
}

// failDeleted takes the deletion of an adopted VirtualMachineInstanceMigration
// for what it is to KubeVirt: the wish to undo it.
func (s *scope) failDeleted() {
	s.fail(v1alpha1.ReasonAborted, "VirtualMachineInstanceMigration %s was deleted, which asks for its migration to be undone", s.migrationName())
}

// adoptable looks at a VirtualMachineInstanceMigration before it is accepted.
// It says in words what must happen first, records why it cannot be accepted
// at all, and is empty once there is something to be judged: KubeVirt may keep
// a migration queued for long, so it is judged when its turn has come. Until
// the target pod is prepared, which needs the acceptance, KubeVirt does not go on.
func (s *scope) adoptable() (waiting string) {
	if s.vfm.Spec.MigrationRef == nil {
		return ""
	}
	switch {
	case s.vmimDeleted():
		s.failDeleted()
	case s.vmim.Spec.SendTo != nil || s.vmim.Spec.Receive != nil:
		s.fail(v1alpha1.ReasonDecentralized,
			"VirtualMachineInstanceMigration %s leads out of the cluster or namespace, where the VM's VFs cannot go; move the VM within both", s.vmim.Name)
	case s.vmim.IsFinal():
		s.fail(v1alpha1.ReasonMigrationFailed, "KubeVirt ended VirtualMachineInstanceMigration %s (phase %s) before its turn came; see its events",
			s.vmim.Name, s.vmim.Status.Phase)
	case s.vmim.Status.Phase == virtv1.MigrationPhaseUnset || s.vmim.Status.Phase == virtv1.MigrationPending:
		return fmt.Sprintf("KubeVirt has not begun VirtualMachineInstanceMigration %s yet.", s.vmim.Name)
	}
	return ""
}

// linkMigration tells on an adopted VirtualMachineInstanceMigration which
// VFMigration goes with it, and why that one is undone once it is.
func (r *VFMigrationReconciler) linkMigration(ctx context.Context, s *scope) (ctrl.Result, error) {
	if s.vfm.Spec.MigrationRef == nil || s.vmim == nil {
		return ctrl.Result{}, nil
	}
	base := s.vmim.DeepCopy()
	metav1.SetMetaDataLabel(&s.vmim.ObjectMeta, kubevirt.LabelVFMigrationUID, string(s.vfm.UID))
	metav1.SetMetaDataAnnotation(&s.vmim.ObjectMeta, kubevirt.AnnotationVFMigration, s.vfm.Name)
	if f := s.base.Status.Failure; f != nil {
		metav1.SetMetaDataAnnotation(&s.vmim.ObjectMeta, kubevirt.AnnotationFailure, bounded(f.Reason+": "+f.Message, 1024))
	}
	patch := client.MergeFrom(base)
	if data, err := patch.Data(s.vmim); err != nil || string(data) == "{}" {
		return ctrl.Result{}, err
	}
	if err := client.IgnoreNotFound(r.Client.Patch(ctx, s.vmim, patch)); err != nil {
		return ctrl.Result{}, fmt.Errorf("link VirtualMachineInstanceMigration %s: %w", base.Name, err)
	}
	return ctrl.Result{}, nil
}

// mayFailByItself is how long to leave a VirtualMachineInstanceMigration that is
// being undone to KubeVirt.
//
// One that runs ends because the source's QEMU is told to give up, or is refused
// its end. KubeVirt 1.8 must not be asked to abort it just then: it would wait for
// an end that it has missed, and never move the VM again (process.cancelMigration
// in agent/device).
//
// An adopted one that does not run yet fails once its target pod is gone. If it
// stays as failed KubeVirt waits ever longer before the next attempt of an
// evacuation, while one that was deleted is replaced at once. So it is deleted
// when the user wants it gone, and where nothing else stops it.
func (s *scope) mayFailByItself() time.Duration {
	failure := s.base.Status.Failure
	left := failure.Time.Add(stopGrace).Sub(s.now)
	if s.is(v1alpha1.ConditionPrepared) && (s.vmim.Status.Phase == virtv1.MigrationRunning || s.is(v1alpha1.ConditionCaptured)) {
		return left
	}
	if s.vfm.Spec.MigrationRef == nil || failure.Reason == v1alpha1.ReasonAborted || failure.Reason == v1alpha1.ReasonDeleted ||
		failure.Reason == v1alpha1.ReasonDecentralized {
		return 0
	}
	switch s.vmim.Status.Phase {
	case virtv1.MigrationScheduling, virtv1.MigrationScheduled, virtv1.MigrationPreparingTarget, virtv1.MigrationTargetReady:
		return left
	}
	return 0
}
