// Package privilege takes from the agent's process what it does not need. Its
// container is privileged, because no device of a node could be opened and
// nothing in /sys be written otherwise, and so has every capability there is.
package privilege

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Capability is one of Linux' that the agent keeps.
type Capability struct {
	// Name is without CAP_, as in a pod's manifest.
	Name string
	// For says what it is needed for.
	For string
	// Number is Linux'.
	Number int
}

// Kept are all capabilities of the agent. docs/security.md has the same.
var Kept = []Capability{
	{"NET_ADMIN", "MAC, VLAN and the other settings of VFs, by their PF; taps of modelled VFs", unix.CAP_NET_ADMIN},
	{"NET_RAW", "the frames that announce on the network where a moved VM is now", unix.CAP_NET_RAW},
	{"DAC_OVERRIDE", "the sockets of device processes, which belong to their virt-launcher's user", unix.CAP_DAC_OVERRIDE},
	{"SYS_PTRACE", "the root directory of a virt-launcher's process, in which its QEMU is looked at", unix.CAP_SYS_PTRACE},
	{"MKNOD", "`/dev/iommu` in its own container, for kernels with VFIO device cdevs", unix.CAP_MKNOD},
	{"SYS_RESOURCE", "the limit on locked memory of device processes with real VFs, which is raised from outside", unix.CAP_SYS_RESOURCE},
}

// Names lists the capabilities that are kept.
func Names() string {
	var names []string
	for _, c := range Kept {
		names = append(names, c.Name)
	}
	return strings.Join(names, ", ")
}

// set is a set of capabilities, as bits.
type set uint64

func kept() (s set) {
	for _, c := range Kept {
		s |= 1 << c.Number
	}
	return s
}

// Restrict has this process go on with the capabilities that are kept, for good:
// it takes the others from what any program may get, and starts its own program
// anew, with the same process id, arguments and environment. There, and in a
// process that has no others, it returns. What the process has open is closed by
// the new start, so it is called before anything is.
func Restrict() error {
	err := restrict()
	if err != nil {
		return fmt.Errorf("giving up capabilities: %w", err)
	}
	return nil
}

func restrict() error {
	effective, err := effective()
	if err != nil {
		return err
	}
	bounding, err := bounding()
	if err != nil {
		return err
	}
	switch {
	case (effective|bounding)&^kept() == 0:
		return nil
	case effective&(1<<unix.CAP_SETPCAP) == 0 && effective&^kept() == 0:
		return nil // has no others, and is not root, who would get them
	}
	// The bounding set is the thread's, and after exec the process's.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for c := range capabilities {
		if s := set(1) << c; bounding&s&^kept() != 0 {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
				return fmt.Errorf("capability %d: %w", c, err)
			}
		}
	}
	// What one may inherit is not bounded.
	if err := inheritNothing(); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", os.Args, os.Environ())
}

// capabilities is how many a set may hold.
const capabilities = 64

func capget() (data [2]unix.CapUserData, err error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	return data, unix.Capget(&header, &data[0])
}

func effective() (set, error) {
	data, err := capget()
	return set(data[1].Effective)<<32 | set(data[0].Effective), err
}

// bounding reads the calling thread's bounding set, up to the last capability
// that the kernel knows.
func bounding() (s set, err error) {
	for c := range capabilities {
		has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			return s, nil
		}
		if err != nil {
			return 0, err
		}
		if has == 1 {
			s |= 1 << c
		}
	}
	return s, nil
}

// inheritNothing empties the calling thread's inheritable set, and with it the
// ambient one.
func inheritNothing() error {
	data, err := capget()
	if err != nil {
		return err
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	return unix.Capset(&header, &data[0])
}
