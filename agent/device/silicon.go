package device

import (
	"context"
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
)

// silicon is a VF's registers, whatever stands behind them.
type silicon interface {
	compsc.Backend
	// Scratch is memory that the VF reaches and the guest does not use.
	Scratch() compsc.Scratch
	// FLR is a function-level reset.
	FLR()
	// Announce sends a frame on the VF's network, past the guest's rings.
	Announce(frame []byte) error
	// Close ends the use of the VF and closes its descriptors.
	Close()
}

// deviceType is what a PCI id says.
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
		f, err := ixgbevf.ForDevice(ixgbevf.VendorID, m.Device, modelQueuePairs)
		add(ixgbevf.VendorID, m.Device, f, err)
	}
	for _, m := range igbvf.Members() {
		f, err := igbvf.ForDevice(igbvf.VendorID, m.Device)
		add(igbvf.VendorID, m.Device, f, err)
	}
	return types
}()

// modelQueuePairs is the number of queue pairs of an 82599 VF when the PF
// runs 64 pools, which is how Linux's driver sets it up for up to 63 VFs.
const modelQueuePairs = 2

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

// openSilicon opens the VF's backend; it owns files.
func openSilicon(h handoff.Handoff, dt deviceType, files []*os.File, mem dirty.Tracked, irq func(int), log *slog.Logger) (silicon, error) {
	if h.Backend != handoff.BackendModel {
		handoff.CloseAll(files)
		return nil, fmt.Errorf("backend %q is not known: only %q is", h.Backend, handoff.BackendModel)
	}
	if dt.family.Name() != ixgbevf.Name {
		handoff.CloseAll(files)
		return nil, fmt.Errorf("the model is one of family %s, not %s", ixgbevf.Name, dt.family.Name())
	}
	if len(files) != 1 {
		handoff.CloseAll(files)
		return nil, fmt.Errorf("the model takes one file, a tap's queue, not %d", len(files))
	}
	return openModel(h, dt, files[0], mem, irq, log)
}

// modelVF is the model with its wire.
type modelVF struct {
	*model.VF
	scratch *model.Scratch
	wire    *model.TapWire
	stop    func()
}

// Where the model finds its scratch memory: beyond what an x86 processor can
// address, and large enough for the longest ring in every queue. What of it is
// never used costs nothing.
const (
	scratchAddr = 1 << 52
	scratchSize = 2 * modelQueuePairs * (1<<20 + 4<<10)
)

// Scratch is memory laid over the guest's.
func (m *modelVF) Scratch() compsc.Scratch { return m.scratch }

// Announce sends a frame on the wire, as the PF could.
func (m *modelVF) Announce(frame []byte) error { return m.wire.Transmit(frame) }

func openModel(h handoff.Handoff, dt deviceType, tap *os.File, mem dirty.Tracked, irq func(int), log *slog.Logger) (silicon, error) {
	cfg := model.DefaultConfig()
	cfg.DeviceID = dt.device
	cfg.QueuePairs = modelQueuePairs
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
			return nil, err
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
	return &modelVF{vf, scratch, wire, func() {
		cancel()
		wire.Close()
		<-ended
	}}, nil
}

// Close ends the wire and the model.
func (m *modelVF) Close() {
	m.stop()
	m.VF.Close()
}
