// The init program of test VMs: it loads the VF driver, gives the interfaces
// the addresses that the kernel's command line names, serves streams (package
// stream) on the network and commands (package proto) on the second serial
// port. There is nothing else in the guest: no shell, no services.
//
// Parameters on the kernel's command line:
//
//	compsc.ip=192.0.2.10/24[,...]  addresses of the VFs, in the order of their PCI addresses
//	compsc.mtu=9000                MTU of all VFs
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/guest/proto"
)

func main() {
	// A PID 1 that returns makes the kernel panic, which ends QEMU.
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
}

func run() error {
	if err := mountAll(); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	config, err := parseCmdline(string(cmdline))
	if err != nil {
		return err
	}
	watch, err := watchKernelLog()
	if err != nil {
		return err
	}
	port, err := openSerial("/dev/ttyS1")
	if err != nil {
		return err
	}
	frames, err := watchFrames()
	if err != nil {
		return err
	}
	// The command port is served before the network is up, so that a test can
	// ask why it is not.
	g := &guest{config: config, log: watch, frames: frames}
	failed := make(chan error, 1)
	go func() { failed <- proto.Serve(port, g.handle) }()
	if err := g.start(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		g.setBroken(err)
	}
	return <-failed
}

func mountAll() error {
	for _, m := range []struct{ fstype, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", m.dir, err)
		}
	}
	return nil
}

// openSerial opens a serial port for binary data: no echo, no line editing.
func openSerial(path string) (*os.File, error) {
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

// loadModules loads the modules of dir in the order that the file
// modules.order there gives.
func loadModules(dir string) error {
	order, err := os.ReadFile(dir + "/modules.order")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(order)) {
		if err := loadModule(dir + "/" + name); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("loading %s: %w", name, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}
