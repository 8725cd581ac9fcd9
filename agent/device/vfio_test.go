package device

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/device/dirty"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
	"compsc.io/compsc/agent/vfio"
	"compsc.io/compsc/agent/vfiouser"
)

// kernelModel is the model of the silicon where the kernel would have a VF:
// it reaches memory that was mapped for it and no other, and raises vectors
// by the eventfds that it was told.
type kernelModel struct {
	*model.VF
	mu       sync.Mutex
	mapped   map[uint64][]byte
	eventfds [ixgbevf.MSIXVectors]int
	order    []string
	mapError error
	dirty    map[uint64]bool // nil: the IOMMU has no dirty bits
	tracking bool
	id       [4]byte
	request  int      // eventfd
	bar      *os.File // nil: BAR0 cannot be mapped
	onMap    func()
}

// barAt is where BAR0 begins in the file that it can be mapped by.
const barAt = 0x10000

func newKernelModel(t *testing.T) *kernelModel {
	k := &kernelModel{mapped: map[uint64][]byte{}, id: [4]byte{0x86, 0x80, 0xed, 0x10}}
	k.DisconnectAll()
	k.VF = model.New(model.DefaultConfig(), k, nullWire{}, k.raise)
	t.Cleanup(k.VF.Close)
	return k
}

type nullWire struct{}

func (nullWire) Transmit([]byte) error { return nil }

func (k *kernelModel) note(format string, args ...any) {
	k.order = append(k.order, fmt.Sprintf(format, args...))
}

func (k *kernelModel) access(addr uint64, n int, do func([]byte)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for at, mem := range k.mapped {
		if addr >= at && addr+uint64(n) <= at+uint64(len(mem)) {
			do(mem[addr-at:])
			return nil
		}
	}
	return errors.New("IOMMU fault")
}

func (k *kernelModel) ReadAt(addr uint64, p []byte) error {
	return k.access(addr, len(p), func(mem []byte) { copy(p, mem) })
}

func (k *kernelModel) WriteAt(addr uint64, p []byte) error {
	return k.access(addr, len(p), func(mem []byte) {
		copy(mem, p)
		if k.tracking {
			k.dirty[addr&^4095] = true
		}
	})
}

func (k *kernelModel) raise(vector int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if fd := k.eventfds[vector]; fd >= 0 {
		one := [8]byte{1}
		_, _ = unix.Write(fd, one[:]) // saturated is pending
	}
}

func (k *kernelModel) BARSize() uint32                    { return ixgbevf.BARSize }
func (k *kernelModel) BARFile() (*os.File, int64)         { return k.bar, barAt }
func (k *kernelModel) Vectors() int                       { return len(k.eventfds) }
func (k *kernelModel) ReadConfig(_ int64, p []byte) error { copy(p, k.id[:]); return nil }
func (k *kernelModel) HasDirtyBits() bool                 { return k.dirty != nil }
func (k *kernelModel) TrackDirty(on bool) error           { k.tracking = on; return nil }
func (k *kernelModel) Reset() error                       { k.note("reset"); k.FLR(); return nil }
func (k *kernelModel) Close() error                       { k.note("close"); return nil }

func (k *kernelModel) Dirty(iova, size uint64, page func(uint64)) error {
	for p := range k.dirty {
		if p >= iova && p < iova+size {
			page(p)
		}
	}
	return nil
}

func (k *kernelModel) Map(iova uint64, mem []byte, _, _ bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.mapError != nil {
		return k.mapError
	}
	k.note("map %#x", iova)
	if k.onMap != nil {
		k.onMap()
	}
	k.mapped[iova] = mem
	return nil
}

func (k *kernelModel) Unmap(iova, size uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if uint64(len(k.mapped[iova])) != size {
		return unix.EINVAL
	}
	k.note("unmap %#x", iova)
	delete(k.mapped, iova)
	return nil
}

