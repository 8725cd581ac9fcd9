package twin

import (
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// host is what a VF is plugged into: the memory and the wire of whoever has it
// now. Both outlive the VF's stay with one tenant.
type host struct {
	mu     sync.Mutex
	memory []byte
	frames [][]byte
}

func newHost(size uint64) *host { return &host{memory: make([]byte, size)} }

// access wraps addresses at the end of the memory, so that whatever a guest
// programs, the device finds memory.
func (h *host) access(addr uint64, p []byte, move func(memory, p []byte) int) {
	for len(p) > 0 {
		n := move(h.memory[addr%uint64(len(h.memory)):], p)
		addr, p = addr+uint64(n), p[n:]
	}
}

// scratchAt is where a VF finds its engine's scratch memory.
const scratchAt = 1 << 40

// socket connects a VF to its host of the moment, and to scratch memory that
// stays with the VF. It is what the model and the engine call.
type socket struct {
	mu      sync.Mutex
	host    *host
	scratch []byte
}

// Range tells where the scratch memory is.
func (s *socket) Range() (addr uint64, size int) { return scratchAt, len(s.scratch) }

func (s *socket) get() *host {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.host
}

func (s *socket) plug(h *host) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.host = h
}

func (s *socket) access(addr uint64, p []byte, move func(memory, p []byte) int) error {
	if addr >= scratchAt && addr+uint64(len(p)) <= scratchAt+uint64(len(s.scratch)) {
		s.mu.Lock()
		defer s.mu.Unlock()
		move(s.scratch[addr-scratchAt:], p)
		return nil
	}
	h := s.get()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.access(addr, p, move)
	return nil
}

// ReadAt reads the memory of the tenant, or the scratch memory.
func (s *socket) ReadAt(addr uint64, p []byte) error {
	return s.access(addr, p, func(memory, p []byte) int { return copy(p, memory) })
}

// WriteAt is ReadAt for writing.
func (s *socket) WriteAt(addr uint64, p []byte) error {
	return s.access(addr, p, func(memory, p []byte) int { return copy(memory, p) })
}

// Transmit puts a frame on the tenant's wire.
func (s *socket) Transmit(frame []byte) error {
	h := s.get()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.frames = append(h.frames, frame)
	return nil
}

// silicon is one VF of the model with its socket.
type silicon struct {
	*model.VF
	socket socket
	name   string
	cfg    model.Config
	fleet  *fleet
	// loops tells that its PF can loop frames to it.
	loops bool
	// pingAfter is after how many requests the PF sends a message of its own,
	// counted down to 0.
	pingAfter int
	// engine is the one in front of it.
	engine atomic.Pointer[compsc.VF]
}

// interrupt lets the engine have every interrupt first, as the device's
// process does. What counts as delivered is what the model counts.
func (s *silicon) interrupt(vector int) {
	if e := s.engine.Load(); e != nil {
		e.Interrupt(vector)
	}
}

// Write writes a register; one of the requests may cross a message of the PF.
func (s *silicon) Write(off, value uint32) {
	s.VF.Write(off, value)
	if s.pingAfter > 0 && off == ixgbevf.VFMAILBOX && value&ixgbevf.MailboxREQ != 0 {
		if s.pingAfter--; s.pingAfter == 0 {
			s.Ping()
		}
	}
}

// looping is a VF whose PF can loop frames to it.
type looping struct{ *silicon }

// Loop has the frame arrive at the VF's filters, unless the PF lets nothing
// untagged through to it now: to wait for that in vain takes long.
func (l looping) Loop(frame []byte) error {
	if pf := l.Stats().PF; !pf.ReceiveEnabled || !pf.Untagged {
		return errors.New("the PF loops no frames to a VF that receives none")
	}
	return l.VF.Loop(frame)
}

// backend is the VF as its engine gets it.
func (s *silicon) backend() compsc.Backend {
	if s.loops {
		return looping{s}
	}
	return s
}

