//go:build e2echart

package chart

import (
	"os/exec"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/helm"
)

// binding: the chart's Job tells KubeVirt of the network binding, with its own
// rights, which are for that alone, and nothing takes that away again.
func (w *world) binding(t *testing.T) {
	ctx := within(t, 2*time.Minute)
	admin := w.h.Client()
	check(t, admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "kubevirt"}}))
	theirs := kubevirtv1.InterfaceBindingPlugin{SidecarImage: "passt"}
	kv := &kubevirtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: "kubevirt", Name: "kubevirt"}}
	kv.Spec.Configuration.NetworkConfiguration = &kubevirtv1.NetworkConfiguration{Binding: map[string]kubevirtv1.InterfaceBindingPlugin{"passt": theirs}}
	check(t, admin.Create(ctx, kv))
	defer func() { check(t, admin.Delete(ctx, kv)) }()

	upgrade := func(v ...string) {
		t.Helper()
		_, err := w.helm(ctx, append([]string{"upgrade", helm.Release, w.set.Chart, "--reset-then-reuse-values"}, values(v...)...)...)
		check(t, err)
	}
	jobs := func() []batchv1.Job {
		t.Helper()
		l := &batchv1.JobList{}
		check(t, admin.List(ctx, l, client.InNamespace(namespace)))
		return l.Items
	}
	upgrade("kubevirt.binding.enabled=true", "image.tag=one")
	first := jobs()
	if len(first) != 1 {
		t.Fatalf("%d Jobs, want one", len(first))
	}
	// Twice, as when its first pod is lost.
	versions := map[string]bool{}
	for range 2 {
		w.register(t, &first[0])
		check(t, admin.Get(ctx, client.ObjectKeyFromObject(kv), kv))
		versions[kv.ResourceVersion] = true
	}
	if len(versions) != 1 {
		t.Errorf("to register again changed KubeVirt: %v", versions)
	}
	known := func(image string) {
		t.Helper()
		check(t, admin.Get(ctx, client.ObjectKeyFromObject(kv), kv))
		want := map[string]kubevirtv1.InterfaceBindingPlugin{"passt": theirs,
			"compsc": {SidecarImage: image, DownwardAPI: kubevirtv1.DeviceInfo, Migration: &kubevirtv1.InterfaceBindingMigration{}}}
		if diff := cmp.Diff(want, kv.Spec.Configuration.NetworkConfiguration.Binding); diff != "" {
			t.Errorf("bindings (-want +got):\n%s", diff)
		}
	}
	known("compsc:one")

	c := w.client(t, namespace, "compsc-binding", nil)
	other := &kubevirtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: "kubevirt", Name: "other"}}
	nothing := client.RawPatch("application/merge-patch+json", []byte(`{}`))
	check(t, c.Patch(ctx, kv.DeepCopy(), nothing, client.DryRunAll))
	forbidden(t, "another KubeVirt", c.Patch(ctx, other, nothing, client.DryRunAll), "kubevirts")
	forbidden(t, "delete KubeVirt", c.Delete(ctx, kv.DeepCopy(), client.DryRunAll), "kubevirts")
	forbidden(t, "list KubeVirts", c.List(ctx, &kubevirtv1.KubeVirtList{}), "kubevirts")
	forbidden(t, "secrets", c.List(ctx, &corev1.SecretList{}, client.InNamespace("kubevirt")), "secrets")

	upgrade("image.tag=two")
	second := jobs()
	if len(second) != 1 || second[0].Name == first[0].Name {
		t.Fatalf("with another image the Jobs are %v, was %s", second, first[0].Name)
	}
	w.register(t, &second[0])
	known("compsc:two")
	upgrade("kubevirt.binding.enabled=false", "image.tag=")
	if left := jobs(); len(left) != 0 {
		t.Errorf("%d Jobs are left", len(left))
	}
	known("compsc:two")
}

// register runs what the Job's pod does.
func (w *world) register(t *testing.T, job *batchv1.Job) {
	t.Helper()
	ctx := within(t, time.Minute)
	args, err := w.start(ctx, "binding", &job.Spec.Template, harness.NodeA, metav1.NewControllerRef(job, batchv1.SchemeGroupVersion.WithKind("Job")))
	check(t, err)
	if out, err := exec.CommandContext(ctx, w.set.Compsc, args...).CombinedOutput(); err != nil {
		t.Fatalf("the Job's pod: %v: %s", err, out)
	}
}
