package compsc

import (
	"context"

	"compsc.io/compsc/agent/family"
)

// GuestRead is a read of BAR0 by the guest. Registers the family does not
// have, and bits they do not have, read 0. All ones mean that the device is
// gone.
func (v *VF) GuestRead(off uint32) uint32 {
	v.mu.Lock()
	defer v.unlock()
	r := v.dwordAt(off)
	if r.access&family.Readable == 0 {
		return 0
	}
	if v.lost != nil {
		return v.lost[off]
	}
	if r.counter != nil {
		return v.readCounter(r.counter, off)
	}
	if off == v.box.Control {
		return v.guestMailboxRead()
	}
	value := v.current(off)
	if value == allOnes || r.access&(family.Writable|family.WriteOneSets|family.WriteOneClears) == 0 {
		return value
	}
	if off == v.irq.MaskSet && v.held == nil {
		value = v.readMask(value)
	}
	value &= r.mask
	if q := r.ring; q != nil && q.Direction == family.TX && off == q.Head {
		q.read, q.wasRead = value, true
	}
	return value
}

// GuestWrite is a write to BAR0 by the guest. Writes to registers the family
// does not have or that cannot be written are dropped, and bits they do not
// have are written as 0.
func (v *VF) GuestWrite(off, val uint32) {
	v.mu.Lock()
	defer v.unlock()
	r := v.dwordAt(off)
	if r.access&(family.Writable|family.WriteOneSets|family.WriteOneClears) == 0 || v.lost != nil {
		return
	}
	val &= r.mask
	switch {
	case off == v.resetReg && val&v.resetBit != 0:
		v.resets.Add(1)
		v.mail.resetAt = v.o.Clock.Now()
		v.mail.resetting = true
		v.afterReset(func() { v.b.Write(off, val) })
	case off == v.box.Control:
		v.guestMailboxWrite(val)
	case v.held != nil && v.writeHeld(off, val):
	default:
		if r.ring != nil {
			v.trackQueueWrite(r.ring, off, val)
			if v.guestQueueWrite(r.ring, off, val) {
				return
			}
		}
		switch off {
		case v.irq.MaskSet:
			v.mask |= val
		case v.irq.MaskClear:
			v.mask &^= val
		}
		v.b.Write(off, val)
	}
}

// FunctionReset resets the function by calling do, which has the backend do
// it, and notes what that takes from the PF. It is for resets that do not go
// through a register, such as a function-level reset of the virtual machine's
// monitor, and is not counted among the guest's.
func (v *VF) FunctionReset(do func()) {
	v.mu.Lock()
	defer v.unlock()
	if v.lost == nil {
		v.afterReset(do)
	}
}

// afterReset calls reset and brings the engine in line with it. The counters
// of an 82599 survive a reset of the VF; those of a device that clears them
// are rebased, so that the guest never sees one jump.
func (v *VF) afterReset(reset func()) {
	v.trackReset()
	before := make([]uint64, len(v.counters))
	for i, c := range v.counters {
		if c.direct {
			continue
		}
		if before[i] = v.sample(c); c.ReadClears {
			c.offset = min(c.offset+before[i], c.mask())
		}
	}
	reset()
	for i, c := range v.counters {
		if c.ReadClears || c.direct {
			continue
		}
		if after := v.sample(c); (after-before[i])&c.mask() > c.mask()/2 {
			c.offset = (c.offset + before[i] - after) & c.mask()
		}
	}
	v.log.Reset()
	v.mail.request = nil
	v.mail.readClear = 0
	v.causes, v.mask = 0, 0
	for _, q := range v.queues {
		r := v.rings[q.Ctl]
		v.unfollow(r)
		if r.relay == nil {
			continue
		}
		ctx, cancel := v.undoContext(context.Background())
		head, err := v.endRelay(ctx, r)
		cancel()
		if err != nil {
			v.o.Logger.Warn("a relay did not end with the reset", "queue", queueName(q), "error", err)
		}
		v.showHead(r, head)
	}
	if v.held == nil {
		return
	}
	v.held[v.irq.MaskSet] = 0
	for _, q := range v.queues {
		v.held[q.Ctl] &^= q.Enable
	}
}

// writeHeld takes a write that reaches the VF while it is quiesced: QEMU may
// still have had it on its way. It reports false for a register that the
// quiesce left alone.
func (v *VF) writeHeld(off, val uint32) bool {
	switch off {
	case v.irq.MaskSet:
		v.held[off] |= val
		return true
	case v.irq.MaskClear:
		v.held[v.irq.MaskSet] &^= val
		return true
	case v.irq.CauseSet:
		v.causes |= val
		return true
	}
	if _, ok := v.heads[off]; ok {
		delete(v.held, off)
		v.heads[off] = val
		return false
	}
	if _, ok := v.held[off]; !ok {
		return false
	}
	for _, q := range v.queues {
		if off == q.Ctl {
			val &^= q.Flush
		}
	}
	v.held[off] = val
	return true
}