// provision is what the host's agent does before a VF is given to a tenant.
// What a tenant did to the PF's settings ends with it.
func (s *silicon) provision() error {
	s.SetSpoofCheck(s.fleet.cfg.SpoofCheck)
	s.SetTrust(s.fleet.trusted)
	mac := s.fleet.cfg.AdminMAC
	if mac == nil {
		mac = make(net.HardwareAddr, 6)
	}
	if err := s.SetAdminMAC(mac); err != nil {
		return err
	}
	return s.SetVLAN(s.fleet.portVLAN)
}

// fleet is what all VFs that the guest may come to have in common: what a
// guest was told by one PF must hold at the next.
type fleet struct {
	cfg model.Config
	// family and member are what all of them are.
	family *ixgbevf.Family
	member ixgbevf.Member
	layout
	trusted bool
	// trustTaken tells that they once were and then were not.
	trustTaken bool
	portVLAN   uint16
	// headsVary has VFs with every combination of heads that can be written
	// and not; otherwise all can be.
	headsVary bool
	built     int
	// clock is that of all VFs: time passes when the guest lets it, so that a
	// seed decides what an interval of interrupt moderation holds back.
	clock *model.ManualClock
	// vfs are all VFs there are.
	vfs []*silicon
	// unplugged tells that the link of all of them is down.
	unplugged bool
	// counters of the VFs that the twins start on.
	counters model.Counters
}

// chance is true n times in of.
func chance(r *rand.Rand, n, of int) bool { return r.IntN(of) < n }

func pick[T any](r *rand.Rand, list ...T) T { return list[r.IntN(len(list))] }

// apis are the API versions that PFs take: those of the kernel's driver, of
// Intel's own, and of one for ESX.
var apis = [][]uint32{
	model.DefaultConfig().APIs,
	{ixgbevf.API10, ixgbevf.API11, ixgbevf.API12, ixgbevf.API13, ixgbevf.API16, ixgbevf.API17},
	{ixgbevf.API10, ixgbevf.API11, ixgbevf.API12, ixgbevf.API13, ixgbevf.API14, ixgbevf.API15, ixgbevf.API16, ixgbevf.API17},
}

func newFleet(r *rand.Rand) *fleet {
	cfg := model.DefaultConfig()
	cfg.QueuePairs = pick(r, 1, 1, 2, 2, 2, 2, 2, 4, 4, 8)
	member := ixgbevf.Members()[0]
	if chance(r, 1, 2) {
		member = pick(r, ixgbevf.Members()[1:]...)
	}
	cfg.DeviceID = member.Device
	cfg.MulticastFilterType = uint32(r.IntN(4))
	if chance(r, 1, 2) {
		cfg.AdminMAC = slices.Clone(stations[0])
	}
	cfg.SpoofCheck = chance(r, 3, 4)
	cfg.ForceDropEnable = chance(r, 3, 4)
	cfg.Coalescing = chance(r, 3, 4)
	cfg.Features = uint32(r.IntN(4))
	cfg.APIs = pick(r, apis...)
	cfg.Associations = pick(r, 0, 0, 3)
	if chance(r, 1, 4) {
		cfg.PFMaxFrame = 9014
	}
	cfg.VLANs, cfg.MACVLANs = 5, pick(r, 0, 3, 3, 3)
	if chance(r, 1, 10) {
		cfg.PFLatency = 100 * time.Microsecond
	}
	vary := chance(r, 1, 2)
	cfg.HeadsPersistAcrossDisable = chance(r, 3, 4)
	clock := model.NewManualClock()
	cfg.Clock = clock
	f := &fleet{cfg: cfg, member: member, layout: newLayout(r, cfg.QueuePairs), trusted: chance(r, 1, 2), headsVary: vary, clock: clock}
	f.family = f.familyOf(cfg)
	if chance(r, 1, 8) {
		f.portVLAN = vlans[1]
	}
	return f
}

// steady takes away what depends on when which goroutine gets the processor.
func (f *fleet) steady() {
	f.headsVary, f.cfg.PFLatency = false, 0
}

