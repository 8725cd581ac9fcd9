package vfio

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioas is the address space of an iommufd.
type ioas struct {
	k  ioctler
	f  *os.File
	id uint32
	// table is the page table with dirty bits, 0 when the IOMMU has none: the
	// kernel then makes one of its own.
	table uint32
}

// bind binds the device to the iommufd, in which it gets a number.
func bind(k ioctler, iommufd, dev *os.File) (uint32, error) {
	fd, err := descriptor(iommufd)
	if err != nil {
		return 0, err
	}
	arg := bindIOMMUFD{argsz: uint32(unsafe.Sizeof(bindIOMMUFD{})), iommufd: fd}
	if _, err := k.ioctl(dev, deviceBindIOMMUFD, unsafe.Pointer(&arg)); err != nil {
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w: %w", ErrBusy, err)
		}
		return 0, fmt.Errorf("VFIO_DEVICE_BIND_IOMMUFD: %w", err)
	}
	return arg.outDevID, nil
}

// attach binds the device to the iommufd and gives it an address space, with
// dirty bits where the IOMMU has them.
func attach(k ioctler, iommufd, dev *os.File) (*ioas, error) {
	devID, err := bind(k, iommufd, dev)
	if err != nil {
		return nil, err
	}
	alloc := ioasAllocArg{size: uint32(unsafe.Sizeof(ioasAllocArg{}))}
	if _, err := k.ioctl(iommufd, ioasAlloc, unsafe.Pointer(&alloc)); err != nil {
		return nil, fmt.Errorf("IOMMU_IOAS_ALLOC: %w", err)
	}
	s := &ioas{k: k, f: iommufd, id: alloc.outID}
	hwpt := hwptAllocArg{size: uint32(unsafe.Sizeof(hwptAllocArg{})), flags: allocDirty, devID: devID, ptID: s.id}
	_, err = k.ioctl(iommufd, hwptAlloc, unsafe.Pointer(&hwpt))
	switch {
	case err == nil:
		s.table = hwpt.outID
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY):
		// No dirty bits in the IOMMU, or none in the kernel (before Linux 6.7).
	default:
		return nil, fmt.Errorf("IOMMU_HWPT_ALLOC: %w", err)
	}
	pt := attachPT{argsz: uint32(unsafe.Sizeof(attachPT{})), ptID: s.id}
	if s.table != 0 {
		pt.ptID = s.table
	}
	if _, err := k.ioctl(dev, deviceAttachIOMMUFDPT, unsafe.Pointer(&pt)); err != nil {
		return nil, fmt.Errorf("VFIO_DEVICE_ATTACH_IOMMUFD_PT: %w", err)
	}
	return s, nil
}

func (s *ioas) mapDMA(iova uint64, mem []byte, readable, writable bool) error {
	arg := ioasMapArg{size: uint32(unsafe.Sizeof(ioasMapArg{})), flags: mapFixedIOVA, ioasID: s.id,
		userVA: address(mem), length: uint64(len(mem)), iova: iova}
	if readable {
		arg.flags |= mapReadable
	}
	if writable {
		arg.flags |= mapWriteable
	}
	_, err := s.k.ioctl(s.f, ioasMap, unsafe.Pointer(&arg))
	return err
}

func (s *ioas) unmapDMA(iova, size uint64) error {
	arg := ioasUnmapArg{size: uint32(unsafe.Sizeof(ioasUnmapArg{})), ioasID: s.id, iova: iova, length: size}
	_, err := s.k.ioctl(s.f, ioasUnmap, unsafe.Pointer(&arg))
	return err
}

// maxRanges bounds how many IOVA ranges there may be.
const maxRanges = 4096

