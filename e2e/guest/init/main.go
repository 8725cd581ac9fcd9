// The init program of test VMs: it loads the VF driver, gives the interfaces
// the addresses that the kernel's command line names, serves streams (package
// stream) on the network and commands (package proto) on a serial
// port. There is nothing else in the guest: no shell, no services.
//
// Parameters on the kernel's command line:
//
//	compsc.ip=192.0.2.10/24[,...]  addresses of the VFs, in the order of their PCI addresses
//	compsc.mtu=9000                MTU of all VFs
//	compsc.port=ttyS0              serial port of the commands, by default the second one; the
//	                               kernel's console must not be there
package main

import (
	"fmt"
	"os"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/pid1"
)

func main() {
	// A PID 1 that returns makes the kernel panic, which ends QEMU.
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
	}
}

func run() error {
	if err := pid1.MountAll(pid1.Kernel); err != nil {
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
	port, err := pid1.OpenSerial("/dev/" + config.port)
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
