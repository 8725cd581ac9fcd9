package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
	"compsc.io/compsc/agent/vfiouser"
)

// What is asked for: capture and restore together in microseconds, and the size
// of a state in bytes.
const (
	moveTarget = 1000
	sizeTarget = 8 << 10
)

const (
	moves = 200
	// pagesMarked at once, and how often.
	pagesMarked = 1000
	markings    = 100
	// An 82599 has 128 filters for addresses and 64 for VLANs in all: no VF can
	// have more, and the VF's own address takes one.
	mostMACVLANs = 127
	mostVLANs    = 64
)

// guestKind is a guest with so much state.
type guestKind struct {
	name   string
	queues int
	// use is what its driver does after it was loaded; nil for none that was.
	use func(*driver) error
}

var guestKinds = []guestKind{
	{"empty (no driver)", ixgbevf.DefaultQueuePairs, nil},
	{"typical (as ixgbevf comes up)", ixgbevf.DefaultQueuePairs, func(*driver) error { return nil }},
	{fmt.Sprintf("full (%d macvlans, %d VLANs, %d groups, %d queue pairs)", mostMACVLANs, mostVLANs, ixgbevf.MaxMulticast, ixgbevf.MaxQueuePairs),
		ixgbevf.MaxQueuePairs, func(d *driver) error { return d.fillFilters(mostMACVLANs, mostVLANs) }},
}

// mediated is a VF of the model with its engine, put together as the device
// process does.
type mediated struct {
	vf     *model.VF
	engine *compsc.VF
	driver *driver
}

func newMediated(queues int, ram []byte, mem *vfiouser.Memory) *mediated {
	cfg := model.DefaultConfig()
	cfg.AdminMAC = guestMAC
	cfg.QueuePairs, cfg.MACVLANs, cfg.VLANs = queues, mostMACVLANs, mostVLANs
	scratch := model.NewScratch(1<<52, 2*queues*(ringBytes+(8<<10)))
	m := &mediated{vf: model.New(cfg, scratch.Over(mem), openWire{}, nil)}
	m.vf.SetTrust(true) // only such a VF gets macvlans
	m.engine = compsc.New(ixgbevf.New(queues), m.vf, compsc.Options{VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID,
		Memory: mem, Scratch: scratch, Logger: slog.New(slog.DiscardHandler)})
	m.driver = &driver{bar: guestBar{m.engine}, ram: ram}
	return m
}

// guestBar is the registers as the guest reaches them through the engine.
type guestBar struct{ *compsc.VF }

func (g guestBar) Read(off uint32) uint32 { return g.GuestRead(off) }
func (g guestBar) Write(off, v uint32)    { g.GuestWrite(off, v) }

// openWire ends nowhere.
type openWire struct{}

func (openWire) Transmit([]byte) error { return nil }

