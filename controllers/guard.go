package controllers

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"compsc.io/compsc/agent/kubevirt"
	kubecluster "compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/api/v1alpha1"
)

// assessInterval is how often it is looked at anew whether a VMI can be moved:
// not everything that decides it is watched.
const assessInterval = 30 * time.Second

// GuardReconciler keeps on every VMI with VFs what admission policies look at:
// the label compsc.io/vf, by which the MigrationPolicy without post-copy
// selects it, and, while it could not be moved, the annotation
// compsc.io/migration-blocked with the reason, by which migrations of it are
// refused on creation.
type GuardReconciler struct {
	*VFMigrationReconciler
}

// Reconcile assesses one VMI:
//
//  1. one without VFs and one that does not run are left alone;
//  2. it is labelled, and judged as the preflight of a migration to anywhere
//     would judge it, unless it is being moved: its own target has the VFs then.
//     What can be moved in a moment, when VFs are back, is not blocked;
//  3. the verdict is written if it is another one than before.
//
// Errors come from the API server only and are retried by the caller.
func (r *GuardReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	vmi := &virtv1.VirtualMachineInstance{}
	if err := r.Client.Get(ctx, req.NamespacedName, vmi); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if len(kubevirt.BoundInterfaces(vmi)) == 0 || vmi.Status.Phase != virtv1.Running || !vmi.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	base := vmi.DeepCopy()
	metav1.SetMetaDataLabel(&vmi.ObjectMeta, kubevirt.LabelVF, "true")
	why, err := r.blocked(ctx, vmi)
	if err != nil {
		return ctrl.Result{}, err
	}
	if why == "" {
		delete(vmi.Annotations, kubevirt.AnnotationMigrationBlocked)
	} else {
		metav1.SetMetaDataAnnotation(&vmi.ObjectMeta, kubevirt.AnnotationMigrationBlocked, why)
	}
	patch := client.MergeFrom(base)
	if data, err := patch.Data(vmi); err != nil {
		return ctrl.Result{}, err
	} else if string(data) != "{}" {
		if err := r.Client.Patch(ctx, vmi, patch); err != nil {
			return ctrl.Result{}, client.IgnoreNotFound(err)
		}
	}
	if was := base.Annotations[kubevirt.AnnotationMigrationBlocked]; why != "" && was == "" {
		r.Recorder.Eventf(vmi, nil, corev1.EventTypeWarning, EventBlocked, "Migrate", "%s", bounded(why, 1000))
	}
	return ctrl.Result{RequeueAfter: assessInterval}, nil
}

// blocked says why the VMI cannot be moved; empty if it can, or is on its way.
func (r *GuardReconciler) blocked(ctx context.Context, vmi *virtv1.VirtualMachineInstance) (string, error) {
	moving, err := r.moving(ctx, vmi)
	if err != nil || moving {
		return "", err
	}
	_, _, err = r.assess(ctx, &v1alpha1.VFMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: vmi.Namespace}, Spec: v1alpha1.VFMigrationSpec{VMIName: vmi.Name},
	})
	if wait := (*notYet)(nil); errors.As(err, &wait) {
		return "", nil
	}
	if no := (*refusal)(nil); errors.As(err, &no) {
		if no.reason == v1alpha1.ReasonVMINotRunning {
			return "", nil // KubeVirt refuses that itself
		}
		return bounded(no.Error(), 1024), nil
	}
	if err != nil {
		return "", fmt.Errorf("assess VirtualMachineInstance %s: %w", vmi.Name, err)
	}
	return "", nil
}

// moving tells whether somebody moves the VM, or is about to.
func (r *GuardReconciler) moving(ctx context.Context, vmi *virtv1.VirtualMachineInstance) (bool, error) {
	if st := vmi.Status.MigrationState; st != nil && st.StartTimestamp != nil && st.EndTimestamp == nil {
		return true, nil
	}
	var ours v1alpha1.VFMigrationList
	if err := r.Client.List(ctx, &ours, client.InNamespace(vmi.Namespace)); err != nil {
		return false, fmt.Errorf("list VFMigrations: %w", err)
	}
	if slices.ContainsFunc(ours.Items, func(m v1alpha1.VFMigration) bool { return m.Spec.VMIName == vmi.Name && !isTerminal(&m) }) {
		return true, nil
	}
	var theirs virtv1.VirtualMachineInstanceMigrationList
	if err := r.Client.List(ctx, &theirs, client.InNamespace(vmi.Namespace)); err != nil {
		return false, fmt.Errorf("list VirtualMachineInstanceMigrations: %w", err)
	}
	return slices.ContainsFunc(theirs.Items, func(m virtv1.VirtualMachineInstanceMigration) bool {
		return m.Spec.VMIName == vmi.Name && !m.IsFinal()
	}), nil
}

