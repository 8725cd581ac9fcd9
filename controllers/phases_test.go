package controllers

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

func TestFinalizerComesFirst(t *testing.T) {
	f := newFixture()
	f.vfm.Finalizers = nil
	c := f.start(t)
	if _, err := c.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !controllerutil.ContainsFinalizer(c.vfm(t), v1alpha1.VFMigrationFinalizer) {
		t.Error("no finalizer")
	}
}

// What is decided in one reconcile is acted upon in the next, when it is written.
func TestNothingIsCreatedBeforeAcceptanceIsWritten(t *testing.T) {
	f := newFixture()
	c := f.start(t)
	for i, want := range []bool{false, true} {
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.exists(t, &virtv1.VirtualMachineInstanceMigration{}, "move"); got != want {
			t.Errorf("after reconcile %d a VirtualMachineInstanceMigration exists: %t, want %t", i+1, got, want)
		}
	}
}

func TestCreateMigration(t *testing.T) {
	for _, tc := range []struct {
		name    string
		target  *v1alpha1.VFMigrationTarget
		arrange func(*fixture)
		want    map[string]string
	}{
		{"anywhere", nil, nil, nil},
		{"to a node", &v1alpha1.VFMigrationTarget{NodeName: "node-b"}, nil, map[string]string{"kubernetes.io/hostname": "node-b"}},
		{"to a node of another host name", &v1alpha1.VFMigrationTarget{NodeName: "node-b"},
			func(f *fixture) { f.nodes["node-b"].Labels[kubevirt.LabelHostname] = "host-b" }, map[string]string{"kubernetes.io/hostname": "host-b"}},
		{"by label", &v1alpha1.VFMigrationTarget{NodeSelector: map[string]string{"zone": "x"}}, nil, map[string]string{"zone": "x"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := accepted()
			f.vfm.Spec.Target = tc.target
			if tc.arrange != nil {
				tc.arrange(f)
			}
			c := f.start(t)
			res, err := c.reconcile(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if want := v1alpha1.DefaultPrepareTimeout - time.Second; res.RequeueAfter != want {
				t.Errorf("requeued after %s, want %s", res.RequeueAfter, want)
			}
			vmim := &virtv1.VirtualMachineInstanceMigration{}
			if !c.exists(t, vmim, "move") {
				t.Fatal("no VirtualMachineInstanceMigration")
			}
			want := virtv1.VirtualMachineInstanceMigrationSpec{VMIName: "vm", AddedNodeSelector: tc.want}
			if diff := cmp.Diff(want, vmim.Spec); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
			if vmim.Labels["compsc.io/vfmigration-uid"] != "vfm-uid" || !metav1.IsControlledBy(vmim, f.vfm) {
				t.Errorf("labels %v, owners %v", vmim.Labels, vmim.OwnerReferences)
			}
			if ref := c.vfm(t).Status.MigrationRef; ref == nil || ref.Name != "move" || ref.UID != vmim.UID {
				t.Errorf("migrationRef %v", ref)
			}
		})
	}
}

// failure is a status change: the migration is to be undone from now on.
func failure(reason, message string) func(*v1alpha1.VFMigrationStatus) {
	return func(st *v1alpha1.VFMigrationStatus) {
		st.Failure = &v1alpha1.VFMigrationFailure{Reason: reason, Message: message, Time: at(time.Second)}
		st.Phase = v1alpha1.PhaseRollingBack
		setCondition(st, v1alpha1.ConditionSucceeded, metav1.ConditionUnknown, v1alpha1.ReasonRollingBack, "Being undone: "+message, 0)
	}
}

// rollbackEvent is told to the VM's owner too, unless that VM is no more.
func (f *fixture) rollbackEvent(reason, message string) []string {
	text := " Warning VFRollback: " + reason + ": " + message
	if f.vmi == nil || f.vmi.CreationTimestamp.After(f.vfm.Status.StartTime.Time) {
		return []string{"VFMigration" + text}
	}
	return []string{"VMI" + text, "VFMigration" + text}
}

// TestFail covers every way in which a migration under way turns into one that
// is to be undone. Nothing is undone before that is written.
func TestFail(t *testing.T) {
	for _, tc := range []struct {
		name, reason, message string
		f                     *fixture
		arrange               func(*fixture)
	}{
		{"abort before KubeVirt was asked", v1alpha1.ReasonAborted, "spec.abort was set; to move the VM, create a new VFMigration",
			accepted(), func(f *fixture) { f.vfm.Spec.Abort = true }},
		{"abort during preparation", v1alpha1.ReasonAborted, "spec.abort was set; to move the VM, create a new VFMigration",
			migrating(virtv1.MigrationScheduling), func(f *fixture) { f.vfm.Spec.Abort = true }},
		{"abort after capture", v1alpha1.ReasonAborted, "spec.abort was set; to move the VM, create a new VFMigration",
			reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning), func(f *fixture) { f.vfm.Spec.Abort = true }},
		{"deletion", v1alpha1.ReasonDeleted, "the VFMigration was deleted before its end",
			reached(v1alpha1.ConditionPrepared, virtv1.MigrationRunning), func(f *fixture) { now := at(0); f.vfm.DeletionTimestamp = &now }},
		{"migration deleted", v1alpha1.ReasonMigrationFailed,
			"VirtualMachineInstanceMigration move was deleted by somebody else; to undo a migration, set spec.abort of its VFMigration",
			migrating(virtv1.MigrationScheduling), func(f *fixture) { f.vmim = nil }},
		{"migration being deleted", v1alpha1.ReasonMigrationFailed,
			"VirtualMachineInstanceMigration move was deleted by somebody else; to undo a migration, set spec.abort of its VFMigration",
			reached(v1alpha1.ConditionPrepared, virtv1.MigrationRunning), func(f *fixture) { now := at(0); f.vmim.DeletionTimestamp = &now }},
		{"name taken since", v1alpha1.ReasonMigrationInProgress,
			"a VirtualMachineInstanceMigration move exists that is not this VFMigration's; delete it, or create a VFMigration of another name",
			accepted(), func(f *fixture) { f.others = append(f.others, otherVMIM("move", "vm", virtv1.MigrationSucceeded)) }},
		{"migration not admitted", v1alpha1.ReasonMigrationFailed, `KubeVirt does not accept the migration: in-flight migration detected`,
			accepted(), func(f *fixture) {
				f.funcs.Create = func(context.Context, client.WithWatch, client.Object, ...client.CreateOption) error {
					return apierrors.NewBadRequest("in-flight migration detected")
				}
			}},
		{"migration failed", v1alpha1.ReasonMigrationFailed,
			"KubeVirt reports VirtualMachineInstanceMigration move failed: guest CPU too new; see its events and the target pod's, then create a new VFMigration",
			migrating(virtv1.MigrationFailed), func(f *fixture) {
				f.vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "vmim-uid", FailureReason: "guest CPU too new"}
			}},
		{"migration failed a while ago", v1alpha1.ReasonMigrationFailed,
			"KubeVirt reports VirtualMachineInstanceMigration move failed: no cause is given; see its events and the target pod's, then create a new VFMigration",
			migrating(virtv1.MigrationFailed), func(f *fixture) {
				end := at(time.Second - FailureGrace)
				f.vmim.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{EndTimestamp: &end}
			}},
		{"VMI deleted", v1alpha1.ReasonVMINotFound, "VirtualMachineInstance vm was deleted during its migration",
			migrating(virtv1.MigrationScheduling), func(f *fixture) { f.vmi = nil }},
		{"VMI made anew", v1alpha1.ReasonVMINotFound, "VirtualMachineInstance vm was deleted during its migration",
			migrating(virtv1.MigrationScheduling), func(f *fixture) { f.vmi.CreationTimestamp = at(time.Second) }},
		{"VM ended", v1alpha1.ReasonVMINotRunning, "VirtualMachineInstance vm came to phase Succeeded during its migration; start the VM again",
			migrating(virtv1.MigrationScheduling), func(f *fixture) { f.vmi.Status.Phase = virtv1.Succeeded }},
		{"target pod replaced", v1alpha1.ReasonMigrationFailed,
			"the target pod launcher-b was replaced by launcher-c on node node-b; create a new VFMigration",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.targetPod.Name, f.targetPod.UID = "launcher-c", "launcher-c-uid"
			}},
		{"target pod where it must not be", v1alpha1.ReasonTargetNotFound,
			"KubeVirt placed the target pod launcher-b on node node-b, which spec.target does not allow; the VM's own nodeSelector or affinity contradicts spec.target",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.vfm.Status.Target, f.vfm.Spec.Target = nil, &v1alpha1.VFMigrationTarget{NodeName: "node-c"}
			}},
		{"pinning failed", v1alpha1.ReasonPinFailed, "TargetPinned: VF in use",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.condition(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonPinFailed, "VF in use")
			}},
		{"target given back unasked", v1alpha1.ReasonPinFailed, "TargetPinned: pod is gone",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.condition(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonReleased, "pod is gone")
			}},
		{"incompatible", v1alpha1.ReasonIncompatible, "Prepared: heads not writable",
			reached(v1alpha1.ConditionTargetPinned, virtv1.MigrationScheduling), func(f *fixture) {
				f.condition(v1alpha1.ConditionPrepared, metav1.ConditionFalse, v1alpha1.ReasonIncompatible, "heads not writable")
			}},
		{"state rejected, as KubeVirt's failure follows", v1alpha1.ReasonStateRejected, "Captured: checksum",
			reached(v1alpha1.ConditionPrepared, virtv1.MigrationFailed), func(f *fixture) {
				f.condition(v1alpha1.ConditionCaptured, metav1.ConditionFalse, v1alpha1.ReasonStateRejected, "checksum")
			}},
		{"restore failed", v1alpha1.ReasonRestoreFailed, "Restored: reset timed out",
			reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning), func(f *fixture) {
				f.condition(v1alpha1.ConditionRestored, metav1.ConditionFalse, v1alpha1.ReasonRestoreFailed, "reset timed out")
			}},
		{"no target pod in time", v1alpha1.ReasonTimeout,
			"spec.timeouts.prepare, 3m0s, passed while waiting for KubeVirt to create a target pod; see the events of VirtualMachineInstanceMigration move",
			migrating(virtv1.MigrationPending), func(f *fixture) {
				f.targetPod, f.vfm.Status.Target = nil, nil
				f.late(v1alpha1.DefaultPrepareTimeout)
			}},
		{"target pod not scheduled in time", v1alpha1.ReasonTimeout,
			"spec.timeouts.prepare, 10s, passed while waiting for the target pod launcher-b to be scheduled; see its events",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.targetPod.Spec.NodeName, f.vfm.Status.Target = "", nil
				f.vfm.Spec.Timeouts.Prepare = &metav1.Duration{Duration: 10 * time.Second}
				f.late(10 * time.Second)
			}},
		{"not pinned in time", v1alpha1.ReasonTimeout,
			"spec.timeouts.prepare, 3m0s, passed while waiting for the agent of node node-b to attach VFs to the target pod launcher-b; see the compsc agent's log on node node-b",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.late(v1alpha1.DefaultPrepareTimeout)
				renewed := metav1.NewMicroTime(t0.Add(time.Second))
				f.leases["node-b"].Spec.RenewTime = &renewed
			}},
		{"target's agent died", v1alpha1.ReasonTimeout,
			"spec.timeouts.prepare, 3m0s, passed while waiting for the agent of node node-b to attach VFs to the target pod launcher-b, which is not available: lease compsc-system/agent-node-b does not exist; see that the compsc agent runs on node node-b",
			migrating(virtv1.MigrationScheduling), func(f *fixture) {
				f.late(v1alpha1.DefaultPrepareTimeout)
				delete(f.leases, "node-b")
			}},
		{"no verdict in time", v1alpha1.ReasonTimeout,
			"spec.timeouts.prepare, 3m0s, passed while waiting for the agents to agree that the VFs can be moved; see the compsc agent's log on node node-a",
			reached(v1alpha1.ConditionTargetPinned, virtv1.MigrationScheduling), func(f *fixture) { f.late(v1alpha1.DefaultPrepareTimeout) }},
		{"not converging", v1alpha1.ReasonTimeout,
			"spec.timeouts.migrate, 15m0s, passed while waiting for the end of pre-copy and the switchover; give more time, or let KubeVirt's migration policy converge the VM's memory",
			reached(v1alpha1.ConditionPrepared, virtv1.MigrationRunning), func(f *fixture) { f.late(v1alpha1.DefaultMigrateTimeout) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.arrange(tc.f)
			tc.f.check(t, expect{
				status:   failure(tc.reason, tc.message),
				events:   tc.f.rollbackEvent(tc.reason, tc.message),
				vmimGone: tc.f.vmim != nil && tc.f.vmim.DeletionTimestamp != nil,
			})
		})
	}
}

