package kubevirt

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	virtv1 "kubevirt.io/api/core/v1"
)

func TestSlots(t *testing.T) {
	at := func(i virtv1.Interface, address string) virtv1.Interface { i.PciAddress = address; return i }
	absent := func(i virtv1.Interface) virtv1.Interface { i.State = virtv1.InterfaceStateAbsent; return i }
	pod := virtv1.Interface{Name: "default"}
	var many []virtv1.Interface
	for i := range MaxInterfaces + 1 {
		many = append(many, iface(fmt.Sprint("net", i), ""))
	}
	for _, tt := range []struct {
		name   string
		ifaces []virtv1.Interface
		want   map[string]int
		err    string
	}{
		{name: "one", ifaces: []virtv1.Interface{pod, iface("blue", "")}, want: map[string]int{"blue": 0x10}},
		{name: "two", ifaces: []virtv1.Interface{iface("red", ""), pod, iface("blue", "")}, want: map[string]int{"red": 0x10, "blue": 0x11}},
		{name: "an unplugged one keeps its place", ifaces: []virtv1.Interface{absent(iface("red", "")), iface("blue", "")}, want: map[string]int{"blue": 0x11}},
		{name: "as many as may be", ifaces: many[:MaxInterfaces], want: map[string]int{
			"net0": 0x10, "net1": 0x11, "net2": 0x12, "net3": 0x13, "net4": 0x14, "net5": 0x15, "net6": 0x16, "net7": 0x17}},
		{name: "asked for", ifaces: []virtv1.Interface{at(iface("red", ""), "0000:00:1d.0"), iface("blue", "")}, want: map[string]int{"red": 0x1d, "blue": 0x11}},

		{name: "none", ifaces: []virtv1.Interface{pod}, err: "no interface of the VMI has the network binding compsc"},
		{name: "all unplugged", ifaces: []virtv1.Interface{absent(iface("red", ""))}, err: "no interface of the VMI has the network binding compsc"},
		{name: "too many", ifaces: many, err: "interface net8: at most 8 interfaces"},
		{name: "conflict", ifaces: []virtv1.Interface{iface("red", ""), at(iface("blue", ""), "0000:00:10.0")}, err: "interfaces red and blue are both at PCI address 0000:00:10.0"},
		{name: "another bus", ifaces: []virtv1.Interface{at(iface("red", ""), "0000:81:00.0")}, err: `interface red: pciAddress "0000:81:00.0" is not on the guest's bus 0`},
		{name: "another function", ifaces: []virtv1.Interface{at(iface("red", ""), "0000:00:10.1")}, err: "is not on the guest's bus 0"},
		{name: "host bridge", ifaces: []virtv1.Interface{at(iface("red", ""), "0000:00:00.0")}, err: "belongs to the chipset"},
		{name: "chipset", ifaces: []virtv1.Interface{at(iface("red", ""), "0000:00:1F.0")}, err: "belongs to the chipset"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Slots(newVMI(tt.ifaces...))
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Fatalf("error %v, want %q", err, tt.err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestCheckAttached(t *testing.T) {
	vmi := newVMI(iface("red", ""), iface("blue", ""))
	red, blue := Interface{Name: "red", Slot: 0x10}, Interface{Name: "blue", Slot: 0x11}
	for name, tt := range map[string]struct {
		have []Interface
		err  string
	}{
		"all":     {have: []Interface{blue, red}},
		"missing": {have: []Interface{red}, err: "interface blue: no VF is attached"},
		"unknown": {have: []Interface{red, blue, {Name: "green", Slot: 0x12}}, err: "interface green: a VF is attached, but the VMI has no such interface"},
		"moved":   {have: []Interface{red, {Name: "blue", Slot: 0x12}}, err: "interface blue: its VF is attached as device 0x12 of the guest, the VMI says 0x11"},
	} {
		if err := CheckAttached(vmi, tt.have); tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: error %v, want %q", name, err, tt.err)
		}
	}
	if err := CheckAttached(newVMI(), nil); err == nil {
		t.Error("a VMI without an interface is accepted")
	}
}

func TestCheckNetworkInfo(t *testing.T) {
	have := []Interface{{Name: "blue", VFAddress: "0000:03:10.0", MAC: "52:54:00:00:00:0a"}}
	info := func(address, mac string) string {
		return `{"interfaces":[{"network":"default"},{"network":"blue","deviceInfo":{"type":"pci","pci":{"pci-address":"` + address + `"}},"mac":"` + mac + `"}]}`
	}
	for _, tt := range []struct{ text, err string }{
		{"", ""},
		{"{}", ""},
		{info("0000:03:10.0", "52:54:00:00:00:0A"), ""},
		{info("0000:03:10.0", ""), ""},
		{info("0000:03:10.2", ""), "interface blue: VF 0000:03:10.2, but"},
		{info("0000:03:10.0", "52:54:00:00:00:0b"), "interface blue: MAC 52:54:00:00:00:0b, but"},
		{"[", "not the expected JSON"},
		{strings.Repeat(" ", maxAnnotation+1), "at most"},
	} {
		if err := CheckNetworkInfo(tt.text, have); tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%.100q: error %v, want %q", tt.text, err, tt.err)
		}
	}
}

func TestSidecarNames(t *testing.T) {
	for name, want := range map[string]bool{
		"hook-sidecar-0": true, "hook-sidecar-15": true, "hook-sidecar-16": false, "hook-sidecar-": false, "hook-sidecar-01": false,
		"hook-sidecar--1": false, "compute": false, "": false, "3": false, "hook-sidecar-../x": false,
	} {
		if got := IsSidecarName(name); got != want {
			t.Errorf("IsSidecarName(%q) is %v", name, got)
		}
	}
	if d := ComputeDeviceDir(SidecarName(2)); d != "/var/run/kubevirt-hooks/hook-sidecar-2/compsc" {
		t.Errorf("ComputeDeviceDir: %s", d)
	}
	if d := SidecarDeviceDir(); d != "/var/run/kubevirt-hooks/compsc" {
		t.Errorf("SidecarDeviceDir: %s", d)
	}
}
