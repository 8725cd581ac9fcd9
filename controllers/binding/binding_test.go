package binding

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/yaml"
)

var key = types.NamespacedName{Namespace: "kubevirt", Name: "kubevirt"}

// manifest is what config/ has those register who do it by hand.
func manifest(t *testing.T) virtv1.InterfaceBindingPlugin {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "config", "kubevirt", "binding", "kubevirt.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	kv := &virtv1.KubeVirt{}
	if err := yaml.UnmarshalStrict(b, kv); err != nil {
		t.Fatal(err)
	}
	return kv.Spec.Configuration.NetworkConfiguration.Binding["compsc"]
}

func TestRegister(t *testing.T) {
	want := manifest(t)
	old := want
	old.SidecarImage = "old"
	incomplete := virtv1.InterfaceBindingPlugin{SidecarImage: want.SidecarImage}
	added := want
	added.SidecarImage = "old"
	added.ComputeResourceOverhead = &virtv1.ResourceRequirementsWithoutClaims{Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Mi")}}
	kept := added
	kept.SidecarImage = want.SidecarImage
	theirs := virtv1.InterfaceBindingPlugin{SidecarImage: "passt", DomainAttachmentType: virtv1.Tap}
	type bindings = map[string]virtv1.InterfaceBindingPlugin
	for name, tt := range map[string]struct {
		network *virtv1.NetworkConfiguration
		want    bindings
		changed bool
	}{
		"no network configuration": {nil, bindings{"compsc": want}, true},
		"no binding":               {&virtv1.NetworkConfiguration{NetworkInterface: "bridge"}, bindings{"compsc": want}, true},
		"another's":                {&virtv1.NetworkConfiguration{Binding: bindings{"passt": theirs}}, bindings{"passt": theirs, "compsc": want}, true},
		"an older one":             {&virtv1.NetworkConfiguration{Binding: bindings{"passt": theirs, "compsc": old}}, bindings{"passt": theirs, "compsc": want}, true},
		"half of it":               {&virtv1.NetworkConfiguration{Binding: bindings{"compsc": incomplete}}, bindings{"compsc": want}, true},
		"with additions":           {&virtv1.NetworkConfiguration{Binding: bindings{"compsc": added}}, bindings{"compsc": kept}, true},
		"there already":            {&virtv1.NetworkConfiguration{Binding: bindings{"passt": theirs, "compsc": kept}}, bindings{"passt": theirs, "compsc": kept}, false},
	} {
		t.Run(name, func(t *testing.T) {
			scheme := runtime.NewScheme()
			if err := virtv1.AddToScheme(scheme); err != nil {
				t.Fatal(err)
			}
			kv := &virtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}}
			kv.Spec.Configuration.NetworkConfiguration = tt.network
			kv.Spec.Configuration.MachineType = "q35"
			c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(kv).Build()
			for _, changed := range []bool{tt.changed, false} {
				got, err := Register(t.Context(), c, key, want.SidecarImage)
				if err != nil || got != changed {
					t.Errorf("changed: %v, %v, want %v", got, err, changed)
				}
			}
			if err := c.Get(t.Context(), key, kv); err != nil {
				t.Fatal(err)
			}
			conf := kv.Spec.Configuration
			if diff := cmp.Diff(tt.want, conf.NetworkConfiguration.Binding); diff != "" {
				t.Errorf("bindings (-want +got):\n%s", diff)
			}
			if conf.MachineType != "q35" || tt.network != nil && conf.NetworkConfiguration.NetworkInterface != tt.network.NetworkInterface {
				t.Errorf("the rest is %+v", conf)
			}
		})
	}
}

func TestNoKubeVirt(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := virtv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	_, err := Register(t.Context(), fake.NewClientBuilder().WithScheme(scheme).Build(), key, "image")
	if client.IgnoreNotFound(err) != nil || err == nil || !strings.Contains(err.Error(), "KubeVirt kubevirt/kubevirt") {
		t.Errorf("without KubeVirt: %v", err)
	}
}
