package agent

import (
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/api/v1alpha1"
)

func TestAbort(t *testing.T) {
	steps := []struct {
		name string
		to   func(*scene)
	}{
		{"at once", func(*scene) {}},
		{"pinned", func(s *scene) {
			s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionTrue, v1alpha1.ConditionTargetPinned)
		}},
		{"prepared", func(s *scene) {
			s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
		}},
		{"captured", func(s *scene) {
			eventually(s.t, "the VM stops", s.src.vmStops)
			s.expect(v1alpha1.ConditionCaptured, metav1.ConditionTrue, v1alpha1.ConditionCaptured)
		}},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			s := boot(t)
			s.begin()
			step.to(s)
			s.fail(v1alpha1.ReasonAborted, "spec.abort was set")
			s.rolledBack(v1alpha1.ReasonAborted)
			if s.dst.vmWantsToStart() {
				t.Error("the target would hold, and then start, the VM")
			}
			s.status(func(m *vfMigration) { setFalse(m, v1alpha1.ConditionSucceeded, v1alpha1.ReasonAborted, "aborted") })

			// The VM can be moved by another VFMigration afterwards.
			s.stopDst()
			if err := s.client.Delete(t.Context(), s.tPod); err != nil {
				t.Fatal(err)
			}
			s.tPod = s.pod("launcher-target-2", "b", vfB, "vmim-2")
			s.dst, s.stopDst = startDevice(t, s.to.podsDir, s.tPod.UID)
			s.migration = s.migrate("m2", s.sPod, s.tPod)
			s.switchOver()
			s.succeed()
			if _, epoch := s.lab.lease("b", vfB); epoch != 2 && step.name != "at once" {
				t.Errorf("epoch of the target's VF is %d, want 2", epoch)
			}
		})
	}
}

func TestAbortPastThePointOfNoReturn(t *testing.T) {
	s := boot(t)
	s.begin()
	eventually(t, "the VM stops", s.src.vmStops)
	s.expect(v1alpha1.ConditionCaptured, metav1.ConditionTrue, v1alpha1.ConditionCaptured)
	if !s.dst.vmWantsToStart() {
		t.Fatal("the target does not hold its start")
	}
	eventually(t, "the target is active", func() bool { return s.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) })
	s.fail(v1alpha1.ReasonAborted, "spec.abort was set")
	s.expect(v1alpha1.ConditionRolledBack, metav1.ConditionFalse, v1alpha1.ReasonPointOfNoReturn)
	s.dst.set(func() { s.dst.phase = pb.Phase_PHASE_RUNNING })
	s.expect(v1alpha1.ConditionVerified, metav1.ConditionTrue, v1alpha1.ConditionVerified)
	if !s.src.is(pb.Phase_PHASE_RELINQUISHED) || !is(s.get(), v1alpha1.ConditionTargetPinned) {
		t.Errorf("source in %s, target pinned: %v", s.src.phase, is(s.get(), v1alpha1.ConditionTargetPinned))
	}
}
