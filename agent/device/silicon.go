package device

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"slices"
	"strings"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/device/dirty"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
	"compsc.io/compsc/agent/vfiouser"
)

// silicon is a VF, whatever stands behind it: its registers, its interrupts,
// and its DMA. All methods but Close are safe for concurrent use.
type silicon interface {
	compsc.Backend
	// Scratch is memory that the VF reaches and the guest does not use.
	Scratch() compsc.Scratch
	// FLR is a function-level reset.
	FLR()
	// Announce sends a frame on the VF's network, past the guest's rings. It
	// returns errPFAnnounces where only the PF can.
	Announce(frame []byte) error
	// GiveUp ends the use of the VF before Close does. It is called by the
	// engine's Lose, so that nobody uses registers or scratch memory.
	GiveUp()
	// Close ends the use of the VF and closes its descriptors.
	Close()

	// Map lets the VF reach guest memory by DMA, which stands at mem in this
	// process; Unmap takes that back.
	Map(addr uint64, mem []byte, readable, writable bool) error
	Unmap(addr, size uint64) error

	// Connect has the VF signal eventfd when it raises the vector; nil
	// disconnects it. DisconnectAll disconnects all.
	Connect(vector int, eventfd *vfiouser.Eventfd) error
	DisconnectAll() error
	// Forward decides whether interrupts come to this process first, and are
	// passed on by the iface: the engine must see them while the guest's rings
	// are not the device's.
	Forward(on bool) error

	// BARFile is the file by which BAR0 can be mapped, and where it begins in it;
	// nil for none. It stays the silicon's.
	BARFile() (*os.File, int64)

	// TellsWrites says whether the pages that the VF writes are known without
	// the engine's help: as tracked memory, or by TrackWrites and Writes.
	TellsWrites() bool
	// TrackWrites begins, or ends, to record which pages the VF writes by DMA.
	TrackWrites(on bool) error
	// Writes calls page for each page written in a range that was mapped.
	Writes(addr, size uint64, page func(addr uint64)) error
}

// errPFAnnounces says that the VF cannot announce, and that whoever is in
// charge of its PF has to.
var errPFAnnounces = errors.New("only the PF can announce the VF's address")

// deviceType is what a PCI id says; of an ixgbevf VF withQueues says the rest.
type deviceType struct {
	vendor, device uint16
	family         family.Family
}

// deviceTypes lists the VFs that can be mediated, by vendor:device.
var deviceTypes = func() map[string]deviceType {
	types := map[string]deviceType{}
	add := func(vendor, device uint16, f family.Family, err error) {
		if err != nil {
			panic(err) // a member that is none
		}
		types[fmt.Sprintf("%04x:%04x", vendor, device)] = deviceType{vendor, device, f}
	}
	for _, m := range ixgbevf.Members() {
		f, err := ixgbevf.ForDevice(ixgbevf.VendorID, m.Device, ixgbevf.DefaultQueuePairs)
		add(ixgbevf.VendorID, m.Device, f, err)
	}
	for _, m := range igbvf.Members() {
		f, err := igbvf.ForDevice(igbvf.VendorID, m.Device)
		add(igbvf.VendorID, m.Device, f, err)
	}
	return types
}()

// Families names the register family of each VF that can be mediated, by
// vendor:device in hexadecimal.
func Families() map[string]string {
	out := map[string]string{}
	for id, dt := range deviceTypes {
		out[id] = dt.family.Name()
	}
	return out
}

// ethernetHeader is what a frame has before its packet, in bytes.
const ethernetHeader = 14

func deviceTypeFor(h handoff.Handoff) (deviceType, error) {
	dt, ok := deviceTypes[h.DeviceID]
	if !ok {
		return deviceType{}, fmt.Errorf("VF %s is a %s, which no family describes: known are %s", h.VF, h.DeviceID,
			strings.Join(slices.Sorted(maps.Keys(deviceTypes)), ", "))
	}
	if h.Family != "" && h.Family != dt.family.Name() {
		return deviceType{}, fmt.Errorf("VF %s is a %s of family %s, not %s", h.VF, h.DeviceID, dt.family.Name(), h.Family)
	}
	return dt, nil
}

