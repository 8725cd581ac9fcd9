//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/helm"
	"compsc.io/compsc/e2e/traffic"
)

// madeKinds are those of the chart's objects.
const madeKinds = "deployments,daemonsets,serviceaccounts,networkpolicies,poddisruptionbudgets,roles,rolebindings,clusterroles,clusterrolebindings," +
	"validatingadmissionpolicies,validatingadmissionpolicybindings,mutatingadmissionpolicies,mutatingadmissionpolicybindings,migrationpolicies.migrations.kubevirt.io"

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
			// Those of the Job which registered the binding have ended, and stay.
			if p := l.Items[i].Status.Phase; p != corev1.PodSucceeded && p != corev1.PodFailed {
				uids = append(uids, l.Items[i].UID)
			}
		}
		return uids
	}
	undisturbed := func(when string) {
		t.Helper()
		if _, err := g.CheckUndisturbed(ctx); err != nil {
			t.Fatalf("%s: %v", when, err)
		}
	}
	// What Helm made, by the label that all of it has, but for the CRDs, which it keeps.
	made := func() []string {
		t.Helper()
		kinds := madeKinds
		if stack.Plugins() {
			kinds += ",plugins.plugin.kubevirt.io"
		}
		out, err := stack.Kubectl(ctx, "", "get", kinds, "--all-namespaces", "--selector", "app.kubernetes.io/instance="+helm.Release, "--output", "name", "--ignore-not-found")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(out)
	}
	first := pods()
	upgrade := []string{"upgrade", helm.Release, stack.o.Artifacts.Chart, "--reset-then-reuse-values",
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

	kinds := []string{"deployment.apps", "daemonset.apps", "clusterrole.rbac.authorization.k8s.io", "validatingadmissionpolicy.admissionregistration.k8s.io"}
	if stack.Plugins() {
		kinds = append(kinds, "plugin.plugin.kubevirt.io")
	}
	for _, kind := range kinds {
		if !slices.ContainsFunc(made(), func(name string) bool { return strings.HasPrefix(name, kind+"/") }) {
			t.Errorf("nothing that Helm made is a %s: %q", kind, made())
		}
	}
	if err := stack.Helm(ctx, "uninstall", helm.Release); err != nil {
		t.Fatal(err)
	}
	if err := stack.Kube.Until(ctx, "all of the product's pods to be gone", func(context.Context) (bool, error) {
		return len(pods()) == 0, nil
	}); err != nil {
		t.Fatal(err)
	}
	if left := made(); len(left) > 0 {
		t.Errorf("left after helm uninstall: %q", left)
	}
	undisturbed("after helm uninstall")

	if err := stack.InstallChart(ctx); err != nil {
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
