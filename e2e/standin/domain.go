package standin

import (
	"context"
	_ "embed"
	"errors"
	"path/filepath"
	"strings"
	"time"

	kubevirtv1 "kubevirt.io/api/core/v1"
	"libvirt.org/go/libvirtxml"
)

// converted is what KubeVirt v1.8.4's converter made of a VMI that boots a
// kernel: agent/kubevirt/domain/testdata says how it was had.
//
//go:embed domain.xml
var converted string

// convertedUID is the UID of that VMI.
const convertedUID = "8a6cbb2c-1b1f-4c0e-9a53-5a8f6c9f8a01"

const (
	// bootDir, below /run, is where KubeVirt has the kernel of a VMI with
	// kernelBoot.
	bootDir = "kubevirt/container-disks/kernel-boot"

	defaultMemory, defaultCPUs = 256, 1

	// ownDir is where the stand-in's own sockets are; KubeVirt's directory has
	// too long a path here.
	ownDir         = "/run/standin"
	consoleLog     = "virt-serial0-log"
	agentSocket    = "agent.sock"
	observerSocket = "observer.sock"
)

// domain is a running QEMU, what libvirt calls an active domain.
type domain struct {
	// monitor is one of the stand-in's own, to watch QEMU with. Everything
	// that changes something goes through libvirt.
	*monitor
	name    string
	compute compute
	// dir holds the stand-in's own sockets, as seen from outside.
	dir string
}

// privateDir is where the sockets of a VM are, KubeVirt's
// pkg/util, VirtPrivateDir.
func privateDir(uid string) string { return "/var/run/kubevirt-private/" + uid }

func domainName(v *kubevirtv1.VirtualMachineInstance) string { return v.Namespace + "_" + v.Name }

// domainXML is the domain that KubeVirt's converter would make of the VMI, as
// far as the stand-in's VMIs go, with three things more: a second serial port,
// which the guest is asked through; the firmware's messages on the first; and
// the monitor of the stand-in.
func domainXML(v *kubevirtv1.VirtualMachineInstance) (string, error) {
	d := &libvirtxml.Domain{}
	if err := d.Unmarshal(strings.ReplaceAll(converted, convertedUID, string(v.UID))); err != nil {
		return "", err
	}
	memory, cpus := int64(defaultMemory), uint(defaultCPUs)
	if m := v.Spec.Domain.Memory; m != nil {
		if m.Guest != nil {
			memory = m.Guest.Value() >> 20
		}
		if m.Hugepages != nil {
			d.MemoryBacking = &libvirtxml.DomainMemoryBacking{
				MemoryHugePages: &libvirtxml.DomainMemoryHugepages{}, MemorySource: &libvirtxml.DomainMemorySource{Type: "memfd"},
			}
		}
	}
	if c := v.Spec.Domain.CPU; c != nil && c.Cores > 0 {
		cpus = uint(c.Cores)
	}
	d.Name = domainName(v)
	d.Memory = &libvirtxml.DomainMemory{Value: uint(memory), Unit: "MiB"}
	d.VCPU.Value = cpus
	d.CPU.Topology.Cores = int(cpus)
	d.OS.Cmdline = ""
	if f := v.Spec.Domain.Firmware; f != nil && f.KernelBoot != nil {
		d.OS.Cmdline = f.KernelBoot.KernelArgs
	}
	for i := range d.SysInfo[0].SMBIOS.System.Entry {
		if e := &d.SysInfo[0].SMBIOS.System.Entry[i]; e.Name == "uuid" {
			e.Value = string(v.UID)
		}
	}
	port := uint(1)
	d.Devices.Serials = append(d.Devices.Serials, libvirtxml.DomainSerial{
		Source: &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind", Path: filepath.Join(ownDir, agentSocket)}},
		Target: &libvirtxml.DomainSerialTarget{Port: &port},
	})
	d.QEMUCommandline = &libvirtxml.DomainQEMUCommandline{}
	for _, a := range []string{"-machine", "graphics=off", "-qmp", "unix:" + filepath.Join(ownDir, observerSocket) + ",server=on,wait=off"} {
		d.QEMUCommandline.Args = append(d.QEMUCommandline.Args, libvirtxml.DomainQEMUCommandlineArg{Value: a})
	}
	return d.Marshal()
}

// define has the sidecar change the domain, as it asked for.
func (s *StandIn) define(ctx context.Context, p *pod, v *kubevirtv1.VirtualMachineInstance) (string, error) {
	doc, err := domainXML(v)
	if err != nil {
		return "", err
	}
	return p.onDefineDomain(ctx, doc, v)
}

// errRefused is what the sidecar says when the VM cannot start, or not yet.
var errRefused = errors.New("the sidecar refuses")

// startDomain defines and starts the VM in the pod.
func (s *StandIn) startDomain(ctx context.Context, p *pod, v *kubevirtv1.VirtualMachineInstance) (*domain, error) {
	doc, err := s.define(ctx, p, v)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.bound(time.Minute))
	defer cancel()
	if err := p.compute.start(ctx, doc, startsPaused(v)); err != nil {
		return nil, err
	}
	return s.observe(ctx, p, v)
}

// observe watches the QEMU that is started in the pod.
func (s *StandIn) observe(ctx context.Context, p *pod, v *kubevirtv1.VirtualMachineInstance) (*domain, error) {
	d := &domain{name: domainName(v), compute: p.compute, dir: filepath.Join(p.dir, ownDir)}
	var err error
	d.monitor, err = openMonitor(ctx, filepath.Join(d.dir, observerSocket), p.compute.silent())
	if err != nil {
		return nil, err
	}
	return d, nil
}

func startsPaused(v *kubevirtv1.VirtualMachineInstance) bool {
	return v.Spec.StartStrategy != nil && *v.Spec.StartStrategy == kubevirtv1.StartStrategyPaused
}
