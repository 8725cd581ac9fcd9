//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/traffic"
)

// told checks what the nodes' objects say of KubeVirt once VMs with VFs ran there.
func told(ctx context.Context, t *testing.T) {
	t.Helper()
	want := map[string]string{
		v1alpha1.ConditionReady:     "True " + v1alpha1.ConditionReady,
		v1alpha1.ConditionKubeVirt:  "True " + cluster.ReasonInstalled,
		v1alpha1.ConditionQEMU:      "True " + v1alpha1.ReasonVFIOUserPresent,
		v1alpha1.ConditionNodeHooks: "False " + cluster.ReasonPluginAPIMissing,
	}
	if stack.Plugins() {
		want[v1alpha1.ConditionNodeHooks] = "True " + cluster.ReasonCalled
	}
	at, err := stack.NodeOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	for name := range stack.Lab.Nodes {
		n := &v1alpha1.VFNode{}
		if err := stack.Client().Get(ctx, client.ObjectKey{Name: name}, n); err != nil {
			t.Fatal(err)
		}
		for typ, want := range want {
			if typ == v1alpha1.ConditionQEMU && name != at {
				want = "Unknown " + v1alpha1.ReasonNotSeen // its virt-launcher has ended
			}
			c := meta.FindStatusCondition(n.Status.Conditions, typ)
			if c == nil || string(c.Status)+" "+c.Reason != want {
				t.Errorf("VFNode %s: condition %s is %+v, want %s", name, typ, c, want)
			}
		}
	}
}

// undoing is a migration that must end with the VM where it was.
type undoing struct {
	name string
	// held has the source's virt-handler stand still until it is over, so that
	// KubeVirt never begins to copy.
	held bool
	// ask starts it, and stop ends it once it has got as far as when says, of
	// the VFMigration or of KubeVirt's phase.
	ask   func(ctx context.Context, from, to string) error
	when  func(*v1alpha1.VFMigration) bool
	phase []kubevirtv1.VirtualMachineInstanceMigrationPhase
	stop  func(ctx context.Context, m *v1alpha1.VFMigration) error
	// reason is that of the VFMigration's failure. With gone the VFMigration
	// does not stay to tell it.
	reason string
	gone   bool
	// after checks what else is to be seen.
	after func(ctx context.Context, t *testing.T, m *v1alpha1.VFMigration)
}

func reached(condition string) func(*v1alpha1.VFMigration) bool {
	return func(m *v1alpha1.VFMigration) bool { return meta.IsStatusConditionTrue(m.Status.Conditions, condition) }
}

func copying(m *v1alpha1.VFMigration) bool { return m.Status.Phase == v1alpha1.PhaseCopying }

// remove deletes an object with kubectl, without waiting for its end.
func remove(ctx context.Context, kind, name string) error {
	_, err := stack.Kubectl(ctx, "", "delete", kind, "-n", Namespace, name, "--wait=false")
	return err
}

// vmimGone waits for the end of a deleted migration of KubeVirt's.
func vmimGone(name string) func(context.Context, *testing.T, *v1alpha1.VFMigration) {
	return func(ctx context.Context, t *testing.T, _ *v1alpha1.VFMigration) {
		if err := stack.Kube.Until(ctx, "migration "+name+" to be gone", func(ctx context.Context) (bool, error) {
			err := stack.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: name}, &kubevirtv1.VirtualMachineInstanceMigration{})
			return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
		}); err != nil {
			t.Error(err)
		}
	}
}

