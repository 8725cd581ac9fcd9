package model

import (
	"encoding/binary"
	"slices"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Fields of VFRSCCTL, and of descriptors that belong to a coalesced frame:
// RSCCNT in dword 0, NEXTP in dword 2 of all but the last.
const (
	rscctlEnable   = 1 << 0
	rscctlMaxShift = 2
	rscctlMaxMask  = 3
	rxCountShift   = 17
	maxCount       = 1<<4 - 1
	rxNextShift    = 4
)

// maxActive is how many frames the device puts together at once.
const maxActive = 32

// maxTotal is the longest IP packet.
const maxTotal = 1<<16 - 1

// TCP flags, and the option that segments to coalesce may have: two NOPs and
// the time stamp.
const (
	tcpACK         = 1 << 4
	tcpTimestamp   = 0x0101080a
	tcpWithStamp   = tcpHeader + 12
	tcpFlags       = 13 // offset of the flags
	tcpAckNumber   = 8
	tcpSequence    = 4
	ipv4Total      = 2
	ipv4Checksum   = 10
	ipv4Addresses  = 12
	etherAddresses = 12
)

// flow tells the segments of one direction of a TCP connection.
type flow struct {
	stations  [etherAddresses]byte
	addresses [8]byte
	ports     [4]byte
	tag       uint16
	tagged    bool
}

// flowOf is the flow of an IPv4 TCP segment; ok is false for other frames.
func flowOf(f *rxFrame) (w flow, ok bool) {
	h := &f.h
	if h.v6 || h.l4End == 0 || h.proto != protoTCP {
		return w, false
	}
	w.tag, w.tagged = f.tag, f.tagged
	copy(w.stations[:], f.data)
	copy(w.addresses[:], f.data[h.ip+ipv4Addresses:])
	copy(w.ports[:], f.data[h.l4:])
	return w, true
}

// coalescing is a frame that is being put together from segments.
type coalescing struct {
	flow flow
	// vector whose interval ends it, -1 for none.
	vector int
	// header is the length of the first segment's headers, ip a copy of the IP
	// header, which is at ipAt in memory, and flags are TCP's, at flagsAt.
	header        int
	ip            [ipv4Header]byte
	flags         byte
	ipAt, flagsAt uint64
	next, ack     uint32 // sequence number expected, acknowledgement of all
	total         int    // length of the IP packet
	used, most    int    // descriptors
	// last is the descriptor that is being filled, with status and tag for
	// when it is written back.
	last   *rxSlot
	status uint32
	tag    uint16
}

// coalescible tells whether a frame is one to be coalesced.
func (v *VF) coalescible(q int, f *rxFrame, l layout) bool {
	h := &f.h
	if !v.cfg.Coalescing || v.regs[ixgbevf.VFRSCCTL(q)/4]&rscctlEnable == 0 || l.format == descLegacy ||
		h.v6 || h.opts || h.tagged || h.proto != protoTCP || h.l4End == 0 || h.l4End == h.end ||
		f.multicast || f.status&(rxIPE|rxL4E) != 0 {
		return false
	}
	tcp := f.data[h.l4:h.l4End]
	stamp := len(tcp) == tcpWithStamp && be.Uint32(tcp[tcpHeader:]) == tcpTimestamp
	return (len(tcp) == tcpHeader || stamp) && tcp[tcpFlags]&^tcpPSH == tcpACK
}

// open makes the frame that was just stored the first of a coalesced one.
func (v *VF) open(q int, f *rxFrame, p placement, slots []*rxSlot) {
	at := func(offset int) uint64 {
		if offset < p.header {
			return slots[0].header + uint64(offset)
		}
		return slots[0].packet + uint64(offset-p.header)
	}
	c := &coalescing{
		vector: v.vectorOf(q, false), header: f.h.l4End, ipAt: at(f.h.ip), flagsAt: at(f.h.l4 + tcpFlags),
		total: f.h.end - f.h.ip, used: p.need, last: slots[len(slots)-1],
		most:   [...]int{1, 4, 8, 16}[v.regs[ixgbevf.VFRSCCTL(q)/4]>>rscctlMaxShift&rscctlMaxMask],
		status: f.status, tag: f.tag, flags: f.data[f.h.l4+tcpFlags],
	}
	if c.flow, _ = flowOf(f); c.used > c.most || len(f.data) != f.h.end || v.activeFrames() == maxActive {
		return
	}
	copy(c.ip[:], f.data[f.h.ip:])
	c.expect(f)
	for i, s := range slots {
		s.count = 1
		s.mark()
		if i > 0 {
			slots[i-1].link(s)
		}
	}
	c.last.reopen()
	v.rx[q].active = append(v.rx[q].active, c)
	if c.flags&tcpPSH != 0 {
		v.complete(q, c)
	}
}

// expect notes what the next segment must be like.
func (c *coalescing) expect(f *rxFrame) {
	tcp := f.data[f.h.l4:]
	c.next = be.Uint32(tcp[tcpSequence:]) + uint32(f.h.end-f.h.l4End)
	c.ack = be.Uint32(tcp[tcpAckNumber:])
}

// activeFrames counts the frames that are being put together.
func (v *VF) activeFrames() (n int) {
	for q := range v.rx {
		n += len(v.rx[q].active)
	}
	return n
}

// join adds a frame's payload to the coalesced frame of its flow. Done tells
// that it did; without, the frame is one of its own, and the other has been
// completed. ok is false, with nothing changed, if memory was not mapped.
func (v *VF) join(q int, f *rxFrame, l layout) (done, ok bool) {
	queue := &v.rx[q]
	w, isTCP := flowOf(f)
	i := slices.IndexFunc(queue.active, func(c *coalescing) bool { return isTCP && c.flow == w })
	if i < 0 {
		return false, true
	}
	c := queue.active[i]
	tcp, payload := f.data[f.h.l4:], f.data[f.h.l4End:f.h.end]
	more := max(0, len(payload)-(l.buffer-c.last.length)+l.buffer-1) / l.buffer
	r := v.ringAt(ixgbevf.VFRDBAL(q))
	if !v.coalescible(q, f, l) || f.h.l4End != c.header || f.h.ip != ethHeader ||
		be.Uint32(tcp[tcpSequence:]) != c.next || be.Uint32(tcp[tcpAckNumber:]) != c.ack ||
		c.used+more > c.most || r.available()-len(queue.used) < more ||
		c.total+len(payload) > maxTotal || c.last.count == maxCount {
		v.complete(q, c)
		return false, true
	}
	// What is written here is written again if not all can be.
	n := min(l.buffer-c.last.length, len(payload))
	if n > 0 && !v.dma(v.mem.WriteAt(c.last.packet+uint64(c.last.length), payload[:n])) {
		return false, false
	}
	var added []*rxSlot
	for rest := payload[n:]; len(rest) > 0; {
		part := rest[:min(l.buffer, len(rest))]
		s := &rxSlot{addr: r.at(len(queue.used) + len(added)), index: r.after(len(queue.used) + len(added)), count: 1, length: len(part)}
		if !v.scatter(s, nil, part) {
			return false, false
		}
		added, rest = append(added, s), rest[len(part):]
	}
	if !v.lengthen(c, len(payload), tcp[tcpFlags]) {
		return false, false
	}
	if n > 0 {
		c.last.length += n
		c.last.count++
		c.last.mark()
	}
	for _, s := range added {
		s.desc = c.last.desc
		// The header is that of the first descriptor.
		binary.LittleEndian.PutUint32(s.desc[0:], binary.LittleEndian.Uint32(s.desc[0:])&(1<<rxCountShift-1))
		binary.LittleEndian.PutUint32(s.desc[8:], 0)
		s.mark()
		c.last.link(s)
		s.reopen()
		c.last = s
	}
	queue.used = append(queue.used, added...)
	c.used += len(added)
	c.expect(f)
	v.stats.RXCoalesced++
	if c.flags&tcpPSH != 0 {
		v.complete(q, c)
	}
	return true, true
}

// lengthen makes the header in memory that of a packet that has so many bytes
// more. TCP's checksum stays that of the first segment.
func (v *VF) lengthen(c *coalescing, n int, flags byte) bool {
	ip := c.ip
	be.PutUint16(ip[ipv4Total:], uint16(c.total+n))
	be.PutUint16(ip[ipv4Checksum:], 0)
	be.PutUint16(ip[ipv4Checksum:], ^sum(0, ip[:]))
	flags |= c.flags
	if !v.dma(v.mem.WriteAt(c.ipAt, ip[:])) || !v.dma(v.mem.WriteAt(c.flagsAt, []byte{flags})) {
		return false
	}
	c.ip, c.flags, c.total = ip, flags, c.total+n
	return true
}

// complete ends a coalesced frame: its last descriptor may be written back.
func (v *VF) complete(q int, c *coalescing) {
	queue := &v.rx[q]
	c.last.end(c.status, c.tag)
	queue.active = slices.DeleteFunc(queue.active, func(o *coalescing) bool { return o == c })
}

// completeDue completes what no interval keeps open: a frame is given to the
// guest no later than the interrupt that tells of it.
func (v *VF) completeDue(q int) {
	for _, c := range slices.Clone(v.rx[q].active) {
		if c.vector < 0 || !v.throttled(c.vector) {
			v.complete(q, c)
		} else {
			v.awaitInterval(c.vector)
		}
	}
}

// completeAll completes everything of a queue.
func (v *VF) completeAll(q int) {
	for _, c := range slices.Clone(v.rx[q].active) {
		v.complete(q, c)
	}
}
