//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/scrape"
	"compsc.io/compsc/e2e/traffic"
)

const (
	vm, blocker = "vm", "blocker"

	// refusedDrain bounds the drain of a virtual machine that cannot move.
	refusedDrain = time.Minute
)

var vmMACs, blockerMACs = []string{"52:54:00:c0:5c:01", "52:54:00:c0:5c:11"}, []string{"52:54:00:c0:5c:02"}

// TestMove: a virtual machine that names our binding gets its VFs, and under
// traffic from outside is moved in every way that users have. One that
// cannot be moved is left alone, and everybody is told why.
func TestMove(t *testing.T) {
	ctx := testContext(t, 30*time.Minute)
	g, err := stack.Boot(ctx, vm, vmMACs, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stack.DeleteVM(context.WithoutCancel(ctx), vm); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("what there is before the VM is deleted:\n" + stack.Diagnose(context.WithoutCancel(ctx)))
		}
	})
	if err := g.StartTraffic(ctx); err != nil {
		t.Fatal(err)
	}
	content := func(t *testing.T) {
		t.Helper()
		if err := stack.CheckContent(ctx, vm, vmMACs); err != nil {
			t.Error(err)
		}
	}
	content(t)
	at, err := stack.NodeOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	called(ctx, t, map[string]calls{}, at, nodehook.PreVMStart, nodehook.PostVMStart)
	for _, way := range stack.Ways(vm) {
		if !t.Run(way.Name, func(t *testing.T) {
			before := hookCalls(ctx, t)
			m, err := stack.Move(ctx, vm, g, way.Name, way.Ask)
			if err != nil {
				t.Fatal(err)
			}
			if m.VFMigration.Status.Phase != v1alpha1.PhaseSucceeded {
				t.Errorf("the VFMigration's phase is %s", m.VFMigration.Status.Phase)
			}
			if n := len(m.VFMigration.Status.Devices); n != len(vmMACs) {
				t.Errorf("%d VFs moved, want %d", n, len(vmMACs))
			}
			t.Log(m)
			guarded(ctx, t, m.VFMigration)
			called(ctx, t, before, m.From, nodehook.PreMigrationSource)
			called(ctx, t, before, m.To, nodehook.PreMigrationTarget, nodehook.PostMigrationTarget)
			content(t)
		}) {
			t.FailNow()
		}
	}
	told(ctx, t)
	for _, u := range undoings {
		t.Run(u.name, func(t *testing.T) { undone(ctx, t, g, u) })
	}
	t.Run("refused", func(t *testing.T) { refused(ctx, t, g) })
	t.Run("operated", func(t *testing.T) { operated(ctx, t, g) })
	if _, err := g.CheckUndisturbed(ctx); err != nil {
		t.Error(err)
	}
	if st, err := g.StopTraffic(ctx); err != nil || !st.Intact {
		t.Errorf("the stream ended with %+v: %v", st, err)
	}
}

