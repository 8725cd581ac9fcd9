package device

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"compsc.io/compsc/agent/compsc"
	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/dirty"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/qemu"
	"compsc.io/compsc/agent/vfiouser"
)

// interfaceConfig is one interface of the VM with a VF.
type interfaceConfig struct {
	// Name of the VMI's interface.
	Name string
	// Slot is the VF's device number on bus 0 of the guest, 1 to 31.
	Slot int
}

// iface is one interface of the VM with its VF. It comes with its VF and
// stays as long as the process.
type iface struct {
	cfg    interfaceConfig
	p      *process
	log    *slog.Logger
	server *vfiouser.Server
	memory vfiouser.Memory
	pages  dirty.Set
	// dma keeps what the VF reaches in step with memory. Taken before mu.
	dma sync.Mutex

	// driverSeen turns true with the guest's first access after watchDriver.
	driverSeen atomic.Bool
	watching   atomic.Bool
	// lost: the VF was given up because the node took it away.
	lost atomic.Bool

	mu      sync.Mutex
	vf      *attachedVF // nil until attached
	config  *pciConfig
	vectors []*vfiouser.Eventfd // nil entries: not connected
	missed  []bool              // fired while not connected
	running chan struct{}       // closed while the VF runs; open while it is stopped
	// waitUntil is until when the guest's accesses wait for a stopped VF; set
	// by the first of them.
	waitUntil time.Time
}

// attachedVF is a VF with what drives it.
type attachedVF struct {
	handoff handoff.Handoff
	device  deviceType
	silicon silicon
	engine  *compsc.VF
	// caps is what Probe found; set by judge, under the process's switchMu.
	caps compsc.Capabilities
}

// newIface makes the interface and its vfio-user socket.
func newIface(p *process, cfg interfaceConfig, log *slog.Logger) (*iface, error) {
	i := &iface{cfg: cfg, p: p, log: log, running: make(chan struct{})}
	close(i.running)
	var err error
	i.server, err = vfiouser.Listen(p.path(VFSocket(cfg.Slot)), i, vfiouser.Options{Logger: log})
	return i, err
}

func (i *iface) attached() bool { return i.get() != nil }

// qemuSocket is the VF's socket as QEMU sees it.
func (i *iface) qemuSocket() string { return filepath.Join(i.p.opts.QEMUDir, VFSocket(i.cfg.Slot)) }

func (i *iface) get() *attachedVF {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.vf
}

// attach builds what drives the VF. It owns files. Repeating what is attached
// already changes nothing.
func (i *iface) attach(h handoff.Handoff, files []*os.File) error {
	if have := i.get(); have != nil {
		handoff.CloseAll(files)
		if have.handoff != h {
			return fmt.Errorf("interface %s has VF %s at epoch %d already and does not take VF %s at epoch %d", h.Interface, have.handoff.VF, have.handoff.Epoch, h.VF, h.Epoch)
		}
		return nil
	}
	dt, err := deviceTypeFor(h)
	if err != nil {
		handoff.CloseAll(files)
		return err
	}
	if h.MAC != "" {
		if _, err := net.ParseMAC(h.MAC); err != nil {
			handoff.CloseAll(files)
			return fmt.Errorf("VF %s: MAC: %w", h.VF, err)
		}
	}
	memory := dirty.Tracked{Memory: &i.memory, Pages: &i.pages}
	s, dt, err := openSilicon(h, dt, files, memory, i.fire, func() { i.p.wanted(i) }, i.log)
	if err != nil {
		return fmt.Errorf("VF %s: %w", h.VF, err)
	}
	if err := i.take(h, dt, s, memory); err != nil {
		s.Close()
		return fmt.Errorf("VF %s: %w", h.VF, err)
	}
	i.log.Info("VF attached", "vf", h.VF, "role", h.Role, "epoch", h.Epoch, "queuePairs", len(dt.family.Queues())/2)
	return nil
}

