package controllers

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// In each phase of KubeVirt's the deletion is asked for; the target pod goes
// with it as long as it cannot hold the VM.
func TestRollbackAsksKubeVirt(t *testing.T) {
	const wait = RollbackTimeout - time.Second
	for phase, podGone := range map[virtv1.VirtualMachineInstanceMigrationPhase]bool{
		virtv1.MigrationPhaseUnset: true, virtv1.MigrationPending: true, virtv1.MigrationScheduling: true, virtv1.MigrationScheduled: true,
		virtv1.MigrationPreparingTarget: true, virtv1.MigrationTargetReady: true, virtv1.MigrationRunning: false,
	} {
		t.Run(string(phase), func(t *testing.T) {
			migrating(phase).failing().check(t, expect{vmimGone: true, podGone: podGone, after: wait})
		})
	}
	// One that QEMU has begun fails by itself; KubeVirt is asked for nothing that
	// could come at the same time.
	for name, arrange := range map[string]func() *fixture{
		"copying":           func() *fixture { return reached(v1alpha1.ConditionPrepared, virtv1.MigrationRunning) },
		"captured":          func() *fixture { return reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning) },
		"captured, unheard": func() *fixture { return reached(v1alpha1.ConditionCaptured, virtv1.MigrationTargetReady) },
	} {
		t.Run(name, func(t *testing.T) { arrange().failing().check(t, expect{after: stopGrace - time.Second}) })
		t.Run(name+", and goes on", func(t *testing.T) {
			f := arrange().failing()
			f.vfm.Status.Failure.Time = at(time.Second - stopGrace)
			f.check(t, expect{vmimGone: true, after: RollbackTimeout - stopGrace})
		})
	}
	t.Run("pod is left over by a deletion under way", func(t *testing.T) {
		f := migrating(virtv1.MigrationTargetReady).failing()
		now := at(0)
		f.vmim.DeletionTimestamp = &now
		f.check(t, expect{vmimGone: true, podGone: true, after: wait})
	})
	t.Run("ended already", func(t *testing.T) {
		f := reached(v1alpha1.ConditionPrepared, virtv1.MigrationFailed).failing()
		f.check(t, expect{after: wait})
	})
}

// The phase that decides over the target pod is the API server's, not the cache's.
func TestRollbackSparesThePodOfAMigrationThatRuns(t *testing.T) {
	f := migrating(virtv1.MigrationTargetReady).failing()
	c := f.start(t)
	live := f.vmim.DeepCopy()
	live.ResourceVersion = ""
	live.Status.Phase = virtv1.MigrationRunning
	other := &fixture{vmim: live}
	c.r.Live = other.start(t)
	if _, err := c.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !c.exists(t, &corev1.Pod{}, "launcher-b") {
		t.Error("the target pod was deleted")
	}
}

func with(f *fixture, arrange ...func(*fixture)) *fixture {
	for _, a := range arrange {
		a(f)
	}
	return f
}

func rolledBack(f *fixture) {
	f.condition(v1alpha1.ConditionRolledBack, metav1.ConditionTrue, v1alpha1.ConditionRolledBack, "")
}

func released(f *fixture) {
	f.condition(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonReleased, "")
}

func tooLate(f *fixture) {
	f.condition(v1alpha1.ConditionRolledBack, metav1.ConditionFalse, v1alpha1.ReasonPointOfNoReturn, "")
}

func deleting(f *fixture) {
	now := at(0)
	f.vmim.DeletionTimestamp = &now
}

func completed(st *v1alpha1.VFMigrationStatus, status metav1.ConditionStatus, reason, message string) {
	now := at(time.Second)
	st.CompletionTime, st.Phase = &now, v1alpha1.PhaseFailed
	if status == metav1.ConditionTrue {
		st.Phase = v1alpha1.PhaseSucceeded
	}
	setCondition(st, v1alpha1.ConditionSucceeded, status, reason, message, time.Second)
}

