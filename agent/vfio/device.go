package vfio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Device is one VF in use. It owns its descriptors. Read, Write, Reset and
// the methods on memory and vectors are safe for concurrent use; Close is
// called last, and once.
type Device struct {
	k     ioctler
	files []*os.File // in the order in which they were opened
	dev   *os.File   // the last of files
	space addressSpace

	bar       []byte // nil when it cannot be mapped
	barSize   uint32
	barOffset int64 // of BAR0 in dev, for a BAR that is not mapped
	config    regionInfo
	canReset  bool
	irqs      uint32 // how many kinds of interrupts it has
	gone      atomic.Bool

	vectors vectors

	mu     sync.Mutex
	locked uint64 // bytes that are mapped for DMA
}

// allOnes is what a device that is gone reads.
const allOnes = ^uint32(0)

// Use takes the VF that the descriptors stand for into use; it owns the files,
// also on an error. The VF may reach memory by DMA from here on, but none is
// mapped, and its queues are as its last user left them: reset them first.
func Use(api API, files []*os.File) (*Device, error) {
	return use(kernel{}, api, files)
}

func use(k ioctler, api API, files []*os.File) (d *Device, err error) {
	d = &Device{k: k, files: files}
	defer func() {
		if err != nil {
			d.Close()
			d = nil
		}
	}()
	want := map[API]int{Group: 3, IOMMUFD: 2}[api]
	if want == 0 {
		return d, fmt.Errorf("VFIO interface %.32q is not known: want %s or %s", api, Group, IOMMUFD)
	}
	if len(files) != want {
		return d, fmt.Errorf("VFIO interface %s comes with %d descriptors, not %d", api, want, len(files))
	}
	d.dev = files[len(files)-1]
	if api == Group {
		d.space = &container{k: k, f: files[0]}
	} else if d.space, err = attach(k, files[0], d.dev); err != nil {
		return d, err
	}
	return d, d.setUp()
}

// setUp reads what the device has and makes its registers accessible.
func (d *Device) setUp() error {
	info := deviceInfo{argsz: uint32(unsafe.Sizeof(deviceInfo{}))}
	if _, err := d.k.ioctl(d.dev, deviceGetInfo, unsafe.Pointer(&info)); err != nil {
		return fmt.Errorf("VFIO_DEVICE_GET_INFO: %w", err)
	}
	if info.flags&deviceFlagPCI == 0 || info.numRegions <= regionConfig || info.numIRQs <= irqMSIX {
		return fmt.Errorf("the VFIO device is no PCI function (flags %#x, %d regions, %d interrupts): bind it to vfio-pci", info.flags, info.numRegions, info.numIRQs)
	}
	d.canReset, d.irqs = info.flags&deviceFlagReset != 0, info.numIRQs
	var err error
	if d.config, _, err = d.region(regionConfig); err != nil {
		return err
	}
	irq := irqInfo{argsz: uint32(unsafe.Sizeof(irqInfo{})), index: irqMSIX}
	if _, err := d.k.ioctl(d.dev, deviceIRQInfo, unsafe.Pointer(&irq)); err != nil {
		return fmt.Errorf("VFIO_DEVICE_GET_IRQ_INFO: %w", err)
	}
	if irq.flags&irqEventfd == 0 || irq.count == 0 || irq.count > maxVectors {
		return fmt.Errorf("the VF has %d MSI-X vectors (flags %#x), want 1 to %d that signal an eventfd", irq.count, irq.flags, maxVectors)
	}
	d.vectors = vectors{k: d.k, dev: d.dev, n: int(irq.count)}
	if err := d.mapBAR(); err != nil {
		return err
	}
	// Without them the VF neither answers nor reaches memory. Whether it does
	// is for its queues to say: none is enabled yet.
	var b [2]byte
	if err := d.ReadConfig(pciCommand, b[:]); err != nil {
		return err
	}
	binary.LittleEndian.PutUint16(b[:], binary.LittleEndian.Uint16(b[:])|commandMemory|commandMaster)
	return d.WriteConfig(pciCommand, b[:])
}

// Command register of a PCI function (PCI Local Bus 3.0, section 6.2.2).
const (
	pciCommand    = 4
	commandMemory = 1 << 1
	commandMaster = 1 << 2
)

// region reads what the kernel tells of a region; whole says that it can be
// mapped from begin to end.
func (d *Device) region(index uint32) (info regionInfo, whole bool, err error) {
	buf := make([]byte, 4096)
	head := (*regionInfo)(unsafe.Pointer(&buf[0]))
	head.argsz, head.index = uint32(len(buf)), index
	if _, err := d.k.ioctl(d.dev, deviceRegionInfo, unsafe.Pointer(head)); err != nil {
		return info, false, fmt.Errorf("VFIO_DEVICE_GET_REGION_INFO of region %d: %w", index, err)
	}
	info = *head
	if info.flags&(regionRead|regionWrite) != regionRead|regionWrite || info.size == 0 {
		return info, false, fmt.Errorf("region %d of the VF has %d bytes and flags %#x: want one to read and write", index, info.size, info.flags)
	}
	whole, err = wholeMappable(buf, info)
	return info, whole, err
}

// maxBAR bounds BAR0: the VFs of all families have 16 KiB.
const maxBAR = 1 << 20