// take drives the silicon from now on, unless it fails.
func (i *iface) take(h handoff.Handoff, dt deviceType, s silicon, memory dirty.Tracked) error {
	vf := &attachedVF{handoff: h, device: dt, silicon: s}
	if err := vf.checkFastPath(); err != nil {
		return fmt.Errorf("interface %s: %w", h.Interface, err)
	}
	vf.engine = compsc.New(dt.family, s, compsc.Options{
		VendorID: dt.vendor, DeviceID: dt.device, Memory: memory, Scratch: s.Scratch(), Direct: h.FastPath, Logger: i.log})
	ctx, cancel := context.WithTimeout(context.Background(), quiesceTimeout)
	defer cancel()
	// A VF may come with what a previous tenant left in it: it reaches nothing
	// of the guest's memory before that is gone.
	if err := vf.engine.Scrub(ctx); err != nil {
		return err
	}
	i.dma.Lock()
	defer i.dma.Unlock()
	if err := i.reachAll(s); err != nil {
		return err
	}
	n := dt.family.Interrupts().Vectors
	i.mu.Lock()
	defer i.mu.Unlock()
	i.vf = vf
	i.config = newPCIConfig(dt.vendor, dt.device, n)
	i.vectors = make([]*vfiouser.Eventfd, n)
	i.missed = make([]bool, n)
	return nil
}

func (i *iface) epoch() uint64 {
	if vf := i.get(); vf != nil {
		return vf.handoff.Epoch
	}
	return 0
}

// close ends the VF's use: nothing is enabled afterwards.
func (i *iface) close() {
	i.silence()
	i.disconnectVectors()
	if vf := i.get(); vf != nil {
		vf.silicon.Close()
	}
	if err := i.memory.Close(); err != nil {
		i.log.Error("guest memory stays mapped", "error", err)
	}
	if err := i.server.Close(); err != nil {
		i.log.Error("vfio-user socket stays open", "error", err)
	}
}

// silence stops the VF for good, or until it is restored.
func (i *iface) silence() {
	vf := i.get()
	if vf == nil || i.lost.Load() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), quiesceTimeout)
	defer cancel()
	if err := vf.engine.Scrub(ctx); err != nil {
		i.p.fail(fmt.Errorf("interface %s: VF %s could not be silenced: %w", i.cfg.Name, vf.handoff.VF, err))
	}
	i.setRunning(true)
}

// pciState reads what QEMU holds of the VF. Its reply comes behind every
// posted doorbell that QEMU sent before, so it also tells that they arrived.
func (i *iface) pciState(ctx context.Context) (qemu.PCIState, error) {
	i.mu.Lock()
	config, n := i.config.legacy(), len(i.vectors)
	i.mu.Unlock()
	table, err := qemu.ReadTable(ctx, i.server, config, n)
	return qemu.PCIState{Config: config, MSIX: table}, err
}

// describe tells the target what it must know before pre-copy.
func (i *iface) describe(ctx context.Context) (*pb.SourceInterface, error) {
	vf := i.get()
	if vf == nil {
		return nil, errors.New("no VF attached")
	}
	if i.lost.Load() {
		return nil, fmt.Errorf("VF %s was taken away by the node: restart the VM", vf.handoff.VF)
	}
	if !i.server.Connected() {
		return nil, errors.New("QEMU is not connected to the VF")
	}
	s, err := i.pciState(ctx)
	if err != nil {
		return nil, err
	}
	sum := vf.engine.Summary()
	return &pb.SourceInterface{
		Name:                i.cfg.Name,
		Family:              vf.device.family.Name(),
		VendorId:            uint32(vf.device.vendor),
		DeviceId:            uint32(vf.device.device),
		Mac:                 vf.handoff.MAC,
		MailboxApi:          sum.API,
		MulticastFilterType: sum.MulticastFilterType,
		NeedsHeadRestore:    vf.engine.HeadsInUse(),
		PciConfig:           s.Config,
		MsixTable:           s.MSIX,
		NotMigratable:       cmp.Or(vf.immovable(), sum.NotMigratable),
		FastPath:            vf.handoff.FastPath,
		Slot:                uint32(i.cfg.Slot),
		Socket:              i.qemuSocket(),
		MailboxRecord:       vf.engine.Record(),
	}, nil
}

