package controllers

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	virtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/kubevirt"
)

func TestOptionsAreChecked(t *testing.T) {
	for name, o := range map[string]Options{
		"no config":    {Namespace: systemNamespace},
		"no namespace": {Config: &rest.Config{Host: "https://127.0.0.1:1"}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := Run(t.Context(), o); err == nil || !strings.Contains(err.Error(), "Config and Namespace must be set") {
				t.Errorf("error %v", err)
			}
		})
	}
}

// The cache holds what the reconciler looks at, and nothing that is large.
func TestTrim(t *testing.T) {
	f := migrating(virtv1.MigrationRunning)
	large := metav1.ObjectMeta{Annotations: map[string]string{"a": "b"}, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "m"}}}

	pod := f.targetPod.DeepCopy()
	pod.Annotations, pod.ManagedFields = large.Annotations, large.ManagedFields
	pod.Spec.Containers = []corev1.Container{{Name: "compute"}}
	got, err := trimPod(pod)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(f.targetPod, got); diff != "" {
		t.Errorf("pod (-want +got):\n%s", diff)
	}

	f.vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "vmim-uid"}
	vmi := f.vmi.DeepCopy()
	vmi.Annotations, vmi.ManagedFields = large.Annotations, large.ManagedFields
	f.vmi.Spec.Domain.Devices.Interfaces = f.vmi.Spec.Domain.Devices.Interfaces[1:]
	vmi.Spec.NodeSelector = map[string]string{"a": "b"}
	f.vmi.Annotations = map[string]string{kubevirt.AnnotationMigrationBlocked: "why"}
	metav1.SetMetaDataAnnotation(&vmi.ObjectMeta, kubevirt.AnnotationMigrationBlocked, "why")
	if got, err = trimVMI(vmi); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(f.vmi, got); diff != "" {
		t.Errorf("VMI (-want +got):\n%s", diff)
	}

	other := &corev1.Node{}
	for name, trim := range map[string]func(any) (any, error){"trimPod": trimPod, "trimVMI": trimVMI} {
		if got, err := trim(other); err != nil || got != any(other) {
			t.Errorf("%s of another kind: %v, %v", name, got, err)
		}
	}
}
