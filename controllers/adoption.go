package controllers

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

const (
	// keptAdopted is how many ended VFMigrations that were made for somebody
	// else's migrations are kept for each VMI. KubeVirt keeps as many of its
	// own (defaultFinalizedMigrationGarbageCollectionBuffer).
	keptAdopted = 5
	// maxSelector is how many labels spec.target.nodeSelector may have.
	maxSelector = 16
)

// AdoptionReconciler makes a VFMigration for each VirtualMachineInstanceMigration
// that somebody else created for a VMI with VFs: virtctl, kubectl, an eviction,
// a workload update. Everything after that is the VFMigrationReconciler's.
type AdoptionReconciler struct {
	// Client reads through the cache and writes.
	Client client.Client
	// Live reads from the API server itself.
	Live client.Reader
	// Recorder takes the events.
	Recorder events.EventRecorder
}

// Reconcile adopts one VirtualMachineInstanceMigration:
//
//  1. one that a VFMigration created, that has ended or that is being deleted
//     before anything came of it, is left alone;
//  2. so is one of a VMI without VFs;
//  3. else its VFMigration is created, unless it exists;
//  4. of the VMI's ended VFMigrations that were made so, the oldest are deleted.
//
// Errors come from the API server only and are retried by the caller.
func (r *AdoptionReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	vmim := &virtv1.VirtualMachineInstanceMigration{}
	if err := r.Client.Get(ctx, req.NamespacedName, vmim); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	owner := metav1.GetControllerOf(vmim)
	if owner != nil && owner.Kind == "VFMigration" || vmim.IsFinal() || !vmim.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, nil
	}
	// The VMI may be younger than the cache.
	vmi := &virtv1.VirtualMachineInstance{}
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: vmim.Namespace, Name: vmim.Spec.VMIName}, vmi)
	if apierrors.IsNotFound(err) {
		return ctrl.Result{}, nil // KubeVirt deals with it
	}
	if err != nil {
		return ctrl.Result{}, fmt.Errorf("read VirtualMachineInstance %s: %w", vmim.Spec.VMIName, err)
	}
	if len(kubevirt.BoundInterfaces(vmi)) == 0 {
		return ctrl.Result{}, nil
	}
	vfm := adopting(vmim, vmi)
	switch err := r.Client.Create(ctx, vfm); {
	case apierrors.IsAlreadyExists(err):
		return ctrl.Result{}, nil
	case err != nil:
		return ctrl.Result{}, fmt.Errorf("create VFMigration %s: %w", vfm.Name, err)
	}
	r.Recorder.Eventf(vmim, vfm, corev1.EventTypeNormal, EventAdopted, "Migrate", "%s", "VFMigration "+vfm.Name+" moves the VM's VFs")
	return ctrl.Result{}, r.prune(ctx, vmi)
}

// adopting returns the VFMigration for a VirtualMachineInstanceMigration. Its
// name tells both that one's name and which of those that had it.
func adopting(vmim *virtv1.VirtualMachineInstanceMigration, vmi *virtv1.VirtualMachineInstance) *v1alpha1.VFMigration {
	suffix := "-" + string(vmim.UID)
	if len(suffix) > 9 {
		suffix = suffix[:9]
	}
	vfm := &v1alpha1.VFMigration{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: vmim.Namespace,
			Name:      vmim.Name[:min(len(vmim.Name), 253-len(suffix))] + suffix,
			Labels:    map[string]string{kubevirt.LabelMigrationUID: string(vmim.UID)},
			// KubeVirt's migration is under way already: whoever deletes this
			// object, however soon, asks for that one to be undone.
			Finalizers: []string{v1alpha1.VFMigrationFinalizer},
			// Nobody but the VM's owner would delete it.
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: virtv1.GroupVersion.String(), Kind: "VirtualMachineInstance", Name: vmi.Name, UID: vmi.UID,
			}},
		},
		Spec: v1alpha1.VFMigrationSpec{
			VMIName:      vmim.Spec.VMIName,
			MigrationRef: &v1alpha1.MigrationReference{Name: vmim.Name, UID: vmim.UID},
		},
	}
	// A larger selector is KubeVirt's to obey; preflight only knows less then.
	if n := len(vmim.Spec.AddedNodeSelector); n > 0 && n <= maxSelector {
		vfm.Spec.Target = &v1alpha1.VFMigrationTarget{NodeSelector: vmim.Spec.AddedNodeSelector}
	}
	return vfm
}

// prune deletes the VMI's oldest ended VFMigrations that were made here.
func (r *AdoptionReconciler) prune(ctx context.Context, vmi *virtv1.VirtualMachineInstance) error {
	var list v1alpha1.VFMigrationList
	if err := r.Client.List(ctx, &list, client.InNamespace(vmi.Namespace), client.HasLabels{kubevirt.LabelMigrationUID}); err != nil {
		return fmt.Errorf("list VFMigrations: %w", err)
	}
	list.Items = slices.DeleteFunc(list.Items, func(m v1alpha1.VFMigration) bool {
		return m.Spec.VMIName != vmi.Name || m.Spec.MigrationRef == nil || !isTerminal(&m) || !m.DeletionTimestamp.IsZero()
	})
	slices.SortFunc(list.Items, func(a, b v1alpha1.VFMigration) int {
		if older(&a, &b) {
			return -1
		}
		return 1
	})
	for i := range max(len(list.Items)-keptAdopted, 0) {
		m := &list.Items[i]
		if err := client.IgnoreNotFound(r.Client.Delete(ctx, m, client.Preconditions{UID: &m.UID})); err != nil {
			return fmt.Errorf("delete VFMigration %s: %w", m.Name, err)
		}
	}
	return nil
}

// SetupWithManager registers the reconciler with mgr.
func (r *AdoptionReconciler) SetupWithManager(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).
		Named("adoption").
		For(&virtv1.VirtualMachineInstanceMigration{}).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		Complete(r)
}
