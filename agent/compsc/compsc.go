// Package compsc moves the hardware state of a virtual function (VF) from one
// device to another under a driver that does not notice. It is the engine of
// CompSC (Pan, Dong, Chen, Zhang, Zhang: "CompSC: Live Migration with
// Pass-through Devices", VEE 2012), for guests whose driver is not modified.
//
// A [VF] stands between the guest and the silicon. While the guest runs, it
// records what the guest asks of the PF and shows statistics that stay
// continuous. For the switchover it quiesces the device, captures a [State],
// and on the other side restores it. What kind of state each register holds
// comes from package family. The engine does no I/O of its own: everything
// goes through a [Backend].
package compsc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"compsc.io/compsc/agent/family"
)

// Backend is the silicon: BAR0 of one VF, in 32-bit registers. Offsets are
// multiples of 4 below the family's BAR size. A device that is gone reads all
// ones. Both methods must be safe to call while the backend works on its own,
// and must not call back into the VF.
type Backend interface {
	Read(off uint32) uint32
	Write(off, v uint32)
}

// Clock tells the time and waits. Tests replace it.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

type realClock struct{}

func (realClock) Now() time.Time                         { return time.Now() }
func (realClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

// Options of a VF. The zero value of each field stands for its default.
type Options struct {
	// VendorID and DeviceID identify the device: they go into captured states
	// and are compared before a restore. Default 0, which fits only 0.
	VendorID, DeviceID uint16
	// Poll is the time between two looks at a register that is to change.
	// Default 100 microseconds.
	Poll time.Duration
	// QueueTimeout bounds how long a queue may take to turn on or off.
	// Default 100 ms; the driver allows 10 ms, and the device needs some 100
	// microseconds.
	QueueTimeout time.Duration
	// DrainTimeout bounds the wait for a transmit queue to run empty. What is
	// left then is sent by the target. Default 50 ms.
	DrainTimeout time.Duration
	// MailboxTimeout bounds the wait for a reply of the PF, and for the PF to
	// let go of the mailbox; what the engine sends it sends once more. A request
	// of the guest older than that counts as given up. Default 1 s, the patience
	// of the driver.
	MailboxTimeout time.Duration
	// ResetTimeout bounds how long a reset may take. Default 1 s.
	ResetTimeout time.Duration
	// Clock for all of these. Default the system's.
	Clock Clock
	// RelayPoll is the time between two looks at a shadow ring whose guest gets
	// no interrupts. Default 50 microseconds.
	RelayPoll time.Duration
	// Memory is the guest's. Without it no context of a transmit queue moves,
	// and a head that the device forgets when its queue stops is lost.
	Memory Memory
	// Scratch is memory to work on rings with. Without it contexts are not
	// loaded, and heads that cannot be written cannot be restored.
	Scratch Scratch
	// Direct tells that the guest reaches the pages of family.DoorbellPages by
	// itself, past GuestRead and GuestWrite. Track knows nothing of it then.
	Direct bool
	// Logger for what is unusual but no error. Default slog.Default().
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	set := func(d *time.Duration, def time.Duration) {
		if *d <= 0 {
			*d = def
		}
	}
	set(&o.Poll, 100*time.Microsecond)
	set(&o.RelayPoll, 50*time.Microsecond)
	set(&o.QueueTimeout, 100*time.Millisecond)
	set(&o.DrainTimeout, 50*time.Millisecond)
	set(&o.MailboxTimeout, time.Second)
	set(&o.ResetTimeout, time.Second)
	if o.Clock == nil {
		o.Clock = realClock{}
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return o
}

// ErrGone is returned when the device stopped answering: it was unplugged, or
// its bus fell into an error.
var ErrGone = errors.New("the device is gone: its registers read all ones")

// ErrNotQuiesced is returned by Capture for a VF that runs.
var ErrNotQuiesced = errors.New("the VF is not quiesced")

const allOnes = ^uint32(0)

// VF is one mediated VF. It is the only user of the backend's registers, and
// safe for concurrent use: each method runs alone. The long ones hold up
// guest accesses while they run, and each is bounded by its context and by
// the times in Options.
type VF struct {
	f        family.Family
	b        Backend
	o        Options
	regs     map[uint32]family.Register
	queues   []family.Queue
	irq      family.Interrupts
	box      family.Mailbox
	resetReg uint32
	resetBit uint32
	linkReg  uint32
	linkBit  uint32
	resets   atomic.Uint64

	// at has, for each dword of BAR0, what a guest's access needs: they look up
	// nothing else.
	at []dword

	// pages are those that the guest reaches by itself.
	pages []uint32

	// rings has each queue under the offset of each of its registers.
	rings map[uint32]*ring
	// relays counts the rings under relay; due tells that they are to be
	// looked after before the lock is released.
	relays atomic.Int32
	due    atomic.Bool

	mu        sync.Mutex
	counters  []*counter
	counterAt map[uint32]*counter
	log       family.Log
	mail      mail
	// dropped tells that the PF sent something that the guest has not seen,
	// and will not.
	dropped bool
	// held is nil while the VF runs. While it is quiesced, it has what the
	// guest shall find in the registers that the quiesce changed: control and
	// tail of each queue, the head of one that goes on elsewhere, and the
	// interrupt mask.
	held map[uint32]uint32
	// kept has the tails, by offset, that the guest rings by itself and that the
	// device kept when the quiesce stopped their queues.
	kept map[uint32]bool
	// heads has where each queue that the quiesce has stopped goes on, by the
	// offset of its head.
	heads map[uint32]uint32
	// mask has the vectors that the guest has enabled, and not disabled.
	mask uint32
	// causes are interrupt causes taken from the device but not raised again.
	causes uint32
	// written is nil unless what the device writes is tracked.
	written *written
	// watching tells that the goroutine that looks after relays is there.
	watching bool
	// lost is nil until the device was given up: what the guest finds in its
	// registers since then, 0 in all others.
	lost map[uint32]uint32
	// fixed has the directions whose heads Probe found not to be writable.
	fixed map[family.Direction]bool
}

// New returns the engine of a VF whose driver is not loaded yet, or that is
// the target of a migration. It does not touch the device.
func New(f family.Family, b Backend, o Options) *VF {
	v := &VF{
		f: f, b: b, o: o.withDefaults(),
		regs:      make(map[uint32]family.Register),
		queues:    f.Queues(),
		irq:       f.Interrupts(),
		box:       f.Mailbox(),
		counterAt: make(map[uint32]*counter),
		rings:     make(map[uint32]*ring),
		log:       f.NewLog(),
	}
	v.resetReg, v.resetBit = f.ResetRegister()
	v.linkReg, v.linkBit = f.LinkRegister()
	if o.Direct {
		v.pages = family.DoorbellPages(f)
	}
	for _, r := range f.Registers() {
		v.regs[r.Offset] = r
	}
	for _, q := range v.queues {
		r := &ring{Queue: q}
		for _, off := range []uint32{q.BAL, q.BAH, q.LEN, q.Head, q.Tail, q.Ctl, q.WBAL, q.WBAH} {
			if off != 0 {
				v.rings[off] = r
			}
		}
	}
	for _, c := range f.Counters() {
		k := &counter{Counter: c, direct: v.direct(c.Low)}
		v.counters = append(v.counters, k)
		v.counterAt[c.Low] = k
		if c.High != 0 {
			v.counterAt[c.High] = k
		}
	}
	v.at = make([]dword, f.BARSize()/4)
	for off, r := range v.regs {
		v.at[off/4] = dword{access: r.Access, mask: r.Mask, ring: v.rings[off], counter: v.counterAt[off]}
	}
	return v
}

// dword is a place in BAR0. The zero value stands for one without a register.
type dword struct {
	access  family.Access
	mask    uint32
	ring    *ring
	counter *counter
}

// dwordAt gives what is at an offset, which may be outside of BAR0.
func (v *VF) dwordAt(off uint32) dword {
	if off%4 != 0 || int(off/4) >= len(v.at) {
		return dword{}
	}
	return v.at[off/4]
}

// GuestResets counts the resets of the VF that the guest asked for through
// the VF's reset bit since New.
func (v *VF) GuestResets() uint64 { return v.resets.Load() }

// Summary tells what a target must know of the VF to give its verdict.
func (v *VF) Summary() family.Summary {
	v.mu.Lock()
	defer v.unlock()
	return v.log.Summary()
}

// HeadsInUse tells whether any ring is enabled, so that its head may be other
// than zero when the VF is captured.
func (v *VF) HeadsInUse() bool {
	v.mu.Lock()
	defer v.unlock()
	for _, q := range v.queues {
		if v.current(q.Ctl)&q.Enable != 0 {
			return true
		}
	}
	return false
}

// Kick raises every vector that a queue is assigned to once, so that no
// interrupt is lost to the guest with the switchover; a spurious one is
// harmless. For a quiesced VF it happens when that ends.
//
// The mailbox's vector is raised only if the guest shall find something: Linux's
// igbvf takes each of its interrupts for a change of the link, and takes the
// link down for two seconds if one comes while it looks whether it is up
// (igbvf_has_link reads get_link_status, which igbvf_msix_other sets, after it
// has let softirqs run).
//
// It returns the vectors, a bit for each: all of them for a VF that is lost.
func (v *VF) Kick() (vectors uint32) {
	v.mu.Lock()
	defer v.unlock()
	if v.lost != nil {
		return v.irq.All
	}
	for _, off := range v.irq.Assign {
		if off == v.irq.Mailbox && !v.news() {
			continue
		}
		for value := v.b.Read(off); value != 0; value >>= 8 {
			if b := uint8(value); b&v.irq.AssignValid != 0 {
				vectors |= 1 << (b & v.irq.AssignVector)
			}
		}
	}
	vectors &= v.irq.All
	switch {
	case vectors == 0:
	case v.held != nil:
		v.causes |= vectors
	default:
		v.b.Write(v.irq.CauseSet, vectors)
	}
	v.dropped = false // once is enough
	return vectors
}

// news tells whether the guest may have to learn something from the mailbox's
// interrupt: of the mailbox, or that the link is down, of which a driver that
// takes it for up does not find out by itself.
func (v *VF) news() bool {
	return v.dropped || v.mail.readClear != 0 || v.b.Read(v.linkReg)&v.linkBit == 0
}

// current is the register as the guest shall see it.
func (v *VF) current(off uint32) uint32 {
	if value, ok := v.held[off]; ok {
		return value
	}
	if head, ok := v.heads[off]; ok {
		return head
	}
	if r := v.rings[off]; r != nil {
		if value, ok := r.show(off); ok {
			return value
		}
	}
	return v.b.Read(off)
}

// poll looks until done says so, at least once; what names the awaited thing
// in the error after the bound. It fails at once with the context.
func (v *VF) poll(ctx context.Context, bound time.Duration, what string, done func() (bool, error)) error {
	deadline := v.o.Clock.Now().Add(bound)
	for {
		ok, err := done()
		if err != nil {
			return fmt.Errorf("waiting until %s: %w", what, err)
		}
		if ok {
			return nil
		}
		if !v.o.Clock.Now().Before(deadline) {
			return fmt.Errorf("waiting until %s: %w after %v", what, errTimeout, bound)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: %w", what, context.Cause(ctx))
		case <-v.o.Clock.After(v.o.Poll):
		}
	}
}

// errTimeout marks a wait that reached its bound, in distinction to one that
// was cancelled.
var errTimeout = errors.New("timed out")

// awaitBits polls a register until the bits of mask equal want.
func (v *VF) awaitBits(ctx context.Context, bound time.Duration, what string, off, mask, want uint32) error {
	return v.poll(ctx, bound, what, func() (bool, error) {
		value := v.b.Read(off)
		if value == allOnes {
			return false, ErrGone
		}
		return value&mask == want, nil
	})
}

// undoContext is for putting things right after ctx may have ended.
func (v *VF) undoContext(ctx context.Context) (context.Context, context.CancelFunc) {
	bound := v.o.ResetTimeout + 2*v.o.MailboxTimeout + time.Duration(len(v.queues))*2*v.o.QueueTimeout
	return context.WithTimeout(context.WithoutCancel(ctx), bound)
}

// queueName names a queue in messages.
func queueName(q family.Queue) string { return fmt.Sprintf("%s queue %d", q.Direction, q.Index) }
