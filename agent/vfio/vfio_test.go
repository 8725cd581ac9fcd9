package vfio

import (
	"errors"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestLayout compares requests and structures with what a C compiler makes of
// <linux/vfio.h> and <linux/iommufd.h>.
func TestLayout(t *testing.T) {
	got := map[string]uintptr{
		"VFIO_GET_API_VERSION": getAPIVersion, "VFIO_SET_IOMMU": setIOMMU, "VFIO_GROUP_GET_DEVICE_FD": groupGetDeviceFD,
		"VFIO_DEVICE_SET_IRQS": deviceSetIRQs, "VFIO_IOMMU_UNMAP_DMA": iommuUnmapDMA,
		"VFIO_DEVICE_BIND_IOMMUFD": deviceBindIOMMUFD, "VFIO_DEVICE_ATTACH_IOMMUFD_PT": deviceAttachIOMMUFDPT,
		"IOMMU_IOAS_ALLOC": ioasAlloc, "IOMMU_IOAS_IOVA_RANGES": ioasIOVARanges, "IOMMU_IOAS_MAP": ioasMap,
		"IOMMU_IOAS_UNMAP": ioasUnmap, "IOMMU_HWPT_ALLOC": hwptAlloc,
		"IOMMU_HWPT_SET_DIRTY_TRACKING": hwptSetDirty, "IOMMU_HWPT_GET_DIRTY_BITMAP": hwptGetDirty,
		"vfio_group_status": unsafe.Sizeof(groupStatus{}), "vfio_device_info": unsafe.Sizeof(deviceInfo{}),
		"vfio_region_info": unsafe.Sizeof(regionInfo{}), "vfio_region_info.offset": unsafe.Offsetof(regionInfo{}.offset),
		"vfio_irq_info": unsafe.Sizeof(irqInfo{}), "vfio_irq_set": unsafe.Sizeof(irqSet{}),
		"vfio_iommu_type1_info": unsafe.Sizeof(typeInfo{}), "vfio_iommu_type1_info.cap_offset": unsafe.Offsetof(typeInfo{}.capOffset),
		"vfio_iommu_type1_dma_map": unsafe.Sizeof(dmaMap{}), "vfio_iommu_type1_dma_unmap": unsafe.Sizeof(dmaUnmap{}),
		"vfio_device_bind_iommufd": unsafe.Sizeof(bindIOMMUFD{}), "vfio_device_attach_iommufd_pt": unsafe.Sizeof(attachPT{}),
		"iommu_ioas_alloc": unsafe.Sizeof(ioasAllocArg{}), "iommu_iova_range": unsafe.Sizeof(iovaRange{}),
		"iommu_ioas_iova_ranges": unsafe.Sizeof(iovaRangesArg{}), "iommu_ioas_iova_ranges.allowed_iovas": unsafe.Offsetof(iovaRangesArg{}.allowed),
		"iommu_ioas_map": unsafe.Sizeof(ioasMapArg{}), "iommu_ioas_map.user_va": unsafe.Offsetof(ioasMapArg{}.userVA),
		"iommu_ioas_unmap": unsafe.Sizeof(ioasUnmapArg{}), "iommu_hwpt_alloc": unsafe.Sizeof(hwptAllocArg{}),
		"iommu_hwpt_alloc.out_hwpt_id": unsafe.Offsetof(hwptAllocArg{}.outID), "iommu_hwpt_set_dirty_tracking": unsafe.Sizeof(setDirtyArg{}),
		"iommu_hwpt_get_dirty_bitmap": unsafe.Sizeof(getDirtyArg{}), "iommu_hwpt_get_dirty_bitmap.iova": unsafe.Offsetof(getDirtyArg{}.iova),
	}
	want := map[string]uintptr{
		"VFIO_GET_API_VERSION": 0x3b64, "VFIO_SET_IOMMU": 0x3b66, "VFIO_GROUP_GET_DEVICE_FD": 0x3b6a,
		"VFIO_DEVICE_SET_IRQS": 0x3b6e, "VFIO_IOMMU_UNMAP_DMA": 0x3b72,
		"VFIO_DEVICE_BIND_IOMMUFD": 0x3b76, "VFIO_DEVICE_ATTACH_IOMMUFD_PT": 0x3b77,
		"IOMMU_IOAS_ALLOC": 0x3b81, "IOMMU_IOAS_IOVA_RANGES": 0x3b84, "IOMMU_IOAS_MAP": 0x3b85,
		"IOMMU_IOAS_UNMAP": 0x3b86, "IOMMU_HWPT_ALLOC": 0x3b89,
		"IOMMU_HWPT_SET_DIRTY_TRACKING": 0x3b8b, "IOMMU_HWPT_GET_DIRTY_BITMAP": 0x3b8c,
		"vfio_group_status": 8, "vfio_device_info": 20,
		"vfio_region_info": 32, "vfio_region_info.offset": 24,
		"vfio_irq_info": 16, "vfio_irq_set": 20,
		"vfio_iommu_type1_info": 24, "vfio_iommu_type1_info.cap_offset": 16,
		"vfio_iommu_type1_dma_map": 32, "vfio_iommu_type1_dma_unmap": 24,
		"vfio_device_bind_iommufd": 16, "vfio_device_attach_iommufd_pt": 12,
		"iommu_ioas_alloc": 12, "iommu_iova_range": 16,
		"iommu_ioas_iova_ranges": 32, "iommu_ioas_iova_ranges.allowed_iovas": 16,
		"iommu_ioas_map": 40, "iommu_ioas_map.user_va": 16,
		"iommu_ioas_unmap": 24, "iommu_hwpt_alloc": 40,
		"iommu_hwpt_alloc.out_hwpt_id": 16, "iommu_hwpt_set_dirty_tracking": 16,
		"iommu_hwpt_get_dirty_bitmap": 48, "iommu_hwpt_get_dirty_bitmap.iova": 16,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("layout (-want +got):\n%s", diff)
	}
}

func isClosed(f *os.File) bool {
	_, err := f.Stat()
	return errors.Is(err, os.ErrClosed)
}

func open(t *testing.T, k *fakeKernel, api API, files []*os.File) *Device {
	t.Helper()
	d, err := use(k, api, files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		for _, f := range files {
			if !isClosed(f) {
				t.Errorf("%s is still open", f.Name())
			}
		}
	})
	return d
}

