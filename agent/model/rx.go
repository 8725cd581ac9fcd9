package model

import (
	"errors"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Fields of VFSRRCTL and VFPSRTYPE.
const (
	srrctlBSizeMask   = 0x7f // in KiB
	srrctlHeaderShift = 8
	srrctlHeaderMask  = 0x3f // in 64 bytes
	srrctlDescShift   = 25
	srrctlDescMask    = 7
	srrctlDropEn      = 1 << 28
	descLegacy        = 0
	descSplit         = 2
	descSplitAlways   = 5
	psrtypeRQPL       = 29
	psrtypeTCP        = 1 << 4
	psrtypeUDP        = 1 << 5
	psrtypeIPv4       = 1 << 8
	psrtypeIPv6       = 1 << 9
	psrtypeL2         = 1 << 12
)

// Status and errors of a received frame, in the layout of the advanced
// descriptor's dword 2.
const (
	rxDD    = 1 << 0
	rxEOP   = 1 << 1
	rxVP    = 1 << 3 // VLAN tag stripped
	rxUDPCS = 1 << 4
	rxL4CS  = 1 << 5
	rxIPCS  = 1 << 6
	rxHBO   = 1 << 23 // the header does not fit its buffer
	rxL4E   = 1 << 30
	rxIPE   = 1 << 31
)

// minFrame is the shortest frame on a wire, without FCS.
const minFrame = 60

// rxQueue is what a receive queue keeps outside its registers.
type rxQueue struct {
	// waiting frames have been accepted but not stored: the packet buffer.
	waiting []rxFrame
	// used are the descriptors whose buffers have data but which are not
	// written back, from VFRDH on.
	used []*rxSlot
	// active are frames that are being put together from segments, whose last
	// descriptors are among used.
	active []*coalescing
	// unmapped tells that memory for the first of them was not there.
	unmapped bool
}

// rxFrame is an accepted frame.
type rxFrame struct {
	data      []byte
	h         headers // of data
	tag       uint16
	tagged    bool // tag was stripped
	multicast bool
	info      uint32 // RSS type and packet type
	hash      uint32
	status    uint32
}

// Loop has the PF send a frame to the VF through its internal switch: what
// Receive does, past the wire. It fails unless Config.Loopback allows it.
func (v *VF) Loop(frame []byte) error {
	if !v.cfg.Loopback {
		return errors.New("the PF loops no frames to its VF")
	}
	v.mu.Lock()
	defer v.unlock()
	v.receive(frame)
	return nil
}

// Receive takes a frame, without FCS, from the network. The VF keeps nothing
// of it. What the PF's filters let through is stored in the guest's memory,
// or dropped, or kept until the guest provides descriptors; it is done when
// Receive returns.
func (v *VF) Receive(frame []byte) {
	v.mu.Lock()
	defer v.unlock()
	if !v.unplugged {
		v.receive(frame)
	}
}

func (v *VF) receive(frame []byte) {
	if v.closed {
		return
	}
	if !v.pf.vfre {
		v.stats.RXDisabled++
		return
	}
	if len(frame) < ethHeader {
		v.stats.RXFiltered++
		return
	}
	h := parse(frame)
	if !v.pf.accepts(v.cfg, frame, h) {
		v.stats.RXFiltered++
		return
	}
	f := rxFrame{data: make([]byte, 0, max(len(frame), minFrame)), multicast: frame[0]&1 != 0}
	f.data = append(f.data, frame...)
	for len(f.data) < minFrame {
		f.data = append(f.data, 0)
	}
	f.info, f.status = h.packetType(), h.verify(f.data)
	q := v.selectQueue(&f, h)
	ctl := v.regs[ixgbevf.VFRXDCTL(q)/4]
	if ctl&ixgbevf.QueueEnable == 0 {
		v.stats.RXDisabled++
		return
	}
	if limit := ctl & ixgbevf.RXDCTLLength; ctl&ixgbevf.RXDCTLLengthEnable != 0 && h.untaggedLength(f.data)+fcs > int(limit) {
		v.stats.RXFiltered++
		return
	}
	if ctl&ixgbevf.RXDCTLVME != 0 && h.tagged {
		f.tag, f.tagged = h.tag, true
		f.status |= rxVP
		f.data = append(f.data[:12], f.data[16:]...)
		h = h.stripped()
	}
	f.h = h
	if v.buffered+len(f.data) > v.cfg.PacketBuffer {
		v.stats.RXNoDescriptor++
		return
	}
	v.buffered += len(f.data)
	v.rx[q].waiting = append(v.rx[q].waiting, f)
	v.drainRX(q)
}

// selectQueue spreads frames over the queues, by the VF's own RSS if it has
// one that is on, else as VFPSRTYPE.RQPL asks for.
func (v *VF) selectQueue(f *rxFrame, h headers) int {
	if q, hash, kind, on := v.ownRSS(h, f.data); on {
		f.hash, f.info = hash, f.info|kind
		return q
	}
	queues := 1 << (v.regs[ixgbevf.VFPSRTYPE/4] >> psrtypeRQPL & 3)
	if queues == 1 || len(v.rx) < queues {
		return 0
	}
	hash, kind := h.rss(f.data, &rssKey, pfHashes)
	if kind == 0 {
		return 0
	}
	f.hash, f.info = hash, f.info|kind
	return int(hash&(retaEntries-1)) % queues
}

// drainRX stores waiting frames for as long as there are descriptors, and
// writes back what is done.
func (v *VF) drainRX(q int) {
	queue := &v.rx[q]
	queue.unmapped = false
	if v.regs[ixgbevf.VFRXDCTL(q)/4]&ixgbevf.QueueEnable == 0 {
		return
	}
	l := v.layoutOf(q)
	for len(queue.waiting) > 0 {
		f := &queue.waiting[0]
		if joined, ok := v.join(q, f, l); joined {
			v.taken(q, f)
			continue
		} else if !ok {
			queue.unmapped = true
			v.retryLater()
			break
		}
		r := v.ringAt(ixgbevf.VFRDBAL(q))
		p := l.place(f)
		if r.available()-len(queue.used) < p.need {
			if !l.drop && p.need < int(r.size) {
				break
			}
			v.stats.RXNoDescriptor++
			v.dropFirst(q)
			continue
		}
		if !v.store(q, r, f, p, l) {
			queue.unmapped = true
			v.retryLater()
			break
		}
		v.taken(q, f)
	}
	v.completeDue(q)
	v.writeBackRX(q)
}

// taken ends the wait of the first frame, which is in the guest's memory.
func (v *VF) taken(q int, f *rxFrame) {
	v.retryDelay = 0
	v.countRX(f)
	v.dropFirst(q)
}

// dropFirst takes the first waiting frame off the packet buffer.
func (v *VF) dropFirst(q int) {
	w := v.rx[q].waiting
	v.buffered -= len(w[0].data)
	w[0] = rxFrame{}
	v.rx[q].waiting = w[1:]
}

func (v *VF) countRX(f *rxFrame) {
	n := uint64(len(f.data))
	if f.tagged {
		n += vlanTag
	}
	v.stats.Received++
	v.counters.GPRC++
	v.counters.GORC += n
	if f.multicast {
		v.counters.MPRC++
	}
}

// writeRX writes a register of a receive queue that is more than storage; it
// reports false for the others.
func (v *VF) writeRX(q int, inner, val uint32) bool {
	ctl := ixgbevf.VFRXDCTL(q)
	switch inner {
	case ixgbevf.VFRDH(0) - ixgbevf.VFRDBAL(0):
		v.writeHead(ixgbevf.VFRDH(q), ctl, val, v.cfg.WritableRXHead)
	case ixgbevf.VFRDT(0) - ixgbevf.VFRDBAL(0):
		v.regs[ixgbevf.VFRDT(q)/4] = val & 0xffff
		v.drainRX(q)
	case ixgbevf.VFRXDCTL(0) - ixgbevf.VFRDBAL(0):
		was := v.regs[ctl/4]
		v.regs[ctl/4] = val & v.spec[ctl/4].Mask &^ ixgbevf.QueueFlush
		if was&ixgbevf.QueueEnable != 0 && val&ixgbevf.QueueEnable == 0 {
			v.completeAll(q)
			v.writeBackRX(q)
			v.disableRX(q)
		}
	default:
		return false
	}
	return true
}

// disableRX turns a receive queue off. Its share of the packet buffer is lost,
// and so is what was not written back.
func (v *VF) disableRX(q int) {
	v.regs[ixgbevf.VFRXDCTL(q)/4] &^= ixgbevf.QueueEnable
	for _, f := range v.rx[q].waiting {
		v.buffered -= len(f.data)
		v.stats.RXNoDescriptor++
	}
	v.rx[q] = rxQueue{}
	if !v.cfg.HeadsPersistAcrossDisable {
		v.regs[ixgbevf.VFRDH(q)/4] = 0
	}
}