// measureSwitchover measures the steps of a move, and the size of the states.
func measureSwitchover(ctx context.Context, r *report) error {
	dir, err := os.MkdirTemp("", "compsc-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	p, err := connectPeers(ctx, dir)
	if err != nil {
		return err
	}
	defer p.close()
	for _, kind := range guestKinds {
		if err := measureMoves(ctx, r, kind, p); err != nil {
			return fmt.Errorf("%s: %w", kind.name, err)
		}
	}
	return measureMarking(ctx, r, filepath.Join(dir, "marking.sock"))
}

// stopwatch collects the times of named steps, in microseconds.
type stopwatch struct {
	names []string
	took  map[string][]float64
}

func (s *stopwatch) step(name string, do func() error) error {
	began := time.Now()
	err := do()
	if _, known := s.took[name]; !known {
		s.names = append(s.names, name)
	}
	s.took[name] = append(s.took[name], float64(time.Since(began).Nanoseconds())/1e3)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// guestMemory is the guest's memory on both sides: as bytes, and as the device
// process maps it.
func guestMemory() ([]byte, *vfiouser.Memory, error) {
	file, ram, err := newRAM()
	if err != nil {
		return nil, nil, err
	}
	mem := &vfiouser.Memory{}
	return ram, mem, mem.Map(vfiouser.DMAMap{Size: ramSize, Readable: true, Writable: true, File: file})
}

func measureMoves(ctx context.Context, r *report, kind guestKind, p *peers) error {
	ram, mem, err := guestMemory()
	if err != nil {
		return err
	}
	source, target := newMediated(kind.queues, ram, mem), newMediated(kind.queues, ram, mem)
	defer source.vf.Close()
	defer target.vf.Close()
	if kind.use != nil {
		if err := source.driver.bringUp(kind.queues); err != nil {
			return err
		}
		if err := kind.use(source.driver); err != nil {
			return err
		}
	}
	w := &stopwatch{took: map[string][]float64{}}
	size := 0
	for range moves {
		// As before a migration: nothing of the last guest is in the target.
		if err := target.engine.Scrub(ctx); err != nil {
			return err
		}
		caps, err := target.engine.Probe(ctx)
		if err != nil {
			return err
		}
		var s *compsc.State
		var sent, received []byte
		steps := []struct {
			name string
			do   func() error
		}{
			{"quiesce", func() error { return source.engine.Quiesce(ctx) }},
			{"capture", func() (err error) { s, err = source.engine.Capture(ctx); return }},
			{"encode", func() (err error) {
				s.MigrationUID, s.Interface, s.Epoch = "7f0f3c52-6a3b-4a5e-9e0e-1d9f8c1b2a3d", interfaceName, 1
				s.PCIConfig, s.MSIXTable = make([]byte, 256), make([]byte, 16*ixgbevf.MSIXVectors)
				sent, err = s.Encode()
				return
			}},
			{"transfer on loopback", func() (err error) { received, err = p.deliver(ctx, sent); return }},
			{"decode", func() (err error) { s, err = compsc.Decode(received); return }},
			{"check", func() error { return target.engine.Check(s, caps) }},
			{"restore", func() error { _, err := target.engine.Restore(ctx, s); return err }},
		}
		for _, step := range steps {
			if err := w.step(step.name, step.do); err != nil {
				return err
			}
		}
		size = len(sent)
		if err := source.engine.Unquiesce(ctx); err != nil {
			return err
		}
	}
	section := "Switchover, " + kind.name
	for _, name := range w.names {
		r.add(section, name, "µs", w.took[name])
	}
	both := make([]float64, moves)
	for i := range both {
		both[i] = w.took["capture"][i] + w.took["restore"][i]
	}
	r.add(section, "capture and restore", "µs", both).below(moveTarget)
	f := r.add(section, "state", "bytes", []float64{float64(size)})
	f.below(sizeTarget)
	return nil
}

// measureMarking has a client in a process of its own mark pages as dirty, as
// the device process has QEMU do: see its markPages.
func measureMarking(ctx context.Context, r *report, path string) error {
	dev := &mappedDevice{mapped: make(chan struct{}, 1)}
	server, err := vfiouser.Listen(path, dev, vfiouser.Options{})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- server.Serve(ctx) }()
	defer func() {
		cancel()
		<-served
	}()
	client, err := startSelf(ctx, "answer", path)
	if err != nil {
		return err
	}
	defer client.stop()
	select {
	case <-dev.mapped:
	case <-ctx.Done():
		return ctx.Err()
	}
	var samples []float64
	var b [1]byte
	for range markings {
		began := time.Now()
		for page := range uint64(pagesMarked) {
			if err := dev.ReadAt(page<<12, b[:]); err != nil {
				return err
			}
			if err := server.PostWrite(page<<12, b[:]); err != nil {
				return err
			}
		}
		if err := server.Fence(ctx, 0); err != nil {
			return err
		}
		samples = append(samples, float64(time.Since(began).Nanoseconds())/1e3)
	}
	r.add("Marking written pages", fmt.Sprintf("%d pages", pagesMarked), "µs", samples).note("the client answers from a process of its own, QEMU takes longer")
	return nil
}

// mappedDevice is a device with the client's memory, and no registers.
type mappedDevice struct {
	plainDevice
	vfiouser.Memory
	mapped chan struct{}
}

func (d *mappedDevice) DMAMap(m vfiouser.DMAMap) error {
	defer func() { d.mapped <- struct{}{} }()
	return d.Map(m)
}

func (d *mappedDevice) DMAUnmap(u vfiouser.DMAUnmap) error { return d.Unmap(u) }

// clientRAM is guest memory as its owner has it.
type clientRAM []byte

func (m clientRAM) ReadAt(addr uint64, p []byte) error { return m.move(addr, p, false) }

func (m clientRAM) WriteAt(addr uint64, p []byte) error { return m.move(addr, p, true) }

func (m clientRAM) move(addr uint64, p []byte, write bool) error {
	if addr > uint64(len(m)) || uint64(len(p)) > uint64(len(m))-addr {
		return fmt.Errorf("%d bytes at %#x are outside of the guest's memory", len(p), addr)
	}
	if write {
		copy(m[addr:], p)
	} else {
		copy(p, m[addr:])
	}
	return nil
}

// runAnswer is the client's process for measureMarking.
func runAnswer(ctx context.Context, args []string) error {
	ctx, cancel := untilStdinEnds(ctx)
	defer cancel()
	file, err := os.CreateTemp("/dev/shm", "compsc-bench-")
	if err != nil {
		return err
	}
	defer file.Close()
	if err := os.Remove(file.Name()); err != nil {
		return err
	}
	const size = pagesMarked << 12
	if err := file.Truncate(size); err != nil {
		return err
	}
	client, err := vfiouser.Dial(ctx, args[0], make(clientRAM, size))
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.DMAMap(ctx, vfiouser.DMAMap{Size: size, Readable: true, Writable: true, File: file}); err != nil {
		return err
	}
	fmt.Println("ready")
	select {
	case <-ctx.Done():
	case <-client.Done():
	}
	return nil
}