// TestFinish covers every end of a migration that was accepted.
func TestFinish(t *testing.T) {
	const (
		noSource = "the agent of the source node node-a has not confirmed that the VM's VFs work there"
		noTarget = "the agent of the target node node-b has not confirmed that the target's VFs are free"
		noReturn = "the migration is past its point of no return, the target owns the VFs"
	)
	elapsed := func(d time.Duration) func(*fixture) {
		return func(f *fixture) {
			if f.vfm.Status.Failure != nil {
				f.vfm.Status.Failure.Time = at(time.Second - d)
			}
			f.late(d)
		}
	}
	for _, tc := range []struct {
		name            string
		f               *fixture
		arrange         []func(*fixture)
		success         bool
		reason, message string
		vmimGone        bool
	}{
		{"success", reached(v1alpha1.ConditionVerified, virtv1.MigrationSucceeded),
			[]func(*fixture){func(f *fixture) { f.vmi.Status.NodeName = "node-b" }}, true,
			v1alpha1.ConditionSucceeded, "The VM runs on node node-b with its VFs.", false},
		{"success, KubeVirt's object cleaned up", reached(v1alpha1.ConditionVerified, virtv1.MigrationSucceeded),
			[]func(*fixture){func(f *fixture) { f.vmi.Status.NodeName, f.vmim = "node-b", nil }}, true,
			v1alpha1.ConditionSucceeded, "The VM runs on node node-b with its VFs.", false},
		{"success, abort came too late", reached(v1alpha1.ConditionVerified, virtv1.MigrationSucceeded).failing(),
			[]func(*fixture){tooLate, func(f *fixture) { f.vmi.Status.NodeName = "node-b" }}, true,
			v1alpha1.ConditionSucceeded, "The VM runs on node node-b with its VFs. The wish to undo the migration (Aborted) came past its point of no return.", false},
		{"undone before anything was asked", accepted().failing(), nil, false, v1alpha1.ReasonAborted, "spec.abort was set", false},
		{"undone before the source was touched", migrating(virtv1.MigrationFailed).failing(), nil, false,
			v1alpha1.ReasonAborted, "spec.abort was set", false},
		{"undone", reached(v1alpha1.ConditionCaptured, virtv1.MigrationFailed).failing(), []func(*fixture){rolledBack, released}, false,
			v1alpha1.ReasonAborted, "spec.abort was set", false},
		{"undone, KubeVirt's object gone", reached(v1alpha1.ConditionCaptured, virtv1.MigrationFailed).failing(),
			[]func(*fixture){rolledBack, released, func(f *fixture) { f.vmim, f.targetPod = nil, nil }}, false,
			v1alpha1.ReasonAborted, "spec.abort was set", false},
		{"undone after all", reached(v1alpha1.ConditionRestored, virtv1.MigrationFailed).failing(), []func(*fixture){rolledBack, released}, false,
			v1alpha1.ReasonAborted, "spec.abort was set", false},
		{"the VM is gone", reached(v1alpha1.ConditionCaptured, virtv1.MigrationFailed).failing(),
			[]func(*fixture){released, func(f *fixture) { f.vmi = nil }}, false, v1alpha1.ReasonAborted, "spec.abort was set", false},
		{"nobody confirms", reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning).failing(),
			[]func(*fixture){elapsed(RollbackTimeout)}, false, v1alpha1.ReasonAborted,
			"spec.abort was set. Not undone: KubeVirt has not ended VirtualMachineInstanceMigration move (phase Running); " + noSource + "; " + noTarget, true},
		{"the source's agent cannot", reached(v1alpha1.ConditionPrepared, virtv1.MigrationFailed).failing(),
			[]func(*fixture){released, elapsed(RollbackTimeout), func(f *fixture) {
				f.condition(v1alpha1.ConditionRolledBack, metav1.ConditionFalse, v1alpha1.ReasonDeviceUnavailable, "no answer")
			}}, false, v1alpha1.ReasonAborted, "spec.abort was set. Not undone: " + noSource + " (no answer)", false},
		{"too late, and KubeVirt failed", reached(v1alpha1.ConditionCaptured, virtv1.MigrationFailed).failing(), []func(*fixture){tooLate, elapsed(RollbackTimeout)}, false,
			v1alpha1.ReasonAborted, "spec.abort was set. Not undone: " + noReturn, false},
		{"too late, and the VM ended", reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning).failing(),
			[]func(*fixture){tooLate, func(f *fixture) { f.vmi.Status.Phase = virtv1.Failed }}, false,
			v1alpha1.ReasonAborted, "spec.abort was set. Not undone: " + noReturn, false},
		{"too late, and no end", reached(v1alpha1.ConditionRestored, virtv1.MigrationRunning).failing(),
			[]func(*fixture){tooLate, elapsed(FinishTimeout)}, false, v1alpha1.ReasonAborted, "spec.abort was set. Not undone: " + noReturn, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			with(tc.f, tc.arrange...)
			status, event := metav1.ConditionFalse, "Warning MigrationFailed: "+tc.reason+": "+tc.message
			if tc.success {
				status, event = metav1.ConditionTrue, "Normal MigrationSucceeded: "+tc.message
			}
			events := []string{"VMI " + event, "VFMigration " + event}
			if tc.f.vmi == nil {
				events = events[1:]
			}
			tc.f.check(t, expect{
				status:   func(st *v1alpha1.VFMigrationStatus) { completed(st, status, tc.reason, tc.message) },
				events:   events,
				vmimGone: tc.vmimGone,
			})
		})
	}
}

