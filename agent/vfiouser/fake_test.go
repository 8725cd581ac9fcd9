package vfiouser

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testTimeout bounds every wait of a test.
const testTimeout = 10 * time.Second

// fakeDevice records what it is asked for. Region 0 is 4 KiB of memory.
type fakeDevice struct {
	mem Memory

	mu        sync.Mutex
	bar       [4096]byte
	writes    []RegionWriteOp
	irqs      []IRQRequest
	vectors   [3]*Eventfd
	resets    int
	connected chan struct{}
	gone      chan error

	onWrite func(op RegionWriteOp) error // optional
}

func newFakeDevice() *fakeDevice {
	return &fakeDevice{connected: make(chan struct{}, 64), gone: make(chan error, 64)}
}

func (d *fakeDevice) Info() Info {
	return Info{
		Regions: []Region{
			{Index: RegionBAR0, Size: 4096, Flags: RegionReadable | RegionWritable},
			{Index: RegionBAR3, Size: 0x4000, Flags: RegionReadable},
			{Index: RegionConfig, Size: 256, Flags: RegionReadable | RegionWritable},
			{Index: 77, Size: 1},
		},
		IRQs: []IRQ{
			{Index: IRQIndexMSIX, Count: 3, Flags: IRQEventfd | IRQMaskable},
			{Index: IRQIndexError, Count: 1, Flags: IRQEventfd},
			{Index: 77, Count: 1},
		},
	}
}

func (d *fakeDevice) Connected() { d.connected <- struct{}{} }

func (d *fakeDevice) Disconnected(reason error) {
	d.mu.Lock()
	d.disable()
	d.mu.Unlock()
	if err := d.mem.Unmap(DMAUnmap{All: true}); err != nil {
		panic(err)
	}
	d.gone <- reason
}

func (d *fakeDevice) disable() {
	for i, e := range d.vectors {
		if e != nil {
			e.Close()
		}
		d.vectors[i] = nil
	}
}

func (d *fakeDevice) Reset() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.resets++
	return nil
}

func (d *fakeDevice) RegionRead(region uint32, off uint64, p []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if region != RegionBAR0 {
		return nil
	}
	copy(p, d.bar[off:])
	return nil
}

func (d *fakeDevice) RegionWrite(region uint32, off uint64, p []byte) error {
	op := RegionWriteOp{Region: region, Offset: off, Data: append([]byte(nil), p...)}
	d.mu.Lock()
	onWrite := d.onWrite
	d.mu.Unlock()
	if onWrite != nil {
		if err := onWrite(op); err != nil {
			return err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.writes = append(d.writes, op)
	if region == RegionBAR0 {
		copy(d.bar[off:], p)
	}
	return nil
}

func (d *fakeDevice) SetIRQs(r IRQRequest) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.Index != IRQIndexMSIX {
		for _, e := range r.Eventfds {
			e.Close()
		}
		return syscall.EINVAL
	}
	d.irqs = append(d.irqs, r)
	switch r.Op {
	case IRQDisable:
		d.disable()
	case IRQAssign, IRQDeassign:
		for i := range r.Count {
			v := &d.vectors[r.Start+i]
			if *v != nil {
				(*v).Close()
			}
			*v = nil
			if r.Op == IRQAssign {
				*v = r.Eventfds[i]
			}
		}
	case IRQTrigger:
		for i := range r.Count {
			if v := d.vectors[r.Start+i]; v != nil {
				return v.Signal()
			}
		}
	}
	return nil
}

func (d *fakeDevice) DMAMap(m DMAMap) error     { return d.mem.Map(m) }
func (d *fakeDevice) DMAUnmap(u DMAUnmap) error { return d.mem.Unmap(u) }

func (d *fakeDevice) setOnWrite(f func(RegionWriteOp) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.onWrite = f
}

func (d *fakeDevice) resetCount() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.resets
}

func (d *fakeDevice) vector(i int) *Eventfd {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.vectors[i]
}

// requested lists the SET_IRQS requests, without descriptors.
func (d *fakeDevice) requested() []IRQRequest {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := append([]IRQRequest(nil), d.irqs...)
	for i := range out {
		out[i].Eventfds = nil
	}
	return out
}

func (d *fakeDevice) written() []RegionWriteOp {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]RegionWriteOp(nil), d.writes...)
}

// guestRAM is the client's memory; it records the writes.
type guestRAM struct {
	mu     sync.Mutex
	ram    []byte
	writes []uint64
	reads  []int
	hook   func(addr uint64, write bool) error // optional
}

func (g *guestRAM) ReadAt(addr uint64, p []byte) error {
	if g.hook != nil {
		if err := g.hook(addr, false); err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if addr+uint64(len(p)) > uint64(len(g.ram)) {
		return syscall.EFAULT
	}
	g.reads = append(g.reads, len(p))
	copy(p, g.ram[addr:])
	return nil
}

func (g *guestRAM) WriteAt(addr uint64, p []byte) error {
	if g.hook != nil {
		if err := g.hook(addr, true); err != nil {
			return err
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if addr+uint64(len(p)) > uint64(len(g.ram)) {
		return syscall.EFAULT
	}
	g.writes = append(g.writes, addr)
	copy(g.ram[addr:], p)
	return nil
}

// seen returns the addresses of the writes and the lengths of the reads so far.
func (g *guestRAM) seen() (writes []uint64, reads []int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append(writes, g.writes...), append(reads, g.reads...)
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// start serves dev until the test ends, and checks that it then stops.
func start(t testing.TB, dev Device, o Options, tweaks ...func(*Server)) (path string, s *Server) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "vf.sock")
	o.Logger = slog.New(slog.DiscardHandler)
	s, err := Listen(path, dev, o)
	if err != nil {
		t.Fatal(err)
	}
	for _, tweak := range tweaks {
		tweak(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := wait(t, served); err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(path); !os.IsNotExist(err) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	return path, s
}

// connect starts a server and connects a client to it.
func connect(t testing.TB, mem ClientMemory) (*fakeDevice, *Server, *Client) {
	t.Helper()
	dev := newFakeDevice()
	path, s := start(t, dev, Options{})
	c, err := Dial(testContext(t), path, mem)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	wait(t, dev.connected)
	return dev, s, c
}

func wait[T any](t testing.TB, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testTimeout):
		t.Fatal("waited too long")
		panic("unreachable")
	}
}

func memfd(t testing.TB, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func eventfd(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	t.Cleanup(func() { f.Close() })
	return f
}

// openFDs counts this process's descriptors.
func openFDs(t testing.TB) int {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}
