//go:build e2echart

package chart

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/helm"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

// overlap is how long a new authority is known before it signs, in the tests.
const overlap = 2 * time.Second

// world is what the parts of TestInstallation share.
type world struct {
	*installation
	vm   *harness.VM
	hops int
}

// TestInstallation goes through the life of an installation, with one VM under
// traffic from the beginning to the end, which must not notice any of it.
func TestInstallation(t *testing.T) {
	s := set(t)
	if s.Compsc == "" {
		t.Fatal("COMPSC_BINARY must name the product's binary")
	}
	if _, err := os.Stat(s.Previous); err != nil {
		t.Fatalf("`make e2e-chart` builds the version that is upgraded: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 13*time.Minute)
	defer cancel()
	w := &world{installation: newInstallation(t, s)}
	h, err := harness.Start(ctx, harness.Options{
		Artifacts: s,
		Log:       slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Progress:  func(what string) { fmt.Fprintln(os.Stderr, what) },
		Binary:    w.binary,
		Install: func(ctx context.Context, h *harness.Harness) (harness.Installation, error) {
			w.h = h
			_, err := w.helm(ctx, append([]string{"install", helm.Release, filepath.Join(s.Previous, "chart"), "--create-namespace"}, w.values()...)...)
			return w.installation, err
		},
	})
	check(t, err)
	defer func() {
		if t.Failed() {
			keepLogs(h, filepath.Join(filepath.Dir(s.Config), "out", "e2e-chart-log"))
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	for node := range h.Lab.Nodes {
		w.awaitReady(t, within(t, time.Minute), node)
	}
	if w.vm, err = h.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	check(t, w.vm.StartTraffic(ctx))

	for _, part := range []struct {
		name string
		run  func(*world, *testing.T)
	}{
		{"the previous version migrates", (*world).migrates},
		{"what an upgrade of the chart does", (*world).chartUpgrade},
		{"upgrade, process by process", (*world).upgrade},
		{"metrics", (*world).metrics},
		{"KubeVirt learns of the binding", (*world).binding},
		{"kubectl", (*world).kubectl},
		{"rights of the manager", (*world).managerRights},
		{"an agent writes for its node only", (*world).agentBoundaries},
		{"certificates are for the own node only", (*world).certificateBoundaries},
		{"a peer acts for its migrations only", (*world).peerBoundaries},
		{"the device process has no rights", (*world).deviceBoundaries},
		{"certificates rotate in a migration", (*world).rotation},
		{"bad certificates are refused", (*world).badCertificates},
		{"agents are updated in a migration", (*world).rollingUpdate},
		{"uninstall", (*world).uninstall},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.run(w, t) }) {
			t.Fatal("what follows needs that")
		}
	}
	if st, err := w.vm.StopTraffic(ctx); err != nil || !st.Intact {
		t.Errorf("the stream from the beginning to the end: %+v: %v", st, err)
	}
}

// values are those of the installation.
func (w *world) values() []string {
	return values("certificates.overlap=" + overlap.String())
}

func keepLogs(h *harness.Harness, dir string) {
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.CopyFS(dir, os.DirFS(h.LogDir()))
	}
	fmt.Fprintln(os.Stderr, "the logs of all processes are in", dir, err)
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// migration is a new VFMigration of the VM to the other node.
func (w *world) migration(t *testing.T, ctx context.Context) *v1alpha1.VFMigration {
	t.Helper()
	node, err := w.h.VMNode(ctx)
	check(t, err)
	w.hops++
	return w.vm.NewMigration(fmt.Sprintf("move-%d", w.hops), harness.Other(node))
}

// migrates moves the VM.
func (w *world) migrates(t *testing.T) {
	ctx := within(t, 3*time.Minute)
	r, err := w.vm.Hop(ctx, w.migration(t, ctx), func(ctx context.Context, m *v1alpha1.VFMigration) error { return w.h.Client().Create(ctx, m) }, nil)
	check(t, err)
	if !r.StreamIntact || r.DriverResets != 0 || r.StreamBytes == 0 {
		t.Errorf("%+v", r)
	}
}

// held starts a migration and keeps it where both ends are prepared.
func (w *world) held(t *testing.T, ctx context.Context) (m *v1alpha1.VFMigration, release func()) {
	t.Helper()
	release = w.h.StandIn.Hold(standin.InTargetReady)
	t.Cleanup(release)
	m = w.migration(t, ctx)
	check(t, w.h.Client().Create(ctx, m))
	check(t, w.h.AwaitMigration(ctx, m, "to be prepared", nil, func(m *v1alpha1.VFMigration) bool {
		return harness.Ended(m) || meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionPrepared)
	}))
	if harness.Ended(m) {
		t.Fatalf("it ended: %s", harness.Describe(m))
	}
	return m, release
}

// moved fails unless the migration ends well, and the VM has not noticed.
func (w *world) moved(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration) {
	t.Helper()
	check(t, w.h.AwaitEnd(ctx, m, nil))
	if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		t.Fatalf("it failed: %s", harness.Describe(m))
	}
	_, err := w.vm.CheckUndisturbed(ctx)
	check(t, err)
}