// refused takes one of the VFs that the virtual machine could move to.
func refused(ctx context.Context, t *testing.T, g *traffic.Guest) {
	from, err := stack.NodeOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	to := Other(from)
	if err := stack.AwaitMovable(ctx, vm, to); err != nil {
		t.Fatal(err)
	}
	if err := stack.CreateVM(ctx, blocker, VMOptions{MACs: blockerMACs, Node: to, Paused: true}); err != nil {
		t.Fatal(err)
	}
	free := sync.OnceFunc(func() {
		if err := stack.DeleteVM(context.WithoutCancel(ctx), blocker); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(free)
	if err := stack.Kube.Until(ctx, "the VF to be taken", func(ctx context.Context) (bool, error) {
		free, err := stack.FreeVFs(ctx, to)
		return free == VFsPerNode-1, err
	}); err != nil {
		t.Fatal(err)
	}
	pod, err := stack.PodOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Rebase(ctx); err != nil {
		t.Fatal(err)
	}

	// Its own object says so.
	known, err := stack.Known(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stack.CreateVFMigration(ctx, "refused", vm, to); err != nil {
		t.Fatal(err)
	}
	m, err := stack.AwaitVFMigration(ctx, vm, known)
	if err != nil {
		t.Fatal(err)
	}
	c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionAccepted)
	if c == nil || c.Reason != v1alpha1.ReasonNoFreeVF || m.Status.Failure == nil || m.Status.MigrationRef != nil {
		t.Errorf("the VFMigration: %s", harness.Describe(m))
	}

	// The virtual machine says so, and so a migration of KubeVirt's own is
	// refused when it is made.
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := stack.Kube.Until(ctx, "the reason on the VMI", func(ctx context.Context) (bool, error) {
		err := stack.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: vm}, v)
		return strings.Contains(v.Annotations[kubevirt.AnnotationMigrationBlocked], v1alpha1.ReasonNoFreeVF), err
	}); err != nil {
		t.Fatal(err)
	}
	if err := stack.CreateVMIM(ctx, "refused", vm); err == nil || !strings.Contains(err.Error(), v1alpha1.ReasonNoFreeVF) {
		t.Errorf("creating a VirtualMachineInstanceMigration: %v, want a refusal that names %s", err, v1alpha1.ReasonNoFreeVF)
	}

	// One that gets past the policy, as one that is made a moment too early
	// does, ends before KubeVirt touches the virtual machine.
	enforce(ctx, t, "Audit", func(err error) bool { return err == nil })
	t.Cleanup(func() { enforce(context.WithoutCancel(ctx), t, "Deny", func(error) bool { return true }) })
	if known, err = stack.Known(ctx); err != nil {
		t.Fatal(err)
	}
	if err := stack.CreateVMIM(ctx, "refused", vm); err != nil {
		t.Fatal(err)
	}
	if m, err = stack.AwaitVFMigration(ctx, vm, known); err != nil {
		t.Fatal(err)
	}
	if f := m.Status.Failure; f == nil || f.Reason != v1alpha1.ReasonNoFreeVF {
		t.Fatalf("the VFMigration of what was let through: %s", harness.Describe(m))
	}
	everybodyKnows(ctx, t, m, "refused")
	enforce(ctx, t, "Deny", func(err error) bool { return err != nil && strings.Contains(err.Error(), v1alpha1.ReasonNoFreeVF) })

	// A drain waits, and the virtual machine stays. KubeVirt tells of it why.
	// It tries again after ever longer pauses, so the drain ends soon after it has told.
	draining, stop := context.WithCancel(ctx)
	defer stop()
	drained := make(chan error, 1)
	go func() { drained <- stack.Drain(draining, from, refusedDrain) }()
	awaitEvent(ctx, t, "VirtualMachineInstance", vm, func(e *corev1.Event) bool {
		return strings.HasPrefix(e.Message, "Error creating a Migration: ") && strings.Contains(e.Message, v1alpha1.ReasonNoFreeVF+": ")
	})
	stop()
	if err := <-drained; err == nil {
		t.Error("the node was drained, with a virtual machine that cannot leave it")
	}
	after, err := stack.PodOf(ctx, vm)
	if err != nil || after != pod {
		t.Errorf("the virtual machine was in pod %s, is in %s (%v)", pod, after, err)
	}
	if _, err := g.CheckUndisturbed(ctx); err != nil {
		t.Error(err)
	}

	// KubeVirt has not forgotten the eviction: the virtual machine leaves as soon
	// as it can.
	if known, err = stack.Known(ctx); err != nil {
		t.Fatal(err)
	}
	free()
	if m, err = stack.AwaitVFMigration(ctx, vm, known); err != nil {
		t.Fatal(err)
	}
	if m.Status.Phase != v1alpha1.PhaseSucceeded {
		t.Errorf("the VFMigration of the drain: %s", harness.Describe(m))
	}
	if node, err := stack.NodeOf(ctx, vm); err != nil || node != to {
		t.Errorf("the virtual machine is on node %s (%v), the drain was of %s", node, err, from)
	}
}

