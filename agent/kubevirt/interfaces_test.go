package kubevirt

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
)

func newVMI(ifaces ...virtv1.Interface) *virtv1.VirtualMachineInstance {
	vmi := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "vm", UID: "vmi-uid"}}
	vmi.Spec.Domain.Devices.Interfaces = ifaces
	return vmi
}

func withNetwork(vmi *virtv1.VirtualMachineInstance, name, nad string) *virtv1.VirtualMachineInstance {
	vmi.Spec.Networks = append(vmi.Spec.Networks, virtv1.Network{Name: name,
		NetworkSource: virtv1.NetworkSource{Multus: &virtv1.MultusNetwork{NetworkName: nad}}})
	return vmi
}

func iface(name, mac string) virtv1.Interface {
	return virtv1.Interface{Name: name, MacAddress: mac, Binding: &virtv1.PluginBinding{Name: BindingName}}
}

func newPod(status, info string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "virt-launcher-vm-x",
		Labels: map[string]string{LabelApp: AppLauncher, LabelCreatedBy: "vmi-uid"}, Annotations: map[string]string{}}}
	if status != "" {
		p.Annotations[AnnotationNetworkStatus] = status
	}
	if info != "" {
		p.Annotations[AnnotationNetworkInfo] = info
	}
	return p
}

const (
	entryDefault = `{"name":"kindnet","interface":"eth0","default":true,"mac":"0a:00:00:00:00:01"}`
	entryBlue    = `{"name":"ns/fast","interface":"pod16477688c0e","mac":"52:54:00:00:00:0A","device-info":{"type":"pci","version":"1.1.0","pci":{"pci-address":"0000:03:10.0"}}}`
	entryNet2    = `{"name":"ns/fast","interface":"net2","mac":"52:54:00:00:00:0b","device-info":{"type":"pci","pci":{"pci-address":"0000:03:10.2"}}}`
	entryNet3    = `{"name":"ns/fast","interface":"net3","device-info":{"type":"pci","pci":{"pci-address":"0000:03:10.4"}}}`
)

var entryRed = `{"name":"ns/fast","interface":"` + podInterfaceName("red") + `","device-info":{"type":"pci","pci":{"pci-address":"0000:03:10.6"}}}`

func list(e ...string) string { return "[" + strings.Join(e, ",") + "]" }

