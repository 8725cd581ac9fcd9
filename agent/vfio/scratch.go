package vfio

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Scratch is memory of this process that the VF reaches and the guest does
// not use, at an address outside of the guest's RAM. ReadAt and WriteAt are
// safe for concurrent use; aligned accesses of 4 and 8 bytes are single loads
// and stores, as the VF sees them.
type Scratch struct {
	d    *Device
	iova uint64
	mem  []byte
}

// NewScratch maps size bytes, a multiple of 4 KiB, at the highest address
// that the IOMMU allows. They are locked.
func (d *Device) NewScratch(size int) (*Scratch, error) {
	if size <= 0 || size%pageSize != 0 {
		return nil, fmt.Errorf("scratch memory of %d bytes: want a multiple of %d", size, pageSize)
	}
	ranges, err := d.Ranges()
	if err != nil {
		return nil, fmt.Errorf("scratch memory: %w", err)
	}
	iova, err := place(ranges, uint64(size))
	if err != nil {
		return nil, fmt.Errorf("scratch memory: %w", err)
	}
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("scratch memory: %w", err)
	}
	if err := d.Map(iova, mem, true, true); err != nil {
		unix.Munmap(mem)
		return nil, fmt.Errorf("scratch memory: %w", err)
	}
	return &Scratch{d, iova, mem}, nil
}

// Range is where the VF finds it, and its size in bytes.
func (s *Scratch) Range() (addr uint64, size int) { return s.iova, len(s.mem) }

// ReadAt fills p from the VF's address addr.
func (s *Scratch) ReadAt(addr uint64, p []byte) error {
	at, err := s.at(addr, p)
	if err != nil {
		return err
	}
	switch start := unsafe.Pointer(unsafe.SliceData(at)); {
	case len(p) == 8 && addr%8 == 0:
		binary.NativeEndian.PutUint64(p, atomic.LoadUint64((*uint64)(start)))
	case len(p) == 4 && addr%4 == 0:
		binary.NativeEndian.PutUint32(p, atomic.LoadUint32((*uint32)(start)))
	default:
		copy(p, at)
	}
	return nil
}

// WriteAt writes p at the VF's address addr.
func (s *Scratch) WriteAt(addr uint64, p []byte) error {
	at, err := s.at(addr, p)
	if err != nil {
		return err
	}
	switch start := unsafe.Pointer(unsafe.SliceData(at)); {
	case len(p) == 8 && addr%8 == 0:
		atomic.StoreUint64((*uint64)(start), binary.NativeEndian.Uint64(p))
	case len(p) == 4 && addr%4 == 0:
		atomic.StoreUint32((*uint32)(start), binary.NativeEndian.Uint32(p))
	default:
		copy(at, p)
	}
	return nil
}

// at returns the part of the memory that p stands for.
func (s *Scratch) at(addr uint64, p []byte) ([]byte, error) {
	n := uint64(len(p))
	if addr < s.iova || n > math.MaxUint64-addr || addr+n > s.iova+uint64(len(s.mem)) {
		return nil, fmt.Errorf("%d bytes at %#x are outside of the scratch memory, %d bytes at %#x", n, addr, len(s.mem), s.iova)
	}
	return s.mem[addr-s.iova:][:n], nil
}

// Close takes the memory back from the VF and frees it; it is called before
// the device's Close, and after the last access.
func (s *Scratch) Close() error {
	if err := s.d.Unmap(s.iova, uint64(len(s.mem))); err != nil {
		// The VF may still reach it: it stays until the process ends.
		return err
	}
	mem := s.mem
	s.mem = nil
	return unix.Munmap(mem)
}