// SetupWithManager registers the reconciler with mgr.
func (r *GuardReconciler) SetupWithManager(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).
		Named("guard").
		For(&virtv1.VirtualMachineInstance{}, builder.WithPredicates(predicate.Funcs{UpdateFunc: worthAssessing})).
		Watches(&v1alpha1.VFNode{}, handler.EnqueueRequestsFromMapFunc(r.all)).
		Watches(&v1alpha1.VFMigration{}, handler.EnqueueRequestsFromMapFunc(subject), builder.WithPredicates(predicate.Funcs{UpdateFunc: beganOrEnded})).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		Complete(r)
}

// worthAssessing tells an update that may change the verdict from KubeVirt's
// frequent others.
func worthAssessing(e event.UpdateEvent) bool {
	before, ok1 := e.ObjectOld.(*virtv1.VirtualMachineInstance)
	after, ok2 := e.ObjectNew.(*virtv1.VirtualMachineInstance)
	if !ok1 || !ok2 {
		return true
	}
	ended := func(v *virtv1.VirtualMachineInstance) bool {
		return v.Status.MigrationState == nil || v.Status.MigrationState.EndTimestamp != nil
	}
	return before.Status.Phase != after.Status.Phase || before.Status.NodeName != after.Status.NodeName || ended(before) != ended(after) ||
		before.Annotations[kubevirt.AnnotationMigrationBlocked] != after.Annotations[kubevirt.AnnotationMigrationBlocked] ||
		before.Labels[kubevirt.LabelVF] != after.Labels[kubevirt.LabelVF]
}

// beganOrEnded tells an update of a VFMigration that bears on the verdict.
func beganOrEnded(e event.UpdateEvent) bool {
	before, ok1 := e.ObjectOld.(*v1alpha1.VFMigration)
	after, ok2 := e.ObjectNew.(*v1alpha1.VFMigration)
	return !ok1 || !ok2 || isTerminal(before) != isTerminal(after)
}

// subject maps a VFMigration to the VMI that it moves.
func subject(_ context.Context, o client.Object) []reconcile.Request {
	m, ok := o.(*v1alpha1.VFMigration)
	if !ok {
		return nil
	}
	return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.VMIName}}}
}

// all maps anything to all VMIs with VFs.
func (r *GuardReconciler) all(ctx context.Context, _ client.Object) []reconcile.Request {
	var list virtv1.VirtualMachineInstanceList
	if err := r.Client.List(ctx, &list); err != nil {
		ctrl.LoggerFrom(ctx).Error(err, "cannot list VirtualMachineInstances")
		return nil
	}
	var reqs []reconcile.Request
	for i := range list.Items {
		if len(kubevirt.BoundInterfaces(&list.Items[i])) > 0 {
			reqs = append(reqs, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
		}
	}
	return reqs
}

// checkGuards refuses what KubeVirt does not know to be dangerous: it does not
// see a VF in the network binding. That real VFs need the guest's RAM locked is
// nothing to refuse for: the device process locks it, not QEMU, and its agent
// raises the limit.
func (r *VFMigrationReconciler) checkGuards(ctx context.Context, vmi *virtv1.VirtualMachineInstance) error {
	allowed, by, err := kubecluster.PostCopy(ctx, r.Live, vmi)
	if err != nil {
		return err
	}
	if allowed {
		return refuse(v1alpha1.ReasonPostCopyAllowed,
			"%s allows post-copy for VirtualMachineInstance %s, which its VFs do not survive; apply config/kubevirt, or forbid it there", by, vmi.Name)
	}
	return nil
}

// postCopy tells whether KubeVirt has settled on a configuration for this
// migration that allows post-copy.
func (s *scope) postCopy() bool {
	st := s.migrationState()
	return st != nil && st.VMIMConfigurationOptions != nil && st.VMIMConfigurationOptions.AllowPostCopy != nil && *st.VMIMConfigurationOptions.AllowPostCopy
}
