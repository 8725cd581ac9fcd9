//go:build e2e

package tests

import (
	"context"
	"testing"
	"time"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/wait"
)

// moved fails unless the migration ends well.
func moved(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration) {
	t.Helper()
	check(t, h.AwaitEnd(ctx, m, nil))
	if !isTrue(v1alpha1.ConditionSucceeded)(m) {
		t.Fatalf("it failed: %s", harness.Describe(m))
	}
	undisturbed(t, ctx, m.Spec.Target.NodeName, harness.VFsPerNode)
}

// TestManagerRestart: the manager is killed and started again in each phase;
// the migration goes on.
func TestManagerRestart(t *testing.T) {
	for _, s := range stages() {
		t.Run(s.name, func(t *testing.T) {
			ctx := within(t, bound)
			m, release := s.bring(t, ctx)
			h.StopManager()
			release()
			if s.hold == "" {
				// Pre-copy at that pace would never end.
				check(t, h.StandIn.SpeedUp(ctx))
			}
			check(t, h.StartManager())
			moved(t, ctx, m)
		})
	}
}

// TestAPIServerAway: the API server does not answer for a while, before and
// in the middle of a migration.
func TestAPIServerAway(t *testing.T) {
	for _, s := range stages() {
		if s.name != "prepared" && s.name != "captured" {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			ctx := within(t, bound)
			m, release := s.bring(t, ctx)
			check(t, h.Cluster.SetAway(true))
			release()
			// The traffic must not depend on it, either.
			away := vm.Pinger.Mark() + int(8*time.Second/(10*time.Millisecond))
			err := wait.Until(ctx, "some seconds without an API server", func(context.Context) (bool, error) {
				return vm.Pinger.Mark() >= away, nil
			})
			check(t, h.Cluster.SetAway(false))
			check(t, err)
			moved(t, ctx, m)
		})
	}
}