var undoings = []undoing{
	{
		name: "VFMigration aborted while RAM is copied",
		ask: func(ctx context.Context, _, to string) error {
			return stack.CreateVFMigration(ctx, "aborted", vm, to)
		},
		when: copying,
		stop: func(ctx context.Context, m *v1alpha1.VFMigration) error {
			_, err := stack.Kubectl(ctx, "", "patch", "vfm", "-n", Namespace, m.Name, "--type=merge", "-p", `{"spec":{"abort":true}}`)
			return err
		},
		reason: v1alpha1.ReasonAborted,
	},
	{
		name: "VFMigration deleted while RAM is copied",
		ask: func(ctx context.Context, _, to string) error {
			return stack.CreateVFMigration(ctx, "removed", vm, to)
		},
		when:   copying,
		stop:   func(ctx context.Context, m *v1alpha1.VFMigration) error { return remove(ctx, "vfm", m.Name) },
		reason: v1alpha1.ReasonDeleted,
		gone:   true,
		after:  vmimGone("removed"),
	},
	{
		name: "VirtualMachineInstanceMigration deleted while its target starts",
		ask: func(ctx context.Context, _, _ string) error {
			return stack.CreateVMIM(ctx, "deleted", vm)
		},
		when:   reached(v1alpha1.ConditionTargetPinned),
		phase:  []kubevirtv1.VirtualMachineInstanceMigrationPhase{kubevirtv1.MigrationScheduling},
		stop:   func(ctx context.Context, _ *v1alpha1.VFMigration) error { return remove(ctx, "vmim", "deleted") },
		reason: v1alpha1.ReasonAborted,
		after:  vmimGone("deleted"),
	},
	{
		// KubeVirt itself does nothing about it then: it only notes the wish.
		name: "VirtualMachineInstanceMigration deleted before it runs",
		held: true,
		ask: func(ctx context.Context, _, _ string) error {
			return stack.CreateVMIM(ctx, "ignored", vm)
		},
		when:   reached(v1alpha1.ConditionPrepared),
		phase:  []kubevirtv1.VirtualMachineInstanceMigrationPhase{kubevirtv1.MigrationPreparingTarget, kubevirtv1.MigrationTargetReady},
		stop:   func(ctx context.Context, _ *v1alpha1.VFMigration) error { return remove(ctx, "vmim", "ignored") },
		reason: v1alpha1.ReasonAborted,
		after:  vmimGone("ignored"),
	},
	{
		name: "VirtualMachineInstanceMigration to nowhere",
		ask: func(ctx context.Context, from, _ string) error {
			return stack.CreateVMIMTo(ctx, "nowhere", vm, from)
		},
		reason: v1alpha1.ReasonTargetNotFound,
		after: func(ctx context.Context, t *testing.T, m *v1alpha1.VFMigration) {
			everybodyKnows(ctx, t, m, "nowhere")
		},
	},
}