// judge tells whether the VF here can take over the described one.
func (i *iface) judge(ctx context.Context, src *pb.SourceInterface) error {
	vf := i.get()
	if vf == nil {
		return errors.New("no VF attached")
	}
	if src.Slot != uint32(i.cfg.Slot) || src.Socket != i.qemuSocket() {
		return &compsc.IncompatibleError{Reason: "Incompatible", Message: fmt.Sprintf(
			"the VM has its VF in PCI slot %#x, at socket %s, the target pod expects slot %#x and socket %s: its interfaces have changed since it started, "+
				"or its pod has other sidecars; try again, and if that does not help restart the VM",
			src.Slot, src.Socket, i.cfg.Slot, i.qemuSocket())}
	}
	dt := vf.device
	if src.Family != dt.family.Name() || src.VendorId != uint32(dt.vendor) || src.DeviceId != uint32(dt.device) {
		return &compsc.IncompatibleError{Reason: "Incompatible", Message: fmt.Sprintf(
			"the source's VF is %04x:%04x (%s), the target's %04x:%04x (%s): choose a node with VFs of the same kind",
			src.VendorId, src.DeviceId, src.Family, dt.vendor, dt.device, dt.family.Name())}
	}
	if src.FastPath != vf.handoff.FastPath {
		return &compsc.IncompatibleError{Reason: "Incompatible", Message: fmt.Sprintf(
			"the VM has its VF with the fast path %s, the target pod was given one with it %s: the VMI's annotation has changed since the VM started; set it back, or restart the VM",
			onOff(src.FastPath), onOff(vf.handoff.FastPath))}
	}
	if src.Mac != vf.handoff.MAC {
		return &compsc.IncompatibleError{Reason: "Incompatible", Message: fmt.Sprintf(
			"the source's VF has MAC %q, the target's was given %q: check the target pod's network annotation", src.Mac, vf.handoff.MAC)}
	}
	if err := (qemu.PCIState{Config: src.PciConfig, MSIX: src.MsixTable}).Valid(dt.family.Interrupts().Vectors); err != nil {
		return &compsc.IncompatibleError{Reason: "Incompatible", Message: err.Error()}
	}
	caps, err := vf.engine.Probe(ctx)
	if err != nil {
		return err
	}
	vf.caps = caps
	// Where heads cannot be written the guest's rings may not be the device's.
	if err := vf.silicon.Forward(!caps.WritableRXHeads || !caps.WritableTXHeads); err != nil {
		return err
	}
	if err := compsc.CheckSummary(dt.family, summaryOf(src), src.NeedsHeadRestore, caps); err != nil {
		return err
	}
	return vf.engine.Rehearse(ctx, src.MailboxRecord, compsc.Rights{Addressed: vf.handoff.MAC != "", Trusted: vf.handoff.Trust})
}

// check judges a captured state, and fits it to this VF.
func (i *iface) check(s *compsc.State) error {
	vf := i.get()
	if vf == nil {
		return errors.New("no VF attached")
	}
	vf.device.fitQueues(s)
	if err := (qemu.PCIState{Config: s.PCIConfig, MSIX: s.MSIXTable}).Valid(vf.device.family.Interrupts().Vectors); err != nil {
		return err
	}
	return vf.engine.Check(s, vf.caps)
}

func (i *iface) quiesce(ctx context.Context) error {
	if err := i.get().engine.Quiesce(ctx); err != nil {
		return err
	}
	i.setRunning(false)
	return nil
}

func (i *iface) unquiesce() error {
	ctx, cancel := context.WithTimeout(context.Background(), quiesceTimeout)
	defer cancel()
	defer i.setRunning(true)
	return i.get().engine.Unquiesce(ctx)
}

// capture reads the state of a quiet VF.
func (i *iface) capture(ctx context.Context, pci qemu.PCIState) (*compsc.State, error) {
	vf := i.get()
	s, err := vf.engine.Capture(ctx)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	s.Interface = i.cfg.Name
	s.PCIConfig, s.MSIXTable = pci.Config, pci.MSIX
	return s, nil
}

// restore brings the state into the silent VF, which runs afterwards, and
// tells the network that the guest's MAC is here now.
func (i *iface) restore(ctx context.Context, s *compsc.State) (*pb.InterfaceRestore, error) {
	vf := i.get()
	r, err := vf.engine.Restore(ctx, s)
	if err != nil {
		return nil, err
	}
	reply := &pb.InterfaceRestore{
		Name:               i.cfg.Name,
		ReplayedOperations: uint32(r.ReplayedOperations),
		HeadsStrategy:      r.HeadsStrategy,
	}
	if mac := vf.engine.Summary().MAC; len(mac) == 6 {
		frame := announcement(mac)
		err := vf.silicon.Announce(frame)
		switch {
		case errors.Is(err, errPFAnnounces):
			reply.Announcement = frame
		case err != nil:
			// The guest's first frame will tell as well.
			i.log.Warn("the MAC could not be announced", "error", err)
		}
	}
	return reply, nil
}

