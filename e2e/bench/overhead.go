package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sync/errgroup"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/device/dirty"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
	"compsc.io/compsc/agent/vfiouser"
)

// overheadTarget is how much of the packet rate may be lost, in percent.
const overheadTarget = 2

// A sample of the comparison is a block of rounds, in each of which every way
// has a short turn; of each way the fastest turn counts. What else the machine
// does can only slow a turn down, and leaves some alone if they are short.
const (
	blocks        = 30
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
	name     string
	engine   bool
	tracking tracking
}

// tracking is who knows which pages the VF writes.
type tracking int

const (
	untracked tracking = iota
	// byMemory: whoever writes, as the model of this process does.
	byMemory
	// byEngine: the engine, from the descriptors, as with a VF behind an IOMMU
	// that has no dirty bits.
	byEngine
)

// ways differ in nothing but what recording and tracking add. On the first, a
// register access goes to the model as it is, and the model writes to the
// guest's memory as it is.
var ways = []way{
	{"without", false, untracked},
	{"with recording", true, untracked},
	{"with recording and tracking", true, byMemory},
	{"with recording and tracking by the engine", true, byEngine},
}

func (w way) socket(dir string) string { return filepath.Join(dir, w.name+".sock") }

// wayDevice is a VF of the model behind a vfio-user server, on its way.
type wayDevice struct {
	plainDevice
	mem  vfiouser.Memory
	vf   *model.VF
	bar  bar
	wire loopWire
}

// loopWire brings what the VF sends back to it.
type loopWire struct{ vf *model.VF }

func (w *loopWire) Transmit(frame []byte) error {
	w.vf.Receive(frame)
	return nil
}

func newWayDevice(w way) *wayDevice {
	d := &wayDevice{}
	cfg := model.DefaultConfig()
	cfg.AdminMAC = guestMAC
	if !w.engine {
		d.vf = model.New(cfg, &d.mem, &d.wire, func(int) {})
		d.bar = d.vf
	} else {
		pages := &dirty.Set{}
		if w.tracking != untracked {
			pages.Start()
		}
		tracked := dirty.Tracked{Memory: &d.mem, Pages: pages}
		var e *compsc.VF
		var reached model.Memory = tracked
		if w.tracking == byEngine {
			reached = &d.mem
		}
		d.vf = model.New(cfg, reached, &d.wire, func(vector int) { e.Interrupt(vector) })
		e = compsc.New(ixgbevf.New(cfg.QueuePairs), d.vf, compsc.Options{
			VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID, Memory: tracked, Logger: slog.New(slog.DiscardHandler)})
		if w.tracking == byEngine {
			e.Track(func(addr uint64, n int) { d.wrote(pages, addr, n) })
		}
		d.bar = guestBar{e}
	}
	d.wire.vf = d.vf
	return d
}

// wrote adds the pages of guest memory among n bytes, as the device process does.
func (d *wayDevice) wrote(pages *dirty.Set, addr uint64, n int) {
	const pageSize = 4096
	for end := addr + uint64(n); addr < end; addr = addr&^(pageSize-1) + pageSize {
		if d.mem.Writable(addr) {
			pages.Add(addr, 1)
		}
	}
}

// The methods of a vfio-user device that differ from plainDevice's.

func (d *wayDevice) RegionRead(_ uint32, off uint64, p []byte) error {
	le.PutUint32(p, d.bar.Read(uint32(off)))
	return nil
}

func (d *wayDevice) RegionWrite(_ uint32, off uint64, p []byte) error {
	d.bar.Write(uint32(off), le.Uint32(p))
	return nil
}

func (d *wayDevice) DMAMap(m vfiouser.DMAMap) error { return d.mem.Map(m) }

