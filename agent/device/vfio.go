package device

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/vfio"
	"compsc.io/compsc/agent/vfiouser"
)

// scratchPerQueue is what each queue gets of the scratch memory, which is
// locked as long as the VF is in use: room for a ring of 4,096 descriptors,
// the most that Linux's drivers and DPDK's use, and 4 KiB.
const scratchPerQueue = 68 << 10

// kernelVF is a *vfio.Device; tests stand in for it.
type kernelVF interface {
	compsc.Backend
	BARSize() uint32
	BARFile() (*os.File, int64)
	Vectors() int
	ReadConfig(off int64, p []byte) error
	Map(iova uint64, mem []byte, readable, writable bool) error
	Unmap(iova, size uint64) error
	Connect(vector, eventfd int) error
	ConnectRequest(eventfd int) error
	DisconnectAll() error
	Reset() error
	HasDirtyBits() bool
	TrackDirty(on bool) error
	Dirty(iova, size uint64, page func(iova uint64)) error
	Close() error
}

// vfioVF is a VF that the kernel's vfio-pci drives.
type vfioVF struct {
	kernelVF
	scratch *vfio.Scratch
	irq     func(vector int)
	log     *slog.Logger

	mu sync.Mutex
	// guest has the eventfd of each vector that QEMU connected.
	guest []*vfiouser.Eventfd
	// own has an eventfd for each vector while interrupts come here first.
	own     []*os.File
	readers sync.WaitGroup
	// request is the eventfd by which the kernel asks for the VF.
	request *os.File
}

// openVFIO takes the VF into use, and counts its queues; it owns files. wanted is called, on a
// goroutine of its own, when the kernel wants the VF back.
func openVFIO(h handoff.Handoff, dt deviceType, files []*os.File, irq func(int), wanted func(), log *slog.Logger) (silicon, deviceType, error) {
	d, err := vfio.Use(vfio.API(h.VFIO.API), files)
	if err != nil {
		return nil, dt, err
	}
	v := newVFIO(d, irq, log)
	if err := v.check(dt); err != nil {
		v.Close()
		return nil, dt, err
	}
	if dt, err = dt.withQueues(v, log); err != nil {
		v.Close()
		return nil, dt, err
	}
	if v.scratch, err = d.NewScratch(len(dt.family.Queues()) * scratchPerQueue); err != nil {
		v.Close()
		return nil, dt, err
	}
	if err := v.listen(wanted); err != nil {
		v.Close()
		return nil, dt, err
	}
	return v, dt, nil
}

func newVFIO(k kernelVF, irq func(int), log *slog.Logger) *vfioVF {
	return &vfioVF{kernelVF: &revocable{vf: k}, irq: irq, log: log, guest: make([]*vfiouser.Eventfd, k.Vectors())}
}

// listen has wanted called whenever the kernel asks for the VF.
func (v *vfioVF) listen(wanted func()) error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	v.request = os.NewFile(uintptr(fd), "request")
	v.readers.Go(func() {
		var count [8]byte
		for {
			if _, err := v.request.Read(count[:]); err != nil {
				return
			}
			// Not awaited, for it may outlast the VF.
			go wanted()
		}
	})
	return descriptor(v.request, v.ConnectRequest)
}

// check compares the function with what its family has.
func (v *vfioVF) check(dt deviceType) error {
	var b [4]byte
	if err := v.ReadConfig(cfgVendor, b[:]); err != nil {
		return err
	}
	vendor, device := binary.LittleEndian.Uint16(b[:]), binary.LittleEndian.Uint16(b[2:])
	if vendor != dt.vendor || device != dt.device {
		return fmt.Errorf("the function is a %04x:%04x, and was handed over as a %04x:%04x", vendor, device, dt.vendor, dt.device)
	}
	if v.BARSize() < dt.family.BARSize() {
		return fmt.Errorf("BAR0 has %d bytes, a VF of family %s has %d", v.BARSize(), dt.family.Name(), dt.family.BARSize())
	}
	if want := dt.family.Interrupts().Vectors; v.Vectors() < want {
		return fmt.Errorf("the VF has %d MSI-X vectors, one of family %s has %d", v.Vectors(), dt.family.Name(), want)
	}
	return nil
}

