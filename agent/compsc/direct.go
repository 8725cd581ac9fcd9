package compsc

import (
	"context"
	"errors"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// What changes where the guest reaches the pages with the doorbells by itself
// (Options.Direct). Everything on them is read from the device when it is
// needed. What only a look at each access could tell is not to be had: which
// buffers were handed over, and so what the device wrote; the contexts that
// were set more than a lap of the ring ago; and the positions of a shadow ring,
// so that there are no relays. The counters on these pages are the device's own.

// errDirect is why there are no relays.
var errDirect = errors.New("the guest reaches the doorbells by itself (fast path): no ring can be relayed")

// direct tells whether the guest reaches the register at off by itself.
func (v *VF) direct(off uint32) bool { return family.OnPages(v.pages, off) }

// Tails returns the tails of the queues that the guest rings by itself, as they
// stand: they change when it does. There are none on the complete path.
func (v *VF) Tails() []uint32 {
	v.mu.Lock()
	defer v.unlock()
	var tails []uint32
	for _, q := range v.queues {
		if v.direct(q.Tail) {
			tails = append(tails, v.current(q.Tail))
		}
	}
	return tails
}

// ringContexts reads what the context slots of a queue that is off hold, from
// what its ring still has of the last lap: the descriptors from the tail around
// to the head, the oldest first. Those that the guest has written behind its
// last doorbell are among them, and count as the oldest.
func (v *VF) ringContexts(r *ring, head uint32) error {
	p, tail := v.placeOf(r.Queue), v.held[r.Tail]
	if v.o.Memory == nil || r.ContextSlots == 0 || p.size == 0 || head >= p.size || tail >= p.size {
		return nil
	}
	b := make([]byte, p.size*r.DescriptorSize)
	if err := v.o.Memory.ReadAt(p.base, b); err != nil {
		return fmt.Errorf("%s: its ring cannot be read: %w", queueName(r.Queue), err)
	}
	slots := cloneSlots(r.slots, r.ContextSlots)
	for n := range p.size - (tail+p.size-head)%p.size {
		i := (tail + n) % p.size * r.DescriptorSize
		note(slots, v.f.Descriptors(), b[i:i+r.DescriptorSize])
	}
	r.slots = slots
	return nil
}

// lapOf reads the last lap of a transmit ring that is on and that the guest
// rings by itself; nil for others.
func (v *VF) lapOf(r *ring, ctl uint32) (*mirror, error) {
	p, tail := v.placeOf(r.Queue), v.held[r.Tail]
	if !v.direct(r.Tail) || v.o.Memory == nil || r.ContextSlots == 0 || ctl&r.Enable == 0 || tail >= p.size {
		return nil, nil
	}
	m := newMirror(p, r.Queue, tail, r.slots)
	if err := v.o.Memory.ReadAt(p.base, m.ring); err != nil {
		return nil, fmt.Errorf("%s: its ring cannot be read: %w", queueName(r.Queue), err)
	}
	for n := range p.size {
		i := (tail + n) % p.size * r.DescriptorSize
		m.watch(v.f.Descriptors(), m.ring[i:i+r.DescriptorSize])
	}
	return m, nil
}

// stopDirect notes what the resumption of a queue that is off now needs, if the
// guest rings it by itself.
func (v *VF) stopDirect(q family.Queue) error {
	if !v.direct(q.Tail) {
		return nil
	}
	if v.b.Read(q.Tail) == v.held[q.Tail] {
		v.kept[q.Tail] = true
	}
	return v.ringContexts(v.rings[q.Ctl], v.heads[q.Head])
}

// heedDoorbells takes over the doorbells that the guest rang while its VF was
// quiesced, say because its migration had failed: they have gone to the device.
func (v *VF) heedDoorbells() {
	for tail := range v.kept {
		if now := v.b.Read(tail); now != allOnes {
			v.held[tail] = now
		}
	}
}

// goOn turns a queue on that stands where it stopped, without putting its tail
// anywhere: the guest may ring its doorbell at any time. It is false for a queue
// whose tail or head the device did not keep.
func (v *VF) goOn(ctx context.Context, q family.Queue, ctl, head uint32) (bool, error) {
	if !v.kept[q.Tail] || v.b.Read(q.Head) != head {
		return false, nil
	}
	v.b.Write(q.Ctl, ctl&^q.Flush|q.Enable)
	if err := v.awaitBits(ctx, v.o.QueueTimeout, queueName(q)+" is on", q.Ctl, q.Enable, q.Enable); err != nil {
		return true, err
	}
	// It is the doorbell that has the device look.
	v.b.Write(q.Tail, v.b.Read(q.Tail))
	return true, nil
}
