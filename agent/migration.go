package agent

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/api/v1alpha1"
)

// +kubebuilder:rbac:groups=compsc.io,resources=vfmigrations,verbs=get;list;watch
// +kubebuilder:rbac:groups=compsc.io,resources=vfmigrations/status,verbs=get;patch

// reconcileMigration plays this node's part in one migration:
//  1. Nothing, once it is over; a worker that still runs is ended.
//  2. As its source: see reconcileSource.
//  3. As its target: see reconcileTarget.
//
// What may take long, or must be quick, is left to workers.
func (a *agent) reconcileMigration(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	m := &vfMigration{}
	if err := a.client.Get(ctx, req.NamespacedName, m); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	isSource, isTarget := a.isSource(m), a.isTarget(m)
	if over(m) {
		a.forget(m)
		for _, s := range []side{source, preparedWriter, target} {
			if err := a.work.stop(ctx, workKey{m.UID, s}); err != nil {
				return ctrl.Result{}, err
			}
		}
		return ctrl.Result{}, nil
	}
	var results [2]ctrl.Result
	var err error
	if isSource {
		if results[0], err = a.reconcileSource(ctx, m); err != nil {
			return ctrl.Result{}, err
		}
	}
	if isTarget {
		if results[1], err = a.reconcileTarget(ctx, m); err != nil {
			return ctrl.Result{}, err
		}
	}
	return sooner(results[0], results[1]), nil
}

func (a *agent) isSource(m *vfMigration) bool {
	return m.Status.Source != nil && m.Status.Source.NodeName == a.node
}

func (a *agent) isTarget(m *vfMigration) bool {
	return m.Status.Target != nil && m.Status.Target.NodeName == a.node
}

func (a *agent) forget(m *vfMigration) {
	for _, what := range []string{tryPin, tryTarget, tryCancelSource, tryCancelTarget} {
		a.tries.worked(what + string(m.UID))
	}
}

// What is tried again within bounds, by migration.
const (
	tryPin          = "pin "
	tryTarget       = "target "
	tryCancelSource = "cancel source "
	tryCancelTarget = "cancel target "
)

func sooner(x, y ctrl.Result) ctrl.Result {
	if x.RequeueAfter == 0 || y.RequeueAfter != 0 && y.RequeueAfter < x.RequeueAfter {
		return y
	}
	return x
}

// named returns how peers name a migration.
func named(m *vfMigration) *peerpb.Migration {
	return &peerpb.Migration{Namespace: m.Namespace, Name: m.Name, Uid: string(m.UID)}
}

// why returns the reason for undoing a migration, for the device process.
func why(m *vfMigration) string {
	if f := m.Status.Failure; f != nil {
		return f.Reason + ": " + f.Message
	}
	return v1alpha1.ReasonRollingBack
}

// migrationsOf maps a pod to the migrations that name it.
func (a *agent) migrationsOf(ctx context.Context, o client.Object) []ctrl.Request {
	if _, ok := o.(*corev1.Pod); !ok {
		return nil
	}
	var list v1alpha1.VFMigrationList
	if err := a.client.List(ctx, &list, client.InNamespace(o.GetNamespace())); err != nil {
		a.log.Error("listing VFMigrations", "error", err)
		return nil
	}
	var out []ctrl.Request
	for i := range list.Items {
		m := &list.Items[i]
		if !over(m) && (podUID(m.Status.Source) == o.GetUID() || podUID(m.Status.Target) == o.GetUID()) {
			out = append(out, ctrl.Request{NamespacedName: client.ObjectKeyFromObject(m)})
		}
	}
	return out
}

func podUID(e *v1alpha1.VFMigrationEndpoint) types.UID {
	if e == nil {
		return ""
	}
	return e.PodUID
}

func reasonOf(m *vfMigration, typ string) string {
	if c := meta.FindStatusCondition(m.Status.Conditions, typ); c != nil {
		return c.Reason
	}
	return ""
}

func statusOf(m *vfMigration, typ string) metav1.ConditionStatus {
	if c := meta.FindStatusCondition(m.Status.Conditions, typ); c != nil {
		return c.Status
	}
	return ""
}
