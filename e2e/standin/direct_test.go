package standin

import (
	"slices"
	"strings"
	"testing"

	kubevirtv1 "kubevirt.io/api/core/v1"
	"libvirt.org/go/libvirtxml"
)

// TestDirectArguments: QEMU gets what the domain says, and all that the sidecar
// put there.
func TestDirectArguments(t *testing.T) {
	v := &kubevirtv1.VirtualMachineInstance{}
	v.Name, v.Namespace = "vm", "default"
	v.Spec.Domain.Firmware = &kubevirtv1.Firmware{KernelBoot: &kubevirtv1.KernelBoot{KernelArgs: "console=ttyS0 compsc.ip=192.0.2.1/24"}}
	doc, err := domainXML(v)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := directArguments(doc, false); err == nil {
		t.Error("a domain whose memory nobody can map is started")
	}
	d := &libvirtxml.Domain{}
	if err := d.Unmarshal(doc); err != nil {
		t.Fatal(err)
	}
	d.MemoryBacking = &libvirtxml.DomainMemoryBacking{
		MemorySource: &libvirtxml.DomainMemorySource{Type: "memfd"}, MemoryAccess: &libvirtxml.DomainMemoryAccess{Mode: "shared"},
	}
	d.QEMUCommandline.Args = append(d.QEMUCommandline.Args,
		libvirtxml.DomainQEMUCommandlineArg{Value: "-device"}, libvirtxml.DomainQEMUCommandlineArg{Value: "the sidecar's"})
	if doc, err = d.Marshal(); err != nil {
		t.Fatal(err)
	}
	args, err := directArguments(doc, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]string{{"-accel", "kvm"}, {"-m", "256M"}, {"-smp", "1"}, {"-device", "the sidecar's"}, {"-kernel", d.OS.Kernel}} {
		if i := slices.Index(args, pair[0]); i < 0 || args[i+1] != pair[1] {
			t.Errorf("no %s %s in %q", pair[0], pair[1], args)
		}
	}
	if i := slices.Index(args, "-append"); !strings.Contains(args[i+1], "console=ttyS0") || !strings.Contains(args[i+1], "compsc.ip=192.0.2.1/24") {
		t.Errorf("the kernel's command line is %q", args[i+1])
	}
}