// late moves everything but the clock so far into the past that the bound d,
// which began at t0, has just passed.
func (f *fixture) late(d time.Duration) {
	f.vfm.Status.StartTime.Time = f.vfm.Status.StartTime.Add(time.Second - d)
	for i := range f.vfm.Status.Conditions {
		c := &f.vfm.Status.Conditions[i]
		c.LastTransitionTime.Time = c.LastTransitionTime.Add(time.Second - d)
	}
}

// TestProceed covers reconciles in which the migration goes on, or waits.
func TestProceed(t *testing.T) {
	const prepare, migrate = v1alpha1.DefaultPrepareTimeout - time.Second, v1alpha1.DefaultMigrateTimeout - time.Second
	phaseIs := func(p v1alpha1.VFMigrationPhase) func(*v1alpha1.VFMigrationStatus) {
		return func(st *v1alpha1.VFMigrationStatus) { st.Phase = p }
	}
	for _, tc := range []struct {
		name    string
		f       *fixture
		arrange func(*fixture)
		want    expect
	}{
		{"nothing new", migrating(virtv1.MigrationScheduling), nil, expect{after: prepare}},
		{"target pod without a node", migrating(virtv1.MigrationScheduling), func(f *fixture) {
			f.targetPod.Spec.NodeName, f.vfm.Status.Target = "", nil
		}, expect{after: prepare}},
		{"target pod being deleted", migrating(virtv1.MigrationScheduling), func(f *fixture) {
			now := at(0)
			f.vfm.Status.Target, f.targetPod.DeletionTimestamp, f.targetPod.Finalizers = nil, &now, []string{"x/y"}
		}, expect{after: prepare, podGone: true}},
		{"target pod on a node", migrating(virtv1.MigrationScheduling), func(f *fixture) { f.vfm.Status.Target = nil }, expect{
			after: prepare, events: []string{"VFMigration Normal TargetChosen: KubeVirt chose node node-b, pod launcher-b"},
			status: func(st *v1alpha1.VFMigrationStatus) {
				st.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "node-b", PodName: "launcher-b", PodUID: "launcher-b-uid"}
			},
		}},
		{"attachment pod is no target", migrating(virtv1.MigrationScheduling), func(f *fixture) {
			f.vfm.Status.Target, f.targetPod.Labels[kubevirt.LabelApp] = nil, "hotplug-disk"
		}, expect{after: prepare}},
		{"migration created, but not noted", migrating(virtv1.MigrationPending), func(f *fixture) {
			f.vfm.Status.MigrationRef, f.vfm.Status.Target, f.targetPod = nil, nil, nil
		}, expect{after: prepare, status: func(st *v1alpha1.VFMigrationStatus) {
			st.MigrationRef = &v1alpha1.MigrationReference{Name: "move", UID: "vmim-uid"}
		}}},
		{"agent in progress", migrating(virtv1.MigrationScheduling), func(f *fixture) {
			f.condition(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonProgressing, "waiting for the device")
		}, expect{after: prepare}},
		{"pinned", reached(v1alpha1.ConditionTargetPinned, virtv1.MigrationScheduling), func(f *fixture) { f.vfm.Status.Phase = v1alpha1.PhasePinning },
			expect{after: prepare, status: phaseIs(v1alpha1.PhasePreparing)}},
		{"prepared", reached(v1alpha1.ConditionPrepared, virtv1.MigrationRunning), func(f *fixture) { f.vfm.Status.Phase = v1alpha1.PhasePreparing },
			expect{after: migrate, status: phaseIs(v1alpha1.PhaseCopying)}},
		{"captured", reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning), func(f *fixture) { f.vfm.Status.Phase = v1alpha1.PhaseCopying },
			expect{after: migrate, status: phaseIs(v1alpha1.PhaseSwitching)}},
		{"restored", reached(v1alpha1.ConditionRestored, virtv1.MigrationRunning), func(f *fixture) { f.vfm.Status.Phase = v1alpha1.PhaseSwitching },
			expect{after: FinishTimeout - time.Second, status: phaseIs(v1alpha1.PhaseVerifying)}},
		{"abort too late", reached(v1alpha1.ConditionRestored, virtv1.MigrationRunning), func(f *fixture) { f.vfm.Spec.Abort = true },
			expect{after: FinishTimeout - time.Second}},
		{"deletion too late", reached(v1alpha1.ConditionVerified, virtv1.MigrationRunning), func(f *fixture) {
			f.vmi.Status.NodeName = "node-b"
		}, expect{after: FinishTimeout - time.Second}},
		{"KubeVirt is done, the agent not yet", reached(v1alpha1.ConditionCaptured, virtv1.MigrationSucceeded), func(f *fixture) {
			f.vmi.Status.NodeName = "node-b"
			f.vmim.Status.PhaseTransitionTimestamps = []virtv1.VirtualMachineInstanceMigrationPhaseTransitionTimestamp{
				{Phase: virtv1.MigrationRunning, PhaseTransitionTimestamp: at(-time.Minute)},
				{Phase: virtv1.MigrationSucceeded, PhaseTransitionTimestamp: at(0)},
			}
		}, expect{after: FinishTimeout - time.Second}},
		{"pod of a finished migration ends", reached(v1alpha1.ConditionVerified, virtv1.MigrationRunning), func(f *fixture) {
			f.targetPod = nil
		}, expect{after: FinishTimeout - time.Second}},
		{"failed just now: an agent may tell why", migrating(virtv1.MigrationFailed), func(f *fixture) {
			f.vmim.Status.PhaseTransitionTimestamps = []virtv1.VirtualMachineInstanceMigrationPhaseTransitionTimestamp{
				{Phase: virtv1.MigrationFailed, PhaseTransitionTimestamp: at(0)},
			}
		}, expect{after: FailureGrace - time.Second}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.arrange != nil {
				tc.arrange(tc.f)
			}
			tc.f.check(t, tc.want)
		})
	}
}

