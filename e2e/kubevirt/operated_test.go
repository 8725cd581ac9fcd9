//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/helm"
	"compsc.io/compsc/e2e/traffic"
)

// operated: agents and manager are replaced, taken away and brought back while
// a virtual machine has its VFs in use, which it does not notice; and it can
// be moved by those that were not there when it started.
func operated(ctx context.Context, t *testing.T, g *traffic.Guest) {
	pods := func() (uids []types.UID) {
		t.Helper()
		l := &corev1.PodList{}
		if err := stack.Client().List(ctx, l, client.InNamespace(v1alpha1.SystemNamespace)); err != nil {
			t.Fatal(err)
		}
		for i := range l.Items {
			uids = append(uids, l.Items[i].UID)
		}
		return uids
	}
	undisturbed := func(when string) {
		t.Helper()
		if _, err := g.CheckUndisturbed(ctx); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	first := pods()
	upgrade := []string{"upgrade", helm.Release, stack.o.Artifacts.Chart, "--reuse-values",
		"--set", "agent.podAnnotations.round=two,manager.podAnnotations.round=two"}
	if err := stack.Helm(ctx, upgrade...); err != nil {
		t.Fatal(err)
	}
	if err := stack.AwaitProduct(ctx); err != nil {
		t.Fatal(err)
	}
	if err := stack.Kube.Until(ctx, "the pods of before to be gone", func(context.Context) (bool, error) {
		return !slices.ContainsFunc(pods(), func(u types.UID) bool { return slices.Contains(first, u) }), nil
	}); err != nil {
		t.Fatal(err)
	}
	undisturbed("after helm upgrade")

	if err := stack.Helm(ctx, "uninstall", helm.Release); err != nil {
		t.Fatal(err)
	}
	if err := stack.Kube.Until(ctx, "all of the product's pods to be gone", func(context.Context) (bool, error) {
		return len(pods()) == 0, nil
	}); err != nil {
		t.Fatal(err)
	}
	undisturbed("after helm uninstall")

	if err := stack.Helm(ctx, append([]string{"install", helm.Release, stack.o.Artifacts.Chart}, values...)...); err != nil {
		t.Fatal(err)
	}
	if err := stack.AwaitProduct(ctx); err != nil {
		t.Fatal(err)
	}
	from, err := stack.NodeOf(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	if err := stack.AwaitMovable(ctx, vm, Other(from)); err != nil {
		t.Fatal(err)
	}
	m, err := stack.Move(ctx, vm, g, "after installing again", func(ctx context.Context, _, to string) error {
		return stack.CreateVFMigration(ctx, "installed-again", vm, to)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Log(m)
}