// openSilicon opens the VF's backend, and returns the VF's type with the queues
// that it has; it owns files. wanted is called when the VF is wanted back.
func openSilicon(h handoff.Handoff, dt deviceType, files []*os.File, mem dirty.Tracked, irq func(int), wanted func(), log *slog.Logger) (silicon, deviceType, error) {
	switch {
	case h.Backend == handoff.BackendVFIO:
		return openVFIO(h, dt, files, irq, wanted, log)
	case h.Backend != handoff.BackendModel:
		handoff.CloseAll(files)
		return nil, dt, fmt.Errorf("backend %q is not known: want %q or %q", h.Backend, handoff.BackendModel, handoff.BackendVFIO)
	case dt.family.Name() != ixgbevf.Name:
		handoff.CloseAll(files)
		return nil, dt, fmt.Errorf("there is no model of a %s of family %s: it needs backend %q", h.DeviceID, dt.family.Name(), handoff.BackendVFIO)
	case len(files) != 1:
		handoff.CloseAll(files)
		return nil, dt, fmt.Errorf("the model takes one file, a tap's queue, not %d", len(files))
	}
	return openModel(h, dt, files[0], mem, irq, log)
}

// modelVF is the model with its wire. It reaches guest memory through tracked,
// and its interrupts come to this process by themselves.
type modelVF struct {
	*model.VF
	inProcess
	scratch *model.Scratch
	wire    *model.TapWire
	stop    func()
}

// Where the model finds its scratch memory: beyond what an x86 processor can
// address, and large enough for the longest ring in every queue. What of it is
// never used costs nothing.
const (
	scratchAddr = 1 << 52
	scratchSize = 2 * ixgbevf.MaxQueuePairs * (1<<20 + 4<<10)
)

// Scratch is memory laid over the guest's.
func (m *modelVF) Scratch() compsc.Scratch { return m.scratch }

// Announce sends a frame on the wire, as the PF could.
func (m *modelVF) Announce(frame []byte) error { return m.wire.Transmit(frame) }

func openModel(h handoff.Handoff, dt deviceType, tap *os.File, mem dirty.Tracked, irq func(int), log *slog.Logger) (silicon, deviceType, error) {
	cfg := model.DefaultConfig()
	cfg.DeviceID = dt.device
	if h.Model.QueuePairs != 0 {
		cfg.QueuePairs = h.Model.QueuePairs
	}
	cfg.WritableRXHead = !h.Model.ReadOnlyRXHead
	cfg.WritableTXHead = !h.Model.ReadOnlyTXHead
	cfg.MulticastFilterType = h.Model.MulticastFilterType
	if h.Model.MTU != 0 {
		cfg.PFMaxFrame = h.Model.MTU + ethernetHeader
	}
	wire := model.NewTapWire(tap)
	scratch := model.NewScratch(scratchAddr, scratchSize)
	vf := model.New(cfg, scratch.Over(mem), wire, irq)
	if h.MAC != "" {
		mac, err := net.ParseMAC(h.MAC)
		if err != nil {
			wire.Close()
			return nil, dt, err
		}
		vf.SetAdminMAC(mac)
	}
	vf.SetTrust(h.Trust)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := wire.Run(ctx, vf.Receive); err != nil && ctx.Err() == nil {
			log.Error("the VF's wire ended", "vf", h.VF, "error", err)
		}
	}()
	m := &modelVF{VF: vf, scratch: scratch, wire: wire, stop: func() {
		cancel()
		wire.Close()
		<-ended
	}}
	dt, err := dt.withQueues(m, log)
	if err != nil {
		m.Close()
		return nil, dt, err
	}
	return m, dt, nil
}

// inProcess is the part of a silicon that a VF in this process has no need of.
type inProcess struct{}

func (inProcess) Map(uint64, []byte, bool, bool) error           { return nil }
func (inProcess) Unmap(uint64, uint64) error                     { return nil }
func (inProcess) Connect(int, *vfiouser.Eventfd) error           { return nil }
func (inProcess) DisconnectAll() error                           { return nil }
func (inProcess) Forward(bool) error                             { return nil }
func (inProcess) BARFile() (*os.File, int64)                     { return nil, 0 }
func (inProcess) TellsWrites() bool                              { return true }
func (inProcess) TrackWrites(bool) error                         { return nil }
func (inProcess) Writes(uint64, uint64, func(addr uint64)) error { return nil }

// GiveUp leaves the model silent.
func (m *modelVF) GiveUp() { m.FLR() }

// Close ends the wire and the model.
func (m *modelVF) Close() {
	m.stop()
	m.VF.Close()
}
