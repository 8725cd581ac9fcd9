//go:build e2e

package tests

import (
	"testing"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/cluster"
	"compsc.io/compsc/e2e/harness"
)

// TestRights: manager and agents have the rights that they use and no others.
// Whether a call is allowed is asked by making it, without effect.
func TestRights(t *testing.T) {
	ctx := within(t, bound)
	as := func(kubeconfig string) client.Client {
		t.Helper()
		cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		check(t, err)
		c, err := client.New(cfg, client.Options{Scheme: cluster.Scheme()})
		check(t, err)
		return client.NewDryRunClient(c)
	}
	manager, agent := as(h.Cluster.ManagerKubeconfig), as(h.Cluster.AgentKubeconfig)

	node := vmNode(t, ctx)
	vmi := &kubevirtv1.VirtualMachineInstance{}
	check(t, h.Client().Get(ctx, client.ObjectKey{Namespace: harness.Namespace, Name: harness.VMI}, vmi))
	pods := &corev1.PodList{}
	check(t, h.Client().List(ctx, pods, client.InNamespace(harness.Namespace), client.MatchingLabels{kubevirtv1.CreatedByLabel: string(vmi.UID)}))
	if len(pods.Items) == 0 {
		t.Fatal("the VM has no pod")
	}
	pod := &pods.Items[0]
	m := newMigration(t, ctx)
	m.Spec.VMIName = "nobody" // which ends it at once
	check(t, create(ctx, m))
	check(t, h.AwaitEnd(ctx, m, nil))
	vfNode := &v1alpha1.VFNode{}
	check(t, h.Client().Get(ctx, client.ObjectKey{Name: node}, vfNode))
	lease := &coordinationv1.Lease{}
	check(t, h.Client().Get(ctx, client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: "agent-" + node}, lease))
	newLease := func(namespace string) *coordinationv1.Lease {
		return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "new"}}
	}
	vmim := &kubevirtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: harness.Namespace, Name: "new"},
		Spec:       kubevirtv1.VirtualMachineInstanceMigrationSpec{VMIName: harness.VMI},
	}
	newPod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: harness.Namespace, Name: "new"},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	touch := func(c client.Client, o client.Object) error {
		n := o.DeepCopyObject().(client.Object)
		n.SetAnnotations(map[string]string{"touched": "yes"})
		return c.Patch(ctx, n, client.MergeFrom(o))
	}
	touchStatus := func(c client.Client, o client.Object) error {
		return c.Status().Patch(ctx, o.DeepCopyObject().(client.Object), client.RawPatch("application/merge-patch+json", []byte(`{"status":{}}`)))
	}
	of := func(o client.Object) client.Object { return o.DeepCopyObject().(client.Object) }

	tests := []struct {
		what           string
		call           func(client.Client) error
		manager, agent bool
	}{
		{"patch the status of a VFMigration", func(c client.Client) error { return touchStatus(c, m) }, true, true},
		{"patch a VFMigration", func(c client.Client) error { return touch(c, m) }, true, false},
		{"delete a VFMigration", func(c client.Client) error { return c.Delete(ctx, of(m)) }, true, false},
		{"patch the status of a VFNode", func(c client.Client) error { return touchStatus(c, vfNode) }, false, true},
		{"patch a VFNode", func(c client.Client) error { return touch(c, vfNode) }, false, false},
		{"delete a VFNode", func(c client.Client) error { return c.Delete(ctx, of(vfNode)) }, false, false},
		{"update an agent's lease", func(c client.Client) error { return c.Update(ctx, of(lease)) }, false, true},
		{"delete a lease", func(c client.Client) error { return c.Delete(ctx, of(lease)) }, false, false},
		{"create a lease of another namespace", func(c client.Client) error { return c.Create(ctx, newLease(harness.Namespace)) }, false, false},
		{"create a VirtualMachineInstanceMigration", func(c client.Client) error { return c.Create(ctx, vmim.DeepCopy()) }, true, false},
		{"patch a VMI", func(c client.Client) error { return touch(c, vmi) }, true, false},
		{"delete a VMI", func(c client.Client) error { return c.Delete(ctx, of(vmi)) }, false, false},
		{"create a pod", func(c client.Client) error { return c.Create(ctx, newPod.DeepCopy()) }, false, false},
		{"patch a pod", func(c client.Client) error { return touch(c, pod) }, false, false},
		{"patch the status of a pod", func(c client.Client) error { return touchStatus(c, pod) }, false, false},
		{"delete a pod", func(c client.Client) error { return c.Delete(ctx, of(pod)) }, true, false},
		{"patch a node", func(c client.Client) error {
			return touch(c, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}})
		}, false, false},
		{"list secrets", func(c client.Client) error { return c.List(ctx, &corev1.SecretList{}) }, false, false},
	}
	for _, test := range tests {
		for who, x := range map[string]struct {
			client.Client
			allowed bool
		}{"the manager": {manager, test.manager}, "an agent": {agent, test.agent}} {
			err := test.call(x.Client)
			switch {
			case x.allowed && err != nil:
				t.Errorf("%s cannot %s: %v", who, test.what, err)
			case !x.allowed && !apierrors.IsForbidden(err):
				t.Errorf("%s may %s: error %v", who, test.what, err)
			}
		}
	}
}
