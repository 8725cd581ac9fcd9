package vfiouser

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

const page = 4096

func dup(t testing.TB, f *os.File) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), f.Name())
}

// guest maps three ranges: two adjacent ones of RAM, taken from the file in
// reverse order, and a read-only one behind a gap.
func guest(t testing.TB) (*Memory, *os.File) {
	t.Helper()
	f := memfd(t, 3*page)
	g := &Memory{}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, m := range []DMAMap{
		{Addr: 0x11000, Size: page, Offset: 0, Readable: true, Writable: true, File: dup(t, f)},
		{Addr: 0x10000, Size: page, Offset: page, Readable: true, Writable: true, File: dup(t, f)},
		{Addr: 0x20000, Size: page, Offset: 2 * page, Readable: true, File: dup(t, f)},
		{Addr: 0x21000, Size: page, Readable: true, Writable: true},
		{Addr: 0x22000, Size: page, Writable: true, File: dup(t, f)},
	} {
		if err := g.Map(m); err != nil {
			t.Fatal(err)
		}
	}
	return g, f
}

func TestMemoryAccess(t *testing.T) {
	g, f := guest(t)
	if err := g.WriteAt(0x10ffe, []byte("abcd")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if err := g.ReadAt(0x10ffe, got); err != nil || string(got) != "abcd" {
		t.Errorf("across two ranges: %q, %v", got, err)
	}
	if _, err := f.ReadAt(got, 2*page-2); err != nil || !bytes.Equal(got, []byte{'a', 'b', 0, 0}) {
		t.Errorf("the client sees %q, %v", got, err)
	}
	for n := range 17 { // every length has its own way of being copied
		for off := range uint64(9) {
			p := bytes.Repeat([]byte{byte(16*off) + byte(n) + 1}, n)
			q := make([]byte, n)
			if err := errors.Join(g.WriteAt(0x10100+off, p), g.ReadAt(0x10100+off, q)); err != nil || !bytes.Equal(p, q) {
				t.Errorf("%d bytes at offset %d: % x, %v", n, off, q, err)
			}
		}
	}
	for _, tt := range []struct {
		addr        uint64
		n           int
		read, write error
	}{
		{0xffff, 1, ErrNotMapped, ErrNotMapped},
		{0xffff, 2, ErrNotMapped, ErrNotMapped},
		{0x11fff, 2, ErrNotMapped, ErrNotMapped},
		{0x1ffff, 2, ErrNotMapped, ErrNotMapped},
		{0x23000, 1, ErrNotMapped, ErrNotMapped},
		{math.MaxUint64, 1, ErrNotMapped, ErrNotMapped},
		{math.MaxUint64, 2, ErrNotMapped, ErrNotMapped},
		{0x20000, 8, nil, ErrPermission},
		{0x20fff, 2, ErrNotMappable, ErrPermission},
		{0x21000, 1, ErrNotMappable, ErrNotMappable},
		{0x22000, 1, ErrPermission, nil},
		{0x30000, 0, nil, nil},
	} {
		p := make([]byte, tt.n)
		if err := g.ReadAt(tt.addr, p); !errors.Is(err, tt.read) || (err == nil) != (tt.read == nil) {
			t.Errorf("reading %d at %#x: %v, want %v", tt.n, tt.addr, err, tt.read)
		}
		if err := g.WriteAt(tt.addr, p); !errors.Is(err, tt.write) || (err == nil) != (tt.write == nil) {
			t.Errorf("writing %d at %#x: %v, want %v", tt.n, tt.addr, err, tt.write)
		}
	}
	// A write that does not fit wholly writes nothing.
	if err := g.WriteAt(0x11ffe, []byte("xxxx")); err == nil {
		t.Fatal("a write into a gap succeeded")
	}
	if err := g.ReadAt(0x11ffe, got[:2]); err != nil || !bytes.Equal(got[:2], []byte{0, 0}) {
		t.Errorf("a refused write left %q, %v", got[:2], err)
	}
}

func TestMemoryMapErrors(t *testing.T) {
	g, f := guest(t)
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	before := openFDs(t)
	for _, tt := range []struct {
		name string
		m    DMAMap
		want syscall.Errno
	}{
		{"empty", DMAMap{Addr: 0x40000, Readable: true}, syscall.EINVAL},
		{"end of the address space", DMAMap{Addr: math.MaxUint64, Size: page, Readable: true}, syscall.EINVAL},
		{"same range", DMAMap{Addr: 0x10000, Size: page, Readable: true}, syscall.EEXIST},
		{"first byte", DMAMap{Addr: 0xf000, Size: page + 1, Readable: true}, syscall.EEXIST},
		{"last byte", DMAMap{Addr: 0x11fff, Size: page, Readable: true}, syscall.EEXIST},
		{"around everything", DMAMap{Addr: 0, Size: 1 << 40, Readable: true}, syscall.EEXIST},
		{"beyond the file", DMAMap{Addr: 0x40000, Size: page + 1, Offset: 2 * page, Readable: true, File: dup(t, f)}, syscall.EINVAL},
		{"huge", DMAMap{Addr: 0x40000, Size: 1 << 63, Readable: true, File: dup(t, f)}, syscall.EINVAL},
		{"huge offset", DMAMap{Addr: 0x40000, Size: page, Offset: math.MaxUint64, Readable: true, File: dup(t, f)}, syscall.EINVAL},
		{"not a file", DMAMap{Addr: 0x40000, Size: 1, Readable: true, File: dup(t, eventfd(t))}, syscall.EINVAL},
	} {
		if err := g.Map(tt.m); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if n := openFDs(t) - before; n > 1 { // the eventfd of the test
		t.Errorf("%d descriptors leaked", n)
	}
	// A descriptor that cannot be written gives a read-only range.
	if err := g.Map(DMAMap{Addr: 0x40000, Size: page, Readable: true, Writable: true, File: dup(t, ro)}); err != nil {
		t.Fatal(err)
	}
	if err := g.WriteAt(0x40000, []byte{1}); !errors.Is(err, ErrPermission) {
		t.Errorf("writing through a read-only descriptor: %v", err)
	}
	if err := g.ReadAt(0x40000, make([]byte, page)); err != nil {
		t.Errorf("reading through a read-only descriptor: %v", err)
	}
}

func TestMemoryUnmap(t *testing.T) {
	g, _ := guest(t)
	for _, tt := range []struct {
		u    DMAUnmap
		want syscall.Errno
	}{
		{DMAUnmap{Addr: 0x10000}, syscall.EINVAL},
		{DMAUnmap{Addr: math.MaxUint64, Size: 2}, syscall.EINVAL},
		{DMAUnmap{Addr: 0x10001, Size: page}, syscall.EINVAL},
		{DMAUnmap{Addr: 0x10001, Size: page - 1}, syscall.EINVAL},
		{DMAUnmap{Addr: 0x10000, Size: page - 1}, syscall.EINVAL},
		{DMAUnmap{Addr: 0x10000, Size: page + 1}, syscall.EINVAL},
		{DMAUnmap{Addr: 0x12000, Size: page}, syscall.ENOENT},
		{DMAUnmap{Addr: 0x20000, Size: page}, 0},
		{DMAUnmap{Addr: 0x10000, Size: 2 * page}, 0}, // two ranges at once
	} {
		err := g.Unmap(tt.u)
		if tt.want == 0 && err != nil || tt.want != 0 && !errors.Is(err, tt.want) {
			t.Errorf("unmapping %+v: %v, want %v", tt.u, err, tt.want)
		}
	}
	want := []Range{
		{Addr: 0x21000, Size: page, Readable: true, Writable: true},
		{Addr: 0x22000, Size: page, Writable: true, Mapped: true},
	}
	if d := cmp.Diff(want, g.Ranges()); d != "" {
		t.Error(d)
	}
	if err := g.ReadAt(0x10000, make([]byte, 1)); !errors.Is(err, ErrNotMapped) {
		t.Errorf("reading what was unmapped: %v", err)
	}
	if err := g.Unmap(DMAUnmap{All: true}); err != nil || len(g.Ranges()) != 0 {
		t.Errorf("unmapping all: %v, left %v", err, g.Ranges())
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if err := g.Map(DMAMap{Addr: 0, Size: page, Readable: true}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("mapping after Close: %v", err)
	}
}

func TestMemoryLimit(t *testing.T) {
	var g Memory
	for i := range uint64(MaxMappings) {
		if err := g.Map(DMAMap{Addr: 2 * i, Size: 1, Readable: true}); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Map(DMAMap{Addr: 1 << 40, Size: 1, Readable: true}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("one too many: %v", err)
	}
}

// TestTruncatedMemory shows that a client that takes memory away costs an error,
// not the process.
func TestTruncatedMemory(t *testing.T) {
	g, f := guest(t)
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, 4, 8, 100, page} {
		if err := g.ReadAt(0x10000, make([]byte, n)); !errors.Is(err, ErrFault) {
			t.Errorf("reading %d bytes of a truncated file: %v", n, err)
		}
		if err := g.WriteAt(0x10000, make([]byte, n)); !errors.Is(err, ErrFault) {
			t.Errorf("writing %d bytes of a truncated file: %v", n, err)
		}
	}
	if err := f.Truncate(3 * page); err != nil {
		t.Fatal(err)
	}
	if err := g.WriteAt(0x10000, []byte{1}); err != nil {
		t.Errorf("after the memory is back: %v", err)
	}
}

func TestAlignRange(t *testing.T) {
	const huge = 2 << 20
	for _, tt := range []struct{ off, size, page, start, length uint64 }{
		{0, page, page, 0, page},
		{page, 3 * page, page, page, 3 * page},
		{0, 0xa0000, huge, 0, huge},
		{0xc0000, huge - 0xc0000, huge, 0, huge},
		{0xc0000, huge, huge, 0, 2 * huge},
	} {
		if start, length := alignRange(tt.off, tt.size, tt.page); start != tt.start || length != tt.length {
			t.Errorf("%+v: %#x, %#x", tt, start, length)
		}
	}
}

// TestMemoryUnaligned maps parts of pages, as happens with huge pages.
func TestMemoryUnaligned(t *testing.T) {
	f := memfd(t, 2*page)
	if _, err := f.WriteAt([]byte("xyz"), page-1); err != nil {
		t.Fatal(err)
	}
	var g Memory
	if err := g.Map(DMAMap{Addr: 7, Size: 3, Offset: page - 1, Readable: true, Writable: true, File: dup(t, f)}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 3)
	if err := g.ReadAt(7, got); err != nil || string(got) != "xyz" {
		t.Errorf("%q, %v", got, err)
	}
	if err := g.ReadAt(9, got[:2]); !errors.Is(err, ErrNotMapped) {
		t.Errorf("beyond the range but within its page: %v", err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// TestMemoryConcurrency is for the race detector, and for unmapping under access.
func TestMemoryConcurrency(t *testing.T) {
	f := memfd(t, page)
	var g Memory
	var work sync.WaitGroup
	stop := make(chan struct{})
	hits := make([]int, 2)
	for i := range hits {
		work.Go(func() {
			p := make([]byte, page)
			for {
				select {
				case <-stop:
					if hits[i] > 0 {
						return
					}
				default:
				}
				err := errors.Join(g.WriteAt(0, p), g.ReadAt(0, p))
				if err == nil {
					hits[i]++
				} else if !errors.Is(err, ErrNotMapped) {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 500 {
		if err := g.Map(DMAMap{Addr: 0, Size: page, Readable: true, Writable: true, File: dup(t, f)}); err != nil {
			t.Fatal(err)
		}
		if err := g.Unmap(DMAUnmap{Addr: 0, Size: page}); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Map(DMAMap{Addr: 0, Size: page, Readable: true, Writable: true, File: dup(t, f)}); err != nil {
		t.Fatal(err)
	}
	close(stop)
	work.Wait()
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

func TestClientMapsMemory(t *testing.T) {
	dev, _, c := connect(t, nil)
	ctx := testContext(t)
	f := memfd(t, 2*page)
	m := DMAMap{Addr: 1 << 32, Size: page, Offset: page, Readable: true, Writable: true, File: f}
	if err := c.DMAMap(ctx, m); err != nil {
		t.Fatal(err)
	}
	if err := c.DMAMap(ctx, m); !errors.Is(err, syscall.EEXIST) {
		t.Errorf("mapping twice: %v", err)
	}
	if err := dev.mem.WriteAt(1<<32, []byte("dma")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 3)
	if _, err := f.ReadAt(got, page); err != nil || string(got) != "dma" {
		t.Errorf("the client sees %q, %v", got, err)
	}
	if err := c.DMAUnmap(ctx, DMAUnmap{Addr: 1 << 32, Size: page}); err != nil {
		t.Fatal(err)
	}
	if err := c.DMAMap(ctx, m); err != nil {
		t.Fatal(err)
	}
	if err := c.DMAUnmap(ctx, DMAUnmap{All: true}); err != nil || len(dev.mem.Ranges()) != 0 {
		t.Errorf("unmapping all: %v, left %v", err, dev.mem.Ranges())
	}
}

func BenchmarkMemoryWrite16(b *testing.B) {
	g, _ := guest(b)
	p := make([]byte, 16)
	for b.Loop() {
		if err := g.WriteAt(0x10010, p); err != nil {
			b.Fatal(err)
		}
	}
}