// enforce has the policy that refuses migrations deny them, or only audit them,
// and waits until an attempt to create one ends as it is to.
func enforce(ctx context.Context, t *testing.T, action string, is func(error) bool) {
	t.Helper()
	if _, err := stack.Kubectl(ctx, "", "patch", "validatingadmissionpolicybinding", "compsc-migrations", "--type=merge",
		"-p", `{"spec":{"validationActions":["`+action+`"]}}`); err != nil {
		t.Error(err)
	}
	var last error
	if err := stack.Kube.Until(ctx, "the policy to "+action, func(ctx context.Context) (bool, error) {
		_, last = stack.Kubectl(ctx, fmt.Sprintf(vmim, "attempt", vm), "create", "--dry-run=server", "-f", "-")
		return is(last), nil
	}); err != nil {
		t.Errorf("%v: %v", err, last)
	}
}

// calls are how often each node hook of an agent was called and let KubeVirt go on.
type calls map[nodehook.Point]float64

// hookCalls asks the agents of all nodes.
func hookCalls(ctx context.Context, t *testing.T) map[string]calls {
	t.Helper()
	all := map[string]calls{}
	for name, node := range stack.Lab.Nodes {
		m, err := scrape.Agent(ctx, node.NS)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = calls{}
		for _, p := range nodehook.Points {
			all[name][p] = m.Value("compsc_agent_node_hooks_total", "hook", string(p), "answer", "go")
		}
	}
	return all
}

// called checks that KubeVirt has called these hooks of a node since before; one
// without plugins calls none.
func called(ctx context.Context, t *testing.T, before map[string]calls, node string, points ...nodehook.Point) {
	t.Helper()
	now := hookCalls(ctx, t)[node]
	for _, p := range points {
		if grew := now[p] > before[node][p]; grew != stack.Plugins() {
			t.Errorf("hook %s of node %s was called %v times, and %v before", p, node, now[p], before[node][p])
		}
	}
}

// guarded checks what keeps a KubeVirt that calls no node hooks from going on too
// early in a migration that has ended well: its target's sidecar was not
// started before both ends were prepared, and post-copy was ruled out. And the
// sidecar is confined, which is our admission policy's work too.
func guarded(ctx context.Context, t *testing.T, m *v1alpha1.VFMigration) {
	t.Helper()
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := stack.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: m.Spec.VMIName}, v); err != nil {
		t.Fatal(err)
	}
	st := v.Status.MigrationState
	if st == nil || st.MigrationPolicyName == nil || *st.MigrationPolicyName != "compsc" {
		t.Errorf("the migration did not go by our MigrationPolicy: %+v", st)
	} else if c := st.VMIMConfigurationOptions; c == nil || c.AllowPostCopy == nil || *c.AllowPostCopy {
		t.Errorf("the migration might have used post-copy: %+v", c)
	}
	pod := &corev1.Pod{}
	if err := stack.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: m.Status.Target.PodName}, pod); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Image == image })
	if i < 0 || pod.Spec.Containers[i].StartupProbe == nil || pod.Spec.Containers[i].StartupProbe.Exec == nil ||
		!slices.Equal(pod.Spec.Containers[i].StartupProbe.Exec.Command, []string{"/compsc", "ready"}) {
		t.Fatalf("the target's sidecar has no startup probe: %+v", pod.Spec.Containers)
	}
	// Both are by the clock of this machine, to the second.
	prepared := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionPrepared)
	j := slices.IndexFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.ContainersReady })
	if prepared == nil || j < 0 || pod.Status.Conditions[j].Status != corev1.ConditionTrue || pod.Status.Conditions[j].LastTransitionTime.Before(&prepared.LastTransitionTime) {
		t.Errorf("the target's pod was ready before both ends were prepared (%+v): %+v", prepared, pod.Status.Conditions)
	}
	confined(t, pod)
}
