//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"testing"
	"time"

	kubevirtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/e2e/guest/proto"
)

// TestPlain: the installation works without us: a virtual machine without a
// VF boots and moves.
func TestPlain(t *testing.T) {
	ctx := testContext(t, 8*time.Minute)
	if err := stack.CreateVM(ctx, "plain", VMOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stack.DeleteVM(context.WithoutCancel(ctx), "plain"); err != nil {
			t.Error(err)
		}
	})
	answers := func() {
		t.Helper()
		if err := stack.Guest(ctx, "plain", func(ctx context.Context, c *proto.Client) error {
			_, err := c.Resets(ctx)
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	answers()
	before, err := stack.NodeOf(ctx, "plain")
	if err != nil {
		t.Fatal(err)
	}
	if err := stack.CreateVMIM(ctx, "plain", "plain"); err != nil {
		t.Fatal(err)
	}
	m, err := stack.AwaitVMIM(ctx, "plain")
	if err != nil {
		t.Fatal(err)
	}
	if m.Status.Phase != kubevirtv1.MigrationSucceeded {
		t.Fatalf("the migration %s: %+v", m.Status.Phase, m.Status.MigrationState)
	}
	if after, err := stack.NodeOf(ctx, "plain"); err != nil || after == before {
		t.Errorf("it runs on %s (%v), was on %s", after, err, before)
	}
	answers()
}