// Scratch is memory at an address that the guest's RAM does not reach.
func (v *vfioVF) Scratch() compsc.Scratch { return v.scratch }

// FLR has the kernel reset the function.
func (v *vfioVF) FLR() {
	if err := v.Reset(); err != nil {
		v.log.Error("the VF was not reset", "error", err)
	}
}

// Announce cannot be done by a VF whose rings are the guest's.
func (v *vfioVF) Announce([]byte) error { return errPFAnnounces }

// Connect has the kernel signal QEMU's eventfd, with this process out of the
// way, unless interrupts are forwarded.
func (v *vfioVF) Connect(vector int, eventfd *vfiouser.Eventfd) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if vector < 0 || vector >= len(v.guest) {
		return fmt.Errorf("MSI-X vector %d: the VF has %d", vector, len(v.guest))
	}
	v.guest[vector] = eventfd
	return v.connect(vector)
}

// connect connects a vector to whom it is to reach.
func (v *vfioVF) connect(vector int) error {
	switch {
	case v.own != nil:
		return descriptor(v.own[vector], func(fd int) error { return v.kernelVF.Connect(vector, fd) })
	case v.guest[vector] != nil:
		return v.guest[vector].Descriptor(func(fd int) error { return v.kernelVF.Connect(vector, fd) })
	}
	return v.kernelVF.Connect(vector, -1)
}

// DisconnectAll turns MSI-X off.
func (v *vfioVF) DisconnectAll() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	clear(v.guest)
	return v.kernelVF.DisconnectAll()
}

// Forward puts this process between the VF and QEMU's eventfds, or takes it
// out again.
func (v *vfioVF) Forward(on bool) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if on == (v.own != nil) {
		return nil
	}
	old := v.own
	v.own = nil
	if on {
		own := make([]*os.File, 0, len(v.guest))
		for range v.guest {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			if err != nil {
				handoff.CloseAll(own)
				return fmt.Errorf("eventfd: %w", err)
			}
			own = append(own, os.NewFile(uintptr(fd), "vector"))
		}
		v.own = own
		for vector, f := range own {
			v.readers.Go(func() { v.forward(vector, f) })
		}
	}
	var errs []error
	for vector, e := range v.guest {
		if e != nil {
			errs = append(errs, v.connect(vector))
		}
	}
	handoff.CloseAll(old)
	return errors.Join(errs...)
}

// forward passes a vector on until its eventfd is closed.
func (v *vfioVF) forward(vector int, f *os.File) {
	var count [8]byte
	for {
		if _, err := f.Read(count[:]); err != nil {
			return
		}
		v.irq(vector)
	}
}

// descriptor calls do with the number of f's descriptor.
func descriptor(f *os.File, do func(fd int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var derr error
	return errors.Join(c.Control(func(fd uintptr) { derr = do(int(fd)) }), derr)
}

// TellsWrites tells whether the IOMMU has dirty bits.
func (v *vfioVF) TellsWrites() bool { return v.HasDirtyBits() }

// TrackWrites has the IOMMU set dirty bits.
func (v *vfioVF) TrackWrites(on bool) error {
	if !v.HasDirtyBits() {
		return nil
	}
	return v.TrackDirty(on)
}

// Writes reads the IOMMU's dirty bits.
func (v *vfioVF) Writes(addr, size uint64, page func(addr uint64)) error {
	if !v.HasDirtyBits() {
		return nil
	}
	return v.Dirty(addr, size, page)
}

// GiveUp gives the VF back to the kernel, which stops and resets it.
func (v *vfioVF) GiveUp() {
	var err error
	if v.scratch != nil {
		err = v.scratch.Close()
		v.scratch = nil
	}
	if err = errors.Join(err, v.kernelVF.Close()); err != nil {
		v.log.Error("the VF was not given back in order", "error", err)
	}
}

// Close does so too, unless that was done.
func (v *vfioVF) Close() {
	v.mu.Lock()
	handoff.CloseAll(v.own)
	v.own = nil
	v.mu.Unlock()
	if v.request != nil {
		v.request.Close()
	}
	v.readers.Wait()
	v.GiveUp()
}
