package compsc_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// pageNumbers is a set of pages of 4 KiB.
type pageNumbers map[uint64]bool

func (p pageNumbers) add(addr uint64, n int) {
	for i := addr >> 12; i <= (addr+uint64(n)-1)>>12; i++ {
		p[i] = true
	}
}

// deviceMemory is the guest's memory as the device reaches it. It records the
// truth about what the device writes.
type deviceMemory struct {
	*guestMemory
	mu      sync.Mutex
	written pageNumbers
}

func (m *deviceMemory) WriteAt(addr uint64, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.written.add(addr, len(p))
	return m.guestMemory.WriteAt(addr, p)
}

func (m *deviceMemory) pages() []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.written))
}

// trackRig is a driver on a VF of the model.
type trackRig struct {
	*guest
	silicon *model.VF
	device  *deviceMemory
	out     wire
	told    pageNumbers
	marks   byte
}

func newTrackRig(t *testing.T, spoil ...func(*model.Config)) *trackRig {
	t.Helper()
	mem := &guestMemory{data: make([]byte, 1<<20)}
	r := &trackRig{device: &deviceMemory{guestMemory: mem, written: pageNumbers{}}, out: make(wire, 64), told: pageNumbers{}}
	cfg := model.DefaultConfig()
	for _, change := range spoil {
		change(&cfg)
	}
	r.silicon = model.New(cfg, r.device, r.out, func(int) {})
	t.Cleanup(r.silicon.Close)
	v := compsc.New(ixgbevf.New(cfg.QueuePairs), r.silicon, compsc.Options{Memory: mem, Logger: slog.New(slog.DiscardHandler)})
	r.guest = &guest{t: t, mem: mem, vf: v}
	r.start()
	return r
}

// traffic has n frames received and n sent.
func (r *trackRig) traffic(n int) {
	r.t.Helper()
	for range n {
		r.marks++
		in := frame(guestMAC, []byte{2, 0, 0, 0, 0, 9}, r.marks)
		r.silicon.Receive(in)
		r.receive(in)
		want := r.transmit()
		select {
		case got := <-r.out:
			if !bytes.Equal(got, want) {
				r.t.Fatalf("sent %x, want %x", got, want)
			}
		case <-time.After(10 * time.Second):
			r.t.Fatal("a frame was not sent")
		}
	}
}

// begin forgets what the device wrote up to now, and tracks.
func (r *trackRig) begin() {
	r.device.mu.Lock()
	clear(r.device.written)
	r.device.mu.Unlock()
	r.vf.Track(r.told.add)
}

// end quiesces the VF and returns what was written, and what was told.
func (r *trackRig) end() (wrote, told []uint64) {
	r.t.Helper()
	if err := r.vf.Quiesce(context.Background()); err != nil {
		r.t.Fatal(err)
	}
	if err := r.vf.FlushTracked(); err != nil {
		r.t.Fatal(err)
	}
	return r.device.pages(), slices.Sorted(maps.Keys(r.told))
}

// buffers are the pages of so many receive buffers of 2 KiB, from the first on.
func buffers(from, n int) pageNumbers {
	p := pageNumbers{}
	for i := range n {
		p.add(rxBuffers+bufSize*uint64((from+i)%size), bufSize)
	}
	return p
}

// What is told is what the device wrote: buffers that it used and the rings,
// and no buffer that it did not use.
func TestTrackedPagesAreThoseTheDeviceWrote(t *testing.T) {
	for _, before := range []int{0, 4, size, 2*size + 6} {
		for _, during := range []int{0, 2, 10, size, 3*size + 4} {
			r := newTrackRig(t)
			r.traffic(before)
			r.begin()
			r.traffic(during)
			wrote, told := r.end()
			want := buffers(before, min(during, size))
			want.add(rxRing, size*16)
			want.add(txRing, size*16)
			if !slices.Equal(told, slices.Sorted(maps.Keys(want))) {
				t.Errorf("%d frames before and %d after: told %x, want %x", before, during, told, slices.Sorted(maps.Keys(want)))
			}
			for _, p := range wrote {
				if !slices.Contains(told, p) {
					t.Errorf("%d frames before and %d after: page %#x was written and is not told", before, during, p)
				}
			}
			if during > 0 && len(wrote) < 3 {
				t.Errorf("the device wrote pages %x only", wrote)
			}
		}
	}
}

// A device that coalesces comes back to the header of a frame whose first
// descriptors it has written back, and used, already.
func TestTrackFollowsCoalescedFrames(t *testing.T) {
	clock := model.NewManualClock()
	r := newTrackRig(t, func(c *model.Config) { c.Clock, c.Coalescing = clock, true })
	r.vf.GuestWrite(ixgbevf.VFRSCCTL(0), ixgbevf.RSCCTLEnable|3<<2)
	r.vf.GuestWrite(ixgbevf.VTEIAC, 3)
	r.vf.GuestWrite(ixgbevf.VTEITR(0), intervalValue)
	r.vf.GuestRead(ixgbevf.VTEICR)
	r.begin()
	s := &tcp{}
	in := func(n int) {
		for range n {
			r.silicon.Receive(s.segment(0, 1400))
		}
	}
	in(1) // starts the interval
	in(4) // goes on in the third descriptor, on another page than the first
	if err := r.vf.FlushTracked(); err != nil {
		t.Fatal(err)
	}
	if head := r.vf.GuestRead(ixgbevf.VFRDH(0)); head < 3 {
		t.Fatalf("the head is at %d: the frame does not go on", head)
	}
	r.device.mu.Lock()
	clear(r.device.written)
	r.device.mu.Unlock()
	clear(r.told)
	in(1)
	wrote, told := r.end()
	if len(wrote) < 3 {
		t.Errorf("the device wrote pages %x only", wrote)
	}
	for _, p := range wrote {
		if !slices.Contains(told, p) {
			t.Errorf("page %#x was written and is not told", p)
		}
	}
	// Told twice is enough.
	clear(r.told)
	if err := r.vf.FlushTracked(); err != nil {
		t.Fatal(err)
	}
	if r.told[rxBuffers>>12] {
		t.Error("the first buffer is told a third time")
	}
}

