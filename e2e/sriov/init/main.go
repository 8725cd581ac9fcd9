// The first process of a VM that plays a node with SR-IOV cards: it loads the
// drivers, runs the one program of its job, tells how that ended and what the
// IOMMU had to say, and turns the VM off.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/pid1"
	"compsc.io/compsc/e2e/sriov/job"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		// A PID 1 that returns makes the kernel panic, which ends QEMU too.
		fmt.Fprintln(os.Stderr, "init: power off:", err)
	}
}

// run fails only if the status could not be told.
func run() error {
	if err := pid1.MountAll(pid1.Kernel); err != nil {
		return err
	}
	if err := pid1.LoadModules(unusable); err != nil {
		return err
	}
	port, err := openPort(job.StatusPort)
	if err != nil {
		return err
	}
	defer port.Close()
	return json.NewEncoder(port).Encode(status())
}

// unusable are the modules of KVM on a machine without it.
func unusable(module string) bool {
	if !strings.HasPrefix(module, "kvm") && module != "ccp" {
		return false
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	return err != nil || !slices.Contains(strings.Fields(string(info)), "svm")
}

func status() job.Status {
	code, err := execute()
	s := job.Status{ExitCode: code}
	var faults error
	if s.Faults, faults = readFaults(); err == nil {
		err = faults
	}
	if err != nil {
		s.Error = err.Error()
	}
	return s
}

// execute runs the job's program and returns its exit code.
func execute() (int, error) {
	if err := pid1.MountAll([]pid1.Mount{
		{Type: "tmpfs", Target: "/tmp"},
		{Type: "tmpfs", Target: "/run"},
		{Type: "9p", Source: job.DirTag, Target: job.Dir, Flags: unix.MS_RDONLY, Data: "trans=virtio,version=9p2000.L,msize=524288,cache=loose"},
		{Type: "9p", Source: job.TreeTag, Target: job.TreeDir, Flags: unix.MS_RDONLY, Data: "trans=virtio,version=9p2000.L,msize=524288,cache=loose"},
	}); err != nil {
		return 0, err
	}
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return 0, err
	}
	if err := netlink.LinkSetUp(loopback); err != nil {
		return 0, fmt.Errorf("lo: %w", err)
	}
	encoded, err := os.ReadFile(filepath.Join(job.Dir, job.File))
	if err != nil {
		return 0, err
	}
	var j job.Job
	if err := json.Unmarshal(encoded, &j); err != nil {
		return 0, fmt.Errorf("%s: %w", job.File, err)
	}
	if len(j.Args) == 0 {
		return 0, fmt.Errorf("%s names no program", job.File)
	}
	output, err := openPort(job.OutputPort)
	if err != nil {
		return 0, err
	}
	defer output.Close()
	cmd := &exec.Cmd{Path: j.Args[0], Args: j.Args, Env: j.Env, Dir: j.Dir, Stdout: output, Stderr: output}
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	ws, ok := cmd.ProcessState.Sys().(interface {
		Signaled() bool
		ExitStatus() int
	})
	if ok && !ws.Signaled() {
		return ws.ExitStatus(), nil
	}
	fmt.Fprintf(output, "%s: %v\n", j.Args[0], err)
	return 128, nil
}

// openPort opens the virtio port with a name.
func openPort(name string) (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, path := range names {
		b, err := os.ReadFile(path)
		if err == nil && strings.TrimSpace(string(b)) == name {
			// For reading too, or a blocking write fails where nobody reads.
			return os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(path))), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("the VM has no virtio port %s among its %d", name, len(names))
}
