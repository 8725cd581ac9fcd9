package model

import (
	"encoding/binary"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// layout is how a receive queue lays frames out in memory.
type layout struct {
	format uint32 // SRRCTL.DESCTYPE
	// buffer and header are the sizes of a descriptor's buffers in bytes.
	buffer, header int
	// splits are VFPSRTYPE's bits.
	splits uint32
	// drop tells that frames without descriptors are dropped at once.
	drop bool
}

func (v *VF) layoutOf(q int) layout {
	srrctl := v.regs[ixgbevf.VFSRRCTL(q)/4]
	l := layout{
		format: srrctl >> srrctlDescShift & srrctlDescMask,
		buffer: int(srrctl&srrctlBSizeMask) << 10,
		header: min(int(srrctl>>srrctlHeaderShift&srrctlHeaderMask)*64, maxHeader),
		splits: v.regs[ixgbevf.VFPSRTYPE/4],
		drop:   v.pf.qde || srrctl&srrctlDropEn != 0,
	}
	if l.buffer == 0 {
		l.buffer = int(ixgbevf.SRRCTLDefault&srrctlBSizeMask) << 10
	}
	return l
}

// rxSlot is a descriptor that is in use.
type rxSlot struct {
	addr  uint64
	index uint32
	// packet and header are the addresses of its buffers.
	packet, header uint64
	length         int                  // bytes in the packet buffer
	count          uint32               // segments, if coalesced
	desc           [descriptorSize]byte // to be written back
	// ready tells that nothing more goes into its buffers.
	ready bool
}

// mark notes length and RSCCNT.
func (s *rxSlot) mark() {
	info := binary.LittleEndian.Uint32(s.desc[0:]) &^ (maxCount << rxCountShift)
	binary.LittleEndian.PutUint32(s.desc[0:], info|s.count<<rxCountShift)
	binary.LittleEndian.PutUint16(s.desc[12:], uint16(s.length))
}

// reopen takes back that the descriptor is the last of its frame.
func (s *rxSlot) reopen() {
	overflow := binary.LittleEndian.Uint32(s.desc[8:]) & rxHBO
	binary.LittleEndian.PutUint32(s.desc[8:], rxDD|overflow)
	binary.LittleEndian.PutUint16(s.desc[14:], 0)
	s.ready = false
}

// link ends the descriptor, which the frame goes beyond, with NEXTP.
func (s *rxSlot) link(next *rxSlot) {
	overflow := binary.LittleEndian.Uint32(s.desc[8:]) & rxHBO
	binary.LittleEndian.PutUint32(s.desc[8:], rxDD|overflow|next.index<<rxNextShift)
	s.ready = true
}

// end makes the descriptor the last of its frame.
func (s *rxSlot) end(status uint32, tag uint16) {
	binary.LittleEndian.PutUint32(s.desc[8:], binary.LittleEndian.Uint32(s.desc[8:])|rxEOP|status)
	binary.LittleEndian.PutUint16(s.desc[14:], tag)
	s.ready = true
}

// store writes a frame into descriptors' buffers and prepares their
// write-back. It reports false, with no descriptor used, if memory was not
// mapped.
func (v *VF) store(q int, r ring, f *rxFrame, p placement, l layout) bool {
	queue := &v.rx[q]
	slots := make([]*rxSlot, 0, p.need)
	rest := f.data
	for i := range p.need {
		s := &rxSlot{addr: r.at(len(queue.used) + i), index: r.after(len(queue.used) + i), ready: true}
		n, header := min(l.buffer, len(rest)), 0
		if i == 0 && p.header > 0 {
			header = p.header
			n = min(l.buffer, len(rest)-header)
		}
		if !v.scatter(s, rest[:header], rest[header:header+n]) {
			return false
		}
		rest = rest[header+n:]
		s.length = n
		s.desc = f.writeBack(n, len(rest) == 0, l.format == descLegacy)
		if i == 0 {
			p.mark(s)
		}
		slots = append(slots, s)
	}
	queue.used = append(queue.used, slots...)
	if v.coalescible(q, f, l) {
		v.open(q, f, p, slots)
	}
	return true
}

// scatter fetches a descriptor and writes to its buffers: what goes into the
// header buffer, whose address the second quadword has, and the rest.
func (v *VF) scatter(s *rxSlot, header, rest []byte) bool {
	var d [descriptorSize]byte
	if !v.dma(v.mem.ReadAt(s.addr, d[:])) {
		return false
	}
	s.packet, s.header = binary.LittleEndian.Uint64(d[:]), binary.LittleEndian.Uint64(d[8:])&^1
	if len(header) > 0 && !v.dma(v.mem.WriteAt(s.header, header)) {
		return false
	}
	return len(rest) == 0 || v.dma(v.mem.WriteAt(s.packet, rest))
}

// writeBackRX writes back what is ready, and tells the guest.
func (v *VF) writeBackRX(q int) {
	if v.flushRX(q) {
		v.queueCause(q, false)
	}
}

// flushRX writes descriptors back that are ready, in the order of the ring,
// and reports whether there were any.
func (v *VF) flushRX(q int) bool {
	queue := &v.rx[q]
	done := 0
	r := v.ringAt(ixgbevf.VFRDBAL(q))
	for ; done < len(queue.used) && queue.used[done].ready && r.sane(); done++ {
		s := queue.used[done]
		// Drivers look at the second quadword: it makes the rest valid.
		if !v.dma(v.mem.WriteAt(s.addr, s.desc[:8])) || !v.dma(v.mem.WriteAt(s.addr+8, s.desc[8:])) {
			queue.unmapped = true
			v.retryLater()
			break
		}
	}
	if done == 0 {
		return false
	}
	v.regs[ixgbevf.VFRDH(q)/4] = r.after(done)
	if queue.used = queue.used[done:]; len(queue.used) == 0 {
		queue.used = nil
	}
	return true
}

// writeBack makes the descriptor of n bytes of a frame.
func (f *rxFrame) writeBack(n int, last, legacy bool) (d [descriptorSize]byte) {
	status := uint32(rxDD)
	tag := uint16(0)
	if last {
		status |= rxEOP | f.status
		tag = f.tag
	}
	if legacy {
		binary.LittleEndian.PutUint16(d[8:], uint16(n))
		d[12] = byte(status)
		d[13] = byte(status >> 24) // IPE and L4E have the same places
		binary.LittleEndian.PutUint16(d[14:], tag)
		return d
	}
	binary.LittleEndian.PutUint32(d[0:], f.info)
	binary.LittleEndian.PutUint32(d[4:], f.hash)
	binary.LittleEndian.PutUint32(d[8:], status)
	binary.LittleEndian.PutUint16(d[12:], uint16(n))
	binary.LittleEndian.PutUint16(d[14:], tag)
	return d
}
