// Package controllers holds the manager's side of a migration: it judges
// whether a VFMigration can be carried out, has KubeVirt move the VM, follows
// KubeVirt and the agents, and ends every VFMigration in a stated condition.
// It never touches a device.
package controllers

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/utils/clock"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// Bounds that are not the user's to choose.
const (
	// RollbackTimeout bounds the undoing of a migration, from status.failure.
	// After it the VFMigration ends all the same, and says what nobody
	// confirmed. KubeVirt takes up to 30 s to abort a running migration.
	RollbackTimeout = 60 * time.Second
	// FinishTimeout bounds the rest of a migration that is past its point of
	// no return: verification, and KubeVirt's own conclusion. To fail sooner
	// undoes nothing, and KubeVirt 1.8 may be that late: the event by which its
	// target learns of the end can be overtaken by an older one, until
	// virt-handler asks all domains again after 5 minutes
	// (--domain-resync-period-seconds; pkg/virt-launcher/virtwrap/
	// live-migration-target.go sends a copy of the domain from before).
	FinishTimeout = 7 * time.Minute
	// FailureGrace is how long the manager, once KubeVirt reports a failure,
	// waits for an agent to tell the cause.
	FailureGrace = 2 * time.Second

	// conflictRetry is when a reconcile that lost against another writer is
	// repeated; the cache holds the other's version by then.
	conflictRetry = 200 * time.Millisecond
)

// VMs live in every namespace, leases in the manager's own. The pods deleted
// are target pods of migrations that KubeVirt has not begun to carry out.
//
// +kubebuilder:rbac:groups=compsc.io,resources=vfmigrations,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups=compsc.io,resources=vfmigrations/status,verbs=patch
// +kubebuilder:rbac:groups=compsc.io,resources=vfmigrations/finalizers,verbs=update
// +kubebuilder:rbac:groups=compsc.io,resources=vfnodes,verbs=list;watch
// +kubebuilder:rbac:groups=kubevirt.io,resources=virtualmachineinstances,verbs=get;list;watch;patch
// +kubebuilder:rbac:groups=kubevirt.io,resources=kubevirts,verbs=list
// +kubebuilder:rbac:groups=migrations.kubevirt.io,resources=migrationpolicies,verbs=list
// +kubebuilder:rbac:groups="",resources=namespaces,verbs=get
// +kubebuilder:rbac:groups=kubevirt.io,resources=virtualmachineinstancemigrations,verbs=get;list;watch;create;patch;delete
// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch;delete
// +kubebuilder:rbac:groups="",resources=nodes,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=compsc-system,resources=leases,verbs=get;create
// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=compsc-system,resources=leases,resourceNames=manager.compsc.io,verbs=update
// +kubebuilder:rbac:groups="",namespace=compsc-system,resources=events,verbs=create;patch

// VFMigrationReconciler carries out VFMigrations. It remembers nothing
// between two calls: everything is derived from the API objects, so that any
// instance can go on where another one stopped. Before it acts upon a decision
// (accepted, to be undone), that decision is in the object's status.
type VFMigrationReconciler struct {
	// Client reads through the cache and writes.
	Client client.Client
	// Live reads from the API server itself. It is asked where a stale answer
	// would do harm: before a refusal, and before a thing is taken for gone.
	Live client.Reader
	// Recorder takes the events.
	Recorder events.EventRecorder
	// Clock tells the time against which timeouts are measured.
	Clock clock.PassiveClock
	// Namespace is where the agents keep their leases.
	Namespace string
}

// phase is one step of a reconcile. It looks at the scope, acts at most once,
// and notes in the scope what it learnt. It must be idempotent.
type phase func(ctx context.Context, s *scope) (ctrl.Result, error)