func (k *kernelModel) Connect(vector, eventfd int) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if eventfd >= 0 { // the kernel has its own reference
		fd, err := unix.Dup(eventfd)
		if err != nil {
			return err
		}
		eventfd = fd
	}
	if old := k.eventfds[vector]; old >= 0 {
		unix.Close(old)
	}
	k.eventfds[vector] = eventfd
	return nil
}

func (k *kernelModel) ConnectRequest(eventfd int) error {
	fd, err := unix.Dup(eventfd)
	k.request = fd
	return err
}

func (k *kernelModel) DisconnectAll() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for v := range k.eventfds {
		k.eventfds[v] = -1
	}
	return nil
}

// vfioIface is an interface with a VF behind the kernel.
func vfioIface(t *testing.T, k *kernelModel) *iface {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	p := &process{log: log, opts: Options{Dir: t.TempDir(), Log: log}, changed: make(chan struct{})}
	i, err := newIface(p, interfaceConfig{Name: "net1", Slot: 5}, log)
	if err != nil {
		t.Fatal(err)
	}
	p.ifaces.Store(&[]*iface{i})
	dt := deviceTypes["8086:10ed"]
	v := newVFIO(k, i.fire, log)
	memory := dirty.Tracked{Memory: &i.memory, Pages: &i.pages}
	i.vf = &attachedVF{handoff: handoff.Handoff{VF: "0000:01:10.0"}, device: dt, silicon: v,
		engine: compsc.New(dt.family, v, compsc.Options{VendorID: dt.vendor, DeviceID: dt.device, Memory: memory, Logger: log})}
	i.vectors, i.missed = make([]*vfiouser.Eventfd, k.Vectors()), make([]bool, k.Vectors())
	t.Cleanup(i.close)
	return i
}

// What a previous tenant left running in a VF never reaches the guest's memory.
func TestScrubbedBeforeItReachesMemory(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	v := i.vf.silicon
	i.vf, i.vectors, i.missed = nil, nil, nil
	if err := mapRAM(t, i, 0, ramSize); err != nil {
		t.Fatal(err)
	}
	const enable = 1 << 25 // RXDCTL.ENABLE and TXDCTL.ENABLE
	on := func() uint32 { return (k.Read(ixgbevf.VFRXDCTL(0)) | k.Read(ixgbevf.VFTXDCTL(0))) & enable }
	k.Write(ixgbevf.VFRXDCTL(0), enable)
	k.Write(ixgbevf.VFTXDCTL(0), enable)
	if on() == 0 {
		t.Fatal("the previous tenant's queues are off")
	}
	mapped := false
	k.onMap = func() {
		mapped = true
		if on() != 0 {
			t.Error("the VF reaches the guest's memory with queues on that are not the guest's")
		}
	}
	if err := i.take(handoff.Handoff{VF: "0000:01:10.0"}, deviceTypes["8086:10ed"], v, dirty.Tracked{Memory: &i.memory, Pages: &i.pages}); err != nil {
		t.Fatal(err)
	}
	if !mapped {
		t.Error("the VF does not reach the guest's memory")
	}
}

func ramFile(t *testing.T, size int64) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "ram")
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func mapRAM(t *testing.T, i *iface, addr, size uint64) error {
	t.Helper()
	return i.DMAMap(vfiouser.DMAMap{Addr: addr, Size: size, Readable: true, Writable: true, File: ramFile(t, int64(size))})
}

