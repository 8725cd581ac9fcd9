package vfio

import (
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func pages(t *testing.T, n int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, n*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

// bothAPIs runs a test on each of the kernel's interfaces.
func bothAPIs(t *testing.T, test func(t *testing.T, k *fakeKernel, d *Device)) {
	for api, files := range map[API]func(*fakeKernel) []*os.File{Group: (*fakeKernel).group, IOMMUFD: (*fakeKernel).iommufd} {
		t.Run(string(api), func(t *testing.T) {
			k := newFakeKernel(t)
			test(t, k, open(t, k, api, files(k)))
		})
	}
}

func TestMap(t *testing.T) {
	bothAPIs(t, func(t *testing.T, k *fakeKernel, d *Device) {
		mem := pages(t, 4)
		if err := d.Map(0x100000, mem, true, true); err != nil {
			t.Fatal(err)
		}
		if err := d.Map(0x102000, mem, true, true); !errors.Is(err, unix.EEXIST) {
			t.Errorf("mapped over what is mapped: %v", err)
		}
		if err := d.Map(0xfee00000, mem, true, true); !errors.Is(err, unix.EINVAL) {
			t.Errorf("mapped over the MSI window: %v", err)
		}
		for _, bad := range []func() error{
			func() error { return d.Map(0x200800, mem, true, true) },
			func() error { return d.Map(0x200000, mem[:100], true, true) },
			func() error { return d.Map(0x200000, mem[8:pageSize+8], true, true) },
			func() error { return d.Map(0x200000, nil, true, true) },
			func() error { return d.Map(0x200000, mem, false, false) },
			func() error { return d.Map(1<<64-pageSize, mem, true, true) },
		} {
			if err := bad(); !errors.Is(err, unix.EINVAL) {
				t.Errorf("a mapping that is none: %v", err)
			}
		}
		if err := d.Unmap(0x100000, 2*pageSize); err == nil {
			t.Error("half of a mapping was unmapped")
		}
		if err := d.Unmap(0x100000, 4*pageSize); err != nil {
			t.Fatal(err)
		}
		if len(k.maps) != 0 || d.locked != 0 {
			t.Errorf("left over: %v, %d bytes", k.maps, d.locked)
		}
	})
}

func TestMemlockIsNamed(t *testing.T) {
	bothAPIs(t, func(t *testing.T, k *fakeKernel, d *Device) {
		var old unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 8 << 20, Max: old.Max}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old) })
		mem := pages(t, 256)
		if err := d.Map(0, mem, true, false); !errors.Is(err, unix.EINVAL) {
			t.Fatalf("page 0 is not allowed here: %v", err)
		}
		if err := d.Map(0x100000, mem, true, true); err != nil {
			t.Fatal(err)
		}
		k.fail[iommuMapDMA], k.fail[ioasMap] = unix.ENOMEM, unix.ENOMEM
		err := d.Map(0x1000000, mem, true, true)
		_, perUser := d.space.(*ioas)
		var lock *MemlockError
		if !errors.As(err, &lock) || *lock != (MemlockError{Needed: 2 << 20, Limit: 8 << 20, PerUser: perUser}) || !errors.Is(err, unix.ENOMEM) {
			t.Errorf("error %v", err)
		}
		if want := "may lock 8 MiB: this VF needs 2 MiB"; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %q, want %q in it", err, want)
		}
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: old.Max}); err != nil {
			t.Fatal(err)
		}
		_, err = d.NewScratch(pageSize)
		if want := "may lock 64 KiB: this VF needs 1028 KiB"; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %q, want %q in it", err, want)
		}
		if err != nil && strings.Contains(err.Error(), "RAM") {
			t.Errorf("error %q is about scratch memory, which is not the guest's", err)
		}
	})
}

func TestScratch(t *testing.T) {
	bothAPIs(t, func(t *testing.T, k *fakeKernel, d *Device) {
		s, err := d.NewScratch(3 * pageSize)
		if err != nil {
			t.Fatal(err)
		}
		addr, size := s.Range()
		if addr != 1<<39-3*pageSize || size != 3*pageSize || k.maps[addr] != 3*pageSize {
			t.Fatalf("scratch memory of %d bytes at %#x, mapped %v", size, addr, k.maps)
		}
		for _, n := range []int{1, 4, 8, 100} {
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(i + 1)
			}
			at := addr + uint64(size) - uint64((n+7)/8*8)
			got := make([]byte, n)
			if err := errors.Join(s.WriteAt(at, p), s.ReadAt(at, got)); err != nil || !slices.Equal(got, p) {
				t.Errorf("%d bytes: % x (%v)", n, got, err)
			}
		}
		for _, at := range []uint64{addr - 1, addr + uint64(size) - 3, 1<<64 - 2, 0} {
			if s.ReadAt(at, make([]byte, 4)) == nil || s.WriteAt(at, make([]byte, 4)) == nil {
				t.Errorf("4 bytes at %#x were reached", at)
			}
		}
		if err := s.Close(); err != nil || len(k.maps) != 0 {
			t.Errorf("left over: %v (%v)", k.maps, err)
		}
		if _, err := d.NewScratch(100); err == nil {
			t.Error("scratch memory of 100 bytes")
		}
		k.allowed = []iovaRange{{0, pageSize - 1}}
		if _, err := d.NewScratch(pageSize); err == nil {
			t.Error("scratch memory at address 0")
		}
	})
}

