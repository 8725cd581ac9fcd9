package vfio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Range is an interval of IO virtual addresses; Last is in it.
type Range struct{ Start, Last uint64 }

// errCaps is what parsers return for a capability chain that is none.
var errCaps = errors.New("the kernel's chain of capabilities is damaged")

// capabilityHeader is the size of struct vfio_info_cap_header: id and version,
// 16 bits each, and the offset of the next.
const capabilityHeader = 8

// capability returns what stands from the header of the capability with this
// id on, in the reply b of a VFIO_*_INFO whose chain begins at off; nil when
// there is none.
func capability(b []byte, off uint32, id uint16) ([]byte, error) {
	le := binary.NativeEndian
	for last := uint32(0); off != 0; {
		// Offsets ascend in what the kernel builds; asking for that bounds the
		// walk.
		if off <= last || int64(off)+capabilityHeader > int64(len(b)) {
			return nil, errCaps
		}
		last = off
		if le.Uint16(b[off:]) == id {
			return b[off:], nil
		}
		off = le.Uint32(b[off+4:])
	}
	return nil, nil
}

// parseIOVARanges reads struct vfio_iommu_type1_info_cap_iova_range out of a
// reply to VFIO_IOMMU_GET_INFO. It returns nil when the kernel tells none.
func parseIOVARanges(b []byte, capOffset uint32) ([]Range, error) {
	c, err := capability(b, capOffset, capIOVARange)
	if err != nil || c == nil {
		return nil, err
	}
	le := binary.NativeEndian
	if len(c) < capabilityHeader+8 {
		return nil, errCaps
	}
	n := le.Uint32(c[capabilityHeader:])
	c = c[capabilityHeader+8:]
	if uint64(n)*16 > uint64(len(c)) {
		return nil, fmt.Errorf("%w: %d IOVA ranges in %d bytes", errCaps, n, len(c))
	}
	out := make([]Range, 0, n)
	for i := range int(n) {
		out = append(out, Range{le.Uint64(c[16*i:]), le.Uint64(c[16*i+8:])})
	}
	return out, checkRanges(out)
}

// checkRanges refuses ranges that are no intervals, and sorts them.
func checkRanges(ranges []Range) error {
	slices.SortFunc(ranges, func(a, b Range) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	for i, r := range ranges {
		if r.Last < r.Start || i > 0 && r.Start <= ranges[i-1].Last {
			return fmt.Errorf("the kernel's IOVA range %#x-%#x is none, or overlaps another", r.Start, r.Last)
		}
	}
	return nil
}

// wholeMappable tells whether a region can be mapped from its begin to its
// end, from a reply to VFIO_DEVICE_GET_REGION_INFO.
func wholeMappable(b []byte, info regionInfo) (bool, error) {
	if info.flags&regionMmap == 0 {
		return false, nil
	}
	if info.flags&regionCaps == 0 {
		return true, nil
	}
	c, err := capability(b, info.capOffset, capSparse)
	if err != nil || c == nil {
		return err == nil, err
	}
	le := binary.NativeEndian
	if len(c) < capabilityHeader+8 {
		return false, errCaps
	}
	n := le.Uint32(c[capabilityHeader:])
	c = c[capabilityHeader+8:]
	if uint64(n)*16 > uint64(len(c)) {
		return false, fmt.Errorf("%w: %d areas in %d bytes", errCaps, n, len(c))
	}
	return n == 1 && le.Uint64(c) == 0 && le.Uint64(c[8:]) == info.size, nil
}

// Where scratch memory is put at the highest: beyond, address widths differ
// between IOMMUs more than they say.
const scratchCeiling = 1<<48 - 1

// place returns the highest aligned address, multiple of pageSize, of size
// bytes inside the ranges: guest RAM grows from below.
func place(ranges []Range, size uint64) (uint64, error) {
	for _, r := range slices.Backward(ranges) {
		last := min(r.Last, scratchCeiling)
		if last < r.Start || last-r.Start < size-1 {
			continue
		}
		at := (last - (size - 1)) &^ (pageSize - 1)
		if at >= r.Start && at != 0 {
			return at, nil
		}
	}
	return 0, fmt.Errorf("no room for %d bytes in the IOVA ranges %#x that the IOMMU allows", size, ranges)
}

// pageSize is the granularity of what is mapped for DMA, and of dirty bits.
const pageSize = 4096
