// Package pid1 is what the first processes of the test VMs have in common. The
// VMs boot from an initramfs that holds nothing but a static program and
// kernel modules.
package pid1

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Modules is the directory of kernel modules in the initramfs.
const Modules = "/modules"

// Mount is one file system to mount.
type Mount struct {
	// Type of the file system, such as "proc".
	Type string
	// Source is the device or tag; empty where the type needs none.
	Source string
	// Target is the directory, made if it is missing.
	Target string
	// Flags and Data are as for mount(2).
	Flags uintptr
	Data  string
}

// Kernel are the file systems of the kernel itself.
var Kernel = []Mount{
	{Type: "proc", Target: "/proc"},
	{Type: "sysfs", Target: "/sys"},
	{Type: "devtmpfs", Target: "/dev"},
}

// MountAll mounts file systems in order. One that is mounted already is left.
func MountAll(mounts []Mount) error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.Target, 0o755); err != nil {
			return err
		}
		source := m.Source
		if source == "" {
			source = m.Type
		}
		if err := unix.Mount(source, m.Target, m.Type, m.Flags, m.Data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", m.Target, err)
		}
	}
	return nil
}

// OpenSerial opens a serial port for binary data: no echo, no line editing.
func OpenSerial(path string) (*os.File, error) {
	port, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	fd := int(port.Fd())
	mode, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	// As cfmakeraw(3).
	mode.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	mode.Oflag &^= unix.OPOST
	mode.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	mode.Cflag &^= unix.CSIZE | unix.PARENB | unix.CBAUD
	mode.Cflag |= unix.CS8 | unix.CLOCAL | unix.CREAD | unix.B115200
	mode.Cc[unix.VMIN], mode.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, mode); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return port, nil
}

// LoadModules loads the kernel modules of the initramfs in the order that the
// file modules.order among them gives, except those that skip names.
func LoadModules(skip func(name string) bool) error {
	order, err := os.ReadFile(Modules + "/modules.order")
	if err != nil {
		return err
	}
	for _, file := range strings.Fields(string(order)) {
		name := strings.TrimSuffix(file, ".ko")
		if skip != nil && skip(name) {
			continue
		}
		if err := LoadModule(name); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return nil
}

// LoadModule loads one kernel module of the initramfs.
func LoadModule(name string) error {
	file, err := os.Open(Modules + "/" + name + ".ko")
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.FinitModule(int(file.Fd()), "", 0); err != nil {
		return fmt.Errorf("loading module %s: %w", name, err)
	}
	return nil
}