// The remains of an earlier VFMigration of the same name make way.
func TestLeftoverMigrationIsReplaced(t *testing.T) {
	f := accepted()
	left := otherVMIM("move", "vm", virtv1.MigrationSucceeded)
	left.Labels = map[string]string{kubevirt.LabelVFMigrationUID: "uid-of-earlier"}
	f.others = append(f.others, left)
	c := f.start(t)
	for range 2 {
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	vmim := &virtv1.VirtualMachineInstanceMigration{}
	if !c.exists(t, vmim, "move") || !metav1.IsControlledBy(vmim, f.vfm) {
		t.Errorf("not replaced: %+v", vmim.ObjectMeta)
	}
}

// A cache that does not know of the abort yet must not create a migration.
func TestStaleCacheCreatesNothing(t *testing.T) {
	f := accepted()
	c := f.start(t)
	stale := c.vfm(t)
	fresh := stale.DeepCopy()
	fresh.Status.Failure = &v1alpha1.VFMigrationFailure{Reason: v1alpha1.ReasonAborted, Message: "x", Time: at(0)}
	if err := c.Status().Update(t.Context(), fresh); err != nil {
		t.Fatal(err)
	}
	c.r.Client = interceptor.NewClient(c.WithWatch, interceptor.Funcs{
		Get: func(ctx context.Context, w client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			if m, ok := o.(*v1alpha1.VFMigration); ok {
				stale.DeepCopyInto(m)
				return nil
			}
			return w.Get(ctx, key, o, opts...)
		},
	})
	res, err := c.reconcile(t.Context())
	if err != nil || res.RequeueAfter != conflictRetry {
		t.Errorf("result %v, error %v; want a retry after %s", res, err, conflictRetry)
	}
	if c.exists(t, &virtv1.VirtualMachineInstanceMigration{}, "move") {
		t.Error("a VirtualMachineInstanceMigration was created")
	}
}

// A cache that has not seen what was just created must not take it for gone.
func TestLaggingCacheIsNoLoss(t *testing.T) {
	f := migrating(virtv1.MigrationPending)
	f.targetPod, f.vfm.Status.Target = nil, nil
	c := f.start(t)
	c.r.Client = interceptor.NewClient(c.WithWatch, interceptor.Funcs{
		Get: func(ctx context.Context, w client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			switch o.(type) {
			case *virtv1.VirtualMachineInstanceMigration, *virtv1.VirtualMachineInstance:
				return apierrors.NewNotFound(schema.GroupResource{}, key.Name)
			}
			return w.Get(ctx, key, o, opts...)
		},
	})
	if _, err := c.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if fail := c.vfm(t).Status.Failure; fail != nil {
		t.Errorf("failure %+v", fail)
	}
}

// Errors of the API server are returned, so that the reconcile is repeated,
// and end nothing.
func TestErrorsAreRetried(t *testing.T) {
	broken := errors.New("broken")
	onDelete := func(f *fixture) {
		f.funcs.Delete = func(context.Context, client.WithWatch, client.Object, ...client.DeleteOption) error { return broken }
	}
	for _, tc := range []struct {
		name    string
		f       *fixture
		arrange func(*fixture)
	}{
		{"create", accepted(), func(f *fixture) {
			f.funcs.Create = func(context.Context, client.WithWatch, client.Object, ...client.CreateOption) error { return broken }
		}},
		{"delete", migrating(virtv1.MigrationRunning).failing(), onDelete},
		{"list pods", migrating(virtv1.MigrationRunning), func(f *fixture) {
			f.funcs.List = func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
				if _, ok := l.(*corev1.PodList); ok {
					return broken
				}
				return c.List(ctx, l, opts...)
			}
		}},
		{"status", newFixture(), func(f *fixture) {
			f.funcs.SubResourcePatch = func(context.Context, client.Client, string, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
				return broken
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.arrange(tc.f)
			c := tc.f.start(t)
			if _, err := c.reconcile(t.Context()); !errors.Is(err, broken) {
				t.Errorf("error %v, want %v", err, broken)
			}
			if isTerminal(c.vfm(t)) {
				t.Error("the migration was ended")
			}
			if len(c.rec.events) != 0 {
				t.Errorf("events %q", c.rec.events)
			}
		})
	}
}

// A status that lost against another writer is computed anew, and nothing is
// told of it.
func TestConflictIsRetried(t *testing.T) {
	f := newFixture()
	f.funcs.SubResourcePatch = func(context.Context, client.Client, string, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
		return apierrors.NewConflict(schema.GroupResource{}, "move", errors.New("changed"))
	}
	c := f.start(t)
	res, err := c.reconcile(t.Context())
	if err != nil || res.RequeueAfter != conflictRetry || len(c.rec.events) != 0 {
		t.Errorf("result %v, error %v, events %q; want a retry after %s", res, err, c.rec.events, conflictRetry)
	}
}
