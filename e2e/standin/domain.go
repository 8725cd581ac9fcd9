package standin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	kubevirtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/e2e/lab"
)

const (
	// domainDir and bootDir are the places of QEMU's own files inside its tree.
	domainDir, bootDir = "/run/domain", "/run/boot"

	defaultMemory, defaultCPUs = 256, 1
)

// domain is a running QEMU, what libvirt calls an active domain.
type domain struct {
	*monitor
	proc *lab.Process
	// dir holds its sockets and its console's log, as seen from outside.
	dir string
}

// startDomain starts QEMU in the pod. An incoming one waits for
// migrate-incoming.
func (s *StandIn) startDomain(ctx context.Context, p *pod, v *kubevirtv1.VirtualMachineInstance, incoming bool) (*domain, error) {
	tree := s.cfg.QEMUTree
	d := &domain{dir: filepath.Join(p.dir, "domain")}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, err
	}
	args, err := domainArgs(v, incoming)
	if err != nil {
		return nil, err
	}
	d.proc, err = s.cfg.Lab.Start(lab.Command{
		Name:   "QEMU of " + p.name,
		Path:   "/usr/bin/qemu-system-x86_64",
		Args:   args,
		Env:    []string{"PATH=/usr/bin:/bin"},
		NS:     s.cfg.Lab.Nodes[p.node].NS,
		Chroot: tree,
		Mounts: []lab.Mount{
			{Target: filepath.Join(tree, "run")},
			{Source: "/dev", Target: filepath.Join(tree, "dev")},
			// The tree's /var/run is a link to its /run, which this process
			// would follow to its own.
			{Source: p.hooks, Target: filepath.Join(tree, "run", strings.TrimPrefix(kubevirt.HooksDir, "/var/run"))},
			{Source: d.dir, Target: filepath.Join(tree, domainDir)},
			{Source: s.cfg.Kernel, Target: filepath.Join(tree, bootDir, "kernel"), ReadOnly: true},
			{Source: s.cfg.Initrd, Target: filepath.Join(tree, bootDir, "initrd"), ReadOnly: true},
		},
		Log: filepath.Join(s.cfg.Lab.Dir, "log", p.name+"-qemu.log"),
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if d.monitor, err = openMonitor(ctx, filepath.Join(d.dir, "monitor.sock"), d.proc.Done()); err != nil {
		d.proc.Stop(0)
		return nil, errors.Join(err, logTail(d.proc))
	}
	return d, nil
}

// domainArgs are QEMU's arguments. Apart from those that concern the VF they
// are the least that boots a kernel.
func domainArgs(v *kubevirtv1.VirtualMachineInstance, incoming bool) ([]string, error) {
	memory, cpus := int64(defaultMemory), uint32(defaultCPUs)
	if m := v.Spec.Domain.Memory; m != nil && m.Guest != nil {
		memory = m.Guest.Value() >> 20
	}
	if c := v.Spec.Domain.CPU; c != nil && c.Cores > 0 {
		cpus = c.Cores
	}
	slots, err := kubevirt.Slots(v)
	if err != nil {
		return nil, err
	}
	// The same on every node, as socket paths travel in the domain.
	hooksDir := kubevirt.ComputeDeviceDir(sidecarContainer)
	var kernelArgs string
	if f := v.Spec.Domain.Firmware; f != nil && f.KernelBoot != nil {
		kernelArgs = f.KernelBoot.KernelArgs
	}
	gate, err := json.Marshal(map[string]any{
		"driver": "nbd", "node-name": "gate0", "export": "", "reconnect-delay": 3,
		"server": map[string]string{"type": "unix", "path": hooksDir + "/gate.sock"},
	})
	if err != nil {
		return nil, err
	}
	a := []string{
		"-name", v.Name,
		"-nodefaults", "-no-user-config", "-display", "none",
		// Without graphics the firmware's console is the first serial port.
		"-machine", "q35,memory-backend=ram,graphics=off", "-accel", "tcg,thread=multi", "-cpu", "qemu64",
		"-smp", strconv.Itoa(int(cpus)),
		"-m", fmt.Sprintf("%dM", memory),
		"-object", fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", memory),
		"-kernel", bootDir + "/kernel", "-initrd", bootDir + "/initrd", "-append", kernelArgs,
		"-serial", "file:" + domainDir + "/console.log",
		"-serial", "unix:" + domainDir + "/agent.sock,server=on,wait=off",
		"-qmp", "unix:" + domainDir + "/monitor.sock,server=on,wait=off",
		"-qmp", "unix:" + hooksDir + "/qmp.sock,server=on,wait=off",
		"-blockdev", string(gate),
		"-blockdev", "driver=qcow2,node-name=gateq,file=gate0",
	}
	for _, name := range bindingInterfaces(v) {
		dev, err := json.Marshal(map[string]any{
			"driver": "vfio-user-pci", "id": "vf-" + name, "bus": "pcie.0",
			"addr": fmt.Sprintf("%#x", slots[name]), "rombar": 0,
			"socket": map[string]string{"type": "unix", "path": hooksDir + "/" + device.VFSocket(slots[name])},
		})
		if err != nil {
			return nil, err
		}
		a = append(a, "-device", string(dev))
	}
	if incoming {
		a = append(a, "-incoming", "defer")
	}
	if incoming || startsPaused(v) {
		a = append(a, "-S")
	}
	return a, nil
}

func startsPaused(v *kubevirtv1.VirtualMachineInstance) bool {
	return v.Spec.StartStrategy != nil && *v.Spec.StartStrategy == kubevirtv1.StartStrategyPaused
}

// kill ends QEMU without asking it, as libvirt does.
func (d *domain) kill() {
	d.proc.Stop(0)
	d.close()
}

// logTail is the end of a process's output as an error, nil if it said nothing.
func logTail(p *lab.Process) error {
	b := p.Tail(2000)
	if b == "" {
		return nil
	}
	return fmt.Errorf("its last words: %s", b)
}
