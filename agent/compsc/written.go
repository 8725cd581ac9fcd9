package compsc

import (
	"errors"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// written follows what memory of the guest the device writes by DMA, where
// nothing else tells: a driver gives the device buffers by its receive rings,
// through doorbells that all pass here, and the rings' heads tell which of
// them the device has used. Besides these the device writes to the rings
// themselves and to where it reports a transmit ring's head.
type written struct {
	tell func(addr uint64, n int)
	// rings has each receive ring that runs, by its control register.
	rings map[uint32]*given
	// lost is why it is not known what the device has written, if so.
	lost error
}

// given is one receive ring with the buffers that the device may have.
type given struct {
	place
	format uint32
	// coalesces tells that the device may coalesce packets.
	coalesces bool
	// next is the first descriptor that was not handed over yet.
	next uint32
	// buffers of each descriptor that were not told yet; of size 0 if none.
	buffers []buffers
}

// buffers are those of one descriptor. Twice tells that they were told once,
// but have to be again.
type buffers struct {
	packet, header family.Span
	twice          bool
}

// Track begins to follow what memory the device writes, with Options.Memory to
// read its rings, and calls tell with each range: at the latest in
// FlushTracked, and more than once for some. What the device wrote before
// Track returns is not told. Tell must not call back into the VF.
//
// It is exact but for what it cannot know: a buffer that was used is told
// whole, and so are the rings. Where packets are coalesced a buffer is told by
// two flushes, for the device may come back to the header of one that goes on
// in the next descriptors. It does so for an interval of interrupt moderation,
// which is a millisecond at most: flushes must be further apart, but for the
// last. A guest that gives the device memory by other
// means than its rings has none.
func (v *VF) Track(tell func(addr uint64, n int)) {
	v.mu.Lock()
	defer v.unlock()
	v.written = &written{tell: tell, rings: map[uint32]*given{}}
	for _, q := range v.queues {
		r := v.rings[q.Ctl]
		if v.current(q.Ctl)&q.Enable != 0 {
			v.trackStart(r)
		}
	}
}

// FlushTracked tells all that the device wrote up to now and that was not told
// yet. For a VF that is quiesced that is the last word. An error says that it
// is not known what the device wrote.
func (v *VF) FlushTracked() error {
	v.mu.Lock()
	defer v.unlock()
	w := v.written
	if w == nil {
		return errors.New("what the device writes is not tracked")
	}
	for _, q := range v.queues {
		r := v.rings[q.Ctl]
		v.trackRing(r)
		if g := w.rings[q.Ctl]; g != nil {
			v.tellUsed(g, v.current(q.Head))
		}
	}
	if w.lost != nil {
		return fmt.Errorf("it is not known which memory the device wrote: %w", w.lost)
	}
	return nil
}

// Untrack ends what Track began.
func (v *VF) Untrack() {
	v.mu.Lock()
	defer v.unlock()
	v.written = nil
}

// trackStart begins to follow a queue that runs, or is about to.
func (v *VF) trackStart(r *ring) {
	v.trackRing(r)
	if r.Direction != family.RX {
		return
	}
	p, head := v.placeOf(r.Queue), v.current(r.Head)
	if p.size == 0 || head >= p.size {
		return // the device stands still
	}
	g := &given{place: p, next: head, buffers: make([]buffers, p.size)}
	g.coalesces = r.Coalesce != 0 && v.current(r.Coalesce)&r.CoalesceEnable != 0
	if r.Format != 0 {
		g.format = v.current(r.Format)
	}
	v.written.rings[r.Ctl] = g
	v.give(r, g, v.current(r.Tail))
}

// give notes the buffers that the device gets with a doorbell. It must be
// called before the doorbell: after it, the device may overwrite them.
func (v *VF) give(r *ring, g *given, tail uint32) {
	if tail >= g.size {
		return // the device stands still
	}
	b := make([]byte, r.DescriptorSize)
	for ; g.next != tail; g.next = (g.next + 1) % g.size {
		if err := v.o.Memory.ReadAt(g.base+uint64(g.next)*uint64(r.DescriptorSize), b); err != nil {
			v.written.lost = fmt.Errorf("%s, descriptor %d: %w", queueName(r.Queue), g.next, err)
			continue
		}
		s := &g.buffers[g.next]
		// Handed over once more, so the device is through with what was there.
		v.written.spans(s.packet, s.header)
		s.packet, s.header = v.f.Descriptors().Buffers(g.format, b)
		s.twice = false
	}
}

// spans tells ranges.
func (w *written) spans(list ...family.Span) {
	for _, s := range list {
		if s.Size > 0 {
			w.tell(s.Addr, int(s.Size))
		}
	}
}

// tellUsed tells the buffers that the device is through with when its ring
// stands at head; all of them if it stands nowhere.
func (v *VF) tellUsed(g *given, head uint32) {
	pending := uint32(0)
	if head < g.size {
		pending = (g.next + g.size - head) % g.size
	}
	for n := range g.size - pending {
		s := &g.buffers[(g.next+n)%g.size]
		v.written.spans(s.packet, s.header)
		if s.twice = g.coalesces && !s.twice; !s.twice {
			s.packet.Size, s.header.Size = 0, 0
		}
	}
}

// trackRing tells the ring itself, and where its head is reported.
func (v *VF) trackRing(r *ring) {
	if p := v.placeOf(r.Queue); p.size > 0 {
		v.written.tell(p.base, int(p.size*r.DescriptorSize))
	}
	if r.WBAL != 0 {
		if low := v.current(r.WBAL); low&1 != 0 {
			v.written.tell(uint64(v.current(r.WBAH))<<32|uint64(low&^3), 4)
		}
	}
}

// trackQueueWrite is called before a guest's write to a queue's register.
func (v *VF) trackQueueWrite(r *ring, off, val uint32) {
	w := v.written
	if w == nil || off == r.Head {
		return
	}
	g := w.rings[r.Ctl]
	switch off {
	case r.Tail:
		if g != nil {
			v.give(r, g, val)
		}
	case r.Ctl:
		on, was := val&r.Enable != 0, v.current(r.Ctl)&r.Enable != 0
		if on == was {
			return
		}
		if g != nil {
			v.tellUsed(g, g.size)
			delete(w.rings, r.Ctl)
		}
		v.trackRing(r)
		if on {
			v.trackStart(r)
		}
	default:
		v.trackRing(r) // the ring, or its report, may be moving away
	}
}

// trackReset is called before a reset of the VF, which turns all queues off.
func (v *VF) trackReset() {
	w := v.written
	if w == nil {
		return
	}
	for _, q := range v.queues {
		v.trackRing(v.rings[q.Ctl])
		if g := w.rings[q.Ctl]; g != nil {
			v.tellUsed(g, g.size)
		}
	}
	clear(w.rings)
}