// TestUndoing covers reconciles of a migration that waits to be undone.
func TestUndoing(t *testing.T) {
	const wait = RollbackTimeout - time.Second
	for name, f := range map[string]*fixture{
		"source not confirmed":    with(reached(v1alpha1.ConditionPrepared, virtv1.MigrationFailed).failing(), released),
		"source may be preparing": with(reached(v1alpha1.ConditionTargetPinned, virtv1.MigrationFailed).failing(), released),
		"target not confirmed":    with(reached(v1alpha1.ConditionTargetPinned, virtv1.MigrationFailed).failing(), rolledBack),
		"KubeVirt not confirmed":  with(reached(v1alpha1.ConditionTargetPinned, virtv1.MigrationRunning).failing(), rolledBack, released, deleting),
		"too late, and KubeVirt failed": with(reached(v1alpha1.ConditionCaptured, virtv1.MigrationFailed).failing(), tooLate, func(f *fixture) {
			f.vfm.Status.Phase = v1alpha1.PhaseSwitching
		}),
	} {
		t.Run(name, func(t *testing.T) { f.check(t, expect{after: wait, vmimGone: !f.vmim.DeletionTimestamp.IsZero()}) })
	}
	t.Run("too late: the normal end is awaited, and nothing deleted", func(t *testing.T) {
		f := reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning).failing()
		f.condition(v1alpha1.ConditionRolledBack, metav1.ConditionFalse, v1alpha1.ReasonPointOfNoReturn, "")
		f.check(t, expect{
			after:  FinishTimeout - time.Second,
			status: func(st *v1alpha1.VFMigrationStatus) { st.Phase = v1alpha1.PhaseSwitching },
		})
	})
}

// Past the point of no return a missing end is stated, not undone.
func TestNoEndPastThePointOfNoReturn(t *testing.T) {
	for _, tc := range []struct {
		name, reason, message string
		f                     *fixture
		arrange               func(*fixture)
	}{
		{"not verified in time", v1alpha1.ReasonTimeout,
			"7m0s passed since the target took over the VFs while waiting for the agent of node node-b to verify the VFs; see the compsc agent's log on node node-b",
			reached(v1alpha1.ConditionRestored, virtv1.MigrationSucceeded), func(f *fixture) { f.late(FinishTimeout) }},
		{"not finished in time", v1alpha1.ReasonTimeout,
			"7m0s passed since the target took over the VFs while waiting for KubeVirt to finish VirtualMachineInstanceMigration move; the VM runs on node node-b",
			reached(v1alpha1.ConditionVerified, virtv1.MigrationRunning), func(f *fixture) { f.late(FinishTimeout) }},
		{"driver not seen", v1alpha1.ReasonRestoreFailed, "Verified: driver does not use the VF",
			reached(v1alpha1.ConditionRestored, virtv1.MigrationRunning), func(f *fixture) {
				f.condition(v1alpha1.ConditionVerified, metav1.ConditionFalse, v1alpha1.ReasonRestoreFailed, "driver does not use the VF")
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.arrange(tc.f)
			c := tc.f.start(t)
			for i, terminal := range []bool{false, true} {
				if _, err := c.reconcile(t.Context()); err != nil {
					t.Fatal(err)
				}
				m := c.vfm(t)
				if f := m.Status.Failure; f == nil || f.Reason != tc.reason || f.Message != tc.message {
					t.Errorf("failure %+v, want %s: %s", f, tc.reason, tc.message)
				}
				if isTerminal(m) != terminal {
					t.Errorf("terminal after reconcile %d: %t", i+1, !terminal)
				}
			}
			if !c.exists(t, &virtv1.VirtualMachineInstanceMigration{}, "move") || !c.exists(t, &corev1.Pod{}, "launcher-b") {
				t.Error("what holds the VM was deleted")
			}
		})
	}
}

// An ended migration lets go of its finalizer and is never touched again.
func TestEnded(t *testing.T) {
	f := accepted().failing()
	f.vfm.Spec.Abort = true
	f.condition(v1alpha1.ConditionSucceeded, metav1.ConditionFalse, v1alpha1.ReasonAborted, "spec.abort was set")
	f.check(t, expect{})
	c := f.start(t)
	if _, err := c.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := c.vfm(t).Finalizers; len(got) != 0 {
		t.Errorf("finalizers %v", got)
	}
}

func TestDeletedUndoesFirst(t *testing.T) {
	f := migrating(virtv1.MigrationTargetReady)
	now := at(0)
	f.vfm.DeletionTimestamp = &now
	f.vmim.Finalizers = nil
	c := f.start(t)
	key := client.ObjectKeyFromObject(f.vfm)
	for i, want := range []struct{ pod, vfm bool }{
		{true, true},  // the intent is written
		{false, true}, // KubeVirt is asked
		{false, true}, // it is undone
		{false, false},
	} {
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.exists(t, &corev1.Pod{}, "launcher-b"); got != want.pod {
			t.Errorf("after reconcile %d the target pod exists: %t", i+1, got)
		}
		if got := c.Get(t.Context(), key, &v1alpha1.VFMigration{}) == nil; got != want.vfm {
			t.Errorf("after reconcile %d the VFMigration exists: %t", i+1, got)
		}
	}
}