// A reset and a new ring elsewhere while the pages are tracked.
func TestTrackFollowsTheDriver(t *testing.T) {
	const rings, wb = 0x80000, 0x90000
	for name, restart := range map[string]func(r *trackRig){
		"reset": func(r *trackRig) { r.vf.GuestWrite(ixgbevf.VFCTRL, ixgbevf.CtrlRST) },
		"off": func(r *trackRig) {
			r.vf.GuestWrite(ixgbevf.VFRXDCTL(0), 0)
			r.eventually("queue off", func() bool { return r.vf.GuestRead(ixgbevf.VFRXDCTL(0))&ixgbevf.QueueEnable == 0 })
		},
		"function reset": func(r *trackRig) { r.vf.FunctionReset(r.silicon.FLR) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newTrackRig(t)
			r.begin()
			r.traffic(3)
			restart(r)
			if name != "off" {
				r.rx, r.tx = 0, 0
				r.start()
			}
			// Another driver takes over, with rings of its own.
			w := r.vf.GuestWrite
			w(ixgbevf.VFRXDCTL(0), 0)
			w(ixgbevf.VFTXDCTL(0), 0)
			r.eventually("queues off", func() bool {
				return (r.vf.GuestRead(ixgbevf.VFRXDCTL(0))|r.vf.GuestRead(ixgbevf.VFTXDCTL(0)))&ixgbevf.QueueEnable == 0
			})
			r.put(rings, 0xa0000, 0)
			r.put(rings+16, 0xa2000, 0)
			w(ixgbevf.VFRDBAL(0), rings)
			w(ixgbevf.VFRDH(0), 0)
			w(ixgbevf.VFRDT(0), 2)
			w(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
			w(ixgbevf.VFRDT(0), 2)
			w(ixgbevf.VFTDBAL(0), rings+0x1000)
			w(ixgbevf.VFTDH(0), 0)
			w(ixgbevf.VFTDT(0), 0)
			w(ixgbevf.VFTDWBAL(0), wb|1)
			w(ixgbevf.VFTXDCTL(0), ixgbevf.QueueEnable|0x20)
			in := frame(guestMAC, []byte{2, 0, 0, 0, 0, 9}, 99)
			r.silicon.Receive(in)
			r.eventually("received frame", func() bool { return r.get(rings+8)&1 != 0 })
			wrote, told := r.end()
			for _, p := range append(wrote, rings>>12, rings>>12+1, wb>>12, rxRing>>12, txRing>>12, 0xa0000>>12) {
				if !slices.Contains(told, p) {
					t.Errorf("page %#x was written and is not told: %x", p, told)
				}
			}
			if slices.Contains(told, 0xa2) {
				t.Errorf("the second buffer was not used and is told: %x", told)
			}
		})
	}
}

// A ring that cannot be read leaves it open what the device writes.
func TestTrackOwnsUp(t *testing.T) {
	r := newTrackRig(t)
	if err := r.vf.FlushTracked(); err == nil {
		t.Error("pages are told that are not tracked")
	}
	r.begin()
	all := r.mem.data
	r.mem.mu.Lock()
	r.mem.data = all[:rxRing]
	r.mem.mu.Unlock()
	r.vf.GuestWrite(ixgbevf.VFRDT(0), 0)
	r.mem.mu.Lock()
	r.mem.data = all
	r.mem.mu.Unlock()
	if err := r.vf.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := r.vf.FlushTracked(); err == nil || errors.Unwrap(err) == nil {
		t.Errorf("descriptors could not be read, and the answer is %v", err)
	}
	r.vf.Untrack()
	if err := r.vf.FlushTracked(); err == nil {
		t.Error("pages are told that are not tracked any more")
	}
}

// After a reset that leaves nothing in the registers, what was written before
// it is still told.
func TestTrackOutlivesAReset(t *testing.T) {
	r := newTrackRig(t)
	r.begin()
	// The driver does not get to give the buffers back.
	for n := range uint64(3) {
		r.silicon.Receive(frame(guestMAC, []byte{2, 0, 0, 0, 0, 9}, byte(n)))
		r.eventually("received frame", func() bool { return r.get(rxRing+16*n+8)&1 != 0 })
	}
	r.vf.FunctionReset(func() {
		r.silicon.FLR()
		for _, off := range []uint32{ixgbevf.VFRDBAL(0), ixgbevf.VFRDLEN(0), ixgbevf.VFRDH(0), ixgbevf.VFTDBAL(0), ixgbevf.VFTDLEN(0)} {
			r.silicon.Write(off, 0)
		}
	})
	wrote, told := r.end()
	for _, p := range wrote {
		if !slices.Contains(told, p) {
			t.Errorf("page %#x was written and is not told: %x", p, told)
		}
	}
}