func TestOpenGroup(t *testing.T) {
	node := func(t *testing.T) string {
		f, err := os.CreateTemp(t.TempDir(), "node")
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		return f.Name()
	}
	t.Run("works", func(t *testing.T) {
		k := newFakeKernel(t)
		files, err := openGroup(k, node(t), node(t), "0000:01:10.0")
		if err != nil {
			t.Fatal(err)
		}
		open(t, k, Group, files)
	})
	for name, test := range map[string]struct {
		change func(*fakeKernel)
		want   string
	}{
		"not viable":   {func(k *fakeKernel) { k.notViable = true }, "each of its functions to vfio-pci"},
		"no IOMMU":     {func(k *fakeKernel) { k.fail[checkExtension] = unix.ENODEV }, "turn the IOMMU on"},
		"no remapping": {func(k *fakeKernel) { k.fail[setIOMMU] = unix.EPERM }, "interrupt remapping"},
		"not in group": {func(k *fakeKernel) { k.fail[groupGetDeviceFD] = unix.ENODEV }, "VFIO_GROUP_GET_DEVICE_FD"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKernel(t)
			test.change(k)
			files, err := openGroup(k, node(t), node(t), "0000:01:10.0")
			if err == nil || !strings.Contains(err.Error(), test.want) || files != nil {
				t.Errorf("files %v, error %v; want an error with %q and no files", files, err, test.want)
			}
		})
	}
	for _, address := range []string{"", "01:10.0", "0000:01:10.0/../x", "0000:01:20.0"} {
		if _, err := OpenGroup(1, address); err == nil || !strings.Contains(err.Error(), "want a PCI address") {
			t.Errorf("address %q: %v", address, err)
		}
	}
	for _, name := range []string{"", "vfio", "../vfio1", "vfio1/.."} {
		if _, err := OpenCdev(name); err == nil || !strings.Contains(err.Error(), "want a name") {
			t.Errorf("cdev %q: %v", name, err)
		}
	}
}

func TestUseRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		api    API
		files  func(*fakeKernel) []*os.File
		change func(*fakeKernel)
		want   string
	}{
		"unknown interface": {"none", (*fakeKernel).group, nil, "not known"},
		"too few files":     {Group, (*fakeKernel).iommufd, nil, "comes with 3 descriptors, not 2"},
		"no information":    {Group, (*fakeKernel).group, func(k *fakeKernel) { k.fail[deviceGetInfo] = unix.ENODEV }, "VFIO_DEVICE_GET_INFO"},
		"no vectors":        {Group, (*fakeKernel).group, func(k *fakeKernel) { k.vectors = 0 }, "0 MSI-X vectors"},
		"bound elsewhere":   {IOMMUFD, (*fakeKernel).iommufd, func(k *fakeKernel) { k.fail[deviceBindIOMMUFD] = unix.EINVAL }, "another process"},
		"no attachment":     {IOMMUFD, (*fakeKernel).iommufd, func(k *fakeKernel) { k.fail[deviceAttachIOMMUFDPT] = unix.EINVAL }, "ATTACH"},
		"bad sparse areas":  {Group, (*fakeKernel).group, func(k *fakeKernel) { k.sparse = []byte{1, 0, 1, 0, 255, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0} }, "areas"},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKernel(t)
			if test.change != nil {
				test.change(k)
			}
			files := test.files(k)
			_, err := use(k, test.api, files)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
			for _, f := range files {
				if !isClosed(f) {
					t.Errorf("%s is still open", f.Name())
				}
			}
		})
	}
}

