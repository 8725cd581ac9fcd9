package vfiouser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxMappings is the largest number of ranges a Memory holds (max_dma_maps).
const MaxMappings = 65535

// Errors of Memory.ReadAt and Memory.WriteAt; use errors.Is.
var (
	// ErrNotMapped says that part of the range is not guest memory now. While
	// firmware or the guest changes the memory layout, QEMU withdraws ranges and
	// announces them again at once: the caller retries.
	ErrNotMapped = errors.New("not mapped")
	// ErrNotMappable says that part of the range came without a descriptor; it
	// can be reached with Server.DMARead and Server.DMAWrite only.
	ErrNotMappable = errors.New("the client shares no descriptor for it; guest RAM must be a shared memfd")
	// ErrPermission says that the client allows no such access.
	ErrPermission = errors.New("access not permitted")
	// ErrFault says that the memory behind the mapping is gone: the client
	// truncated its file.
	ErrFault = errors.New("the memory behind the mapping is gone")
)

// Memory is guest-physical memory, as announced by DMA_MAP. The zero value is
// empty and ready. It is safe for concurrent use. ReadAt and WriteAt run in
// parallel; Map, Unmap and Close wait for those under way.
//
// Writes of one goroutine reach the guest in order, and an aligned access of 4
// or 8 bytes is a single load or store.
type Memory struct {
	mu     sync.RWMutex
	ranges []mapping // by address, not overlapping
	closed bool
}

// Range is one announced range of guest memory.
type Range struct {
	Addr     uint64
	Size     uint64
	Readable bool
	Writable bool
	Mapped   bool // ReadAt and WriteAt can reach it
}

type mapping struct {
	Range
	mem []byte // Size bytes at Addr
	raw []byte // the whole mmap, of which mem is a part
}

func (m *mapping) end() uint64 { return m.Addr + m.Size }

// Map adds a range; it closes m.File. The range is mapped shared, and read-only
// unless m.Writable and the descriptor allow writing. A range that overlaps
// another is refused with EEXIST, one that is not wholly inside the file with
// EINVAL. A client that truncates the file later does not harm this process: see
// ErrFault.
func (g *Memory) Map(m DMAMap) error {
	if m.File != nil {
		defer m.File.Close()
	}
	if m.Size == 0 || m.Size > math.MaxUint64-m.Addr || (!m.Readable && !m.Writable) {
		return fmt.Errorf("mapping %#x bytes at guest address %#x: %w", m.Size, m.Addr, syscall.EINVAL)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return fmt.Errorf("mapping guest address %#x: %w", m.Addr, os.ErrClosed)
	}
	if len(g.ranges) >= MaxMappings {
		return fmt.Errorf("mapping guest address %#x: there are %d mappings: %w", m.Addr, len(g.ranges), syscall.ENOSPC)
	}
	i := g.search(m.Addr)
	if i < len(g.ranges) && g.ranges[i].Addr < m.Addr+m.Size {
		return fmt.Errorf("mapping %#x bytes at guest address %#x: overlaps the mapping at %#x: %w", m.Size, m.Addr, g.ranges[i].Addr, syscall.EEXIST)
	}
	n := mapping{Range: Range{Addr: m.Addr, Size: m.Size, Readable: m.Readable, Writable: m.Writable}}
	if m.File != nil {
		if err := n.mmap(int(m.File.Fd()), m.Offset); err != nil {
			return fmt.Errorf("mapping %#x bytes at guest address %#x from file offset %#x: %w", m.Size, m.Addr, m.Offset, err)
		}
	}
	g.ranges = slices.Insert(g.ranges, i, n)
	return nil
}

func (m *mapping) mmap(fd int, off uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("the descriptor is not a memory file: %w", syscall.EINVAL)
	}
	if size := uint64(st.Size); off > size || m.Size > size-off {
		return fmt.Errorf("the file has %#x bytes: %w", size, syscall.EINVAL)
	}
	page := uint64(unix.Getpagesize())
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return err
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		page = uint64(fs.Bsize)
	}
	start, length := alignRange(off, m.Size, page)
	if length > math.MaxInt {
		return syscall.ENOMEM
	}
	prot := unix.PROT_READ
	if m.Writable {
		prot |= unix.PROT_WRITE
	}
	raw, err := unix.Mmap(fd, int64(start), int(length), prot, unix.MAP_SHARED)
	if m.Writable && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
		m.Writable = false
		raw, err = unix.Mmap(fd, int64(start), int(length), unix.PROT_READ, unix.MAP_SHARED)
	}
	if err != nil {
		return err
	}
	m.raw, m.mem, m.Mapped = raw, raw[off-start:][:m.Size:m.Size], true
	return nil
}

// alignRange widens [off, off+size), which is within a file, to whole pages: QEMU
// cuts RAM at addresses such as 0xa0000 also when it consists of huge pages.
func alignRange(off, size, page uint64) (start, length uint64) {
	start = off &^ (page - 1)
	end := (off + size + page - 1) &^ (page - 1)
	return start, end - start
}

// search returns the index of the first range that ends after addr.
func (g *Memory) search(addr uint64) int {
	return sort.Search(len(g.ranges), func(i int) bool { return g.ranges[i].end() > addr })
}

