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
	addr uint64
	desc [descriptorSize]byte // to be written back
	// ready tells that nothing more goes into its buffers.
	ready bool
}

// store writes a frame into descriptors' buffers and prepares their
// write-back. It reports false, with no descriptor used, if memory was not
// mapped.
func (v *VF) store(q int, r ring, f *rxFrame, p placement, l layout) bool {
	queue := &v.rx[q]
	slots := make([]rxSlot, 0, p.need)
	rest := f.data
	for i := range p.need {
		s := rxSlot{addr: r.at(len(queue.used) + i), ready: true}
		n, header := min(l.buffer, len(rest)), 0
		if i == 0 && p.header > 0 {
			header = p.header
			n = min(l.buffer, len(rest)-header)
		}
		if !v.scatter(s.addr, rest[:header], rest[header:header+n]) {
			return false
		}
		rest = rest[header+n:]
		s.desc = f.writeBack(n, len(rest) == 0, l.format == descLegacy)
		if i == 0 {
			p.mark(&s)
		}
		slots = append(slots, s)
	}
	queue.used = append(queue.used, slots...)
	return true
}

// scatter writes to the buffers of the descriptor at addr: what goes into the
// header buffer, whose address the second quadword has, and the rest.
func (v *VF) scatter(addr uint64, header, rest []byte) bool {
	var d [descriptorSize]byte
	if !v.dma(v.mem.ReadAt(addr, d[:])) {
		return false
	}
	if len(header) > 0 && !v.dma(v.mem.WriteAt(binary.LittleEndian.Uint64(d[8:])&^1, header)) {
		return false
	}
	return len(rest) == 0 || v.dma(v.mem.WriteAt(binary.LittleEndian.Uint64(d[:]), rest))
}

// writeBackRX writes descriptors back that are ready, in the order of the
// ring, and tells the guest.
func (v *VF) writeBackRX(q int) {
	queue := &v.rx[q]
	done := 0
	r := v.ringAt(ixgbevf.VFRDBAL(q))
	for ; done < len(queue.used) && queue.used[done].ready && r.sane(); done++ {
		s := &queue.used[done]
		// Drivers look at the second quadword: it makes the rest valid.
		if !v.dma(v.mem.WriteAt(s.addr, s.desc[:8])) || !v.dma(v.mem.WriteAt(s.addr+8, s.desc[8:])) {
			queue.unmapped = true
			v.retryLater()
			break
		}
	}
	if done == 0 {
		return
	}
	v.regs[ixgbevf.VFRDH(q)/4] = r.after(done)
	if queue.used = queue.used[done:]; len(queue.used) == 0 {
		queue.used = nil
	}
	v.queueCause(q, false)
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
