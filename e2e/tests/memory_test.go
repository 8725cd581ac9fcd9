//go:build e2e

package tests

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

const (
	pageSize = 4096
	// guestQueues are the queue pairs that the driver uses of the VM's VF.
	guestQueues = 2
)

// compareRAM starts a migration of the VM to the other node and compares the
// RAM of both QEMUs twice while neither runs the VM: with the last pages not
// sent yet, and when the target has loaded everything. It leaves the migration
// there, until release is called.
func compareRAM(t *testing.T, ctx context.Context, vm *harness.VM) (before, r harness.RAMReport, m *v1alpha1.VFMigration, release func()) {
	t.Helper()
	release = h.StandIn.Hold(standin.BeforeFinish)
	t.Cleanup(release)
	goOn := h.StandIn.Hold(standin.InPreSwitchover)
	t.Cleanup(goOn)
	node, err := vm.Node(ctx)
	check(t, err)
	m = vm.NewMigration(uniqueName(t), harness.Other(node))
	check(t, create(ctx, m))
	reach(t, ctx, m, "stopped", stopped)
	before = arrivedRAM(t, ctx, m)
	goOn()
	reach(t, ctx, m, "loaded", loaded)
	q, _ := h.StandIn.Loaded(m.Status.MigrationRef.UID)
	r, err = harness.CompareRAM(q.SourcePID, q.TargetPID)
	check(t, err)
	if r.Used < r.Pages/20 {
		t.Fatalf("%d of %d pages are in use: this is not a running Linux's memory", r.Used, r.Pages)
	}
	return before, r, m, release
}

// stopped tells whether the VM has stopped on the source, with its VFs captured
// and what they wrote marked.
func stopped(_ context.Context, m *v1alpha1.VFMigration) (bool, error) {
	if !isTrue(v1alpha1.ConditionCaptured)(m) || m.Status.MigrationRef == nil {
		return false, nil
	}
	_, ok := h.StandIn.Stopped(m.Status.MigrationRef.UID)
	return ok, nil
}

// arrivedRAM compares the RAM of both QEMUs before the last pages are sent: once
// two comparisons agree, for what was sent before may still be on its way.
func arrivedRAM(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration) (r harness.RAMReport) {
	t.Helper()
	q, _ := h.StandIn.Stopped(m.Status.MigrationRef.UID)
	last := -1
	check(t, wait.Until(ctx, "what was sent to arrive", func(context.Context) (bool, error) {
		var err error
		r, err = harness.CompareRAM(q.SourcePID, q.TargetPID)
		same := err == nil && len(r.Different) == last
		last = len(r.Different)
		return same, err
	}))
	return r
}

// markedPages are the numbers of the pages that were marked in a migration, as
// the source's device process says (--marked-pages).
func markedPages(t *testing.T, m *v1alpha1.VFMigration) map[int]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(markedDir, string(m.UID)+"-*"))
	check(t, err)
	if len(files) == 0 {
		t.Fatalf("nobody says which pages were marked in VFMigration %s (%s)", m.Name, m.UID)
	}
	pages := map[int]bool{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		check(t, err)
		for line := range strings.Lines(string(b)) {
			addr, err := strconv.ParseUint(strings.TrimSpace(line), 16, 64)
			check(t, err)
			pages[int(addr/pageSize)] = true
		}
	}
	return pages
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
//
// Some of what was marked had arrived before: what QEMU copied after the VF's last
// write to it. That is told, and is no more than the driver's rings can name at
// a time, for a page that has left them is the guest's, and sent when it uses it.
func TestMemory(t *testing.T) {
	var s proto.Settings
	check(t, vm.Call(within(t, bound), func(ctx context.Context, c *proto.Client) (err error) {
		s, err = c.Settings(ctx)
		return err
	}))
	const descriptor = 16
	rings := guestQueues * (s.RX + (s.RX+s.TX)*descriptor/pageSize + 2)
	for range 5 {
		ctx := within(t, bound)
		before, r, m, release := compareRAM(t, ctx, vm)
		if len(r.Different) > 0 {
			t.Errorf("%d of %d pages differ: %#x", len(r.Different), r.Pages, r.Different)
		}
		if marked(m) == 0 {
			t.Error("no page was marked, under traffic")
		}
		pages := markedPages(t, m)
		if int64(len(pages)) != marked(m) {
			t.Errorf("%d pages are reported as marked, these are %d", marked(m), len(pages))
		}
		needed := 0
		for _, p := range before.Different {
			if pages[p] {
				needed++
			}
		}
		beyond := len(pages) - needed
		t.Logf("%d pages, %d in use, %d differ at the end; %d marked, of which %d differed before, and %d did not",
			r.Pages, r.Used, len(r.Different), len(pages), needed, beyond)
		if needed == 0 {
			t.Error("none of the marked pages differed before it was sent again")
		}
		if beyond > rings {
			t.Errorf("%d pages were marked for nothing, the rings name %d at most", beyond, rings)
		}
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
	defer deviceArgs.Store(usualArgs())
	unmarked, err := h.BootVM(ctx, "unmarked", "52:54:00:c0:5c:02", 1)
	check(t, err)
	check(t, unmarked.StartTraffic(ctx))
	source, err := unmarked.Node(ctx)
	check(t, err)
	deviceArgs.Store(usualArgs())

	_, r, m, release := compareRAM(t, ctx, unmarked)
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