func TestInterfaces(t *testing.T) {
	blue := Interface{Name: "blue", Slot: 0x10, VFAddress: "0000:03:10.0", MAC: "52:54:00:00:00:0a", Network: "ns/fast"}
	one := func(mac string) *virtv1.VirtualMachineInstance {
		return withNetwork(newVMI(iface("blue", mac)), "blue", "fast")
	}
	two := func() *virtv1.VirtualMachineInstance {
		return withNetwork(withNetwork(newVMI(iface("red", ""), iface("blue", "")), "red", "ns/fast"), "blue", "fast")
	}
	tests := []struct {
		name   string
		vmi    *virtv1.VirtualMachineInstance
		pod    *corev1.Pod
		want   []Interface
		err    string
		notYet bool
	}{
		{name: "no binding of ours", vmi: withNetwork(newVMI(virtv1.Interface{Name: "blue"}), "blue", "fast"), pod: newPod("", "")},
		{name: "other binding", vmi: withNetwork(newVMI(virtv1.Interface{Name: "blue", Binding: &virtv1.PluginBinding{Name: "passt"}}), "blue", "fast"), pod: newPod("", "")},
		{name: "unplugged interface", vmi: func() *virtv1.VirtualMachineInstance {
			v := one("")
			v.Spec.Domain.Devices.Interfaces[0].State = virtv1.InterfaceStateAbsent
			return v
		}(), pod: newPod("", "")},
		{name: "one", vmi: one(""), pod: newPod(list(entryDefault, entryBlue), ""), want: []Interface{blue}},
		{name: "MAC asked for", vmi: one("52:54:00:00:00:0a"), pod: newPod(list(entryBlue), ""), want: []Interface{blue}},
		{name: "MAC only in the VMI", vmi: one("52-54-00-00-00-0C"), pod: newPod(list(entryNet3), ""),
			want: []Interface{{Name: "blue", Slot: 0x10, VFAddress: "0000:03:10.4", MAC: "52:54:00:00:00:0c", Network: "ns/fast"}}},
		{name: "matched by pod interface name before order", vmi: func() *virtv1.VirtualMachineInstance {
			v := two()
			v.Spec.Networks = v.Spec.Networks[1:]
			v.Spec.Domain.Devices.Interfaces = v.Spec.Domain.Devices.Interfaces[1:]
			return v
		}(), pod: newPod(list(entryNet2, entryBlue), ""), want: []Interface{blue}},
		{name: "both matched by pod interface name", vmi: two(), pod: newPod(list(entryDefault, entryBlue, entryRed), ""), want: []Interface{
			{Name: "red", Slot: 0x10, VFAddress: "0000:03:10.6", Network: "ns/fast"},
			{Name: "blue", Slot: 0x11, VFAddress: "0000:03:10.0", MAC: "52:54:00:00:00:0a", Network: "ns/fast"}}},
		{name: "never by order", vmi: two(), pod: newPod(list(entryDefault, entryNet2, entryNet3), ""),
			err: "interface red: network ns/fast has 2 entries, and none with the interface name " + podInterfaceName("red")},
		{name: "network-info agrees", vmi: one(""), pod: newPod(list(entryBlue),
			`{"interfaces":[{"network":"blue","deviceInfo":{"type":"pci","version":"1.1.0","pci":{"pci-address":"0000:03:10.0"}},"mac":"52:54:00:00:00:0a"}]}`),
			want: []Interface{blue}},
		{name: "network-info of other networks", vmi: one(""), pod: newPod(list(entryBlue), `{"interfaces":[{"network":"other"}]}`), want: []Interface{blue}},

		{name: "no annotation yet", vmi: one(""), pod: newPod("", ""), err: "no annotation k8s.v1.cni.cncf.io/network-status", notYet: true},
		{name: "another VMI's pod", vmi: func() *virtv1.VirtualMachineInstance { v := one(""); v.UID = "other"; return v }(),
			pod: newPod(list(entryBlue), ""), err: "made for the VMI with UID vmi-uid, not for vm with UID other"},
		{name: "not JSON", vmi: one(""), pod: newPod("{", ""), err: "annotation k8s.v1.cni.cncf.io/network-status: not the expected JSON"},
		{name: "too long", vmi: one(""), pod: newPod(strings.Repeat(" ", maxAnnotation+1), ""), err: "262145 bytes, at most 262144"},
		{name: "too many entries", vmi: one(""), pod: newPod(list(strings.Split(strings.Repeat("{} ", maxEntries)+"{}", " ")...), ""), err: "129 entries, at most 128"},
		{name: "no Multus network", vmi: newVMI(iface("blue", "")), pod: newPod(list(entryBlue), ""), err: "interface blue: the VMI has no Multus network of that name"},
		{name: "entry missing", vmi: one(""), pod: newPod(list(entryDefault), ""), err: "network ns/fast has 0 entries, the VMI has 1 networks of it"},
		{name: "network not a VF's", vmi: one(""), pod: newPod(list(`{"name":"ns/fast","interface":"net1"}`), ""), err: "interface blue: network ns/fast has no device-info with a PCI address"},
		{name: "bad PCI address", vmi: one(""), pod: newPod(list(`{"name":"ns/fast","device-info":{"pci":{"pci-address":"../../etc"}}}`), ""), err: `"../../etc" is no PCI address`},
		{name: "bad MAC", vmi: one(""), pod: newPod(list(strings.Replace(entryBlue, "52:54", "zz:54", 1)), ""), err: "is no MAC address"},
		{name: "MAC differs", vmi: one("52:54:00:00:00:99"), pod: newPod(list(entryBlue), ""), err: "the VF has MAC 52:54:00:00:00:0a, the VMI asks for 52:54:00:00:00:99"},
		{name: "one VF twice", vmi: two(), pod: newPod(list(strings.Replace(entryRed, "10.6", "10.0", 1), entryBlue), ""), err: "interfaces red and blue both have VF 0000:03:10.0"},
		{name: "network-info disagrees on the VF", vmi: one(""), pod: newPod(list(entryBlue),
			`{"interfaces":[{"network":"blue","deviceInfo":{"pci":{"pci-address":"0000:03:10.6"}}}]}`),
			err: "annotation kubevirt.io/network-info, interface blue: VF 0000:03:10.6"},
		{name: "network-info disagrees on the MAC", vmi: one(""), pod: newPod(list(entryBlue),
			`{"interfaces":[{"network":"blue","mac":"52:54:00:00:00:99"}]}`), err: "MAC 52:54:00:00:00:99, but"},
		{name: "network-info names a network twice", vmi: one(""), pod: newPod(list(entryBlue),
			`{"interfaces":[{"network":"blue"},{"network":"blue"}]}`), err: `network "blue" appears twice`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Interfaces(tt.pod, tt.vmi)
			if tt.err == "" && err != nil {
				t.Fatal(err)
			}
			if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), "ns/virt-launcher-vm-x")) {
				t.Fatalf("error %v, want one naming the pod and containing %q", err, tt.err)
			}
			if errors.Is(err, ErrNotYet) != tt.notYet {
				t.Errorf("errors.Is(%v, ErrNotYet) is not %v", err, tt.notYet)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestPodConventions(t *testing.T) {
	p := newPod("", "")
	if !IsLauncher(p) || IsTarget(p) || VMIUID(p) != "vmi-uid" || Finished(p) || VMIName(p) != "" {
		t.Errorf("plain pod misread: %v %v %v %v %q", IsLauncher(p), IsTarget(p), VMIUID(p), Finished(p), VMIName(p))
	}
	p.Labels[LabelVMIName] = "by-label"
	if n := VMIName(p); n != "by-label" {
		t.Errorf("VMIName = %q", n)
	}
	p.Annotations[AnnotationVMIName] = "by-annotation"
	if n := VMIName(p); n != "by-annotation" {
		t.Errorf("VMIName = %q", n)
	}
	yes := true
	p.OwnerReferences = []metav1.OwnerReference{{Kind: "VirtualMachineInstance", Name: "by-owner", Controller: &yes}}
	if n := VMIName(p); n != "by-owner" {
		t.Errorf("VMIName = %q", n)
	}
	p.Labels[LabelMigrationJobUID] = "m"
	if !IsTarget(p) || MigrationUID(p) != "m" {
		t.Errorf("target pod misread")
	}
	for phase, want := range map[corev1.PodPhase]bool{corev1.PodPending: false, corev1.PodRunning: false, corev1.PodSucceeded: true, corev1.PodFailed: true} {
		p.Status.Phase = phase
		if Finished(p) != want {
			t.Errorf("Finished in phase %s is not %v", phase, want)
		}
	}
	const dir = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/hook-sidecar-sockets/hook-sidecar-3/compsc"
	if d := DeviceDir("/var/lib/kubelet/pods", "u", 3); d != dir {
		t.Errorf("DeviceDir = %s", d)
	}
}

func FuzzInterfaces(f *testing.F) {
	f.Add(list(entryDefault, entryBlue), `{"interfaces":[{"network":"blue","mac":"52:54:00:00:00:0a"}]}`, "")
	f.Add(list(entryNet2, entryNet3), "", "52:54:00:00:00:0c")
	f.Add(list(entryRed, entryBlue), "", "52:54:00:00:00:0a")
	f.Add(`[{"name":"ns/fast","device-info":null}]`, `{"interfaces":null}`, "x")
	f.Add("null", "null", "")
	f.Fuzz(func(t *testing.T, status, info, mac string) {
		vmi := withNetwork(withNetwork(newVMI(iface("blue", mac), iface("red", "")), "blue", "fast"), "red", "ns/fast")
		got, err := Interfaces(newPod(status, info), vmi)
		if err != nil {
			return
		}
		if len(got) != 2 || got[0].VFAddress == got[1].VFAddress {
			t.Fatalf("accepted %q as %+v", status, got)
		}
		for _, i := range got {
			if !pciAddress.MatchString(i.VFAddress) || (i.MAC != "" && len(i.MAC) != 17) {
				t.Fatalf("accepted %q as %+v", status, i)
			}
		}
	})
}
