package vfio

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVectors bounds a VF's MSI-X table (PCI Local Bus 3.0, section 6.8.2).
const maxVectors = 2048

// vectors connects MSI-X vectors to eventfds. The kernel takes the number of
// vectors from the first call that enables them, and older ones cannot add to
// it: all are enabled at once, and those that nobody listens to are parked on
// an eventfd of our own, which remembers that they fired.
type vectors struct {
	k   ioctler
	dev *os.File
	n   int

	mu      sync.Mutex
	enabled bool
	parked  []int // eventfds
}

// Vectors is the number of the VF's MSI-X vectors.
func (d *Device) Vectors() int { return d.vectors.n }

// Connect has the kernel signal the eventfd when the VF raises the vector, in
// place of what it was connected to; -1 disconnects it. The kernel has its own
// reference to the eventfd when Connect returns. What a vector raised while it
// was disconnected it raises when it is connected again.
func (d *Device) Connect(vector int, eventfd int) error { return d.vectors.connect(vector, eventfd) }

// DisconnectAll disconnects every vector and turns MSI-X off.
func (d *Device) DisconnectAll() error { return d.vectors.disconnectAll() }

func (v *vectors) connect(vector, eventfd int) error {
	if vector < 0 || vector >= v.n {
		return fmt.Errorf("MSI-X vector %d: the VF has %d", vector, v.n)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.enabled {
		if err := v.enable(); err != nil {
			return err
		}
	}
	if eventfd < 0 {
		return v.set(vector, v.parked[vector:vector+1])
	}
	if err := v.set(vector, []int{eventfd}); err != nil {
		return err
	}
	var fired [8]byte
	switch _, err := unix.Read(v.parked[vector], fired[:]); {
	case errors.Is(err, unix.EAGAIN):
		return nil
	case err != nil:
		return fmt.Errorf("MSI-X vector %d: %w", vector, err)
	}
	one := [8]byte{1} // native byte order, as everywhere here
	if _, err := unix.Write(eventfd, one[:]); err != nil && !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("MSI-X vector %d: its eventfd: %w", vector, err)
	}
	return nil
}

// enable parks every vector.
func (v *vectors) enable() error {
	for len(v.parked) < v.n {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return fmt.Errorf("eventfd: %w", err)
		}
		v.parked = append(v.parked, fd)
	}
	if err := v.set(0, v.parked); err != nil {
		return err
	}
	v.enabled = true
	return nil
}

// ConnectRequest has the kernel signal the eventfd when it wants the VF back:
// its driver is to be unbound, or the VF to be removed, and whoever asked for
// that waits until the VF is closed. The kernel signals once when that begins
// and again every 10 s, and has its own reference to the eventfd when
// ConnectRequest returns. A kernel without the interrupt is no error: it waits
// without telling.
func (d *Device) ConnectRequest(eventfd int) error {
	if d.irqs <= irqRequest {
		return nil
	}
	if err := d.vectors.connectEventfds(irqRequest, 0, []int{eventfd}); err != nil {
		return fmt.Errorf("request interrupt: %w", err)
	}
	return nil
}

func (v *vectors) set(start int, eventfds []int) error {
	return v.connectEventfds(irqMSIX, start, eventfds)
}

func (v *vectors) connectEventfds(index uint32, start int, eventfds []int) error {
	head := int(unsafe.Sizeof(irqSet{}) / 4)
	arg := make([]uint32, head+len(eventfds))
	*(*irqSet)(unsafe.Pointer(&arg[0])) = irqSet{argsz: uint32(4 * len(arg)), flags: setDataEvent | setTrigger,
		index: index, start: uint32(start), count: uint32(len(eventfds))}
	for i, fd := range eventfds {
		arg[head+i] = uint32(int32(fd))
	}
	if _, err := v.k.ioctl(v.dev, deviceSetIRQs, unsafe.Pointer(&arg[0])); err != nil {
		return fmt.Errorf("VFIO_DEVICE_SET_IRQS of index %d, %d to %d: %w", index, start, start+len(eventfds)-1, err)
	}
	return nil
}

func (v *vectors) disconnectAll() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.enabled {
		return nil
	}
	arg := irqSet{argsz: uint32(unsafe.Sizeof(irqSet{})), flags: setDataNone | setTrigger, index: irqMSIX}
	if _, err := v.k.ioctl(v.dev, deviceSetIRQs, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("VFIO_DEVICE_SET_IRQS, MSI-X off: %w", err)
	}
	v.enabled = false
	return nil
}

// close closes the eventfds; the kernel forgets the vectors with the device.
func (v *vectors) close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var errs []error
	for _, fd := range v.parked {
		errs = append(errs, unix.Close(fd))
	}
	v.parked, v.enabled = nil, false
	return errors.Join(errs...)
}
