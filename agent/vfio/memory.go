package vfio

import (
	"errors"
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MemlockError says that the process may not lock as much memory as the VF is
// to reach.
type MemlockError struct {
	// Needed and Limit are in bytes. Needed is what this VF's mappings come to
	// with the one that failed.
	Needed, Limit uint64
	// PerUser says that the kernel counts what all processes of this one's user
	// lock by iommufd, and not this one's alone.
	PerUser bool
}

// Error names the amounts and says what to do.
func (e *MemlockError) Error() string {
	others := ""
	if e.PerUser {
		others = ", and what other processes of its user lock by iommufd counts too"
	}
	return fmt.Sprintf("memory that a VF reaches is locked, for each VF anew, and this process may lock %s: this VF needs %s%s; "+
		"raise its limit RLIMIT_MEMLOCK, or give it CAP_IPC_LOCK", amount(e.Limit), amount(e.Needed), others)
}

// amount is in MiB if these are whole, and else in KiB, so that no amount looks
// like a smaller one.
func amount(bytes uint64) string {
	if bytes != 0 && bytes%(1<<20) == 0 {
		return fmt.Sprintf("%d MiB", bytes>>20)
	}
	return fmt.Sprintf("%d KiB", bytes>>10)
}

// Unwrap is ENOMEM, what the kernel says.
func (e *MemlockError) Unwrap() error { return unix.ENOMEM }

// addressSpace is what the VF sees of memory.
type addressSpace interface {
	mapDMA(iova uint64, mem []byte, readable, writable bool) error
	unmapDMA(iova, size uint64) error
	ranges() ([]Range, error)
}

// Map lets the VF reach mem at iova, to read and to write as given. Address
// and length are multiples of 4 KiB, and mem is memory that was mapped with
// mmap, not Go's own; it must stay mapped until Unmap. Its pages are locked.
// The error is, or wraps, a *[MemlockError] if that is more than the process
// may lock, EEXIST where something is mapped already, and EINVAL for an
// address that the IOMMU does not allow.
func (d *Device) Map(iova uint64, mem []byte, readable, writable bool) error {
	size := uint64(len(mem))
	what := func(err error) error {
		return fmt.Errorf("mapping %#x bytes at IOVA %#x for DMA: %w", size, iova, err)
	}
	if size == 0 || size > math.MaxUint64-iova || (iova|size|uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))))%pageSize != 0 || !readable && !writable {
		return what(fmt.Errorf("address, length and memory must be of whole pages of %d bytes, to read or to write: %w", pageSize, unix.EINVAL))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.space.mapDMA(iova, mem, readable, writable)
	if errors.Is(err, unix.ENOMEM) {
		_, perUser := d.space.(*ioas)
		err = memlock(d.locked+size, perUser, err)
	}
	if err != nil {
		return what(err)
	}
	d.locked += size
	return nil
}

// memlock tells whether ENOMEM is about the limit on locked memory.
func memlock(needed uint64, perUser bool, err error) error {
	var l unix.Rlimit
	if rerr := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); rerr != nil || l.Cur == unix.RLIM_INFINITY {
		return err
	}
	return &MemlockError{Needed: needed, Limit: l.Cur, PerUser: perUser}
}

// Unmap takes back what one Map gave. On return the VF reaches none of it.
func (d *Device) Unmap(iova, size uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.space.unmapDMA(iova, size); err != nil {
		return fmt.Errorf("unmapping %#x bytes at IOVA %#x: %w", size, iova, err)
	}
	d.locked -= min(size, d.locked)
	return nil
}

// Ranges are the IO virtual addresses that can be mapped, in ascending order.
// An old kernel that does not tell them is taken to allow 39 bits.
func (d *Device) Ranges() ([]Range, error) {
	r, err := d.space.ranges()
	if err == nil && len(r) == 0 {
		r = []Range{{0, 0xfedfffff}, {0xfef00000, 1<<39 - 1}}
	}
	return r, err
}

// container is the address space of a VFIO container with a type 1 IOMMU.
type container struct {
	k ioctler
	f *os.File
}

func (c *container) mapDMA(iova uint64, mem []byte, readable, writable bool) error {
	arg := dmaMap{argsz: uint32(unsafe.Sizeof(dmaMap{})), vaddr: address(mem), iova: iova, size: uint64(len(mem))}
	if readable {
		arg.flags |= dmaRead
	}
	if writable {
		arg.flags |= dmaWrite
	}
	_, err := c.k.ioctl(c.f, iommuMapDMA, unsafe.Pointer(&arg))
	return err
}

func (c *container) unmapDMA(iova, size uint64) error {
	arg := dmaUnmap{argsz: uint32(unsafe.Sizeof(dmaUnmap{})), iova: iova, size: size}
	if _, err := c.k.ioctl(c.f, iommuUnmapDMA, unsafe.Pointer(&arg)); err != nil {
		return err
	}
	if arg.size != size {
		return fmt.Errorf("%#x bytes were mapped there", arg.size)
	}
	return nil
}

// maxInfo bounds what VFIO_IOMMU_GET_INFO may want to return.
const maxInfo = 1 << 20

func (c *container) ranges() ([]Range, error) {
	for size := 4096; size <= maxInfo; {
		buf := make([]byte, size)
		info := (*typeInfo)(unsafe.Pointer(&buf[0]))
		info.argsz = uint32(size)
		if _, err := c.k.ioctl(c.f, iommuGetInfo, unsafe.Pointer(info)); err != nil {
			return nil, fmt.Errorf("VFIO_IOMMU_GET_INFO: %w", err)
		}
		if int64(info.argsz) > int64(size) {
			size = int(min(info.argsz, maxInfo+1))
			continue
		}
		if info.flags&iommuInfoCaps == 0 {
			return nil, nil
		}
		return parseIOVARanges(buf, info.capOffset)
	}
	return nil, fmt.Errorf("VFIO_IOMMU_GET_INFO wants more than %d bytes", maxInfo)
}

// address is where mem is, as the kernel is told.
func address(mem []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))) }
