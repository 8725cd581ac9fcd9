//go:build apiserver

package controllers

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// TestAgentWrites: of a VFMigration that names its node, an agent writes its own
// part only, and its events are known to be its word.
func TestAgentWrites(t *testing.T) {
	for _, u := range manifests(t, "admission") {
		if err := admin.Create(t.Context(), u); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := admin.Delete(context.Background(), u); err != nil {
				t.Error(err)
			}
		})
	}
	config := rest.CopyConfig(adminConfig)
	config.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + systemNamespace + ":compsc-agent", Groups: []string{"system:masters"},
		Extra: map[string][]string{"authentication.kubernetes.io/node-name": {"a"}}}
	a, err := client.New(config, client.Options{Scheme: admin.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	gomega.NewWithT(t).Eventually(func() bool {
		return apierrors.IsForbidden(a.Create(t.Context(), &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: "b"}}, client.DryRunAll))
	}, patience, 20*time.Millisecond).Should(gomega.BeTrue())
	says := func(what string, err error, want string) {
		t.Helper()
		if want == "" && err != nil || want != "" && (!apierrors.IsForbidden(err) || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}

	ns := newNamespace(t)
	m := &v1alpha1.VFMigration{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "m"}, Spec: v1alpha1.VFMigrationSpec{VMIName: "vm"}}
	if err := admin.Create(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.IgnoreNotFound(admin.Delete(context.Background(), m)); err != nil {
			t.Error(err)
		}
	})
	if err := admin.Get(t.Context(), client.ObjectKeyFromObject(m), m); err != nil {
		t.Fatal(err)
	}
	m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "a", PodName: "p", PodUID: "u"}
	m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "b", PodName: "q", PodUID: "v"}
	m.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, Reason: "Test", LastTransitionTime: metav1.Now()}}
	if err := admin.Status().Update(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	const conditions, manager = "the agent of node a may write Prepared, Captured, RolledBack only", "an agent may not say when a VFMigration began or ended"
	for what, tt := range map[string]struct {
		change func(*v1alpha1.VFMigrationStatus)
		says   string
	}{
		"its condition":       {add(v1alpha1.ConditionCaptured), ""},
		"a step":              {func(s *v1alpha1.VFMigrationStatus) { s.Steps = []v1alpha1.StepStatus{{Name: "source/x"}} }, ""},
		"the target's":        {add(v1alpha1.ConditionVerified), conditions},
		"that it is over":     {add(v1alpha1.ConditionSucceeded), conditions},
		"the manager's taken": {func(s *v1alpha1.VFMigrationStatus) { s.Conditions = nil }, conditions},
		"failure": {func(s *v1alpha1.VFMigrationStatus) {
			s.Failure = &v1alpha1.VFMigrationFailure{Reason: "Aborted", Message: "x", Time: metav1.Now()}
		}, manager},
		"completion": {func(s *v1alpha1.VFMigrationStatus) { s.CompletionTime = new(metav1.Now()) }, manager},
		"start":      {func(s *v1alpha1.VFMigrationStatus) { s.StartTime = new(metav1.Now()) }, manager},
		"phase":      {func(s *v1alpha1.VFMigrationStatus) { s.Phase = v1alpha1.PhaseSucceeded }, manager},
		"KubeVirt's": {func(s *v1alpha1.VFMigrationStatus) {
			s.MigrationRef = &v1alpha1.MigrationReference{Name: "x", UID: "y"}
		}, manager},
		"which it reflects":  {func(s *v1alpha1.VFMigrationStatus) { s.ObservedGeneration = 7 }, manager},
		"which nodes it has": {func(s *v1alpha1.VFMigrationStatus) { s.Target.NodeName = "c" }, "may not change which nodes"},
	} {
		c := m.DeepCopy()
		tt.change(&c.Status)
		says(what, a.Status().Update(t.Context(), c, client.DryRunAll), tt.says)
	}

	node := func(name string) *corev1.ObjectReference {
		return &corev1.ObjectReference{APIVersion: v1alpha1.GroupVersion.String(), Kind: "VFNode", Name: name}
	}
	pod := func(name string) *corev1.ObjectReference {
		return &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: ns, Name: name}
	}
	const event = "must be of the agent of node a, and about its VFNode"
	for what, tt := range map[string]struct {
		by                 string
		regarding, related *corev1.ObjectReference
		says               string
	}{
		"its node":              {"compsc-agent", node("a"), nil, ""},
		"a VM's pod":            {"compsc-agent", pod("virt-launcher-vm-x"), node("a"), ""},
		"another node":          {"compsc-agent", node("b"), node("a"), event},
		"a VM's pod, unsigned":  {"compsc-agent", pod("virt-launcher-vm-x"), nil, event},
		"a VM's pod, as others": {"compsc-agent", pod("virt-launcher-vm-x"), node("b"), event},
		"another pod":           {"compsc-agent", pod("coredns"), node("a"), event},
		"as the kubelet":        {"kubelet", node("a"), nil, event},
	} {
		e := &eventsv1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: tt.regarding.Namespace, GenerateName: "e-"}, EventTime: metav1.NowMicro(),
			ReportingController: tt.by, ReportingInstance: "x", Type: corev1.EventTypeWarning, Reason: "Test", Action: "Test", Regarding: *tt.regarding, Related: tt.related}
		if e.Namespace == "" {
			e.Namespace = metav1.NamespaceDefault
		}
		says("event about "+what, a.Create(t.Context(), e, client.DryRunAll), tt.says)
	}
}

// add makes a change that adds a condition.
func add(condition string) func(*v1alpha1.VFMigrationStatus) {
	return func(s *v1alpha1.VFMigrationStatus) {
		s.Conditions = append(s.Conditions, metav1.Condition{Type: condition, Status: metav1.ConditionTrue, Reason: condition, LastTransitionTime: metav1.Now()})
	}
}
