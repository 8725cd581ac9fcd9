//go:build e2esriov

package tests

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/agent/vfio"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/driver"
)

// base is where VFs find a guest's memory: beyond 4 GiB, so that the upper
// halves of addresses matter.
const base = 5 << 32

// slow bounds what the VF and its PF may take.
const slow = 10 * time.Second

// ram is the memory of a guest. It implements compsc.Memory.
type ram []byte

func newRAM(t *testing.T) ram {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, driver.MemorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	})
	return mem
}

func (r ram) at(addr uint64, n int) ([]byte, error) {
	if addr < base || addr-base > uint64(len(r)-n) {
		return nil, fmt.Errorf("%d bytes at %#x are outside of the memory", n, addr)
	}
	return r[addr-base:][:n], nil
}

// ReadAt reads at an address as the device has it.
func (r ram) ReadAt(addr uint64, p []byte) error {
	mem, err := r.at(addr, len(p))
	copy(p, mem)
	return err
}

// WriteAt writes at an address as the device has it.
func (r ram) WriteAt(addr uint64, p []byte) error {
	mem, err := r.at(addr, len(p))
	copy(mem, p)
	return err
}

// slot is a VF in use through VFIO, with the engine in front of it. It is a
// driver.Bus.
type slot struct {
	*compsc.VF
	device *vfio.Device
	events []int // eventfds of the vectors
}

// plug takes a VF into use that reaches the guest's memory.
func plug(t *testing.T, vf card.VF, mem ram) *slot {
	t.Helper()
	return plugAs(t, vf, mem, igbvf.New())
}

// plugAs does so with the engine of a family.
func plugAs(t *testing.T, vf card.VF, mem ram, f family.Family) *slot {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("VF %s: %v", vf.Address, err)
		}
	}
	if name, err := vf.Driver(); err != nil || name == "" {
		must(errors.Join(err, vf.Bind()))
	}
	api, files, err := vf.Open()
	must(err)
	device, err := vfio.Use(api, files)
	must(err)
	t.Cleanup(func() { must(device.Close()) })
	must(device.Map(base, mem, true, true))
	scratch, err := device.NewScratch(4 * 68 << 10)
	must(err)
	s := &slot{device: device, VF: compsc.New(f, device, compsc.Options{
		VendorID: igbvf.VendorID, DeviceID: igbvf.DeviceID, Memory: mem, Scratch: scratch,
		// The PF's driver runs on an emulated processor.
		QueueTimeout: slow, MailboxTimeout: slow, ResetTimeout: slow})}
	for vector := range device.Vectors() {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		must(err)
		t.Cleanup(func() { must(unix.Close(fd)) })
		must(device.Connect(vector, fd))
		s.events = append(s.events, fd)
	}
	return s
}

// Read is a read of a register by the guest.
func (s *slot) Read(off uint32) uint32 { return s.GuestRead(off) }

// Write is a write to a register by the guest.
func (s *slot) Write(off, v uint32) { s.GuestWrite(off, v) }

// awaitFired waits until the vector has fired.
func (s *slot) awaitFired(vector int, patience time.Duration) error {
	if err := await(s.events[vector], patience); err != nil {
		return fmt.Errorf("vector %d did not fire: %w", vector, err)
	}
	return nil
}

// await waits until there is something to read.
func await(fd int, patience time.Duration) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for deadline := time.Now().Add(patience); ; {
		n, err := unix.Poll(fds, int(max(0, time.Until(deadline).Milliseconds())))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("nothing within %v", patience)
		default:
			return nil
		}
	}
}

// state is in words what the PF has set for a VF, and the VF's driver.
func state(t *testing.T, vf card.VF) string {
	t.Helper()
	driver, err := vf.Driver()
	if err != nil {
		t.Fatal(err)
	}
	link, err := vf.PF.Link()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("driver %q, %+v", driver, link.Attrs().Vfs[vf.Number])
}
