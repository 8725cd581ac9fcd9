// Package node runs a virtual machine that plays a node with SR-IOV cards:
// QEMU's igb, which emulates Intel's 82576 with its VFs, behind an emulated
// Intel IOMMU. In it the kernel's own drivers of card, IOMMU and VFIO run, and
// one program, typically the binary of a Go test.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"compsc.io/compsc/e2e/sriov/job"
)

// PFs is how many cards a node has: a VF's state is to move to a VF of
// another.
const PFs = 2

// WireMAC is the address of the own port of a node that is alone to the wire of
// its cards, an interface that is no card.
const WireMAC = "52:54:00:c5:01:00"

// WireMACOf is that of the node with the number.
func WireMACOf(number int) string { return fmt.Sprintf("52:54:00:c5:%02x:00", 2*number+1) }

// Config describes a node and its job.
type Config struct {
	// QEMU is a root directory with QEMU; the node finds it at job.TreeDir.
	QEMU string
	// Kernel and Initrd are what the node boots.
	Kernel, Initrd string
	// Memory is in MiB, HugePages what of it is in pages of 2 MiB. The cards want
	// them for a guest's memory: they drop a frame one of whose buffers is not in
	// one piece in the node's memory (hw/net/net_tx_pkt.c,
	// net_tx_pkt_add_raw_fragment_pci), as often as it is sent.
	Memory, HugePages int
	// KVM, if set, is a QEMU program to run the node with instead of the tree's,
	// whose emulated processors KVM can use (hack/svm-qemu makes it).
	KVM string
	// Number tells nodes on one wire apart: 0 for one that is alone.
	Number int
	// Wire, if set, is a tap device that the wire of the node's cards goes on to;
	// the caller closes it.
	Wire *os.File
	// Files are put into job.Dir: paths by name.
	Files map[string]string
	// Job is the program to run.
	Job job.Job
	// Output gets what it prints, as it comes.
	Output io.Writer
	// Console is a file for the messages of the node's kernel, empty for none.
	Console string
}

// Node is a running node.
type Node struct {
	dir    string
	keep   string // where the console goes
	qemu   *exec.Cmd
	errs   strings.Builder
	ended  chan error // gets one value when QEMU has ended
	copied chan error // gets one value when all output was copied
}

// Start starts the node. It ends with its program, with this process, or with
// ctx. The caller must Wait for it.
func Start(ctx context.Context, c Config) (_ *Node, err error) {
	dir, err := os.MkdirTemp(filepath.Join(c.QEMU, "tmp"), "node-")
	if err != nil {
		return nil, err
	}
	n := &Node{dir: dir, keep: c.Console, ended: make(chan error, 1), copied: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	if err := n.fill(c); err != nil {
		return nil, err
	}
	// The program is looked up inside the new root.
	inside := strings.TrimPrefix(dir, filepath.Clean(c.QEMU))
	program := "/usr/bin/qemu-system-x86_64"
	if c.KVM != "" {
		program = filepath.Join(inside, kvmProgram)
	}
	n.qemu = exec.CommandContext(ctx, program, c.arguments(inside)...)
	n.qemu.Dir = "/"
	n.qemu.SysProcAttr = &syscall.SysProcAttr{Chroot: c.QEMU, Pdeathsig: syscall.SIGKILL}
	n.qemu.Stdout, n.qemu.Stderr = &n.errs, &n.errs
	n.qemu.WaitDelay = 5 * time.Second
	// A file, for QEMU takes a port for closed when its standard input ends.
	from, to, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer to.Close()
	n.qemu.ExtraFiles = []*os.File{to}
	if c.Wire != nil {
		n.qemu.ExtraFiles = append(n.qemu.ExtraFiles, c.Wire)
	}
	if err := n.start(); err != nil {
		return nil, errors.Join(fmt.Errorf("QEMU: %w", err), from.Close())
	}
	go func() {
		_, err := io.Copy(c.Output, from)
		n.copied <- errors.Join(err, from.Close())
	}()
	return n, nil
}

// start starts QEMU on a thread that lives as long as it does: the kernel kills
// it with the thread that started it, and one may end before the process does.
func (n *Node) start() error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := n.qemu.Start()
		started <- err
		if err == nil {
			n.ended <- n.qemu.Wait()
		}
	}()
	return <-started
}

// fill puts what the node reads into its directory, which is below QEMU's root.
func (n *Node) fill(c Config) error {
	if err := os.Mkdir(filepath.Join(n.dir, "job"), 0o755); err != nil {
		return err
	}
	encoded, err := json.Marshal(c.Job)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(n.dir, "job", job.File), encoded, 0o644); err != nil {
		return err
	}
	for name, path := range c.Files {
		if err := place(path, filepath.Join(n.dir, "job", name)); err != nil {
			return err
		}
	}
	if c.KVM != "" {
		if err := place(c.KVM, filepath.Join(n.dir, kvmProgram)); err != nil {
			return err
		}
	}
	return errors.Join(place(c.Kernel, filepath.Join(n.dir, "vmlinuz")), place(c.Initrd, filepath.Join(n.dir, "initrd")))
}

