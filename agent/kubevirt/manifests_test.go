package kubevirt

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// decode reads a manifest, in which nothing may be that the API does not know.
func decode(t *testing.T, path string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "config", path))
	if err != nil {
		t.Fatal(err)
	}
	if b, err = yaml.YAMLToJSONStrict(b); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	// As the API server reads it, in which names are case-sensitive.
	strict, err := json.UnmarshalStrict(b, into)
	if err = errors.Join(append(strict, err)...); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

// TestBindingManifest: the binding is registered as the sidecar expects it.
func TestBindingManifest(t *testing.T) {
	k := &virtv1.KubeVirt{}
	decode(t, "kubevirt/binding/kubevirt.yaml", k)
	if k.Kind != "KubeVirt" || k.APIVersion != virtv1.GroupVersion.String() {
		t.Errorf("it is a %s %s", k.APIVersion, k.Kind)
	}
	b, ok := k.Spec.Configuration.NetworkConfiguration.Binding[BindingName]
	if !ok || len(k.Spec.Configuration.NetworkConfiguration.Binding) != 1 {
		t.Fatalf("bindings %+v, want %s", k.Spec.Configuration.NetworkConfiguration.Binding, BindingName)
	}
	if b.SidecarImage == "" || b.DownwardAPI != virtv1.DeviceInfo || b.Migration == nil || b.DomainAttachmentType != "" {
		t.Errorf("registered as %+v", b)
	}
}

// TestSamples: the sample VM gets a VF of the sample network.
func TestSamples(t *testing.T) {
	nad := &nadv1.NetworkAttachmentDefinition{}
	decode(t, "samples/kubevirt/network-attachment-definition.yaml", nad)
	var cni struct {
		Type       string `json:"type"`
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.UnmarshalCaseSensitivePreserveInts([]byte(nad.Spec.Config), &cni); err != nil || cni.Type != "sriov" || cni.CNIVersion == "" {
		t.Errorf("CNI configuration %s: %v", nad.Spec.Config, err)
	}
	if nad.Annotations["k8s.v1.cni.cncf.io/resourceName"] == "" {
		t.Error("the network has no resource")
	}

	vm := &virtv1.VirtualMachine{}
	decode(t, "samples/kubevirt/virtual-machine.yaml", vm)
	vmi := &virtv1.VirtualMachineInstance{ObjectMeta: vm.ObjectMeta, Spec: vm.Spec.Template.Spec}
	slots, err := Slots(vmi)
	if err != nil || len(slots) != 1 || slots["fast"] != FirstSlot {
		t.Errorf("slots %v: %v", slots, err)
	}
	pod := newPod(list(`{"name":"`+nad.Namespace+`/`+nad.Name+`","interface":"net1","device-info":{"type":"pci","pci":{"pci-address":"0000:03:10.0"}}}`), "")
	pod.Labels[LabelCreatedBy] = ""
	got, err := Interfaces(pod, vmi)
	if err != nil || len(got) != 1 || got[0].MAC != "52:54:00:c0:5c:01" {
		t.Errorf("interfaces %+v: %v", got, err)
	}
	if s := vmi.Spec.EvictionStrategy; s == nil || *s != virtv1.EvictionStrategyLiveMigrate {
		t.Error("a drain would shut the VM down")
	}
	if vmi.Spec.Domain.Machine.Type != "q35" || vmi.Spec.Domain.Memory.Hugepages != nil {
		t.Errorf("machine %+v, memory %+v", vmi.Spec.Domain.Machine, vmi.Spec.Domain.Memory)
	}
	for _, d := range vmi.Spec.Domain.Devices.Disks {
		var volume *virtv1.Volume
		for i := range vmi.Spec.Volumes {
			if vmi.Spec.Volumes[i].Name == d.Name {
				volume = &vmi.Spec.Volumes[i]
			}
		}
		if volume == nil || volume.ContainerDisk == nil {
			t.Errorf("disk %s has volume %+v", d.Name, volume)
		}
	}
}
