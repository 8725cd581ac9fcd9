package vfio

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fakeKernel answers ioctls as <linux/vfio.h> and <linux/iommufd.h> describe
// them, with one device whose BAR0 and configuration space are in a file.
type fakeKernel struct {
	t    *testing.T
	fail map[uint]error // per request

	notViable bool
	sparse    []byte // appended to the reply on BAR0, as its capabilities
	noMmap    bool
	vectors   uint32
	allowed   []iovaRange
	noDirty   bool
	irqs      uint32 // kinds of interrupts

	maps     map[uint64]uint64 // size by IOVA
	eventfds map[int]int       // by vector; nil: MSI-X is off
	request  int               // eventfd of the request interrupt
	resets   int
	attached uint32
	tracking bool
	dirty    map[uint64]bool
}

const (
	fakeConfigAt = 1 << 16
	fakeBAR      = 16 << 10
)

func newFakeKernel(t *testing.T) *fakeKernel {
	return &fakeKernel{t: t, vectors: 3, irqs: 5, fail: map[uint]error{}, maps: map[uint64]uint64{}, dirty: map[uint64]bool{},
		allowed: []iovaRange{{0x1000, 0xfedfffff}, {0xfef00000, 1<<39 - 1}}}
}

// file is a descriptor of the given name; a device's holds BAR0 and
// configuration space.
func (k *fakeKernel) file(name string) *os.File {
	f, err := os.Create(filepath.Join(k.t.TempDir(), name))
	if err != nil {
		k.t.Fatal(err)
	}
	if err := f.Truncate(fakeConfigAt + 4096); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { f.Close() })
	return f
}

func (k *fakeKernel) group() []*os.File {
	return []*os.File{k.file("container"), k.file("group"), k.file("device")}
}

func (k *fakeKernel) iommufd() []*os.File {
	return []*os.File{k.file("iommufd"), k.file("device")}
}

func (k *fakeKernel) ioctlValue(_ *os.File, request uint, arg uintptr) (int, error) {
	if err := k.fail[request]; err != nil {
		return -1, err
	}
	if arg != 3 {
		k.t.Errorf("request %#x with %d, want VFIO_TYPE1v2_IOMMU", request, arg)
	}
	return 1, nil
}

func (k *fakeKernel) ioctl(_ *os.File, request uint, arg unsafe.Pointer) (int, error) {
	if err := k.fail[request]; err != nil {
		return -1, err
	}
	switch request {
	case getAPIVersion:
		return 0, nil
	case groupGetStatus:
		if !k.notViable {
			(*groupStatus)(arg).flags = groupViable
		}
	case groupSetContainer:
	case groupGetDeviceFD:
		fd, err := unix.Dup(int(k.file("device").Fd()))
		return fd, err
	case deviceGetInfo:
		*(*deviceInfo)(arg) = deviceInfo{argsz: 20, flags: deviceFlagPCI | deviceFlagReset, numRegions: 9, numIRQs: k.irqs}
	case deviceRegionInfo:
		k.region((*regionInfo)(arg))
	case deviceIRQInfo:
		i := (*irqInfo)(arg)
		i.flags, i.count = irqEventfd, k.vectors
	case deviceSetIRQs:
		return 0, k.setIRQs(arg)
	case deviceReset:
		k.resets++
	case iommuGetInfo:
		k.typeInfo((*typeInfo)(arg))
	case iommuMapDMA:
		m := (*dmaMap)(arg)
		return 0, k.mapDMA(m.iova, m.size)
	case iommuUnmapDMA:
		u := (*dmaUnmap)(arg)
		if k.maps[u.iova] != u.size {
			u.size = 0
			return 0, nil
		}
		delete(k.maps, u.iova)
	case deviceBindIOMMUFD:
		(*bindIOMMUFD)(arg).outDevID = 7
	case ioasAlloc:
		(*ioasAllocArg)(arg).outID = 8
	case hwptAlloc:
		a := (*hwptAllocArg)(arg)
		if k.noDirty {
			return -1, unix.EOPNOTSUPP
		}
		if a.devID != 7 || a.ptID != 8 || a.flags != allocDirty {
			return -1, unix.EINVAL
		}
		a.outID = 9
	case deviceAttachIOMMUFDPT:
		k.attached = (*attachPT)(arg).ptID
	case ioasIOVARanges:
		a := (*iovaRangesArg)(arg)
		n := a.num
		a.num = uint32(len(k.allowed))
		if a.num > n {
			return -1, unix.EMSGSIZE
		}
		copy(unsafe.Slice((*iovaRange)(pointer(&a.allowed)), n), k.allowed)
	case ioasMap:
		m := (*ioasMapArg)(arg)
		if m.flags&mapFixedIOVA == 0 || m.ioasID != 8 {
			return -1, unix.EINVAL
		}
		return 0, k.mapDMA(m.iova, m.length)
	case ioasUnmap:
		u := (*ioasUnmapArg)(arg)
		if k.maps[u.iova] != u.length {
			return -1, unix.ENOENT
		}
		delete(k.maps, u.iova)
	case hwptSetDirty:
		k.tracking = (*setDirtyArg)(arg).flags == dirtyEnable
	case hwptGetDirty:
		a := (*getDirtyArg)(arg)
		words := unsafe.Slice((*uint64)(pointer(&a.data)), (a.length/a.pageSize+63)/64)
		for p := range k.dirty {
			if p >= a.iova && p < a.iova+a.length {
				bit := (p - a.iova) / a.pageSize
				words[bit/64] |= 1 << (bit % 64)
				delete(k.dirty, p)
			}
		}
	default:
		k.t.Errorf("unexpected request %#x", request)
		return -1, unix.ENOTTY
	}
	return 0, nil
}