// Reconcile brings one VFMigration forward:
//
//  1. observe everything that concerns it;
//  2. run the phases in order: intent (deletion, abort), accept, ensure the
//     VirtualMachineInstanceMigration, link an adopted one, follow the agents,
//     KubeVirt and the target pod, check the timeouts, roll back, finish;
//  3. compute the status once and write it with one patch;
//  4. tell of what changed in events and metrics.
//
// Errors come from the API server only and are retried by the caller.
func (r *VFMigrationReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	vfm := &v1alpha1.VFMigration{}
	if err := r.Client.Get(ctx, req.NamespacedName, vfm); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if isTerminal(vfm) {
		return r.setFinalizer(ctx, vfm, controllerutil.RemoveFinalizer)
	}
	if !controllerutil.ContainsFinalizer(vfm, v1alpha1.VFMigrationFinalizer) {
		if !vfm.DeletionTimestamp.IsZero() {
			return ctrl.Result{}, nil // nothing was started
		}
		if res, err := r.setFinalizer(ctx, vfm, controllerutil.AddFinalizer); err != nil || !res.IsZero() {
			return res, err
		}
	}

	s, err := r.observe(ctx, vfm)
	if err != nil {
		return ctrl.Result{}, err
	}
	var result ctrl.Result
	var errs []error
	for _, run := range []phase{
		r.intent, r.accept, r.ensureMigration, r.linkMigration, r.followAgents, r.followKubeVirt,
		r.followTarget, r.timeouts, r.rollback, r.finish,
	} {
		res, err := run(ctx, s)
		if err != nil {
			errs = append(errs, err)
		}
		result = soonest(result, res)
	}
	s.summarise()
	switch changed, err := r.patchStatus(ctx, s); {
	case apierrors.IsConflict(err):
		result = ctrl.Result{RequeueAfter: conflictRetry}
	case err != nil:
		errs = append(errs, fmt.Errorf("write status: %w", err))
	case changed:
		r.tell(s)
	}
	if err := errors.Join(errs...); err != nil {
		return ctrl.Result{}, err
	}
	return result, nil
}

// setFinalizer applies change, which adds or removes the finalizer, to vfm and
// writes it if that made a difference.
func (r *VFMigrationReconciler) setFinalizer(ctx context.Context, vfm *v1alpha1.VFMigration, change func(client.Object, string) bool) (ctrl.Result, error) {
	base := vfm.DeepCopy()
	if !change(vfm, v1alpha1.VFMigrationFinalizer) {
		return ctrl.Result{}, nil
	}
	err := r.Client.Patch(ctx, vfm, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{}))
	if apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(err)
}

// lookup reads an object through the cache, and from the API server if the
// cache has none: a cache lags, and may not have seen what was just created.
func (r *VFMigrationReconciler) lookup(ctx context.Context, key client.ObjectKey, obj client.Object) (bool, error) {
	err := r.Client.Get(ctx, key, obj)
	if apierrors.IsNotFound(err) {
		err = r.Live.Get(ctx, key, obj)
	}
	return err == nil, client.IgnoreNotFound(err)
}

// soonest returns the result that comes back first.
func soonest(a, b ctrl.Result) ctrl.Result {
	if a.RequeueAfter == 0 || b.RequeueAfter != 0 && b.RequeueAfter < a.RequeueAfter {
		return b
	}
	return a
}

// SetupWithManager registers the reconciler and its watches with mgr. One
// VFMigration is reconciled at a time: what two for the same VM read before
// they are accepted must not interleave.
func (r *VFMigrationReconciler) SetupWithManager(mgr ctrl.Manager) error {
	underWayNow.read(r.Client, r.Clock)
	return ctrl.NewControllerManagedBy(mgr).
		Named("vfmigration").
		For(&v1alpha1.VFMigration{}).
		Owns(&virtv1.VirtualMachineInstanceMigration{}).
		Watches(&virtv1.VirtualMachineInstanceMigration{}, r.concerned(func(m *v1alpha1.VFMigration, o client.Object) bool {
			ref := m.Spec.MigrationRef
			return ref != nil && ref.Name == o.GetName()
		})).
		Watches(&virtv1.VirtualMachineInstance{}, r.concerned(func(m *v1alpha1.VFMigration, o client.Object) bool {
			return m.Spec.VMIName == o.GetName()
		})).
		Watches(&corev1.Pod{}, r.concerned(func(m *v1alpha1.VFMigration, o client.Object) bool {
			uid := types.UID(o.GetLabels()[kubevirt.LabelMigrationJobUID])
			made, adopted := m.Status.MigrationRef, m.Spec.MigrationRef
			return made != nil && made.UID == uid || adopted != nil && adopted.UID == uid
		})).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		Complete(r)
}

// concerned maps an object to the VFMigrations of its namespace that are under
// way and that it concerns.
func (r *VFMigrationReconciler) concerned(match func(*v1alpha1.VFMigration, client.Object) bool) handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
		var list v1alpha1.VFMigrationList
		if err := r.Client.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
			ctrl.LoggerFrom(ctx).Error(err, "cannot list VFMigrations", "namespace", o.GetNamespace())
			return nil
		}
		var reqs []reconcile.Request
		for i := range list.Items {
			if m := &list.Items[i]; !isTerminal(m) && match(m, o) {
				reqs = append(reqs, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(m)})
			}
		}
		return reqs
	})
}
