//go:build e2echart

package chart

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/helm"
	"compsc.io/compsc/e2e/wait"
)

// upgradeArgs are those of docs/operating.md: the new version's defaults, and
// the values that it was installed with.
func upgradeArgs(chart string) []string {
	return []string{"upgrade", helm.Release, chart, "--reset-then-reuse-values"}
}

// lacking writes a chart that differs from the given one in what versions may
// differ in: it has another CRD, and lacks some objects.
func lacking(t *testing.T, chart string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "compsc")
	check(t, os.CopyFS(dir, os.DirFS(chart)))
	edit := func(file, old, new string) {
		t.Helper()
		path := filepath.Join(dir, file)
		b, err := os.ReadFile(path)
		check(t, err)
		if strings.Count(string(b), old) != 1 {
			t.Fatalf("%s does not hold %q once", path, old)
		}
		check(t, os.WriteFile(path, []byte(strings.Replace(string(b), old, new, 1)), 0o600))
	}
	edit("Chart.yaml", "\nversion: 0.1.0\n", "\nversion: 0.0.9\n")
	edit("files/crd/compsc.io_vfnodes.yaml", "              agentVersion:\n", "              agentBuild:\n")
	check(t, os.Remove(filepath.Join(dir, "templates", "admission.yaml")))
	check(t, os.Remove(filepath.Join(dir, "templates", "networkpolicy.yaml")))
	return dir
}

// chartUpgrade: an upgrade brings objects and fields of CRDs, a rollback takes
// them away, and both keep the values of the installation. The processes are
// those of before, in all of it.
func (w *world) chartUpgrade(t *testing.T) {
	ctx := within(t, 2*time.Minute)
	has := func(when string, want bool) {
		t.Helper()
		policy := &admissionregistrationv1.ValidatingAdmissionPolicy{}
		err := w.h.Client().Get(ctx, client.ObjectKey{Name: "compsc-agent-writes"}, policy)
		if got := err == nil; got != want || client.IgnoreNotFound(err) != nil {
			t.Errorf("%s: the admission policy is there: %t, want %t (%v)", when, got, want, err)
		}
		crd := &unstructured.Unstructured{}
		crd.SetGroupVersionKind(apiextensionsv1.SchemeGroupVersion.WithKind("CustomResourceDefinition"))
		check(t, w.h.Client().Get(ctx, client.ObjectKey{Name: "vfnodes.compsc.io"}, crd))
		if got := strings.Contains(text(t, crd), `"agentVersion":`); got != want {
			t.Errorf("%s: the CRD has the field: %t, want %t", when, got, want)
		}
	}
	_, err := w.helm(ctx, upgradeArgs(lacking(t, w.set.Chart))...)
	check(t, err)
	has("a chart that lacks them", false)
	_, err = w.helm(ctx, upgradeArgs(w.set.Chart)...)
	check(t, err)
	has("upgraded", true)
	_, err = w.helm(ctx, "rollback", helm.Release, "2")
	check(t, err)
	has("rolled back", false)
	_, err = w.helm(ctx, upgradeArgs(w.set.Chart)...)
	check(t, err)
	has("upgraded again", true)
	deployment := &appsv1.Deployment{}
	check(t, w.h.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: "compsc-manager"}, deployment))
	if args := deployment.Spec.Template.Spec.Containers[0].Args; !slices.Contains(args, "--ca-overlap="+overlap.String()) {
		t.Errorf("the values of the installation are lost: %q", args)
	}
	_, err = w.vm.CheckUndisturbed(ctx)
	check(t, err)
}

// versionOf is what a program says that it is.
func versionOf(t *testing.T, program string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, "--version").Output()
	check(t, err)
	return strings.TrimSpace(strings.TrimPrefix(string(out), "compsc version "))
}

// upgrade replaces one process after the other, as the Deployment, the
// DaemonSet and the administrator do, and moves the VM in between. While
// versions are mixed a migration works, or is refused for that reason before
// anything is touched.
func (w *world) upgrade(t *testing.T) {
	older, newer := versionOf(t, w.previous()), versionOf(t, w.set.Compsc)
	if older == newer {
		t.Fatalf("both versions are %s", older)
	}
	runs := func(ctx context.Context, manager, a, b string) {
		t.Helper()
		if got := w.buildInfo(t, "", "manager"); got != manager {
			t.Errorf("the manager is of version %s, want %s", got, manager)
		}
		for node, want := range map[string]string{harness.NodeA: a, harness.NodeB: b} {
			if got := w.buildInfo(t, node, "agent"); got != want {
				t.Errorf("node %s's agent is of version %s, want %s", node, got, want)
			}
			check(t, wait.Until(ctx, "the agent's version "+want+" in VFNode "+node, func(ctx context.Context) (bool, error) {
				n := &v1alpha1.VFNode{}
				err := w.h.Client().Get(ctx, client.ObjectKey{Name: node}, n)
				return n.Status.AgentVersion == want, err
			}))
		}
	}
	ctx := within(t, 5*time.Minute)
	runs(ctx, older, older, older)

	// The manager first, as docs/operating.md has it.
	w.endManager(t, ctx)
	w.update(harness.ManagerName)
	check(t, w.h.StartManager())
	runs(ctx, newer, older, older)
	worked := w.worksOrRefuses(t, ctx, "the manager is new")

	w.update(harness.AgentName(harness.NodeA))
	w.replaceAgent(t, ctx, harness.NodeA)
	runs(ctx, newer, newer, older)
	// To the new one and back, whichever comes first.
	for range 2 {
		if w.worksOrRefuses(t, ctx, "the manager and one agent are new") {
			worked = true
		}
	}
	if !worked {
		t.Error("no migration worked while versions were mixed")
	}

	w.update(harness.AgentName(harness.NodeB))
	w.replaceAgent(t, ctx, harness.NodeB)
	runs(ctx, newer, newer, newer)
	// The VM's device process is the old one's still, and moves to one of
	// KubeVirt's new sidecar image; then both are new.
	w.update(harness.DeviceName)
	w.migrates(t)
	w.migrates(t)
}

// worksOrRefuses moves the VM and tells whether that worked. If not, it was
// refused because of the versions, and nothing was touched.
func (w *world) worksOrRefuses(t *testing.T, ctx context.Context, when string) bool {
	t.Helper()
	from, err := w.h.VMNode(ctx)
	check(t, err)
	m := w.migration(t, ctx)
	check(t, w.h.Client().Create(ctx, m))
	check(t, w.h.AwaitEnd(ctx, m, nil))
	_, err = w.vm.CheckUndisturbed(ctx)
	check(t, err)
	if meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		t.Logf("%s: a migration from node %s works", when, from)
		return true
	}
	c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionAccepted)
	if c == nil || c.Reason != v1alpha1.ReasonVersionMismatch || m.Status.MigrationRef != nil {
		t.Fatalf("%s: it neither works nor is refused for its versions: %s", when, harness.Describe(m))
	}
	t.Logf("%s: a migration from node %s is refused: %s", when, from, c.Message)
	if now, err := w.h.VMNode(ctx); err != nil || now != from {
		t.Errorf("%s: the VM was on node %s and is on %s: %v", when, from, now, err)
	}
	return false
}