func TestRangesGrow(t *testing.T) {
	bothAPIs(t, func(t *testing.T, k *fakeKernel, d *Device) {
		k.allowed = nil
		var want []Range
		for i := range uint64(500) {
			k.allowed = append(k.allowed, iovaRange{i << 20, i<<20 + 0xfffff>>1})
			want = append(want, Range{i << 20, i<<20 + 0xfffff>>1})
		}
		got, err := d.Ranges()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("ranges (-want +got):\n%s", diff)
		}
	})
}

func TestDirty(t *testing.T) {
	k := newFakeKernel(t)
	d := open(t, k, IOMMUFD, k.iommufd())
	if !d.HasDirtyBits() || k.attached != 9 {
		t.Fatalf("dirty bits: %v, attached to %d", d.HasDirtyBits(), k.attached)
	}
	if err := d.TrackDirty(true); err != nil || !k.tracking {
		t.Fatalf("not tracking (%v)", err)
	}
	want := []uint64{0x100000, 0x13f000, 0x140000, 0x100000 + dirtyChunk, 0x100000 + dirtyChunk + 65*pageSize}
	for _, p := range append(slices.Clone(want), 0xff000, 0x100000+dirtyChunk+66*pageSize) {
		k.dirty[p] = true
	}
	var got []uint64
	for range 2 {
		if err := d.Dirty(0x100000, dirtyChunk+66*pageSize, func(p uint64) { got = append(got, p) }); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("dirty pages (-want +got):\n%s", diff)
	}
	if err := d.Dirty(0, 100, func(uint64) {}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("dirty bits of a part of a page: %v", err)
	}
	if err := d.TrackDirty(false); err != nil || k.tracking {
		t.Errorf("still tracking (%v)", err)
	}
}

func TestNoDirtyBits(t *testing.T) {
	k := newFakeKernel(t)
	k.noDirty = true
	d := open(t, k, IOMMUFD, k.iommufd())
	g := open(t, k, Group, k.group())
	if k.attached != 8 {
		t.Errorf("attached to %d, want the IOAS", k.attached)
	}
	for _, d := range []*Device{d, g} {
		if d.HasDirtyBits() || !errors.Is(d.TrackDirty(true), unix.EOPNOTSUPP) || !errors.Is(d.Dirty(0, pageSize, nil), unix.EOPNOTSUPP) {
			t.Error("dirty bits that are none")
		}
	}
}

func FuzzIOVARanges(f *testing.F) {
	le := binary.NativeEndian
	header := func(id uint16, next uint32) []byte {
		return le.AppendUint32(le.AppendUint16(le.AppendUint16(nil, id), 1), next)
	}
	good := append(make([]byte, 24), header(3, 36)...)
	good = le.AppendUint32(good, 0)
	good = append(good, header(capIOVARange, 0)...)
	good = le.AppendUint64(good, 1)
	good = le.AppendUint64(le.AppendUint64(good, 0x1000), 0xffff)
	if got, err := parseIOVARanges(good, 24); err != nil || !slices.Equal(got, []Range{{0x1000, 0xffff}}) {
		f.Fatalf("ranges %v (%v)", got, err)
	}
	f.Add(good, uint32(24))
	f.Add(good, uint32(1<<31))
	f.Add(append(make([]byte, 24), header(3, 24)...), uint32(24)) // a loop
	f.Fuzz(func(t *testing.T, b []byte, off uint32) {
		ranges, err := parseIOVARanges(b, off)
		if err == nil {
			if at, err := place(ranges, 8*pageSize); err == nil &&
				!slices.ContainsFunc(ranges, func(r Range) bool { return at >= r.Start && at+8*pageSize-1 <= r.Last }) {
				t.Errorf("%#x is not in %v", at, ranges)
			}
		}
		if _, err := wholeMappable(b, regionInfo{flags: regionMmap | regionCaps, capOffset: off, size: fakeBAR}); err != nil && !errors.Is(err, errCaps) {
			t.Error(err)
		}
	})
}