// familyOf is the table of a VF with that configuration.
func (f *fleet) familyOf(cfg model.Config) *ixgbevf.Family {
	table, err := ixgbevf.ForDevice(ixgbevf.VendorID, cfg.DeviceID, cfg.QueuePairs)
	if err != nil {
		fail("%v", err)
	}
	return table
}

// nearWrap is a start value for a counter of so many bits: often one that
// wraps soon.
func nearWrap(r *rand.Rand, width uint) uint64 {
	switch r.IntN(3) {
	case 0:
		return 0
	case 1:
		return r.Uint64() >> (64 - width)
	default:
		return 1<<width - 1 - r.Uint64N(1<<(width-24))
	}
}

// build makes another VF of the fleet. The first two have the same counters:
// the twins start there.
func (f *fleet) build(r *rand.Rand, name string) (*silicon, error) {
	s := &silicon{name: name, cfg: f.cfg, fleet: f}
	c := &s.cfg
	c.Counters = model.Counters{
		GPRC: nearWrap(r, 32), GORC: nearWrap(r, 36), MPRC: nearWrap(r, 32),
		GPTC: nearWrap(r, 32), GOTC: nearWrap(r, 36),
	}
	switch f.built {
	case 0:
		f.counters = c.Counters
	case 1:
		c.Counters = f.counters
	}
	if f.headsVary {
		c.WritableRXHead, c.WritableTXHead, s.loops = chance(r, 1, 2), chance(r, 1, 2), chance(r, 1, 2)
	}
	c.Loopback = s.loops
	f.built++
	return f.power(s)
}

// buildPoor makes a VF that lacks something that the guest uses, as it was told
// and as the PF of where it is now tells; nil if it uses nothing of that kind.
func (f *fleet) buildPoor(r *rand.Rand, used model.PFState, told told) (s *silicon, reason string, err error) {
	s = &silicon{name: "poor VF", cfg: f.cfg, fleet: f}
	portVLAN := f.portVLAN
	switch c := &s.cfg; {
	case !used.ClearToSend:
		return nil, "", nil
	case len(used.MACVLANs) > 1 && chance(r, 1, 2):
		c.MACVLANs, reason = len(used.MACVLANs)-1, compsc.ReasonMailboxRefused
	case len(used.VLANs) > 1 && chance(r, 1, 2):
		c.VLANs, reason = len(used.VLANs)-1, compsc.ReasonMailboxRefused
	case told.asked != 0 && chance(r, 1, 2):
		c.Features, reason = told.asked&^told.granted, compsc.ReasonMailboxRefused
	case told.queues && chance(r, 1, 2):
		// Of the queues a PF tells whether there is a port VLAN.
		if reason = compsc.ReasonMailboxRefused; portVLAN != 0 {
			portVLAN = 0
		} else {
			portVLAN = vlans[2]
		}
	case chance(r, 1, 4):
		c.DeviceID, reason = otherDevice(c.DeviceID), compsc.ReasonDeviceMismatch
	case used.API != ixgbevf.API10 && chance(r, 1, 2):
		c.APIs, reason = []uint32{ixgbevf.API10}, compsc.ReasonAPINotAccepted
	case used.MAC != nil:
		c.MulticastFilterType, reason = (c.MulticastFilterType+1)%4, compsc.ReasonMulticastFilterMismatch
	default:
		return nil, "", nil
	}
	if s, err = f.power(s); err == nil {
		err = s.SetVLAN(portVLAN)
	}
	return s, reason, err
}

// otherDevice is another member of the family.
func otherDevice(id uint16) uint16 {
	members := ixgbevf.Members()
	at := slices.IndexFunc(members, func(m ixgbevf.Member) bool { return m.Device == id })
	return members[(at+1)%len(members)].Device
}

func (f *fleet) power(s *silicon) (*silicon, error) {
	s.socket.scratch = make([]byte, f.scratchSize)
	s.socket.plug(newHost(f.memorySize))
	s.VF = model.New(s.cfg, &s.socket, &s.socket, s.interrupt)
	s.SetLink(!f.unplugged)
	f.vfs = append(f.vfs, s)
	return s, s.provision()
}
