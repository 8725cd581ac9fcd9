//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
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
		v1alpha1.ConditionNodeHooks: "False " + cluster.ReasonPluginAPIMissing, // KubeVirt 1.8 has none
	}
	for name := range stack.Lab.Nodes {
		n := &v1alpha1.VFNode{}
		if err := stack.Client().Get(ctx, client.ObjectKey{Name: name}, n); err != nil {
			t.Fatal(err)
		}
		for typ, want := range want {
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
	// ask starts it, and stop ends it once it has got as far as when says.
	ask  func(ctx context.Context, from, to string) error
	when func(*v1alpha1.VFMigration) bool
	stop func(ctx context.Context, m *v1alpha1.VFMigration) error
	// reason is that of the VFMigration's failure.
	reason string
	// after checks what else is to be seen.
	after func(ctx context.Context, t *testing.T, m *v1alpha1.VFMigration)
}

func reached(condition string) func(*v1alpha1.VFMigration) bool {
	return func(m *v1alpha1.VFMigration) bool { return meta.IsStatusConditionTrue(m.Status.Conditions, condition) }
}

var undoings = []undoing{
	{
		name: "VFMigration aborted while RAM is copied",
		ask: func(ctx context.Context, _, to string) error {
			return stack.CreateVFMigration(ctx, "aborted", vm, to)
		},
		when: func(m *v1alpha1.VFMigration) bool { return m.Status.Phase == v1alpha1.PhaseCopying },
		stop: func(ctx context.Context, m *v1alpha1.VFMigration) error {
			_, err := stack.Kubectl(ctx, "", "patch", "vfm", "-n", Namespace, m.Name, "--type=merge", "-p", `{"spec":{"abort":true}}`)
			return err
		},
		reason: v1alpha1.ReasonAborted,
	},
	{
		// KubeVirt itself does nothing about it then.
		name: "VirtualMachineInstanceMigration deleted before it runs",
		ask: func(ctx context.Context, _, _ string) error {
			return stack.CreateVMIM(ctx, "deleted", vm)
		},
		when: reached(v1alpha1.ConditionTargetPinned),
		stop: func(ctx context.Context, _ *v1alpha1.VFMigration) error {
			_, err := stack.Kubectl(ctx, "", "delete", "vmim", "-n", Namespace, "deleted", "--wait=false")
			return err
		},
		reason: v1alpha1.ReasonAborted,
	},
	{
		name: "VirtualMachineInstanceMigration to nowhere",
		ask: func(ctx context.Context, from, _ string) error {
			return stack.CreateVMIMTo(ctx, "nowhere", vm, from)
		},
		reason: v1alpha1.ReasonTargetNotFound,
		after:  everybodyKnows,
	},
}

// everybodyKnows finds the reason on the migration of KubeVirt's, and told of
// the virtual machine.
func everybodyKnows(ctx context.Context, t *testing.T, m *v1alpha1.VFMigration) {
	want := m.Status.Failure.Reason + ": "
	vmim, err := stack.AwaitVMIM(ctx, "nowhere")
	if err != nil {
		t.Fatal(err)
	}
	if why := vmim.Annotations[kubevirt.AnnotationFailure]; vmim.Status.Phase != kubevirtv1.MigrationFailed || !strings.HasPrefix(why, want) {
		t.Errorf("the VirtualMachineInstanceMigration %s, and says %q; want it to say %q", vmim.Status.Phase, why, want)
	}
	if err := stack.Kube.Until(ctx, "the VM's event", func(ctx context.Context) (bool, error) {
		events := &corev1.EventList{}
		err := stack.Client().List(ctx, events, client.InNamespace(Namespace))
		return slices.ContainsFunc(events.Items, func(e corev1.Event) bool {
			return e.InvolvedObject.Kind == "VirtualMachineInstance" && e.InvolvedObject.Name == vm && strings.HasPrefix(e.Message, want)
		}), err
	}); err != nil {
		t.Error(err)
	}
}

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
	if err := u.ask(ctx, from, Other(from)); err != nil {
		t.Fatal(err)
	}
	if u.when != nil {
		var m *v1alpha1.VFMigration
		if err := stack.Kube.Until(ctx, "the moment", func(ctx context.Context) (bool, error) {
			fresh, err := stack.newMigrations(ctx, vm, known)
			if err != nil || len(fresh) == 0 {
				return false, err
			}
			if m = &fresh[0]; harness.Ended(m) {
				return false, errors.New("it ended before: " + harness.Describe(m))
			}
			return u.when(m), nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := u.stop(ctx, m); err != nil {
			t.Fatal(err)
		}
	}
	m, err := stack.AwaitVFMigration(ctx, vm, known)
	if err != nil {
		t.Fatal(err)
	}
	if f := m.Status.Failure; f == nil || f.Reason != u.reason || m.Status.Phase != v1alpha1.PhaseFailed {
		t.Fatalf("the VFMigration: %s", harness.Describe(m))
	}
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