// everybodyKnows finds the reason for which a migration of KubeVirt's was refused
// on it, and told of it, of the virtual machine and of the VFMigration.
func everybodyKnows(ctx context.Context, t *testing.T, m *v1alpha1.VFMigration, name string) {
	t.Helper()
	want := m.Status.Failure.Reason + ": "
	vmim, err := stack.AwaitVMIM(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if why := vmim.Annotations[kubevirt.AnnotationFailure]; vmim.Status.Phase != kubevirtv1.MigrationFailed || !strings.HasPrefix(why, want) {
		t.Errorf("the VirtualMachineInstanceMigration %s, and says %q; want it to say %q", vmim.Status.Phase, why, want)
	}
	for kind, name := range map[string]string{"VirtualMachineInstance": vm, "VirtualMachineInstanceMigration": name, "VFMigration": m.Name} {
		awaitEvent(ctx, t, kind, name, func(e *corev1.Event) bool { return strings.HasPrefix(e.Message, want) })
	}
}

// awaitEvent waits for an event of an object.
func awaitEvent(ctx context.Context, t *testing.T, kind, name string, is func(*corev1.Event) bool) {
	t.Helper()
	var seen []string
	ctx, cancel := context.WithTimeoutCause(ctx, eventTimeout, errors.New("it took too long"))
	defer cancel()
	if err := stack.Kube.Until(ctx, "an event of "+kind+" "+name, func(ctx context.Context) (bool, error) {
		events := &corev1.EventList{}
		err := stack.Client().List(ctx, events, client.InNamespace(Namespace))
		seen = nil
		for i := range events.Items {
			e := &events.Items[i]
			if e.InvolvedObject.Kind != kind || e.InvolvedObject.Name != name {
				continue
			}
			if is(e) {
				return true, nil
			}
			seen = append(seen, e.Reason+": "+e.Message)
		}
		return false, err
	}); err != nil {
		t.Errorf("%v; it has: %q", err, seen)
	}
}

// eventTimeout is how long an event may take to be written.
const eventTimeout = time.Minute

// undone has the migration undone, and the virtual machine not notice.
func undone(ctx context.Context, t *testing.T, g *traffic.Guest, u undoing) {
	slow(ctx, t)
	from, err := stack.NodeOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := stack.PodOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	known, err := stack.Known(ctx)
	if err != nil {
		t.Fatal(err)
	}
	thaw := func() {}
	if u.held {
		thaw = freeze(t, from)
	}
	if err := u.ask(ctx, from, Other(from)); err != nil {
		t.Fatal(err)
	}
	var m *v1alpha1.VFMigration
	if u.when != nil {
		if err := stack.Kube.Until(ctx, "the moment", func(ctx context.Context) (bool, error) {
			fresh, err := stack.newMigrations(ctx, vm, known)
			if err != nil || len(fresh) == 0 {
				return false, err
			}
			if m = &fresh[0]; harness.Ended(m) {
				return false, errors.New("it ended before: " + harness.Describe(m))
			}
			if u.phase == nil || !u.when(m) {
				return u.when(m), nil
			}
			vmim := &kubevirtv1.VirtualMachineInstanceMigration{}
			if err := stack.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: m.Spec.MigrationRef.Name}, vmim); err != nil {
				return false, err
			}
			return slices.Contains(u.phase, vmim.Status.Phase), nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := u.stop(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	if u.gone {
		m, err = lastOf(ctx, m)
	} else {
		m, err = stack.AwaitVFMigration(ctx, vm, known)
	}
	if err != nil {
		t.Fatal(err)
	}
	if f := m.Status.Failure; f == nil || f.Reason != u.reason || !u.gone && m.Status.Phase != v1alpha1.PhaseFailed {
		t.Fatalf("the VFMigration: %s", harness.Describe(m))
	}
	thaw()
	if u.after != nil {
		u.after(ctx, t, m)
	}
	if _, err := g.CheckUndisturbed(ctx); err != nil {
		t.Error(err)
	}
	if err := stack.AwaitMovable(ctx, vm, Other(from)); err != nil {
		t.Error(err)
	}
	// The target's pod may still be ending.
	var after types.UID
	var last error
	if err := stack.Kube.Until(ctx, "the virtual machine to have one pod", func(ctx context.Context) (bool, error) {
		after, last = stack.PodOf(ctx, vm)
		return last == nil, nil
	}); err != nil {
		t.Errorf("%v: %v", err, last)
	}
	if after != pod {
		t.Errorf("the virtual machine was in pod %s, is in %s", pod, after)
	}
}

// lastOf waits until a VFMigration is gone, and returns what it said last.
func lastOf(ctx context.Context, m *v1alpha1.VFMigration) (*v1alpha1.VFMigration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, moveTimeout, errors.New("it took too long"))
	defer cancel()
	last := m.DeepCopy()
	return last, stack.Kube.Until(ctx, "VFMigration "+m.Name+" to be gone", func(ctx context.Context) (bool, error) {
		now := &v1alpha1.VFMigration{}
		err := stack.Client().Get(ctx, client.ObjectKeyFromObject(m), now)
		if apierrors.IsNotFound(err) {
			return true, nil
		}
		if err == nil {
			last = now
		}
		return false, err
	})
}

// freeze stops the virt-handler of a node until thaw is called, or the test ends.
func freeze(t *testing.T, node string) (thaw func()) {
	t.Helper()
	group := "/" + stack.Lab.ID + "-" + node + "/"
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, path := range comms {
		comm, err := os.ReadFile(path)
		if err != nil || string(comm) != "virt-handler\n" {
			continue // such as one that has just ended
		}
		groups, err := os.ReadFile(filepath.Join(filepath.Dir(path), "cgroup"))
		if err != nil || !strings.Contains(string(groups), group) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	if len(pids) == 0 {
		t.Fatalf("node %s has no virt-handler", node)
	}
	thaw = sync.OnceFunc(func() {
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGCONT); err != nil {
				t.Errorf("virt-handler of node %s: %v", node, err)
			}
		}
	})
	t.Cleanup(thaw)
	return thaw
}

// slow has RAM copied slowly, for there to be time to do something meanwhile.
func slow(ctx context.Context, t *testing.T) {
	t.Helper()
	bandwidth := func(ctx context.Context, b string) {
		t.Helper()
		if _, err := stack.Kubectl(ctx, "", "patch", "migrationpolicy", "compsc", "--type=merge", "-p", `{"spec":{"bandwidthPerMigration":`+b+`}}`); err != nil {
			t.Fatal(err)
		}
	}
	bandwidth(ctx, `"1Mi"`)
	t.Cleanup(func() { bandwidth(context.WithoutCancel(ctx), "null") })
}
