package model

import (
	"sync"
	"sync/atomic"
	"time"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// gone is what a read of a device that is no longer there returns.
const gone = ^uint32(0)

// VF is one virtual function with the part of its PF that looks after it. All
// methods are safe for concurrent use. Close must be called.
//
// The interrupt callback is never called with the VF's lock held, so it may
// call the VF; several may run at once.
type VF struct {
	cfg   Config
	mem   Memory
	wire  Wire
	irq   func(vector int)
	start time.Time

	mu sync.Mutex
	// idle is signalled when the transmit engine has let go of its batch.
	idle *sync.Cond
	regs [ixgbevf.BARSize / 4]uint32
	// spec says which registers exist, and how plain ones behave.
	spec     [ixgbevf.BARSize / 4]family.Register
	rx       []rxQueue
	tx       []txQueue
	buffered int // bytes in all receive queues' packet buffers
	pf       pf
	counters Counters
	stats    Stats
	// fire has the vectors to raise once the lock is released.
	fire uint32
	// throttles moderate the vectors.
	throttles [ixgbevf.MSIXVectors]throttle
	// busy tells that the transmit engine has a batch on its way out.
	busy bool
	// unplugged tells that the PF's link is down.
	unplugged bool
	busyQueue int
	closed    bool
	answer    *time.Timer // the PF's pending answer
	// retry is pending while DMA found memory unmapped, for retryDelay.
	retry      *time.Timer
	retryDelay time.Duration

	// epoch changes whenever what the engine has under way must be forgotten.
	epoch atomic.Uint64
	kick  chan struct{}
	quit  chan struct{}
	done  chan struct{}
}

// New powers a VF on: its PF is up and has never seen it, so that it is
// silent until a driver resets it and enables queues. mem and wire must not be
// nil; irq, which may be, raises one of vectors 0 to 2. New starts a
// goroutine, which Close ends.
func New(cfg Config, mem Memory, wire Wire, irq func(vector int)) *VF {
	cfg.QueuePairs = min(max(cfg.QueuePairs, 1), ixgbevf.MaxQueuePairs)
	v := &VF{
		cfg: cfg, mem: mem, wire: wire, irq: irq,
		start:    time.Now(),
		rx:       make([]rxQueue, cfg.QueuePairs),
		tx:       make([]txQueue, cfg.QueuePairs),
		counters: cfg.Counters,
		kick:     make(chan struct{}, 1),
		quit:     make(chan struct{}),
		done:     make(chan struct{}),
	}
	if cfg.Clock == nil {
		v.cfg.Clock = systemClock{}
	}
	v.idle = sync.NewCond(&v.mu)
	f, err := ixgbevf.ForDevice(ixgbevf.VendorID, cfg.DeviceID, cfg.QueuePairs)
	if err != nil {
		v.cfg.DeviceID = ixgbevf.DeviceID
		f = ixgbevf.New(cfg.QueuePairs)
	}
	for _, r := range f.Registers() {
		v.spec[r.Offset/4] = r
	}
	for n := range cfg.QueuePairs {
		v.regs[ixgbevf.VFDCARXCTRL(n)/4] = ixgbevf.DCARXDefault
		v.regs[ixgbevf.VFSRRCTL(n)/4] = ixgbevf.SRRCTLDefault
		v.regs[ixgbevf.VFDCATXCTRL(n)/4] = ixgbevf.DCATXDefault
	}
	v.pf.powerOn(v.cfg)
	v.regs[ixgbevf.VFMAILBOX/4] = ixgbevf.MailboxRSTD
	go v.engine()
	return v
}

// unlock releases the lock, then raises the interrupts that became due under
// it.
func (v *VF) unlock() {
	fire := v.fire
	v.fire = 0
	v.mu.Unlock()
	if v.irq == nil {
		return
	}
	for n := range ixgbevf.MSIXVectors {
		if fire&(1<<n) != 0 {
			v.irq(n)
		}
	}
}

// Read reads the dword at off, as the guest does. It returns 0 for an offset
// that is no register or not aligned, and all ones after Close.
func (v *VF) Read(off uint32) uint32 {
	v.mu.Lock()
	defer v.unlock()
	switch {
	case v.closed:
		return gone
	case off%4 != 0 || off >= ixgbevf.BARSize:
		return 0
	}
	r := &v.regs[off/4]
	switch off {
	case ixgbevf.VFLINKS:
		if v.unplugged {
			return 0
		}
		return ixgbevf.LinksUp | ixgbevf.LinksSpeed10G
	case ixgbevf.VFFRTIMER:
		return uint32(time.Since(v.start).Microseconds())
	case ixgbevf.VTEICR:
		val := *r
		*r = 0
		return val
	case ixgbevf.VTEIMS:
		return *r
	case ixgbevf.VFMAILBOX:
		val := *r
		*r &^= ixgbevf.MailboxReadClear
		return val
	case ixgbevf.VFGPRC:
		return uint32(v.counters.GPRC)
	case ixgbevf.VFGORCLSB:
		return uint32(v.counters.GORC)
	case ixgbevf.VFGORCMSB:
		return uint32(v.counters.GORC>>32) & 0xf
	case ixgbevf.VFMPRC:
		return uint32(v.counters.MPRC)
	case ixgbevf.VFGPTC:
		return uint32(v.counters.GPTC)
	case ixgbevf.VFGOTCLSB:
		return uint32(v.counters.GOTC)
	case ixgbevf.VFGOTCMSB:
		return uint32(v.counters.GOTC>>32) & 0xf
	}
	if v.spec[off/4].Access&family.Readable == 0 {
		return 0
	}
	return *r
}

// Write writes the dword at off, as the guest does. A doorbell of a transmit
// queue returns at once and is worked off by the VF's goroutine; one of a
// receive queue has delivered the waiting frames when it returns.
func (v *VF) Write(off, val uint32) {
	v.mu.Lock()
	defer v.unlock()
	if v.closed || off%4 != 0 || off >= ixgbevf.BARSize {
		return
	}
	r := &v.regs[off/4]
	switch off {
	case ixgbevf.VFCTRL:
		if val&ixgbevf.CtrlRST != 0 {
			v.reset()
		}
		return
	case ixgbevf.VTEICR:
		*r &^= val
		return
	case ixgbevf.VTEICS:
		v.cause(val)
		return
	case ixgbevf.VTEIMS:
		*r |= val & ixgbevf.VectorMask
		v.deliver(val)
		return
	case ixgbevf.VTEIMC:
		v.regs[ixgbevf.VTEIMS/4] &^= val
		return
	case ixgbevf.VTEITR(0), ixgbevf.VTEITR(1), ixgbevf.VTEITR(2):
		v.writeEITR(int(off-ixgbevf.VTEITR(0))/4, val)
		return
	case ixgbevf.VFMAILBOX:
		v.mailbox(val)
		return
	}
	if q, inner := ringRegister(off, ixgbevf.VFRDBAL(0)); q < len(v.rx) && v.writeRX(q, inner, val) {
		return
	}
	if q, inner := ringRegister(off, ixgbevf.VFTDBAL(0)); q < len(v.tx) && v.writeTX(q, inner, val) {
		return
	}
	s := v.spec[off/4]
	switch {
	case s.Access&family.WriteOneSets != 0:
		*r |= val & s.Mask
	case s.Access&family.WriteOneClears != 0:
		*r &^= val & s.Mask
	case s.Access&family.Writable != 0:
		*r = *r&^s.Mask | val&s.Mask&^s.Modifier
	}
}

// ringRegister splits an offset in a page of rings into the queue and the
// offset in its block; a queue out of all range means another page.
func ringRegister(off, page uint32) (queue int, inner uint32) {
	if off < page || off >= page+0x40*ixgbevf.MaxQueuePairs {
		return ixgbevf.MaxQueuePairs, 0
	}
	return int(off-page) / 0x40, (off - page) % 0x40
}

// FLR resets the function as a function level reset does; the caller keeps
// the PCI configuration space. When it returns nothing more reaches the wire
// or memory.
func (v *VF) FLR() {
	v.mu.Lock()
	defer v.unlock()
	if v.closed {
		return
	}
	v.reset()
	for v.busy {
		v.idle.Wait()
	}
}

// reset stops queues and interrupts and tells the PF. Ring registers, heads
// and statistics stay (82599 specification update, clarification 5).
func (v *VF) reset() {
	v.epoch.Add(1)
	v.stats.Resets++
	for _, off := range []uint32{ixgbevf.VTEICR, ixgbevf.VTEIMS, ixgbevf.VTEIAC, ixgbevf.VTEIAM} {
		v.regs[off/4] = 0
	}
	v.dropIntervals()
	for q := range v.rx {
		if v.regs[ixgbevf.VFRXDCTL(q)/4]&ixgbevf.QueueEnable != 0 {
			v.disableRX(q)
		}
	}
	for q := range v.tx {
		if v.regs[ixgbevf.VFTXDCTL(q)/4]&ixgbevf.QueueEnable != 0 {
			v.disableTX(q)
		}
	}
	if v.cfg.CountersClearedByReset {
		v.counters = Counters{}
	}
	v.pf.vflr(v.cfg)
	if v.answer != nil {
		v.answer.Stop()
		v.answer = nil
	}
	// RSTD tells the driver that it may go on. A batch on its way out delays it.
	if v.busy {
		v.regs[ixgbevf.VFMAILBOX/4] = ixgbevf.MailboxRSTI
	} else {
		v.regs[ixgbevf.VFMAILBOX/4] = ixgbevf.MailboxRSTD
	}
}

// resetDone ends a reset that had to wait for the transmit engine.
func (v *VF) resetDone() {
	if r := &v.regs[ixgbevf.VFMAILBOX/4]; *r&ixgbevf.MailboxRSTI != 0 {
		*r = *r&^ixgbevf.MailboxRSTI | ixgbevf.MailboxRSTD
	}
}

// Close removes the device: reads return all ones, and nothing reaches the
// wire, memory or the interrupt callback once it has returned, except a
// callback that was already running. The wire and the memory stay the
// caller's. Close is idempotent.
func (v *VF) Close() {
	v.mu.Lock()
	if !v.closed {
		v.closed = true
		v.epoch.Add(1)
		v.dropIntervals()
		if v.answer != nil {
			v.answer.Stop()
		}
		if v.retry != nil {
			v.retry.Stop()
		}
		close(v.quit)
	}
	v.mu.Unlock()
	<-v.done
}

// Stats returns what the VF did so far and what its PF holds for it.
func (v *VF) Stats() Stats {
	v.mu.Lock()
	defer v.unlock()
	s := v.stats
	s.PF = v.pf.snapshot()
	for q := range v.rx {
		s.RXHeld += len(v.rx[q].used)
	}
	return s
}

// dma counts an access to memory that found nothing mapped.
func (v *VF) dma(err error) bool {
	if err != nil {
		v.stats.Unmapped++
	}
	return err == nil
}

// Delays between attempts at memory that is not mapped. The longest is a
// compromise: a guest that gave the device a wrong address is retried forever.
const (
	retryFirst = time.Millisecond
	retryLast  = time.Second
)

// retryLater has queues that stand still for unmapped memory tried again,
// should no doorbell come first.
func (v *VF) retryLater() {
	if v.retry != nil {
		return
	}
	v.retryDelay = min(max(2*v.retryDelay, retryFirst), retryLast)
	v.retry = time.AfterFunc(v.retryDelay, func() {
		v.mu.Lock()
		defer v.unlock()
		v.retry = nil
		if v.closed {
			return
		}
		for q := range v.rx {
			if v.rx[q].unmapped {
				v.drainRX(q)
			}
		}
		for q := range v.tx {
			v.tx[q].unmapped = false
		}
		v.wake()
	})
}
