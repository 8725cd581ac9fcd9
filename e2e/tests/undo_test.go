//go:build e2e

package tests

import (
	"context"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

func isTrue(condition string) func(*v1alpha1.VFMigration) bool {
	return func(m *v1alpha1.VFMigration) bool {
		return meta.IsStatusConditionTrue(m.Status.Conditions, condition)
	}
}

// stage is a moment before the point of no return, and how to keep a
// migration in it.
type stage struct {
	name string
	// hold is where the stand-in keeps the migration; or, if empty, slow
	// keeps it in pre-copy.
	hold standin.Point
	// reached tells that the migration is there.
	reached func(context.Context, *v1alpha1.VFMigration) (bool, error)
}

// inPhase tells whether a VFMigration has the condition and its
// VirtualMachineInstanceMigration is in the phase.
func inPhase(phase kubevirtv1.VirtualMachineInstanceMigrationPhase, condition string) func(context.Context, *v1alpha1.VFMigration) (bool, error) {
	return func(ctx context.Context, m *v1alpha1.VFMigration) (bool, error) {
		if !isTrue(condition)(m) || m.Status.MigrationRef == nil {
			return false, nil
		}
		k := &kubevirtv1.VirtualMachineInstanceMigration{}
		err := h.Client().Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: m.Status.MigrationRef.Name}, k)
		return k.Status.Phase == phase, err
	}
}

func stages() []stage {
	return []stage{
		{"accepted", standin.InPending, inPhase(kubevirtv1.MigrationPending, v1alpha1.ConditionAccepted)},
		{"pinned", standin.InScheduling, inPhase(kubevirtv1.MigrationScheduling, v1alpha1.ConditionTargetPinned)},
		{"prepared", standin.InScheduled, inPhase(kubevirtv1.MigrationScheduled, v1alpha1.ConditionPrepared)},
		{"preparing-target", standin.InPreparingTarget, inPhase(kubevirtv1.MigrationPreparingTarget, v1alpha1.ConditionPrepared)},
		{"target-ready", standin.InTargetReady, inPhase(kubevirtv1.MigrationTargetReady, v1alpha1.ConditionPrepared)},
		{"pre-copy", "", copying},
		{"captured", standin.InPreSwitchover, inPhase(kubevirtv1.MigrationRunning, v1alpha1.ConditionCaptured)},
		{"before-start", standin.BeforeFinish, loaded},
	}
}

// bring starts a migration and keeps it in the stage.
func (s stage) bring(t *testing.T, ctx context.Context) (m *v1alpha1.VFMigration, release func()) {
	t.Helper()
	if s.hold != "" {
		release = h.StandIn.Hold(s.hold)
	} else {
		h.StandIn.SetBandwidth(1 << 20)
		release = func() { h.StandIn.SetBandwidth(0) }
	}
	t.Cleanup(release)
	m = newMigration(t, ctx)
	check(t, create(ctx, m))
	reach(t, ctx, m, s.name, s.reached)
	return m, release
}

// reach waits until a migration that must not end before is where reached
// says.
func reach(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, what string, reached func(context.Context, *v1alpha1.VFMigration) (bool, error)) {
	t.Helper()
	check(t, wait.Until(ctx, "VFMigration "+m.Name+" to be "+what, func(ctx context.Context) (bool, error) {
		if err := h.Client().Get(ctx, client.ObjectKeyFromObject(m), m); err != nil {
			return false, err
		}
		if harness.Ended(m) {
			t.Fatalf("it ended: %s", harness.Describe(m))
		}
		return reached(ctx, m)
	}))
}

// copying tells whether pre-copy has begun.
func copying(_ context.Context, m *v1alpha1.VFMigration) (bool, error) {
	return isTrue(v1alpha1.ConditionPrepared)(m) && m.Status.MigrationRef != nil && h.StandIn.Copying(m.Status.MigrationRef.UID), nil
}

// loaded tells whether the target has loaded everything.
func loaded(_ context.Context, m *v1alpha1.VFMigration) (bool, error) {
	if !isTrue(v1alpha1.ConditionCaptured)(m) || m.Status.MigrationRef == nil {
		return false, nil
	}
	_, ok := h.StandIn.Loaded(m.Status.MigrationRef.UID)
	return ok, nil
}

// letGo ends the hold of the stages in which neither KubeVirt nor libvirt can
// be interrupted, once the undoing has begun.
func (s stage) letGo(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, release func()) {
	t.Helper()
	if s.hold != standin.BeforeFinish {
		return
	}
	check(t, wait.Until(ctx, "the undoing of "+m.Name, func(ctx context.Context) (bool, error) {
		x := m.DeepCopy()
		err := h.Client().Get(ctx, client.ObjectKeyFromObject(m), x)
		return isTrue(v1alpha1.ConditionRolledBack)(x), err
	}))
	release()
}

// TestAbort: spec.abort in each phase before the point of no return.
func TestAbort(t *testing.T) {
	for _, s := range stages() {
		t.Run(s.name, func(t *testing.T) {
			ctx := within(t, bound)
			source := vmNode(t, ctx)
			m, release := s.bring(t, ctx)
			before := m.DeepCopy()
			m.Spec.Abort = true
			check(t, h.Client().Patch(ctx, m, client.MergeFrom(before)))
			s.letGo(t, ctx, m, release)
			refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonAborted)
		})
	}
}

// TestDelete: deletion in each phase before the point of no return.
func TestDelete(t *testing.T) {
	for _, s := range stages() {
		t.Run(s.name, func(t *testing.T) {
			ctx := within(t, bound)
			source := vmNode(t, ctx)
			m, release := s.bring(t, ctx)
			check(t, h.Client().Delete(ctx, m))
			s.letGo(t, ctx, m, release)
			check(t, wait.Until(ctx, "VFMigration "+m.Name+" to be gone", func(ctx context.Context) (bool, error) {
				err := h.Client().Get(ctx, client.ObjectKeyFromObject(m), m)
				return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
			}))
			undisturbed(t, ctx, source, harness.VFsPerNode)
		})
	}
}