func TestVFIOReachesWhatTheGuestHas(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	for _, addr := range []uint64{0, 0x100000, 0x200000} {
		if err := mapRAM(t, i, addr, 0x10000); err != nil {
			t.Fatal(err)
		}
	}
	if err := i.DMAMap(vfiouser.DMAMap{Addr: 0xfd000000, Size: 0x1000, Readable: true}); err != nil {
		t.Fatal(err) // no RAM: without a descriptor
	}
	if len(k.mapped) != 3 {
		t.Fatalf("the VF reaches %d ranges", len(k.mapped))
	}
	if err := k.WriteAt(0x100010, []byte("device")); err != nil {
		t.Fatal(err)
	}
	var b [6]byte
	if err := i.memory.ReadAt(0x100010, b[:]); err != nil || string(b[:]) != "device" {
		t.Errorf("the guest has %q (%v)", b, err)
	}
	if err := i.DMAUnmap(vfiouser.DMAUnmap{Addr: 0x100000, Size: 0x10000}); err != nil {
		t.Fatal(err)
	}
	if err := k.WriteAt(0x100010, []byte("device")); err == nil {
		t.Error("the VF reaches memory that the guest lost")
	}
	if err := i.DMAUnmap(vfiouser.DMAUnmap{Addr: 0x200000, Size: 0x1000}); err == nil || len(k.mapped) != 2 {
		t.Errorf("a part of a range was unmapped (%v), the VF reaches %d", err, len(k.mapped))
	}
	i.Disconnected(nil)
	if len(k.mapped) != 0 || len(i.memory.Ranges()) != 0 {
		t.Errorf("left over: %d ranges of the VF, %v", len(k.mapped), i.memory.Ranges())
	}
}

func TestVFIOThatCannotReachIsRefused(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	k.mapError = &vfio.MemlockError{Needed: 4 << 30, Limit: 8 << 20}
	if err := mapRAM(t, i, 0, 0x10000); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("mapped with %v", err)
	}
	if r := i.memory.Ranges(); len(r) != 0 {
		t.Errorf("the guest's memory is still mapped: %v", r)
	}
	if want := "needs 4096 MiB"; !strings.Contains(i.p.lastError, want) {
		t.Errorf("the status says %q, want %q in it", i.p.lastError, want)
	}
}

// A VF that is attached after QEMU has announced its memory.
func TestVFIOAttachedLate(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	vf := i.vf
	i.vf = nil
	if err := mapRAM(t, i, 0, 0x10000); err != nil || len(k.mapped) != 0 {
		t.Fatal(err, k.mapped)
	}
	i.dma.Lock()
	err := i.reachAll(vf.silicon)
	i.vf = vf
	i.dma.Unlock()
	if err != nil || len(k.mapped) != 1 {
		t.Errorf("the VF reaches %d ranges (%v)", len(k.mapped), err)
	}
}

// assign connects a vector to a new eventfd, and returns the test's end of it.
func assign(t *testing.T, i *iface, vector uint32) *os.File {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	dup, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	e, err := vfiouser.NewEventfd(dup)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	t.Cleanup(func() { f.Close() })
	if err := i.SetIRQs(vfiouser.IRQRequest{Op: vfiouser.IRQAssign, Index: vfiouser.IRQIndexMSIX, Start: vector, Count: 1, Eventfds: []*vfiouser.Eventfd{e}}); err != nil {
		t.Fatal(err)
	}
	return f
}

func fires(t *testing.T, f *os.File) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(testTime)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Read(make([]byte, 8)); err != nil {
		t.Errorf("no interrupt: %v", err)
	}
}

func silentEventfd(t *testing.T, f *os.File) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Read(make([]byte, 8)); err == nil {
		t.Error("an interrupt that nobody raised")
	}
}

// Vectors go straight to QEMU, and past this process only when it must see
// them first.
func TestVFIOInterrupts(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	var seen atomic.Int32
	i.vf.silicon.(*vfioVF).irq = func(vector int) {
		seen.Add(1)
		i.fire(vector)
	}
	f := assign(t, i, 1)
	k.raise(1)
	fires(t, f)
	silentEventfd(t, f)

	if err := i.vf.silicon.Forward(true); err != nil {
		t.Fatal(err)
	}
	g := assign(t, i, 2)
	for _, c := range []struct {
		vector int
		f      *os.File
	}{{1, f}, {2, g}} {
		k.raise(c.vector)
		fires(t, c.f)
	}
	if n := seen.Load(); n != 2 {
		t.Errorf("this process saw %d of 2 interrupts that it was to forward, and of none before", n)
	}
	if err := i.vf.silicon.Forward(false); err != nil {
		t.Fatal(err)
	}
	k.raise(1)
	fires(t, f)
	silentEventfd(t, f)
	if err := i.SetIRQs(vfiouser.IRQRequest{Op: vfiouser.IRQDisable, Index: vfiouser.IRQIndexMSIX}); err != nil {
		t.Fatal(err)
	}
	k.raise(1)
	silentEventfd(t, f)
	if slices.ContainsFunc(k.eventfds[:], func(fd int) bool { return fd >= 0 }) {
		t.Errorf("vectors are connected: %v", k.eventfds)
	}
}