// ended fails unless the process, which was asked to, ends well.
func ended(t *testing.T, ctx context.Context, p *lab.Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-ctx.Done():
		t.Fatalf("it does not end: %s", p.Tail(1000))
	}
	if err := p.Err(); err != nil {
		t.Errorf("it ended badly: %v: %s", err, p.Tail(1000))
	}
}

// endManager ends the manager, which leaves its leadership to the next one.
func (w *world) endManager(t *testing.T, ctx context.Context) {
	t.Helper()
	p, err := w.h.EndManager()
	check(t, err)
	ended(t, ctx, p)
}

// replaceAgent ends the node's agent and starts its successor, as a rolling
// update does, and waits until that serves.
func (w *world) replaceAgent(t *testing.T, ctx context.Context, node string) {
	t.Helper()
	p, err := w.h.EndAgent(node)
	check(t, err)
	ended(t, ctx, p)
	check(t, w.h.StartAgent(node, harness.VFsPerNode))
	w.awaitReady(t, ctx, node)
}

// awaitReady waits until the node's agent says that it serves migrations.
func (w *world) awaitReady(t *testing.T, ctx context.Context, node string) {
	t.Helper()
	check(t, wait.Until(ctx, "VFNode "+node+" to be ready", func(ctx context.Context) (bool, error) {
		n := &v1alpha1.VFNode{}
		if err := w.h.Client().Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
			return false, client.IgnoreNotFound(err)
		}
		return meta.IsStatusConditionTrue(n.Status.Conditions, v1alpha1.ConditionReady), nil
	}))
	check(t, w.h.AwaitAgentLease(ctx, node, true))
}

// rollingUpdate: an agent that is told to end in a migration waits for it, and
// says that no other is to begin; its successor takes its place.
func (w *world) rollingUpdate(t *testing.T) {
	ctx := within(t, 3*time.Minute)
	for _, side := range []string{"source", "target"} {
		m, release := w.held(t, ctx)
		node := m.Status.Source.NodeName
		if side == "target" {
			node = m.Status.Target.NodeName
		}
		p, err := w.h.EndAgent(node)
		check(t, err)
		check(t, wait.Until(ctx, "VFNode "+node+" to say that its agent ends", func(ctx context.Context) (bool, error) {
			n := &v1alpha1.VFNode{}
			err := w.h.Client().Get(ctx, client.ObjectKey{Name: node}, n)
			c := meta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionReady)
			return c != nil && c.Reason == v1alpha1.ReasonDraining, err
		}))
		select {
		case <-p.Done():
			t.Fatalf("the %s's agent ended in the middle of the migration: %s", side, p.Tail(1000))
		default:
		}
		release()
		w.moved(t, ctx, m)
		ended(t, ctx, p)
		if !strings.Contains(p.Tail(1<<20), "the agent ends when the migrations of its node have") {
			t.Errorf("the %s's agent does not say what it waits for: %s", side, p.Tail(1000))
		}
		check(t, w.h.StartAgent(node, harness.VFsPerNode))
		w.awaitReady(t, ctx, node)
	}
}

