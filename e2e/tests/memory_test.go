//go:build e2e

package tests

import (
	"context"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
)

// compareRAM starts a migration of the VM to the other node and compares the
// RAM of both QEMUs when the target has loaded everything and neither runs
// the VM. It leaves the migration there, until release is called.
func compareRAM(t *testing.T, ctx context.Context, vm *harness.VM) (r harness.RAMReport, m *v1alpha1.VFMigration, release func()) {
	t.Helper()
	release = h.StandIn.Hold(standin.BeforeFinish)
	t.Cleanup(release)
	node, err := vm.Node(ctx)
	check(t, err)
	m = vm.NewMigration(uniqueName(t), harness.Other(node))
	check(t, create(ctx, m))
	reach(t, ctx, m, "loaded", loaded)
	q, _ := h.StandIn.Loaded(m.Status.MigrationRef.UID)
	r, err = harness.CompareRAM(q.SourcePID, q.TargetPID)
	check(t, err)
	if r.Used < r.Pages/20 {
		t.Fatalf("%d of %d pages are in use: this is not a running Linux's memory", r.Used, r.Pages)
	}
	return r, m, release
}

func marked(m *v1alpha1.VFMigration) (n int64) {
	for _, d := range m.Status.Devices {
		n += d.PagesMarked
	}
	return n
}

// TestMemory: when the target starts the VM, its RAM is the source's, to the
// last byte: what the VF wrote was marked, and sent again. There is no
// exception: QEMU itself writes nothing into the guest's RAM while it loads.
func TestMemory(t *testing.T) {
	for range 5 {
		ctx := within(t, bound)
		r, m, release := compareRAM(t, ctx, vm)
		if len(r.Different) > 0 {
			t.Errorf("%d of %d pages differ: %#x", len(r.Different), r.Pages, r.Different)
		}
		if marked(m) == 0 {
			t.Error("no page was marked, under traffic")
		}
		t.Logf("%d pages, %d in use, %d marked, %d differ", r.Pages, r.Used, marked(m), len(r.Different))
		release()
		moved(t, ctx, m)
	}
}

// TestMemoryUnmarked: the same comparison finds differences if the source
// does not mark what its VF wrote. How many tells what marking is good for.
// The VM is one of its own, that is not moved.
func TestMemoryUnmarked(t *testing.T) {
	ctx := within(t, 2*bound)
	deviceArgs.Store([]string{"--fault=no-marking"})
	defer deviceArgs.Store([]string(nil))
	unmarked, err := h.BootVM(ctx, "unmarked", "52:54:00:c0:5c:02", 1)
	check(t, err)
	check(t, unmarked.StartTraffic(ctx))
	source, err := unmarked.Node(ctx)
	check(t, err)
	deviceArgs.Store([]string(nil))

	r, m, release := compareRAM(t, ctx, unmarked)
	if len(r.Different) == 0 {
		t.Errorf("all %d pages are equal though none was marked (%d)", r.Pages, marked(m))
	}
	t.Logf("%d pages, %d in use, %d marked, %d differ", r.Pages, r.Used, marked(m), len(r.Different))

	before := m.DeepCopy()
	m.Spec.Abort = true
	check(t, h.Client().Patch(ctx, m, client.MergeFrom(before)))
	check(t, h.AwaitMigration(ctx, m, "to be rolled back", nil, isTrue(v1alpha1.ConditionRolledBack)))
	release()
	check(t, h.AwaitEnd(ctx, m, nil))
	if node, err := unmarked.Node(ctx); err != nil || node != source {
		t.Fatalf("the VM is on node %q, want %s: %v", node, source, err)
	}
	_, err = unmarked.CheckUndisturbed(ctx)
	check(t, err)
	st, err := unmarked.StopTraffic(ctx)
	check(t, err)
	if !st.Intact {
		t.Errorf("its stream: %+v", st)
	}
	check(t, h.DeleteVM(ctx, "unmarked"))
	undisturbed(t, ctx, vmNode(t, ctx), harness.VFsPerNode)
}
