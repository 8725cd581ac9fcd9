package compsc

import (
	"context"
	"slices"

	"compsc.io/compsc/agent/family"
)

// mirror has the descriptors of one transmit ring as they were when they were
// handed to the device. Context descriptors fill slots in the device that
// nothing reads back, and drivers rely on what is in them for as long as they
// like (DPDK's do, Linux's do not): the ring alone tells only of the last lap.
type mirror struct {
	place
	// next is the first descriptor that was not handed over yet.
	next uint32
	// ring is a copy; zeros stand for descriptors that were never seen.
	ring []byte
	// slots is what the context slots held before the oldest descriptor of
	// ring; nil for a slot that was never seen filled.
	slots [][]byte
	// used has a bit for each slot that a packet has used since it was filled,
	// using for each that the packet uses whose end was not seen yet.
	used, using uint32
	// relied has a bit for each slot that a later packet has used as well.
	relied uint32
}

// newMirror starts to follow a ring from head, the device's context slots
// holding slots.
func newMirror(p place, q family.Queue, head uint32, slots [][]byte) *mirror {
	if p.size == 0 || head >= p.size {
		return nil // the device stands still
	}
	return &mirror{place: p, next: head, ring: make([]byte, p.size*q.DescriptorSize), slots: cloneSlots(slots, q.ContextSlots)}
}

// handOver notes that the descriptors up to tail go to the device. It must be
// called before the doorbell: after it, the guest may reuse them.
func (m *mirror) handOver(mem Memory, f family.Descriptors, tail uint32) error {
	if tail >= m.size {
		return nil // the device stands still
	}
	size := uint32(len(m.ring)) / m.size
	for m.next != tail {
		end := tail
		if tail < m.next {
			end = m.size
		}
		b := m.ring[m.next*size : end*size]
		// What they were before, the device has consumed.
		for d := range slices.Chunk(b, int(size)) {
			note(m.slots, f, d)
		}
		if err := mem.ReadAt(m.base+uint64(m.next*size), b); err != nil {
			clear(b)
			return err
		}
		for d := range slices.Chunk(b, int(size)) {
			m.watch(f, d)
		}
		m.next = end % m.size
	}
	return nil
}

// watch learns from the next descriptor whether the driver relies on a context
// beyond the packet that it filled the slot for.
func (m *mirror) watch(f family.Descriptors, d []byte) {
	if slot, ok := f.ContextSlot(d); ok {
		m.used &^= 1 << slot
		return
	}
	if slot, ok := f.UsesContext(d); ok {
		m.using |= 1 << slot
		m.relied |= m.used & (1 << slot)
	}
	if f.EndOfPacket(family.TX, 0, d) {
		m.used, m.using = m.used|m.using, 0
	}
}

// cloneSlots copies the contents of n slots.
func cloneSlots(slots [][]byte, n int) [][]byte {
	c := make([][]byte, n)
	for i := range min(n, len(slots)) {
		c[i] = slices.Clone(slots[i])
	}
	return c
}

// note records the context that a descriptor fills a slot with, if it does.
func note(slots [][]byte, f family.Descriptors, d []byte) {
	if slot, ok := f.ContextSlot(d); ok && slot < len(slots) {
		slots[slot] = append(slots[slot][:0], d...)
	}
}

// at returns what the slots hold when the device has consumed everything
// before head.
func (m *mirror) at(f family.Descriptors, head uint32) [][]byte {
	slots := cloneSlots(m.slots, len(m.slots))
	size := uint32(len(m.ring)) / m.size
	consumed := m.size
	if head != m.next && head < m.size {
		consumed = (head + m.size - m.next) % m.size
	}
	for n := range consumed {
		i := (m.next + n) % m.size
		note(slots, f, m.ring[i*size:(i+1)*size])
	}
	return slots
}

// openEnd is what lies between the end of the last whole packet and the place
// to which the device has consumed a ring.
type openEnd struct {
	// start is where a packet of which the device has a part begins, with the
	// contexts before it; it is the place itself if there is none.
	start uint32
	// reports tells whether any descriptor of the part asks to be written back.
	reports bool
	// filled has a bit for each context slot that was filled there.
	filled uint32
}

// end looks back from head. Its driver may have handed over a part of a packet,
// as one does that rings the doorbell for each fragment. What was never seen
// lies before all packets, for a ring is followed from between two of them on.
func (m *mirror) end(f family.Descriptors, head uint32) openEnd {
	ahead := (m.next + m.size - head) % m.size
	size := uint32(len(m.ring)) / m.size
	end, begin, open := openEnd{start: head}, head, false
	for i, left := head, m.size; left > ahead; left-- {
		i = (i + m.size - 1) % m.size
		d := m.ring[i*size : (i+1)*size]
		slot, context := f.ContextSlot(d)
		if !context && f.EndOfPacket(family.TX, 0, d) || !slices.ContainsFunc(d, func(b byte) bool { return b != 0 }) {
			break
		}
		if context {
			end.filled |= 1 << slot
		}
		begin, open, end.reports = i, open || !context, end.reports || f.Reports(d)
	}
	if open {
		end.start = begin
	}
	return end
}