// The guest's driver, as far as a ring: what the VF wrote is found by the
// rings, and by dirty bits where there are any.
func TestVFIOWrittenPages(t *testing.T) {
	for name, dirty := range map[string]map[uint64]bool{"rings": nil, "dirty bits": {}} {
		t.Run(name, func(t *testing.T) {
			k := newKernelModel(t)
			k.dirty = dirty
			i := vfioIface(t, k)
			if err := mapRAM(t, i, 0, 0x100000); err != nil {
				t.Fatal(err)
			}
			w := i.vf.engine.GuestWrite
			ring := make([]byte, 0, 8*16)
			for n := range uint64(8) {
				ring = le.AppendUint64(le.AppendUint64(ring, 0x10000+n*0x1000), 0)
			}
			ring = append(ring[:7*16], le.AppendUint64(nil, 1<<40)...) // no RAM
			ring = append(ring, make([]byte, 8)...)
			if err := i.memory.WriteAt(0x1000, ring); err != nil {
				t.Fatal(err)
			}
			w(ixgbevf.VFRDBAL(0), 0x1000)
			w(ixgbevf.VFRDLEN(0), 8*16)
			w(ixgbevf.VFSRRCTL(0), 1<<25|2)
			if err := i.track(); err != nil {
				t.Fatal(err)
			}
			w(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
			w(ixgbevf.VFRDT(0), 7)
			w(ixgbevf.VFRDT(0), 7)
			// The device takes two buffers.
			for n := range uint64(2) {
				if err := errors.Join(k.WriteAt(0x10000+n*0x1000, []byte("frame")), k.WriteAt(0x1000+16*n, make([]byte, 16))); err != nil {
					t.Fatal(err)
				}
			}
			k.VF.Write(ixgbevf.VFRXDCTL(0), 0)
			k.VF.Write(ixgbevf.VFRDH(0), 2)
			got, err := i.written()
			if err != nil {
				t.Fatal(err)
			}
			if want := []uint64{0x1000, 0x10000, 0x11000}; !slices.Equal(got, want) {
				t.Errorf("written %#x, want %#x", got, want)
			}
			i.wrote(0xff800, 0x1000)
			i.wrote(^uint64(0)-100, 0x1000)
			if n := len(i.pages.Addresses()); n != len(got)+1 {
				t.Errorf("%d pages are recorded besides those of the guest", n-len(got)-1)
			}
			i.untrack()
			if k.tracking || len(i.pages.Addresses()) > 0 {
				t.Error("still tracked")
			}
		})
	}
}

func TestVFIOChecksTheFunction(t *testing.T) {
	k := newKernelModel(t)
	v := newVFIO(k, nil, nil)
	if err := v.check(deviceTypes["8086:10ed"]); err != nil {
		t.Error(err)
	}
	if err := v.check(deviceTypes["8086:1515"]); err == nil || !strings.Contains(err.Error(), "is a 8086:10ed, and was handed over as a 8086:1515") {
		t.Errorf("another function: %v", err)
	}
	h := handoff.Handoff{VF: "0000:01:10.0", DeviceID: "8086:10ed", Backend: handoff.BackendVFIO, VFIO: handoff.VFIO{API: "none"}}
	f := ramFile(t, 1)
	_, _, err := openSilicon(h, deviceTypes["8086:10ed"], []*os.File{f}, dirty.Tracked{}, nil, nil, slog.Default())
	if err == nil || !strings.Contains(err.Error(), "not known") {
		t.Errorf("opened with %v", err)
	}
	if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Error("the descriptor is still open")
	}
}
