package kubevirt

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	virtv1 "kubevirt.io/api/core/v1"
)

// Bounds of what is read from a pod's annotations. The API server bounds all
// annotations of an object together to 256 KiB.
const (
	maxAnnotation = 256 << 10
	maxEntries    = 128
)

// ErrNotYet is what Interfaces wraps when the pod does not tell its VFs yet;
// it will once its network is set up.
var ErrNotYet = errors.New("the pod's network is not set up yet")

// Interface is one of a VMI's interfaces with the compsc network binding,
// with the VF that a pod was given for it.
type Interface struct {
	// Name is the VMI interface's name.
	Name string
	// Slot is the VF's device number on bus 0 of the guest; see Slots.
	Slot int
	// VFAddress is the VF's PCI address, in lower case, with its domain.
	VFAddress string
	// MAC is the address that the VF must answer to, in lower case; empty
	// when neither the VMI nor the pod's network names one.
	MAC string
	// Network is the network that the pod is attached to, namespace/name.
	Network string
	// FastPath tells that the guest is to reach the VF's doorbells by itself.
	FastPath bool
}

var pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// Interfaces returns the VMI's interfaces with the compsc network binding,
// with the VF that pod was given for each; none when the VMI has no such
// interface.
//
// The VFs are read from Multus' network-status annotation. An entry belongs
// to the interface whose network it names; where several name the same, the
// entry's interface name, which KubeVirt derives from the VMI's network name,
// decides, and never their order.
// KubeVirt's own network-info annotation must agree where it is present.
//
// Errors name the pod, the annotation and the interface. They wrap ErrNotYet
// when the annotation is not there yet.
func Interfaces(pod *corev1.Pod, vmi *virtv1.VirtualMachineInstance) ([]Interface, error) {
	if len(BoundInterfaces(vmi)) == 0 {
		return nil, nil
	}
	fail := func(format string, a ...any) error {
		return fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, fmt.Errorf(format, a...))
	}
	slots, err := Slots(vmi)
	if err != nil {
		return nil, fail("VMI %s: %w", vmi.Name, err)
	}
	fast, err := FastPaths(vmi)
	if err != nil {
		return nil, fail("VMI %s: %w", vmi.Name, err)
	}
	if uid := VMIUID(pod); uid != "" && vmi.UID != "" && uid != vmi.UID {
		return nil, fail("made for the VMI with UID %s, not for %s with UID %s", uid, vmi.Name, vmi.UID)
	}
	text, ok := pod.Annotations[AnnotationNetworkStatus]
	if !ok || text == "" {
		return nil, fail("no annotation %s: %w", AnnotationNetworkStatus, ErrNotYet)
	}
	entries, err := parseNetworkStatus(text)
	if err != nil {
		return nil, fail("annotation %s: %w", AnnotationNetworkStatus, err)
	}
	var info map[string]infoEntry
	if text := pod.Annotations[AnnotationNetworkInfo]; text != "" {
		if info, err = parseNetworkInfo(text); err != nil {
			return nil, fail("annotation %s: %w", AnnotationNetworkInfo, err)
		}
	}

	var out []Interface
	users := map[string]string{}
	for i := range vmi.Spec.Domain.Devices.Interfaces {
		iface := &vmi.Spec.Domain.Devices.Interfaces[i]
		if !bound(iface) {
			continue
		}
		network, e, err := entryOf(vmi, iface.Name, entries)
		if err != nil {
			return nil, fail("annotation %s, interface %s: %w", AnnotationNetworkStatus, iface.Name, err)
		}
		got, err := readEntry(iface, e)
		if err != nil {
			return nil, fail("annotation %s, interface %s: %w", AnnotationNetworkStatus, iface.Name, err)
		}
		got.Network, got.Slot, got.FastPath = network, slots[iface.Name], slices.Contains(fast, iface.Name)
		if other, taken := users[got.VFAddress]; taken {
			return nil, fail("annotation %s: interfaces %s and %s both have VF %s",
				AnnotationNetworkStatus, other, iface.Name, got.VFAddress)
		}
		users[got.VFAddress] = iface.Name
		if ie, ok := info[iface.Name]; ok {
			if err := ie.check(got); err != nil {
				return nil, fail("annotation %s, interface %s: %w", AnnotationNetworkInfo, iface.Name, err)
			}
		}
		out = append(out, got)
	}
	return out, nil
}

// entryOf finds the entry of the VMI's network with this name.
func entryOf(vmi *virtv1.VirtualMachineInstance, name string, entries []nadv1.NetworkStatus) (string, *nadv1.NetworkStatus, error) {
	network := ""
	for i := range vmi.Spec.Networks {
		if n := &vmi.Spec.Networks[i]; n.Name == name && n.Multus != nil {
			network = qualified(vmi.Namespace, n.Multus.NetworkName)
		}
	}
	if network == "" {
		return "", nil, fmt.Errorf("the VMI has no Multus network of that name")
	}
	sharing := 0
	for i := range vmi.Spec.Networks {
		if n := &vmi.Spec.Networks[i]; n.Multus != nil && qualified(vmi.Namespace, n.Multus.NetworkName) == network {
			sharing++
		}
	}
	var same []*nadv1.NetworkStatus
	want := podInterfaceName(name)
	for i := range entries {
		if entries[i].Name != network {
			continue
		}
		if entries[i].Interface == want {
			return network, &entries[i], nil
		}
		same = append(same, &entries[i])
	}
	if len(same) != sharing {
		return "", nil, fmt.Errorf("network %s has %d entries, the VMI has %d networks of it", network, len(same), sharing)
	}
	if sharing > 1 {
		return "", nil, fmt.Errorf("network %s has %d entries, and none with the interface name %s: which of them is this one's cannot be told; restart the VM", network, len(same), want)
	}
	return network, same[0], nil
}