// Info implements vfiouser.Device.
func (i *iface) Info() vfiouser.Info {
	const rw = vfiouser.RegionReadable | vfiouser.RegionWritable
	size, n := uint64(0), 0
	var direct *vfiouser.RegionMap
	if vf := i.get(); vf != nil {
		size, n = uint64(vf.device.family.BARSize()), vf.device.family.Interrupts().Vectors
		direct = vf.fastPath()
	}
	return vfiouser.Info{
		Regions: []vfiouser.Region{
			{Index: vfiouser.RegionBAR0, Size: size, Flags: rw, Map: direct},
			{Index: vfiouser.RegionBAR3, Size: size, Flags: rw},
			{Index: vfiouser.RegionConfig, Size: configSize, Flags: rw},
		},
		IRQs: []vfiouser.IRQ{
			{Index: vfiouser.IRQIndexMSIX, Count: uint32(n), Flags: vfiouser.IRQEventfd},
			{Index: vfiouser.IRQIndexError, Count: 1, Flags: vfiouser.IRQEventfd},
			{Index: vfiouser.IRQIndexRequest, Count: 1, Flags: vfiouser.IRQEventfd},
		},
	}
}

// Connected implements vfiouser.Device.
func (i *iface) Connected() {
	i.log.Info("QEMU connected")
	i.p.connected()
}

// Disconnected implements vfiouser.Device.
func (i *iface) Disconnected(reason error) {
	i.log.Info("QEMU disconnected", "reason", reason)
	i.disconnectVectors()
	i.silence() // before the VF's memory goes
	if err := i.DMAUnmap(vfiouser.DMAUnmap{All: true}); err != nil {
		i.log.Error("guest memory stays mapped", "error", err)
	}
	i.p.disconnected(i)
}

// Reset implements vfiouser.Device: a function-level reset. QEMU resets the
// device at its start and with the machine; a VF that waits for its state, or
// is stopped, has nothing to reset.
func (i *iface) Reset() error {
	vf := i.get()
	if vf == nil {
		return nil
	}
	if phase, _ := i.p.current(); phase != pb.Phase_PHASE_RUNNING && phase != pb.Phase_PHASE_SOURCE_PREPARED {
		return nil
	}
	vf.engine.FunctionReset(vf.silicon.FLR)
	return nil
}

// RegionRead implements vfiouser.Device.
func (i *iface) RegionRead(region uint32, off uint64, p []byte) error {
	switch region {
	case vfiouser.RegionConfig:
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.config == nil {
			return errors.New("no VF attached")
		}
		i.config.read(off, p)
	case vfiouser.RegionBAR0:
		vf := i.get()
		if vf == nil {
			return errors.New("no VF attached")
		}
		i.touched()
		return eachDword(off, p, func(o uint32, b []byte) {
			binary.LittleEndian.PutUint32(b, vf.engine.GuestRead(o))
		})
	default:
		// BAR3: QEMU serves the MSI-X table itself; no bit is ever pending.
		clear(p)
	}
	return nil
}

// RegionWrite implements vfiouser.Device.
func (i *iface) RegionWrite(region uint32, off uint64, p []byte) error {
	switch region {
	case vfiouser.RegionConfig:
		i.mu.Lock()
		defer i.mu.Unlock()
		if i.config == nil {
			return errors.New("no VF attached")
		}
		i.config.write(off, p)
	case vfiouser.RegionBAR0:
		vf := i.get()
		if vf == nil {
			return errors.New("no VF attached")
		}
		i.touched()
		return eachDword(off, p, func(o uint32, b []byte) {
			vf.engine.GuestWrite(o, binary.LittleEndian.Uint32(b))
		})
	}
	return nil
}

// eachDword splits an access to the registers, which are 32 bits wide. Other
// widths and unaligned accesses have no defined meaning on the VF.
func eachDword(off uint64, p []byte, f func(off uint32, b []byte)) error {
	if off%4 != 0 || len(p)%4 != 0 {
		return fmt.Errorf("register access of %d bytes at %#x is not of whole aligned dwords", len(p), off)
	}
	for o := 0; o < len(p); o += 4 {
		f(uint32(off)+uint32(o), p[o:o+4])
	}
	return nil
}
