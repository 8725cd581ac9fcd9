//go:build e2e

package tests

import (
	"context"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
)

const bound = 2 * time.Minute

// TestNoFreeVF: every VF of the target belongs to another VM.
func TestNoFreeVF(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	target := harness.Other(source)
	// The other VMs must not come to the source.
	check(t, h.SetNodeSchedulable(ctx, source, false))
	var others []string
	for i := range harness.VFsPerNode {
		name := "other-" + string(rune('a'+i))
		check(t, h.CreateVM(ctx, name, "52:54:00:c0:5c:f"+string(rune('0'+i)), 32, 1, true))
		others = append(others, name)
	}
	check(t, h.SetNodeSchedulable(ctx, source, true))
	check(t, h.AwaitFreeVFs(ctx, target, 0))

	m := newMigration(t, ctx)
	check(t, create(ctx, m))
	refused(t, ctx, m, source, 0, v1alpha1.ReasonNoFreeVF, target)

	for _, name := range others {
		check(t, h.DeleteVM(ctx, name))
	}
	undisturbed(t, ctx, source, harness.VFsPerNode)
}

// TestTargetAgentDown: nobody renews the target agent's lease.
func TestTargetAgentDown(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	target := harness.Other(source)
	h.StopAgent(target)
	m := newMigration(t, ctx)
	// While the dead agent's lease is still valid the migration is accepted,
	// and ends when nobody pins the target's VFs.
	m.Spec.Timeouts.Prepare = &metav1.Duration{Duration: 30 * time.Second}
	check(t, h.AwaitAgentLease(ctx, target, false))
	check(t, create(ctx, m))
	refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonAgentUnavailable, target)
	check(t, h.StartAgent(target, harness.VFsPerNode))
	check(t, h.AwaitAgentLease(ctx, target, true))
	undisturbed(t, ctx, source, harness.VFsPerNode)
}

// TestNoSuchVMI: the VMI does not exist.
func TestNoSuchVMI(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	m := newMigration(t, ctx)
	m.Spec.VMIName = "nobody"
	check(t, create(ctx, m))
	refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonVMINotFound, "nobody")
}

// TestNoSuchInterface: the VMI has no such interface.
func TestNoSuchInterface(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	m := newMigration(t, ctx)
	m.Spec.Interfaces = []string{harness.Interface, "net9"}
	check(t, create(ctx, m))
	refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonInterfaceNotFound, "net9")
}

// TestSecondMigration: the VMI is already being moved. The first migration
// does not mind.
func TestSecondMigration(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	release := h.StandIn.Hold(standin.InScheduled)
	defer release()
	first := newMigration(t, ctx)
	check(t, create(ctx, first))
	check(t, h.AwaitMigration(ctx, first, "to be prepared", nil, isTrue(v1alpha1.ConditionPrepared)))
	second := newMigration(t, ctx)
	check(t, create(ctx, second))
	check(t, h.AwaitEnd(ctx, second, nil))
	if f := second.Status.Failure; f == nil || f.Reason != v1alpha1.ReasonMigrationInProgress {
		t.Errorf("the second ended with %s, want %s", harness.Describe(second), v1alpha1.ReasonMigrationInProgress)
	}
	release()
	check(t, h.AwaitEnd(ctx, first, nil))
	if !isTrue(v1alpha1.ConditionSucceeded)(first) {
		t.Errorf("the first failed: %s", harness.Describe(first))
	}
	undisturbed(t, ctx, harness.Other(source), harness.VFsPerNode)
}

// TestStateRejected: the state is corrupted on its way. The target's device
// process does it to what it receives, because the channel between the agents
// would notice.
func TestStateRejected(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	deviceArgs.Store([]string{"--fault=corrupt-state"})
	defer deviceArgs.Store(usualArgs())
	m := newMigration(t, ctx)
	check(t, create(ctx, m))
	refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonStateRejected)
}

// TestActivationRefused: between the rehearsal, in which the target's PF did all
// that the guest's driver asks of it, and the activation, its other VFs take the
// filters that were free. The VFs are restored on the target by then, and the
// source has given its own up: it takes them back.
func TestActivationRefused(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	vlan := func(up bool) {
		check(t, vm.Call(ctx, func(ctx context.Context, c *proto.Client) error {
			return c.Run(ctx, proto.Action{Name: proto.ActionVLAN, VLAN: 77, Up: up})
		}))
	}
	vlan(true)
	defer vlan(false)
	deviceArgs.Store([]string{"--fault=filters-taken"})
	defer deviceArgs.Store(usualArgs())
	m := newMigration(t, ctx)
	check(t, create(ctx, m))
	refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonRestoreFailed, "SET_VLAN")
	if !isTrue(v1alpha1.ConditionCaptured)(m) {
		t.Errorf("it never came to the activation: %s", harness.Describe(m))
	}
	// Nothing stays of it: the next one takes the VM there.
	deviceArgs.Store(usualArgs())
	hop(t, ctx)
}

// TestPreCopyDoesNotConverge: the bound of the migration ends it.
func TestPreCopyDoesNotConverge(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	h.StandIn.SetBandwidth(1 << 20)
	defer h.StandIn.SetBandwidth(0)
	m := newMigration(t, ctx)
	m.Spec.Timeouts.Migrate = &metav1.Duration{Duration: 6 * time.Second}
	check(t, create(ctx, m))
	refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonTimeout)
}