// ring is what the engine knows of one queue beyond its registers.
type ring struct {
	family.Queue
	// mirror is nil for a receive queue, and while the queue is off.
	mirror *mirror
	// slots is what the context slots held when the mirror ended: they
	// outlive it, as they do in the device.
	slots [][]byte
	// lap stands for the mirror of a ring that is not followed, once the VF is
	// quiesced.
	lap *mirror
	// relied has a bit for each slot whose context a driver that left its queue
	// on has relied on before it came to this VF.
	relied uint32
	// relay is there while the device works on a shadow ring.
	relay *relay
	// head is what the guest finds as the head of a queue that is off, if
	// headShown is set: the device has another.
	head      uint32
	headShown bool
	// read is the last head of a transmit queue that the guest has read, if
	// wasRead is set: it takes back what lies before. Reads past this process,
	// of a VF with the fast path, are not known.
	read    uint32
	wasRead bool
}

// followed is the mirror, or what stands for it; nil for neither.
func (r *ring) followed() *mirror {
	if r.mirror != nil {
		return r.mirror
	}
	return r.lap
}

// show is what the guest finds in a register if that is not the device's.
func (r *ring) show(off uint32) (uint32, bool) {
	switch {
	case r.relay != nil:
		return r.relay.show(r, off)
	case off == r.Head && r.headShown:
		return r.head, true
	}
	return 0, false
}

// contexts returns what the context slots hold with the queue at head; nil
// when none was ever seen filled.
func (v *VF) contexts(r *ring, head uint32) [][]byte {
	slots := r.slots
	if r.mirror != nil {
		slots = r.mirror.at(v.f.Descriptors(), head)
	}
	if !slices.ContainsFunc(slots, func(d []byte) bool { return d != nil }) {
		return nil
	}
	return slots
}

// relied tells which of the context slots the driver counts on with the queue
// at head: by what it has handed over beyond, and where that tells nothing
// those that it has used for several packets or just filled for the next one.
func (v *VF) relied(r *ring, head uint32) uint32 {
	m, f := r.followed(), v.f.Descriptors()
	if m == nil {
		return r.relied
	}
	relied, open := r.relied|m.relied|m.end(f, head).filled, filled(m.at(f, head))
	relied &= open
	size := uint32(len(m.ring)) / m.size
	for i := head; i != m.next && head < m.size; i = (i + 1) % m.size {
		d := m.ring[i*size : (i+1)*size]
		if slot, ok := f.ContextSlot(d); ok {
			relied &^= open & (1 << slot)
			open &^= 1 << slot
		} else if slot, ok := f.UsesContext(d); ok {
			relied |= open & (1 << slot)
			open &^= 1 << slot
		}
	}
	return relied
}

// filled has a bit for each slot that holds something.
func filled(slots [][]byte) (bits uint32) {
	for i, d := range slots {
		if d != nil {
			bits |= 1 << i
		}
	}
	return bits
}

// follow starts to mirror a transmit queue that is about to run at head.
func (v *VF) follow(r *ring, head uint32) {
	if v.o.Memory != nil && r.ContextSlots > 0 && r.mirror == nil && !v.direct(r.Tail) {
		r.mirror = newMirror(v.placeOf(r.Queue), r.Queue, head, r.slots)
	}
}

// unfollow ends the mirror of a queue that is turned off, or of a VF that is
// reset.
func (v *VF) unfollow(r *ring) {
	if r.mirror != nil {
		r.slots = r.mirror.at(v.f.Descriptors(), r.mirror.next)
		r.mirror = nil
	}
	r.relied = 0 // no driver counts on contexts from before
}

// handOver notes that the device gets the descriptors up to tail.
func (v *VF) handOver(r *ring, tail uint32) {
	if r.mirror == nil {
		return
	}
	if err := r.mirror.handOver(v.o.Memory, v.f.Descriptors(), tail); err != nil {
		// As for the device itself, the memory may be back at the next doorbell.
		v.o.Logger.Debug("descriptors cannot be read", "queue", queueName(r.Queue), "error", err)
	}
}

// guestQueueWrite takes a guest's write to a queue's register, and tells
// whether it is done with that.
func (v *VF) guestQueueWrite(r *ring, off, val uint32) bool {
	switch {
	case off == r.Tail:
		if m := r.mirror; r.wasRead && m != nil && m.end(v.f.Descriptors(), m.next).start == m.next {
			r.wasRead = false // it was before the packet that begins here
		}
		v.handOver(r, val)
	case off == r.Ctl && val&r.Enable == 0:
		v.unfollow(r)
	case off == r.Head && r.relay == nil:
		r.headShown = false
	case off == r.Ctl && r.headShown && v.b.Read(off)&r.Enable == 0:
		return v.guestTurnOn(r, val)
	case off == r.Ctl && r.ContextSlots > 0 && r.mirror == nil:
		v.follow(r, v.current(r.Head))
		v.handOver(r, v.current(r.Tail))
	}
	if r.relay == nil {
		return false
	}
	v.relayWrite(r, off, val)
	return true
}

// guestTurnOn turns a queue on whose head is not where the guest sees it.
func (v *VF) guestTurnOn(r *ring, ctl uint32) bool {
	ctx, cancel := v.undoContext(context.Background())
	defer cancel()
	head, tail := r.head, v.b.Read(r.Tail)
	r.headShown = false
	_, err := v.bringHead(ctx, r, head, v.contexts(r, head))
	if err == nil {
		err = v.turnOn(ctx, r.Queue, ctl, head, tail)
	}
	if err != nil {
		v.o.Logger.Error("a queue cannot be turned on where it stood", "queue", queueName(r.Queue), "error", err)
		return false
	}
	v.follow(r, head)
	v.handOver(r, tail)
	v.ringTail(r, tail)
	v.raise()
	return true
}