// uninstall removes the product under a running VM.
func (w *world) uninstall(t *testing.T) {
	ctx := within(t, 2*time.Minute)
	before := &v1alpha1.VFMigrationList{}
	check(t, w.h.Client().List(ctx, before))
	_, err := w.helm(ctx, "uninstall", helm.Release)
	check(t, err)
	for _, o := range []client.Object{&appsv1.Deployment{}, &appsv1.DaemonSet{}, &rbacv1.ClusterRole{}, &rbacv1.ClusterRoleBinding{},
		&admissionregistrationv1.ValidatingAdmissionPolicy{}} {
		for _, name := range []string{"compsc-manager", "compsc-agent", "compsc-agent-writes"} {
			key := client.ObjectKey{Name: name}
			if ok, err := w.h.Client().IsObjectNamespaced(o); err == nil && ok {
				key.Namespace = namespace
			}
			if err := w.h.Client().Get(ctx, key, o); !apierrors.IsNotFound(err) {
				t.Errorf("%T %s is left: %v", o, name, err)
			}
		}
	}
	// Their pods end with them.
	w.endManager(t, ctx)
	for _, node := range []string{harness.NodeA, harness.NodeB} {
		p, err := w.h.EndAgent(node)
		check(t, err)
		ended(t, ctx, p)
	}
	w.leftovers(t, ctx)
	after := &v1alpha1.VFMigrationList{}
	check(t, w.h.Client().List(ctx, after))
	if len(after.Items) == 0 || len(after.Items) != len(before.Items) {
		t.Errorf("%d VFMigrations are left of %d", len(after.Items), len(before.Items))
	}
	_, err = w.h.VMNode(ctx)
	check(t, err)
	_, err = w.vm.CheckUndisturbed(ctx)
	check(t, err)
	// It can be installed again over what is kept.
	_, err = w.helm(ctx, append([]string{"install", helm.Release, w.set.Chart, "--dry-run=server"}, w.values()...)...)
	check(t, err)
}

// leftovers: what docs/operating.md lists is left in the namespace, and nothing else.
func (w *world) leftovers(t *testing.T, ctx context.Context) {
	t.Helper()
	want := []string{"ConfigMap " + v1alpha1.TrustConfigMap, "Lease agent-a", "Lease agent-b", "Lease manager.compsc.io", "Lease vf-*", "Secret " + v1alpha1.AuthoritySecret}
	var got []string
	for kind, list := range map[string]client.ObjectList{
		"Secret": &corev1.SecretList{}, "ConfigMap": &corev1.ConfigMapList{}, "Lease": &coordinationv1.LeaseList{}, "Service": &corev1.ServiceList{},
		"ServiceAccount": &corev1.ServiceAccountList{}, "Role": &rbacv1.RoleList{}, "RoleBinding": &rbacv1.RoleBindingList{},
		"NetworkPolicy": &networkingv1.NetworkPolicyList{}, "PodDisruptionBudget": &policyv1.PodDisruptionBudgetList{},
		"Deployment": &appsv1.DeploymentList{}, "DaemonSet": &appsv1.DaemonSetList{},
	} {
		check(t, w.h.Client().List(ctx, list, client.InNamespace(namespace)))
		check(t, meta.EachListItem(list, func(o runtime.Object) error {
			name := o.(client.Object).GetName()
			if strings.HasPrefix(name, "compsc-user-") {
				return nil // The test made the rights of its user.
			}
			if kind == "Lease" && strings.HasPrefix(name, "vf-") {
				name = "vf-*"
			}
			got = append(got, kind+" "+name)
			return nil
		}))
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, slices.Compact(got)); diff != "" {
		t.Errorf("left after helm uninstall (-want +got):\n%s", diff)
	}
	page, err := os.ReadFile(filepath.Join(filepath.Dir(w.set.Config), "docs", "operating.md"))
	check(t, err)
	_, section, _ := strings.Cut(string(page), "\n## Uninstall\n")
	for _, name := range []string{v1alpha1.TrustConfigMap, v1alpha1.AuthoritySecret, "leases"} {
		if !strings.Contains(section, name) {
			t.Errorf("docs/operating.md does not say that %s is left", name)
		}
	}
}