func (s *ioas) ranges() ([]Range, error) {
	for n := uint32(64); n <= maxRanges; {
		list := make([]iovaRange, n)
		var pin runtime.Pinner // the kernel is told an address
		pin.Pin(&list[0])
		arg := iovaRangesArg{size: uint32(unsafe.Sizeof(iovaRangesArg{})), ioasID: s.id, num: n,
			allowed: uint64(uintptr(unsafe.Pointer(&list[0])))}
		_, err := s.k.ioctl(s.f, ioasIOVARanges, unsafe.Pointer(&arg))
		pin.Unpin()
		if errors.Is(err, unix.EMSGSIZE) && arg.num > n {
			n = arg.num
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("IOMMU_IOAS_IOVA_RANGES: %w", err)
		}
		if arg.num > n {
			return nil, fmt.Errorf("IOMMU_IOAS_IOVA_RANGES returned %d ranges in a list of %d", arg.num, n)
		}
		out := make([]Range, 0, arg.num)
		for _, r := range list[:arg.num] {
			out = append(out, Range{r.start, r.last})
		}
		return out, checkRanges(out)
	}
	return nil, fmt.Errorf("IOMMU_IOAS_IOVA_RANGES wants more than %d ranges", maxRanges)
}

// HasDirtyBits tells whether the IOMMU records which pages the VF writes.
func (d *Device) HasDirtyBits() bool {
	s, ok := d.space.(*ioas)
	return ok && s.table != 0
}

// TrackDirty begins to record which pages the VF writes, or ends it. It fails
// unless HasDirtyBits.
func (d *Device) TrackDirty(on bool) error {
	s, ok := d.space.(*ioas)
	if !ok || s.table == 0 {
		return fmt.Errorf("the IOMMU has no dirty bits: %w", unix.EOPNOTSUPP)
	}
	arg := setDirtyArg{size: uint32(unsafe.Sizeof(setDirtyArg{})), hwptID: s.table}
	if on {
		arg.flags = dirtyEnable
	}
	if _, err := s.k.ioctl(s.f, hwptSetDirty, unsafe.Pointer(&arg)); err != nil {
		return fmt.Errorf("IOMMU_HWPT_SET_DIRTY_TRACKING: %w", err)
	}
	return nil
}

// dirtyChunk is how much memory one call reads the dirty bits of, in bytes.
const dirtyChunk = 1 << 30

// Dirty calls page with the address of each page of 4 KiB in
// [iova, iova+size), a range that is mapped, that the VF wrote since the last
// call, and clears its bit. TrackDirty is on.
func (d *Device) Dirty(iova, size uint64, page func(iova uint64)) error {
	s, ok := d.space.(*ioas)
	if !ok || s.table == 0 {
		return fmt.Errorf("the IOMMU has no dirty bits: %w", unix.EOPNOTSUPP)
	}
	if size == 0 || size%pageSize != 0 || size > math.MaxUint64-iova {
		return fmt.Errorf("dirty bits of %#x bytes at %#x: want whole pages: %w", size, iova, unix.EINVAL)
	}
	words := make([]uint64, (min(size, dirtyChunk)/pageSize+63)/64)
	var pin runtime.Pinner // the kernel is told an address
	pin.Pin(&words[0])
	defer pin.Unpin()
	for end := iova + size; iova < end; {
		n := min(end-iova, dirtyChunk)
		clear(words)
		arg := getDirtyArg{size: uint32(unsafe.Sizeof(getDirtyArg{})), hwptID: s.table, iova: iova, length: n,
			pageSize: pageSize, data: uint64(uintptr(unsafe.Pointer(&words[0])))}
		if _, err := s.k.ioctl(s.f, hwptGetDirty, unsafe.Pointer(&arg)); err != nil {
			return fmt.Errorf("IOMMU_HWPT_GET_DIRTY_BITMAP of %#x bytes at %#x: %w", n, iova, err)
		}
		for i, w := range words {
			for ; w != 0; w &= w - 1 {
				if at := uint64(i*64+bits.TrailingZeros64(w)) * pageSize; at < n {
					page(iova + at)
				}
			}
		}
		iova += n
	}
	return nil
}