func (k *fakeKernel) region(r *regionInfo) {
	r.flags, r.capOffset = regionRead|regionWrite|regionMmap, 0
	switch r.index {
	case regionBAR0:
		r.size, r.offset = fakeBAR, 0
		if k.noMmap {
			r.flags &^= regionMmap
		}
		if k.sparse != nil {
			r.flags |= regionCaps
			r.capOffset = uint32(unsafe.Sizeof(*r))
			copy(unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(r), r.capOffset)), len(k.sparse)), k.sparse)
		}
	case regionConfig:
		r.size, r.offset, r.flags = 4096, fakeConfigAt, regionRead|regionWrite
	}
}

func (k *fakeKernel) typeInfo(i *typeInfo) {
	need := uint32(24 + capabilityHeader + 8 + 16*len(k.allowed))
	have := i.argsz
	i.argsz, i.flags = need, iommuInfoCaps
	if have < need {
		return
	}
	i.capOffset = 24
	c := unsafe.Slice((*uint32)(unsafe.Add(unsafe.Pointer(i), 24)), 4)
	c[0], c[1], c[2] = 1<<16|capIOVARange, 0, uint32(len(k.allowed))
	copy(unsafe.Slice((*iovaRange)(unsafe.Add(unsafe.Pointer(i), 40)), len(k.allowed)), k.allowed)
}

func (k *fakeKernel) mapDMA(iova, size uint64) error {
	for at, n := range k.maps {
		if iova < at+n && at < iova+size {
			return unix.EEXIST
		}
	}
	if !slices.ContainsFunc(k.allowed, func(r iovaRange) bool { return iova >= r.start && iova+size-1 <= r.last }) {
		return unix.EINVAL
	}
	k.maps[iova] = size
	return nil
}

// setIRQs is as strict as kernels without dynamic MSI-X are: vectors can be
// added by the first call only.
func (k *fakeKernel) setIRQs(arg unsafe.Pointer) error {
	s := (*irqSet)(arg)
	switch {
	case s.index == irqRequest && s.flags == setDataEvent|setTrigger && s.argsz == uint32(unsafe.Sizeof(*s))+4 && s.start == 0 && s.count == 1:
		k.request = int(*(*int32)(unsafe.Add(arg, unsafe.Sizeof(*s))))
		return nil
	case s.index != irqMSIX || s.flags&setTrigger == 0:
		return unix.EINVAL
	case s.flags == setDataNone|setTrigger && s.count == 0:
		k.eventfds = nil
		return nil
	case s.flags != setDataEvent|setTrigger || s.argsz != uint32(unsafe.Sizeof(*s))+4*s.count || s.start+s.count > k.vectors:
		return unix.EINVAL
	case k.eventfds == nil && s.start != 0, k.eventfds != nil && int(s.start+s.count) > len(k.eventfds):
		return unix.EINVAL
	}
	if k.eventfds == nil {
		k.eventfds = map[int]int{}
	}
	for i, fd := range unsafe.Slice((*int32)(unsafe.Add(arg, unsafe.Sizeof(*s))), s.count) {
		k.eventfds[int(s.start)+i] = int(fd)
	}
	return nil
}

// raise is the device's interrupt.
func (k *fakeKernel) raise(vector int) {
	one := [8]byte{1}
	if _, err := unix.Write(k.eventfds[vector], one[:]); err != nil {
		k.t.Error(err)
	}
}

// pointer is the address that an argument tells the kernel.
func pointer(field *uint64) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(field)) }