// serveWays has all ways in one process, each on a socket in a directory.
func serveWays(ctx context.Context, args []string) error {
	ctx, cancel := untilStdinEnds(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	for _, w := range ways {
		d := newWayDevice(w)
		defer d.vf.Close()
		s, err := vfiouser.Listen(w.socket(args[0]), d, vfiouser.Options{})
		if err != nil {
			return err
		}
		group.Go(func() error { return s.Serve(ctx) })
	}
	fmt.Println("ready")
	return group.Wait()
}

// guest is a guest on one of the ways.
type guest struct {
	conn   *rawConn
	driver *driver
	// best is the fastest turn of the block, in frames a second, and least the
	// one that took least of the server's processors, in nanoseconds a frame;
	// rates and work have those of each block.
	best, least float64
	rates, work []float64
}

// measureOverhead compares the packet rate of a guest whose VF is recorded and
// tracked with that of one whose VF is not.
func measureOverhead(ctx context.Context, r *report) error {
	dir, err := os.MkdirTemp("", "compsc-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	server, err := startSelf(ctx, "serve-ways", dir)
	if err != nil {
		return err
	}
	defer server.stop()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	guests := make([]*guest, len(ways))
	for i, w := range ways {
		g := &guest{least: math.Inf(1)}
		if g.conn, err = dialRaw(accessServer{Path: w.socket(dir)}); err == nil {
			g.driver, err = g.conn.bringUp()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		g.fillBuffers()
		guests[i] = g
	}
	// A processor for the guest and one for the server, whose work then shows in
	// full; left to the scheduler, its choices make more of a difference.
	processors, err := usable()
	if err != nil {
		return err
	}
	if err := errors.Join(pin(os.Getpid(), processors[0]), pin(server.cmd.Process.Pid, processors[min(1, len(processors)-1)])); err != nil {
		return err
	}
	for block := range blocks + 1 { // the first is to warm up
		if err := ctx.Err(); err != nil {
			return err
		}
		for round := range rounds {
			for i := range guests {
				n := (i + round) % len(guests) // none is always the first
				if err := guests[n].turn(server.cmd.Process.Pid); err != nil {
					return fmt.Errorf("%s: %w", ways[n].name, err)
				}
			}
		}
		for _, g := range guests {
			if block > 0 {
				g.rates, g.work = append(g.rates, g.best), append(g.work, g.least)
			}
			g.best, g.least = 0, math.Inf(1)
		}
	}
	const section = "Guest's packet rate, sent and received on the model through vfio-user"
	for i, w := range ways {
		r.addRate(section, w.name, "/s", guests[i].rates).note("server's processor %s µs a frame", number(median(guests[i].work)/1e3))
	}
	for i, w := range ways[1:] {
		lost := ratios(guests[i+1].rates, guests[0].rates)
		for n := range lost {
			lost[n] = 100 * (1 - lost[n])
		}
		more := ratios(guests[i+1].work, guests[0].work)
		for n := range more {
			more[n] = 100 * (more[n] - 1)
		}
		r.add(section, w.name+": lost", "%", lost).below(overheadTarget)
		r.add(section, w.name+": more work of the server", "%", more)
	}
	return nil
}

// fillBuffers puts a datagram of the guest to itself into each transmit buffer.
func (g *guest) fillBuffers() {
	f := make([]byte, frameSize)
	copy(f, guestMAC)
	copy(f[6:], guestMAC)
	f[12], f[13] = 0x08, 0x00
	f[14], f[22], f[23] = 0x45, 64, 17
	f[16], f[17] = byte((frameSize-14)>>8), byte((frameSize-14)&0xff)
	f[38], f[39] = byte((frameSize-34)>>8), byte((frameSize-34)&0xff)
	for i := range ringLen {
		copy(g.driver.ram[txBuffer(i):], f)
	}
}

// turn sends frames as ixgbevf does, with a doorbell for each, and receives them
// all.
func (g *guest) turn(server int) error {
	d := g.driver
	before, err := processorTime(server)
	if err != nil {
		return err
	}
	began := time.Now()
	for done := 0; done < framesPerTurn; done += burst {
		for range burst {
			at := txRing(0) + uint64(d.txNext)*descriptorSize
			le.PutUint64(d.ram[at:], txBuffer(d.txNext))
			// Advanced data descriptor: EOP, IFCS, RS, DEXT.
			le.PutUint32(d.ram[at+8:], frameSize|3<<20|1<<24|1<<25|1<<27|1<<29)
			le.PutUint32(d.ram[at+12:], frameSize<<14)
			d.txNext = (d.txNext + 1) % ringLen
			d.bar.Write(ixgbevf.VFTDT(0), uint32(d.txNext))
		}
		if err := d.poll(burst); err != nil {
			return errors.Join(err, g.conn.err)
		}
		d.bar.Write(ixgbevf.VTEIMS, 1) // end of the poll
	}
	took := time.Since(began)
	after, err := processorTime(server)
	if err != nil {
		return err
	}
	g.best = max(g.best, framesPerTurn/took.Seconds())
	g.least = min(g.least, (after-before)/framesPerTurn)
	return g.conn.err
}

// poll takes n frames out of the receive ring, and gives the descriptors back.
func (d *driver) poll(n int) error {
	for cleaned := range n {
		at := rxRing(0) + uint64(d.rxNext)*descriptorSize
		status := (*atomic.Uint32)(unsafe.Pointer(&d.ram[at+8]))
		if err := await("frame", func() bool { return status.Load()&1 != 0 }); err != nil {
			return err
		}
		le.PutUint64(d.ram[at:], rxBuffer(d.rxNext))
		le.PutUint64(d.ram[at+8:], 0)
		d.rxNext = (d.rxNext + 1) % ringLen
		d.rxTail = (d.rxTail + 1) % ringLen
		if (cleaned+1)%rxRefill == 0 {
			d.bar.Write(ixgbevf.VFRDT(0), uint32(d.rxTail))
		}
	}
	return nil
}
