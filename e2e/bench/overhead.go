package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/device/dirty"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
	"compsc.io/compsc/agent/vfiouser"
)

// overheadTarget is how much of the packet rate may be lost.
const overheadTarget = 0.02

// A sample of the comparison is a block of rounds, in each of which every way
// has a short turn; of each way the fastest turn counts. What else the machine
// does can only slow a turn down, and leaves some alone if they are short.
const (
	blocks        = 40
	rounds        = 30
	framesPerTurn = 1 << 10
	frameSize     = 256
	// rxRefill is how many receive descriptors ixgbevf gives back with one
	// doorbell (IXGBEVF_RX_BUFFER_WRITE); burst is the budget of one poll.
	rxRefill = 16
	burst    = 64
)

// way is one way from the guest's driver to the silicon.
type way struct {
	name   string
	driver *driver
	vf     *model.VF
	sent   *atomic.Uint64
	best   [2]float64
	rates  [2][]float64
}

// countingWire takes frames and counts them.
type countingWire struct{ n atomic.Uint64 }

func (w *countingWire) Transmit([]byte) error {
	w.n.Add(1)
	return nil
}

// guestBar is the registers as the guest reaches them through the engine.
type guestBar struct{ *compsc.VF }

func (g guestBar) Read(off uint32) uint32 { return g.GuestRead(off) }
func (g guestBar) Write(off, v uint32)    { g.GuestWrite(off, v) }

// guestMemory is the guest's memory on both sides: as bytes, and as the device
// process maps it.
func guestMemory() ([]byte, *vfiouser.Memory, error) {
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	file := os.NewFile(uintptr(fd), "ram")
	if err := file.Truncate(ramSize); err != nil {
		return nil, nil, err
	}
	ram, err := unix.Mmap(fd, 0, ramSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, err
	}
	mem := &vfiouser.Memory{}
	return ram, mem, mem.Map(vfiouser.DMAMap{Size: ramSize, Readable: true, Writable: true, File: file})
}