func (d *Device) mapBAR() error {
	info, whole, err := d.region(regionBAR0)
	if err != nil {
		return err
	}
	if info.size%4 != 0 || info.size > maxBAR {
		return fmt.Errorf("BAR0 of the VF has %d bytes, want at most %d", info.size, maxBAR)
	}
	d.barSize, d.barOffset = uint32(info.size), int64(info.offset)
	if !whole {
		return nil
	}
	fd, err := descriptor(d.dev)
	if err != nil {
		return err
	}
	if d.bar, err = unix.Mmap(int(fd), d.barOffset, int(info.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("mapping BAR0: %w", err)
	}
	return nil
}

// BARSize is the size of BAR0 in bytes.
func (d *Device) BARSize() uint32 { return d.barSize }

// BARFile is the file by which BAR0 can be mapped, and where it begins in it; nil
// where the kernel does not let all of it be mapped. It stays the Device's, and
// stands for the whole device: whoever has its descriptor can also reset the VF,
// and reach all of its registers and its configuration space. The kernel takes
// the VF for in use as long as it is open or mapped anywhere.
func (d *Device) BARFile() (*os.File, int64) {
	if d.bar == nil {
		return nil, 0
	}
	return d.dev, d.barOffset
}

// Read reads the 32-bit register at off of BAR0, a multiple of 4. It returns
// all ones outside of the BAR and when the device is gone.
func (d *Device) Read(off uint32) uint32 {
	var v uint32
	if !d.access(off, func(p *uint32) { v = atomic.LoadUint32(p) }, func(f *os.File, at int64) error {
		var b [4]byte
		_, err := f.ReadAt(b[:], at)
		v = binary.LittleEndian.Uint32(b[:])
		return err
	}) {
		return allOnes
	}
	return v
}

// Write writes the 32-bit register at off of BAR0, a multiple of 4. Writes
// outside of the BAR and to a device that is gone are lost.
func (d *Device) Write(off, v uint32) {
	d.access(off, func(p *uint32) { atomic.StoreUint32(p, v) }, func(f *os.File, at int64) error {
		_, err := f.WriteAt(binary.LittleEndian.AppendUint32(nil, v), at)
		return err
	})
}

// access does one access, mapped or through the file. When the device goes,
// an access to the mapping faults.
func (d *Device) access(off uint32, mapped func(*uint32), through func(*os.File, int64) error) (ok bool) {
	if off%4 != 0 || off > d.barSize-4 || d.gone.Load() {
		return false
	}
	if d.bar == nil {
		if err := through(d.dev, d.barOffset+int64(off)); err != nil {
			d.gone.Store(true)
			return false
		}
		return true
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if _, fault := r.(interface{ Addr() uintptr }); !fault {
				panic(r)
			}
			d.gone.Store(true)
			ok = false
		}
	}()
	// The VFs' registers are little-endian, as is every machine with them
	// that CompSC is built for.
	mapped((*uint32)(unsafe.Pointer(&d.bar[off])))
	return true
}

// Gone tells whether an access has found that the device is no longer there.
func (d *Device) Gone() bool { return d.gone.Load() }

// ReadConfig fills p from the VF's configuration space as VFIO shows it.
func (d *Device) ReadConfig(off int64, p []byte) error {
	if err := d.checkConfig(off, p); err != nil {
		return err
	}
	if _, err := d.dev.ReadAt(p, int64(d.config.offset)+off); err != nil {
		return fmt.Errorf("reading %d bytes of configuration space at %#x: %w", len(p), off, err)
	}
	return nil
}

// WriteConfig writes p to the VF's configuration space; VFIO drops what would
// reach beyond the VF.
func (d *Device) WriteConfig(off int64, p []byte) error {
	if err := d.checkConfig(off, p); err != nil {
		return err
	}
	if _, err := d.dev.WriteAt(p, int64(d.config.offset)+off); err != nil {
		return fmt.Errorf("writing %d bytes of configuration space at %#x: %w", len(p), off, err)
	}
	return nil
}

func (d *Device) checkConfig(off int64, p []byte) error {
	if off < 0 || off > int64(d.config.size)-int64(len(p)) {
		return fmt.Errorf("%d bytes at %#x are outside of the configuration space of %d bytes", len(p), off, d.config.size)
	}
	return nil
}

// Reset is a function-level reset. It takes some 100 ms: the PCI Express
// specification gives the function that long. Vectors stay connected and
// memory stays mapped; registers are as the silicon leaves them.
func (d *Device) Reset() error {
	if !d.canReset {
		return errors.New("the kernel has no way to reset the VF: see reset_method in its directory in sysfs")
	}
	if _, err := d.k.ioctl(d.dev, deviceReset, nil); err != nil {
		return fmt.Errorf("VFIO_DEVICE_RESET: %w", err)
	}
	return nil
}

// Close ends the use of the VF: the kernel stops its DMA, resets it and unmaps
// all memory, and every descriptor is closed.
func (d *Device) Close() error {
	var errs []error
	if d.bar != nil {
		errs = append(errs, unix.Munmap(d.bar))
		d.bar = nil
	}
	d.gone.Store(true)
	errs = append(errs, d.vectors.close())
	// The device first: it holds on to its group, or its iommufd.
	for i := len(d.files) - 1; i >= 0; i-- {
		errs = append(errs, d.files[i].Close())
	}
	d.files = nil
	return errors.Join(errs...)
}