func readEntry(iface *virtv1.Interface, e *nadv1.NetworkStatus) (Interface, error) {
	got := Interface{Name: iface.Name}
	if e.DeviceInfo == nil || e.DeviceInfo.Pci == nil || e.DeviceInfo.Pci.PciAddress == "" {
		return got, fmt.Errorf("network %s has no device-info with a PCI address: is the network's resourceName that of a VF?", e.Name)
	}
	var err error
	if got.VFAddress, err = parsePCI(e.DeviceInfo.Pci.PciAddress); err != nil {
		return got, err
	}
	if got.MAC, err = parseMAC(e.Mac); err != nil {
		return got, err
	}
	want, err := parseMAC(iface.MacAddress)
	if err != nil {
		return got, fmt.Errorf("the VMI's macAddress: %w", err)
	}
	if want != "" && got.MAC != "" && want != got.MAC {
		return got, fmt.Errorf("the VF has MAC %s, the VMI asks for %s", got.MAC, want)
	}
	if want != "" {
		got.MAC = want
	}
	return got, nil
}

func parseNetworkStatus(text string) ([]nadv1.NetworkStatus, error) {
	var entries []nadv1.NetworkStatus
	if err := parse(text, &entries); err != nil {
		return nil, err
	}
	if len(entries) > maxEntries {
		return nil, fmt.Errorf("%d entries, at most %d", len(entries), maxEntries)
	}
	return entries, nil
}

// infoEntry is one interface in KubeVirt's network-info annotation
// (pkg/network/downwardapi of KubeVirt, which its API module does not hold).
type infoEntry struct {
	Network    string            `json:"network"`
	DeviceInfo *nadv1.DeviceInfo `json:"deviceInfo"`
	MAC        string            `json:"mac"`
}

func parseNetworkInfo(text string) (map[string]infoEntry, error) {
	var doc struct {
		Interfaces []infoEntry `json:"interfaces"`
	}
	if err := parse(text, &doc); err != nil {
		return nil, err
	}
	if len(doc.Interfaces) > maxEntries {
		return nil, fmt.Errorf("%d interfaces, at most %d", len(doc.Interfaces), maxEntries)
	}
	out := make(map[string]infoEntry, len(doc.Interfaces))
	for _, e := range doc.Interfaces {
		if _, twice := out[e.Network]; twice {
			return nil, fmt.Errorf("network %q appears twice", e.Network)
		}
		out[e.Network] = e
	}
	return out, nil
}

// check compares what KubeVirt says with what Multus said.
func (e infoEntry) check(got Interface) error {
	if e.DeviceInfo != nil && e.DeviceInfo.Pci != nil && e.DeviceInfo.Pci.PciAddress != "" {
		a, err := parsePCI(e.DeviceInfo.Pci.PciAddress)
		if err != nil {
			return err
		}
		if a != got.VFAddress {
			return fmt.Errorf("VF %s, but annotation %s says %s", a, AnnotationNetworkStatus, got.VFAddress)
		}
	}
	m, err := parseMAC(e.MAC)
	if err != nil {
		return err
	}
	if m != "" && got.MAC != "" && m != got.MAC {
		return fmt.Errorf("MAC %s, but annotation %s says %s", m, AnnotationNetworkStatus, got.MAC)
	}
	return nil
}

func parse(text string, into any) error {
	if len(text) > maxAnnotation {
		return fmt.Errorf("%d bytes, at most %d", len(text), maxAnnotation)
	}
	if err := json.Unmarshal([]byte(text), into); err != nil {
		return fmt.Errorf("not the expected JSON: %w", err)
	}
	return nil
}

func parsePCI(s string) (string, error) {
	a := strings.ToLower(s)
	if !pciAddress.MatchString(a) {
		return "", fmt.Errorf("%.32q is no PCI address such as 0000:03:10.0", s)
	}
	return a, nil
}

func parseMAC(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	m, err := net.ParseMAC(s)
	if err != nil || len(m) != 6 {
		return "", fmt.Errorf("%.32q is no MAC address", s)
	}
	return m.String(), nil
}

func qualified(namespace, name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return namespace + "/" + name
}

// podInterfaceName is the name KubeVirt asks Multus to give the pod's
// interface of a VMI network (pkg/network/namescheme of KubeVirt: "pod" and
// the first 11 hexadecimal digits of the name's SHA-256).
func podInterfaceName(network string) string {
	return fmt.Sprintf("pod%x", sha256.Sum256([]byte(network)))[:14]
}
