package standin

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
)

// networkInfoAnnotation is KubeVirt's digest of network-status for a binding
// with downwardAPI: device-info (pkg/network/downwardapi).
const networkInfoAnnotation = "kubevirt.io/network-info"

// networkInfo is the content of networkInfoAnnotation.
type networkInfo struct {
	Interfaces []networkInfoInterface `json:"interfaces,omitempty"`
}

type networkInfoInterface struct {
	Network    string            `json:"network"`
	DeviceInfo *nadv1.DeviceInfo `json:"deviceInfo,omitempty"`
	Mac        string            `json:"mac,omitempty"`
}

// bindingInterfaces are the VMI's interfaces that get a VF, in order.
func bindingInterfaces(v *kubevirtv1.VirtualMachineInstance) []string {
	var names []string
	for _, i := range v.Spec.Domain.Devices.Interfaces {
		if i.Binding != nil && i.Binding.Name == BindingName {
			names = append(names, i.Name)
		}
	}
	return names
}

// podInterface is KubeVirt's hashed name of a secondary network's interface
// in the pod (pkg/network/namescheme).
func podInterface(network string) string {
	return fmt.Sprintf("pod%x", sha256.Sum256([]byte(network)))[:14]
}

// networksAnnotation is what virt-controller asks Multus for.
func networksAnnotation(v *kubevirtv1.VirtualMachineInstance) (string, error) {
	mac := map[string]string{}
	for _, i := range v.Spec.Domain.Devices.Interfaces {
		mac[i.Name] = i.MacAddress
	}
	var elements []nadv1.NetworkSelectionElement
	for _, n := range v.Spec.Networks {
		if n.Multus == nil {
			continue
		}
		ns, name, ok := strings.Cut(n.Multus.NetworkName, "/")
		if !ok {
			ns, name = v.Namespace, n.Multus.NetworkName
		}
		elements = append(elements, nadv1.NetworkSelectionElement{
			Name: name, Namespace: ns, MacRequest: mac[n.Name], InterfaceRequest: podInterface(n.Name),
		})
	}
	b, err := json.Marshal(elements)
	return string(b), err
}

func requestedNetworks(p *corev1.Pod) ([]nadv1.NetworkSelectionElement, error) {
	var elements []nadv1.NetworkSelectionElement
	if err := json.Unmarshal([]byte(p.Annotations[nadv1.NetworkAttachmentAnnot]), &elements); err != nil {
		return nil, fmt.Errorf("pod %s: networks: %w", p.Name, err)
	}
	return elements, nil
}

// networkStatus is what Multus writes once the CNI plugins have run.
func networkStatus(networks []nadv1.NetworkSelectionElement, vfs []string) (string, error) {
	status := []nadv1.NetworkStatus{{Name: "pod-network", Interface: "eth0", Default: true}}
	for i, n := range networks {
		status = append(status, nadv1.NetworkStatus{
			Name: n.Namespace + "/" + n.Name, Interface: n.InterfaceRequest, Mac: n.MacRequest,
			DeviceInfo: &nadv1.DeviceInfo{
				Type: nadv1.DeviceInfoTypePCI, Version: nadv1.DeviceInfoVersion,
				Pci: &nadv1.PciDevice{PciAddress: vfs[i]},
			},
		})
	}
	b, err := json.Marshal(status)
	return string(b), err
}

// digestNetworks is what virt-controller makes of network-status for the
// downward API.
func digestNetworks(p *corev1.Pod, v *kubevirtv1.VirtualMachineInstance) (string, error) {
	var status []nadv1.NetworkStatus
	if err := json.Unmarshal([]byte(p.Annotations[nadv1.NetworkStatusAnnot]), &status); err != nil {
		return "", fmt.Errorf("pod %s: network-status: %w", p.Name, err)
	}
	byInterface := map[string]nadv1.NetworkStatus{}
	for _, s := range status {
		byInterface[s.Interface] = s
	}
	var info networkInfo
	for _, name := range bindingInterfaces(v) {
		if s, ok := byInterface[podInterface(name)]; ok {
			info.Interfaces = append(info.Interfaces, networkInfoInterface{Network: name, DeviceInfo: s.DeviceInfo, Mac: s.Mac})
		}
	}
	b, err := json.Marshal(info)
	return string(b), err
}