// newWay builds a VF of the model and brings it up. Without the engine, the
// driver has the model itself and the model the guest's memory itself: nothing
// of the product is in between.
func newWay(name string, engine, tracking bool) (*way, error) {
	ram, mem, err := guestMemory()
	if err != nil {
		return nil, err
	}
	wire := &countingWire{}
	cfg := model.DefaultConfig()
	cfg.AdminMAC = guestMAC
	w := &way{name: name, sent: &wire.n}
	if !engine {
		w.vf = model.New(cfg, mem, wire, func(int) {})
		w.driver = &driver{bar: w.vf, ram: ram}
	} else {
		pages := &dirty.Set{}
		if tracking {
			pages.Start()
		}
		tracked := dirty.Tracked{Memory: mem, Pages: pages}
		var e *compsc.VF
		w.vf = model.New(cfg, tracked, wire, func(vector int) { e.Interrupt(vector) })
		e = compsc.New(ixgbevf.New(cfg.QueuePairs), w.vf, compsc.Options{
			VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID, Memory: tracked, Logger: slog.New(slog.DiscardHandler)})
		w.driver = &driver{bar: guestBar{e}, ram: ram}
	}
	if err := w.driver.bringUp(cfg.QueuePairs); err != nil {
		w.vf.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return w, nil
}

// measureOverhead compares the packet rate of a guest whose VF is mediated and
// tracked with that of one that has the VF for itself.
func measureOverhead(ctx context.Context, r *report) error {
	var ways []*way
	for _, w := range []struct {
		name             string
		engine, tracking bool
	}{{"without", false, false}, {"with recording", true, false}, {"with recording and tracking", true, true}} {
		way, err := newWay(w.name, w.engine, w.tracking)
		if err != nil {
			return err
		}
		defer way.vf.Close()
		ways = append(ways, way)
	}
	frame := testFrame()
	for block := range blocks + 1 { // the first is to warm up
		if err := ctx.Err(); err != nil {
			return err
		}
		for round := range rounds {
			for i := range ways {
				w := ways[(i+round)%len(ways)] // none is always the first
				if err := w.turn(frame); err != nil {
					return fmt.Errorf("%s: %w", w.name, err)
				}
			}
		}
		for _, w := range ways {
			for dir, best := range w.best {
				if block > 0 {
					w.rates[dir] = append(w.rates[dir], best)
				}
			}
			w.best = [2]float64{}
		}
	}
	const section = "Guest's packet rate on the model"
	for dir, name := range []string{"receive", "transmit"} {
		for _, w := range ways {
			r.addRate(section, name+" "+w.name, "/s", w.rates[dir])
		}
		for _, w := range ways[1:] {
			lost := ratios(ways[0].rates[dir], w.rates[dir])
			for i := range lost {
				lost[i] = 100 * (1 - 1/lost[i])
			}
			f := r.add(section, name+" "+w.name+": lost", "%", lost)
			if w == ways[2] {
				f.below(100 * overheadTarget)
			}
		}
	}
	return nil
}

// turn pushes frames in both directions and notes how fast that was.
func (w *way) turn(frame []byte) error {
	for dir, push := range []func([]byte) error{w.receive, w.transmit} {
		began := time.Now()
		if err := push(frame); err != nil {
			return err
		}
		w.best[dir] = max(w.best[dir], framesPerTurn/time.Since(began).Seconds())
	}
	return nil
}

// testFrame is an UDP datagram to the guest.
func testFrame() []byte {
	f := make([]byte, frameSize)
	copy(f, guestMAC)
	copy(f[6:], guestMAC) // from itself too: the PF checks the source
	f[12], f[13] = 0x08, 0x00
	f[14], f[22], f[23] = 0x45, 64, 17
	f[16], f[17] = byte((frameSize-14)>>8), byte((frameSize-14)&0xff)
	f[38], f[39] = byte((frameSize-34)>>8), byte((frameSize-34)&0xff)
	return f
}

// receive has frames arrive, a poll's budget at a time, and takes them out of
// the ring as ixgbevf does.
func (w *way) receive(frame []byte) error {
	d := w.driver
	for done := 0; done < framesPerTurn; done += burst {
		for range burst {
			w.vf.Receive(frame)
		}
		d.bar.Read(ixgbevf.VTEICR)
		cleaned := 0
		for range burst {
			at := rxRing(0) + uint64(d.rxNext)*descriptorSize
			if le.Uint32(d.ram[at+8:])&1 == 0 {
				return fmt.Errorf("descriptor %d was not written back", d.rxNext)
			}
			le.PutUint64(d.ram[at:], rxBuffer(d.rxNext))
			le.PutUint64(d.ram[at+8:], 0)
			d.rxNext = (d.rxNext + 1) % ringLen
			d.rxTail = (d.rxTail + 1) % ringLen
			if cleaned++; cleaned%rxRefill == 0 {
				d.bar.Write(ixgbevf.VFRDT(0), uint32(d.rxTail))
			}
		}
		d.bar.Write(ixgbevf.VTEIMS, 1) // end of the poll
	}
	return nil
}

// transmit sends frames with a doorbell for each, and waits for every burst to
// be out.
func (w *way) transmit(frame []byte) error {
	d := w.driver
	before := w.sent.Load()
	for i := range ringLen {
		copy(d.ram[txBuffer(i):], frame)
	}
	for done := 0; done < framesPerTurn; done += burst {
		last := uint64(0)
		for range burst {
			last = txRing(0) + uint64(d.txNext)*descriptorSize
			le.PutUint64(d.ram[last:], txBuffer(d.txNext))
			// Advanced data descriptor: EOP, IFCS, RS, DEXT.
			le.PutUint32(d.ram[last+8:], frameSize|3<<20|1<<24|1<<25|1<<27|1<<29)
			le.PutUint32(d.ram[last+12:], frameSize<<14)
			d.txNext = (d.txNext + 1) % ringLen
			d.bar.Write(ixgbevf.VFTDT(0), uint32(d.txNext))
		}
		err := await("completion of a transmit descriptor", func() bool {
			if le.Uint32(d.ram[last+12:])&1 != 0 {
				return true
			}
			runtime.Gosched()
			return false
		})
		if err != nil {
			return err
		}
		d.bar.Write(ixgbevf.VTEIMS, 1)
	}
	if sent := w.sent.Load() - before; sent != framesPerTurn {
		return fmt.Errorf("%d frames were sent of %d", sent, framesPerTurn)
	}
	return nil
}
