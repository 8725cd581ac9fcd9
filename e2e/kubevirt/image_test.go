//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// TestImage: the image starts, as a user that is not root, with nothing to
// write to and no rights.
func TestImage(t *testing.T) {
	ctx := testContext(t, 2*time.Minute)
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: "version"}}
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	pod.Spec.Containers = []corev1.Container{{
		Name: "compsc", Image: image, Args: []string{"--version"},
		SecurityContext: &corev1.SecurityContext{
			RunAsNonRoot: new(true), ReadOnlyRootFilesystem: new(true), AllowPrivilegeEscalation: new(false),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
	}}
	if err := stack.Client().Create(ctx, pod); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stack.Client().Delete(context.WithoutCancel(ctx), pod); err != nil {
			t.Error(err)
		}
	})
	if err := stack.Kube.Until(ctx, "the pod to end", func(ctx context.Context) (bool, error) {
		err := stack.Client().Get(ctx, client.ObjectKeyFromObject(pod), pod)
		return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed, err
	}); err != nil {
		t.Fatalf("%v: %+v", err, pod.Status)
	}
	out, err := stack.Kubectl(ctx, "", "logs", "-n", Namespace, "version")
	if err != nil || pod.Status.Phase != corev1.PodSucceeded || !strings.HasPrefix(out, "compsc version ") {
		t.Errorf("the pod %s and says %q: %v", pod.Status.Phase, out, err)
	}
}