func TestRegisters(t *testing.T) {
	for name, change := range map[string]func(*fakeKernel){
		"mapped":       func(*fakeKernel) {},
		"not mappable": func(k *fakeKernel) { k.noMmap = true },
		"partly mapped": func(k *fakeKernel) {
			k.sparse = append([]byte{1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 16)...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKernel(t)
			change(k)
			files := k.group()
			d := open(t, k, Group, files)
			if (d.bar != nil) != (name == "mapped") {
				t.Errorf("BAR0 is mapped: %v", d.bar != nil)
			}
			if d.BARSize() != fakeBAR || d.Vectors() != 3 {
				t.Errorf("BAR0 of %d bytes, %d vectors", d.BARSize(), d.Vectors())
			}
			d.Write(0x1018, 0x11223344)
			var b [4]byte
			if _, err := files[2].ReadAt(b[:], 0x1018); err != nil || b != [4]byte{0x44, 0x33, 0x22, 0x11} {
				t.Errorf("the device has % x (%v)", b, err)
			}
			if got := d.Read(0x1018); got != 0x11223344 {
				t.Errorf("read %#x", got)
			}
			for _, off := range []uint32{1, fakeBAR, fakeBAR - 3, 1<<32 - 4} {
				d.Write(off, 1)
				if got := d.Read(off); got != allOnes {
					t.Errorf("read %#x at %#x", got, off)
				}
			}
			if d.Gone() {
				t.Error("the device is gone")
			}
			if err := d.ReadConfig(pciCommand, b[:2]); err != nil || b[0] != 6 {
				t.Errorf("command register %#x (%v), want memory and bus master", b[0], err)
			}
			if d.ReadConfig(4095, b[:2]) == nil || d.WriteConfig(-1, b[:2]) == nil {
				t.Error("configuration space ends later than it does")
			}
			if err := d.Reset(); err != nil || k.resets != 1 {
				t.Errorf("%d resets (%v)", k.resets, err)
			}
		})
	}
}

// TestGone takes the memory away from under the mapping, as the kernel does
// with a VF that is removed.
func TestGone(t *testing.T) {
	for name, noMmap := range map[string]bool{"mapped": false, "not mappable": true} {
		t.Run(name, func(t *testing.T) {
			k := newFakeKernel(t)
			k.noMmap = noMmap
			files := k.group()
			d := open(t, k, Group, files)
			if got := d.Read(0); got != 0 {
				t.Fatalf("read %#x", got)
			}
			if err := files[2].Truncate(0); err != nil {
				t.Fatal(err)
			}
			if got := d.Read(0); got != allOnes || !d.Gone() {
				t.Errorf("read %#x, gone %v", got, d.Gone())
			}
			d.Write(0, 1)
		})
	}
}

func TestVectors(t *testing.T) {
	k := newFakeKernel(t)
	d := open(t, k, Group, k.group())
	eventfd := func() int {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		return fd
	}
	fired := func(fd int) bool {
		var b [8]byte
		_, err := unix.Read(fd, b[:])
		return err == nil
	}
	first, second := eventfd(), eventfd()
	if err := d.Connect(1, first); err != nil {
		t.Fatal(err)
	}
	if len(k.eventfds) != 3 || k.eventfds[1] != first {
		t.Fatalf("the kernel has vectors %v", k.eventfds)
	}
	k.raise(1)
	if !fired(first) {
		t.Error("vector 1 did not come through")
	}
	k.raise(2) // nobody listens yet
	if err := d.Connect(2, second); err != nil {
		t.Fatal(err)
	}
	if !fired(second) {
		t.Error("what vector 2 raised before it was connected is lost")
	}
	if err := d.Connect(2, -1); err != nil {
		t.Fatal(err)
	}
	k.raise(2)
	if fired(second) {
		t.Error("vector 2 is still connected")
	}
	if err := d.Connect(2, first); err != nil || !fired(first) {
		t.Errorf("vector 2 was lost while it was disconnected (%v)", err)
	}
	if err := d.Connect(1, first); err != nil || fired(first) {
		t.Errorf("vector 1 was raised by being connected (%v)", err)
	}
	if d.Connect(3, first) == nil || d.Connect(-1, first) == nil {
		t.Error("a vector was connected that the VF does not have")
	}
	if err := d.DisconnectAll(); err != nil || k.eventfds != nil {
		t.Errorf("MSI-X is still on (%v)", err)
	}
	if err := d.Connect(0, second); err != nil || k.eventfds[0] != second {
		t.Errorf("vector 0 is not connected again (%v)", err)
	}
}

func TestConnectRequest(t *testing.T) {
	k := newFakeKernel(t)
	d := open(t, k, Group, k.group())
	if err := d.ConnectRequest(77); err != nil || k.request != 77 {
		t.Errorf("the kernel signals eventfd %d (%v)", k.request, err)
	}
	k.fail[deviceSetIRQs] = unix.EINVAL
	if err := d.ConnectRequest(78); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a refusal of the kernel's: %v", err)
	}
	// A kernel that does not have it is not asked.
	k.irqs = 4
	if err := open(t, k, Group, k.group()).ConnectRequest(79); err != nil {
		t.Error(err)
	}
}