// Unmap removes the ranges that lie within [u.Addr, u.Addr+u.Size), or all. On
// return no access to them is under way. A request that would cut a range in two
// is refused with EINVAL, one that names no range with ENOENT.
func (g *Memory) Unmap(u DMAUnmap) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if u.All {
		return g.remove(0, len(g.ranges))
	}
	if u.Size == 0 || u.Size > math.MaxUint64-u.Addr {
		return fmt.Errorf("unmapping %#x bytes at guest address %#x: %w", u.Size, u.Addr, syscall.EINVAL)
	}
	end := u.Addr + u.Size
	from := g.search(u.Addr)
	to := from
	for ; to < len(g.ranges) && g.ranges[to].Addr < end; to++ {
		if r := &g.ranges[to]; r.Addr < u.Addr || r.end() > end {
			return fmt.Errorf("unmapping %#x bytes at guest address %#x: would cut the mapping at %#x: %w", u.Size, u.Addr, r.Addr, syscall.EINVAL)
		}
	}
	if from == to {
		return fmt.Errorf("unmapping %#x bytes at guest address %#x: %w", u.Size, u.Addr, syscall.ENOENT)
	}
	return g.remove(from, to)
}

func (g *Memory) remove(from, to int) error {
	var errs []error
	for i := from; i < to; i++ {
		if g.ranges[i].raw != nil {
			errs = append(errs, unix.Munmap(g.ranges[i].raw))
		}
	}
	g.ranges = slices.Delete(g.ranges, from, to)
	return errors.Join(errs...)
}

// Close unmaps everything; later calls of Map fail, and no access finds memory.
func (g *Memory) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	return g.remove(0, len(g.ranges))
}

// Ranges lists what is announced, by address.
func (g *Memory) Ranges() []Range {
	g.mu.RLock()
	defer g.mu.RUnlock()
	out := make([]Range, len(g.ranges))
	for i := range g.ranges {
		out[i] = g.ranges[i].Range
	}
	return out
}

// View returns the range that begins at addr, and its memory in this process if
// it is Mapped: for the kernel, to let a device reach the same pages. The memory
// must not be accessed otherwise, and is there until Unmap or Close.
func (g *Memory) View(addr uint64) (r Range, mem []byte, ok bool) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	i := g.search(addr)
	if i == len(g.ranges) || g.ranges[i].Addr != addr {
		return Range{}, nil, false
	}
	return g.ranges[i].Range, g.ranges[i].mem, true
}

// Writable tells whether there is mapped memory at addr that WriteAt, and the
// device, may write.
func (g *Memory) Writable(addr uint64) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	i := g.search(addr)
	return i < len(g.ranges) && g.ranges[i].Addr <= addr && g.ranges[i].Writable && g.ranges[i].Mapped
}

// ReadAt reads len(p) bytes at guest-physical addr. The bytes may cross adjacent
// ranges. On an error p is undefined.
func (g *Memory) ReadAt(addr uint64, p []byte) error { return g.access(addr, p, false) }

// WriteAt writes p at guest-physical addr. The bytes may cross adjacent ranges.
// Nothing is written on an error other than ErrFault.
func (g *Memory) WriteAt(addr uint64, p []byte) error { return g.access(addr, p, true) }

func (g *Memory) access(addr uint64, p []byte, write bool) error {
	if len(p) == 0 {
		return nil
	}
	g.mu.RLock()
	defer g.mu.RUnlock()
	first := g.search(addr)
	err := g.check(first, addr, uint64(len(p)), write)
	for i, at, rest := first, addr, p; err == nil && len(rest) > 0; i++ {
		r := &g.ranges[i]
		mem := r.mem[at-r.Addr:]
		n := min(len(mem), len(rest))
		if write {
			err = guarded(store, mem[:n], rest[:n])
		} else {
			err = guarded(load, mem[:n], rest[:n])
		}
		at, rest = at+uint64(n), rest[n:]
	}
	if err != nil {
		op := "reading"
		if write {
			op = "writing"
		}
		return fmt.Errorf("%s %d bytes at guest address %#x: %w", op, len(p), addr, err)
	}
	return nil
}

// check tells whether size bytes at addr, which range i contains if any does,
// can be accessed.
func (g *Memory) check(i int, addr, size uint64, write bool) error {
	if size > math.MaxUint64-addr {
		return ErrNotMapped
	}
	for end := addr + size; addr < end; i++ {
		if i >= len(g.ranges) || g.ranges[i].Addr > addr {
			return ErrNotMapped
		}
		r := &g.ranges[i]
		switch {
		case write && !r.Writable, !write && !r.Readable:
			return ErrPermission
		case !r.Mapped:
			return ErrNotMappable
		}
		addr = r.end()
	}
	return nil
}

// guarded calls do, and turns a fault on the guest's memory (the client can
// truncate the file at any time, and the kernel then raises SIGBUS) into an error.
func guarded(do func(guest, p []byte), guest, p []byte) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			if _, fault := r.(interface{ Addr() uintptr }); !fault {
				panic(r)
			}
			err = ErrFault
		}
	}()
	do(guest, p)
	return nil
}

func store(guest, p []byte) {
	at := unsafe.Pointer(unsafe.SliceData(guest))
	switch {
	case len(p) == 8 && uintptr(at)%8 == 0:
		atomic.StoreUint64((*uint64)(at), binary.NativeEndian.Uint64(p))
	case len(p) == 4 && uintptr(at)%4 == 0:
		atomic.StoreUint32((*uint32)(at), binary.NativeEndian.Uint32(p))
	default:
		copy(guest, p)
	}
}

func load(guest, p []byte) {
	at := unsafe.Pointer(unsafe.SliceData(guest))
	switch {
	case len(p) == 8 && uintptr(at)%8 == 0:
		binary.NativeEndian.PutUint64(p, atomic.LoadUint64((*uint64)(at)))
	case len(p) == 4 && uintptr(at)%4 == 0:
		binary.NativeEndian.PutUint32(p, atomic.LoadUint32((*uint32)(at)))
	default:
		copy(p, guest)
	}
}
