package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/vfiouser"
)

// le is the byte order of vfio-user and of the VF.
var le = binary.LittleEndian

// Of vfio-user messages, what client and floor need.
const (
	headerSize     = 16
	readRequest    = headerSize + 16
	readReply      = readRequest + 4
	flagNoReply    = 1 << 4
	cmdVersion     = 1
	cmdDMAMap      = 2
	cmdRegionRead  = 9
	cmdRegionWrite = 10
)

// serveFloor answers with bytes of the right number, which is the least that a
// server can do: what it takes is the machine's, not the protocol's.
func serveFloor(_ context.Context, args []string) error {
	ln, err := listenRaw(args[0])
	if err != nil {
		return err
	}
	fmt.Println("ready")
	fd, _, err := unix.Accept(ln)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	buf := make([]byte, 64<<10)
	reply := make([]byte, readReply)
	for have := 0; ; {
		n, err := unix.Read(fd, buf[have:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return err
		}
		have += n
		at := 0
		for have-at >= headerSize {
			size := int(le.Uint32(buf[at+4:]))
			if size < headerSize || size > len(buf) {
				return fmt.Errorf("a message of %d bytes", size)
			}
			if have-at < size {
				break
			}
			if le.Uint32(buf[at+8:])&flagNoReply == 0 {
				if _, err := unix.Write(fd, reply); err != nil {
					return err
				}
			}
			at += size
		}
		have = copy(buf, buf[at:have])
	}
}

func listenRaw(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return 0, err
	}
	return fd, unix.Listen(fd, 1)
}

// plainDevice has memory for registers: what it takes is the server's.
type plainDevice struct {
	registers [ixgbevf.BARSize]byte
}

func (d *plainDevice) Info() vfiouser.Info {
	return vfiouser.Info{Regions: []vfiouser.Region{
		{Index: vfiouser.RegionBAR0, Size: ixgbevf.BARSize, Flags: vfiouser.RegionReadable | vfiouser.RegionWritable},
	}}
}

func (d *plainDevice) Connected()         {}
func (d *plainDevice) Disconnected(error) {}
func (d *plainDevice) Reset() error       { return nil }

func (d *plainDevice) RegionRead(_ uint32, off uint64, p []byte) error {
	copy(p, d.registers[off:])
	return nil
}

func (d *plainDevice) RegionWrite(_ uint32, off uint64, p []byte) error {
	copy(d.registers[off:], p)
	return nil
}

func (d *plainDevice) SetIRQs(vfiouser.IRQRequest) error { return syscall.ENOTSUP }
func (d *plainDevice) DMAMap(vfiouser.DMAMap) error      { return syscall.ENOTSUP }
func (d *plainDevice) DMAUnmap(vfiouser.DMAUnmap) error  { return syscall.ENOTSUP }

// serveBare is the product's vfio-user server without a VF behind it.
func serveBare(ctx context.Context, args []string) error {
	ctx, cancel := untilStdinEnds(ctx)
	defer cancel()
	s, err := vfiouser.Listen(args[0], &plainDevice{}, vfiouser.Options{})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return s.Serve(ctx)
}

// interfaceName and interfaceSlot are those of the one interface of the device
// process.
const (
	interfaceName = "net1"
	interfaceSlot = 5
)

// serveDevice is the product's device process, with a VF of the model.
func serveDevice(ctx context.Context, args []string) error {
	ctx, cancel := untilStdinEnds(ctx)
	defer cancel()
	process, err := device.New(device.Options{Dir: args[0], QEMUDir: args[0], Log: slog.Default()})
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- process.Run(ctx) }()
	// The other end of the wire stays open and silent.
	wire, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	end := os.NewFile(uintptr(wire[1]), "wire")
	defer end.Close()
	h := handoff.Handoff{
		Interface: interfaceName, Slot: interfaceSlot, Of: 1, VF: "0000:03:10.0", PF: "pf0", Family: ixgbevf.Name, DeviceID: "8086:10ed",
		Backend: handoff.BackendModel, MAC: guestMAC.String(), Epoch: 1, Role: handoff.RolePrimary,
	}
	// The process listens in a moment.
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := handoff.Send(ctx, filepath.Join(args[0], device.HandoffSocket), h, []*os.File{end})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("handing the VF over: %w", err)
		}
		select {
		case err := <-done:
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
	fmt.Println("ready")
	return <-done
}

// guestMAC is the VF's address.
var guestMAC = net.HardwareAddr{0x52, 0x54, 0, 0x10, 0xed, 1}