// kvmProgram is Config.KVM in the node's directory.
const kvmProgram = "qemu"

// place copies a file.
func place(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	info, err := source.Stat()
	if err != nil {
		return err
	}
	target, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}

// arguments are those of QEMU; dir is the node's directory inside QEMU's root.
func (c Config) arguments(dir string) []string {
	cpu, thread := "qemu64,+x2apic", "multi"
	if c.KVM != "" {
		// On a thread for each, on a busy machine, one processor of this QEMU in
		// time takes an interrupt and does not come to acknowledge it: no more of
		// that priority reach it. They also clear each other's flags in VMRUN (in
		// cpu_clear_ignne).
		cpu, thread = cpu+",+svm,+npt", "single"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", "q35", "-cpu", cpu, "-smp", "2", "-m", fmt.Sprintf("%dM", c.Memory),
		"-accel", "tcg,thread=" + thread,
		"-device", "intel-iommu,intremap=on,caching-mode=off",
		"-kernel", dir + "/vmlinuz", "-initrd", dir + "/initrd",
		"-append", "console=ttyS0 panic=-1 nokaslr mitigations=off intel_iommu=on log_buf_len=4M " +
			// Ten ticks come late on a busy machine, and the kernel panics.
			"no_timer_check " +
			// What costs time and tests nothing here.
			"cryptomgr.notests audit=0 apparmor=0 selinux=0 nowatchdog random.trust_cpu=on rcupdate.rcu_expedited=1 " +
			fmt.Sprintf("hugepages=%d", c.HugePages/2),
		"-serial", "file:" + dir + "/console",
		"-device", "virtio-serial-pci",
		"-add-fd", "fd=3,set=1", "-chardev", "file,id=output,path=/dev/fdset/1,append=on", "-device", "virtserialport,chardev=output,name=" + job.OutputPort,
		"-chardev", "file,id=status,path=" + dir + "/status", "-device", "virtserialport,chardev=status,name=" + job.StatusPort,
		"-virtfs", "local,id=job,path=" + dir + "/job,mount_tag=" + job.DirTag + ",security_model=none,readonly=on",
		"-virtfs", "local,id=tree,path=/,mount_tag=" + job.TreeTag + ",security_model=none,readonly=on",
	}
	args = append(args, "-netdev", "hubport,hubid=0,id=wire", "-device", "virtio-net-pci,netdev=wire,romfile=,mac="+WireMACOf(c.Number))
	if c.Wire != nil {
		args = append(args, "-netdev", "tap,id=outside,fd=4", "-netdev", "hubport,hubid=0,id=onward,netdev=outside")
	}
	if c.KVM != "" {
		// Elsewhere than where it was built for, it does not find its firmware.
		args = append(args, "-L", "/usr/share/qemu", "-L", "/usr/share/seabios")
	}
	for i := range PFs {
		args = append(args,
			"-device", fmt.Sprintf("pcie-root-port,id=port%d,chassis=%d,slot=%d,bus=pcie.0", i, i+1, i+1),
			"-netdev", fmt.Sprintf("hubport,hubid=0,id=uplink%d", i),
			"-device", fmt.Sprintf("igb,bus=port%d,netdev=uplink%d,mac=52:54:00:c5:%02x:%02x,romfile=", i, i, 2*c.Number, i+1))
	}
	return args
}

// Wait waits until the node has ended, and removes what it left. The error is
// nil if the node's program ran and was watched, however it ended.
func (n *Node) Wait() (job.Status, error) {
	end := errors.Join(<-n.ended, <-n.copied)
	s, err := n.status()
	if n.keep != "" {
		err = errors.Join(err, place(filepath.Join(n.dir, "console"), n.keep))
	}
	if err != nil {
		console, _ := os.ReadFile(filepath.Join(n.dir, "console"))
		err = fmt.Errorf("the node ended (%v) without a status: %w\n%s\nend of its console:\n%s",
			end, err, n.errs.String(), console[max(0, len(console)-8<<10):])
	}
	return s, errors.Join(err, os.RemoveAll(n.dir))
}

func (n *Node) status() (job.Status, error) {
	encoded, err := os.ReadFile(filepath.Join(n.dir, "status"))
	if err != nil {
		return job.Status{}, err
	}
	var s job.Status
	err = json.Unmarshal(encoded, &s)
	return s, err
}
