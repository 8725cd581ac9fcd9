package model

import "encoding/binary"

// Fields of a context descriptor's dword 2.
const (
	ctxIPv4    = 1 << 10
	ctxL4Shift = 11
	ctxL4Mask  = 3
	l4UDP      = 0
	l4TCP      = 1
	l4SCTP     = 2
)

// minMSS is the smallest segment size taken. Intel's drivers stay far above;
// a smaller one would only multiply a hostile guest's work.
const minMSS = 32

// TCP flags that do not belong in every segment (82599 datasheet, DTXTCPFLGL
// and DTXTCPFLGH: 0xff6, 0xf76 and 0xf7f at power-on).
const (
	tcpFIN = 1 << 0
	tcpPSH = 1 << 3
	tcpCWR = 1 << 7
)

// txContext is what a context descriptor tells about the packets to come.
type txContext struct {
	tag           uint16
	macLen, ipLen int
	l4Len, mss    int
	ipv4          bool
	l4            uint32
}

func contextOf(d *descriptor) txContext {
	lens, kind, mss := d.word(0), d.word(2), d.word(3)
	return txContext{
		tag:    uint16(lens >> 16),
		macLen: int(lens >> 9 & 0x7f),
		ipLen:  int(lens & 0x1ff),
		l4Len:  int(mss >> 8 & 0xff),
		mss:    int(mss >> 16),
		ipv4:   kind&ctxIPv4 != 0,
		l4:     kind >> ctxL4Shift & ctxL4Mask,
	}
}

// packet is what a run of descriptors up to EOP describes: one frame, or many
// if it is to be segmented.
type packet struct {
	data                  []byte
	ctx                   txContext
	segment, ipSum, l4Sum bool
	insertTag             bool
	tag                   uint16
	legacySum             bool
	sumStart, sumAt       int
}

// packetOf starts a packet from its first descriptor, which carries the
// commands for all of it.
func packetOf(d *descriptor, contexts *[2]txContext) packet {
	command, options := d.command(), d.word(3)
	if command&txDEXT == 0 {
		return packet{}
	}
	p := packet{
		ctx:       contexts[options/txIDX&1],
		segment:   command&txTSE != 0,
		ipSum:     options&txIXSM != 0,
		l4Sum:     options&txTXSM != 0,
		insertTag: command&txVLE != 0,
	}
	p.ipSum = p.ipSum && p.ctx.ipv4
	p.tag = p.ctx.tag
	return p
}

// legacyEnd takes the commands of a legacy packet from its last descriptor.
func (p *packet) legacyEnd(d *descriptor) {
	command := d.command()
	p.insertTag = command&txVLE != 0
	p.tag = binary.LittleEndian.Uint16(d[14:])
	p.legacySum = command&txIC != 0
	p.sumAt = int(command >> 16 & 0xff)
	p.sumStart = int(d[13])
}

// valid tells whether the packet can be sent as it asks to be.
func (p *packet) valid() bool {
	n, c := len(p.data), &p.ctx
	l4, field := c.macLen+c.ipLen, p.l4Field()
	switch {
	case n < ethHeader, !p.segment && n > maxTXFrame:
		return false
	case p.legacySum && (p.sumStart >= n || p.sumAt+2 > n):
		return false
	case (p.ipSum || p.segment) && c.macLen < ethHeader:
		return false
	case p.ipSum && (c.ipLen < ipv4Header || l4 > n):
		return false
	case p.l4Sum && (field == 0 || l4+field+p.l4FieldSize() > n):
		return false
	case !p.segment:
		return true
	}
	l4Min, ipMin := tcpHeader, ipv6Header
	if c.l4 == l4UDP {
		l4Min = udpHeader
	}
	if c.ipv4 {
		ipMin = ipv4Header
	}
	return c.l4 <= l4TCP && c.mss >= minMSS && c.ipLen >= ipMin && c.l4Len >= l4Min &&
		n > l4+c.l4Len && l4+c.l4Len+c.mss <= maxTXFrame
}

// l4Field is the offset of the checksum in the L4 header, 0 for no checksum.
func (p *packet) l4Field() int {
	switch p.ctx.l4 {
	case l4TCP:
		return 16
	case l4UDP:
		return 6
	case l4SCTP:
		return 8
	}
	return 0
}

func (p *packet) l4FieldSize() int {
	if p.ctx.l4 == l4SCTP {
		return 4
	}
	return 2
}

// frames gives each frame of a valid packet to emit, which owns it and
// returns false to stop.
func (p *packet) frames(emit func([]byte) bool) {
	if !p.segment {
		p.offload(p.data, 0)
		emit(p.finish(p.data))
		return
	}
	header := p.ctx.macLen + p.ctx.ipLen + p.ctx.l4Len
	payload := p.data[header:]
	for at, n := 0, 0; at < len(payload); n++ {
		part := payload[at:min(at+p.ctx.mss, len(payload))]
		f := make([]byte, 0, header+len(part)+vlanTag)
		f = append(append(f, p.data[:header]...), part...)
		p.adjust(f, at, n, at+len(part) == len(payload))
		p.offload(f, len(f)-p.ctx.macLen-p.ctx.ipLen)
		if !emit(p.finish(f)) {
			return
		}
		at += len(part)
	}
}

// adjust makes the headers of segment n, whose payload begins at octet at.
func (p *packet) adjust(f []byte, at, n int, last bool) {
	c := &p.ctx
	ip, l4 := f[c.macLen:], f[c.macLen+c.ipLen:]
	if c.ipv4 {
		be.PutUint16(ip[2:], uint16(len(ip)))
		be.PutUint16(ip[4:], be.Uint16(ip[4:])+uint16(n))
	} else {
		be.PutUint16(ip[4:], uint16(len(ip)-ipv6Header))
	}
	if c.l4 == l4UDP {
		be.PutUint16(l4[4:], uint16(len(l4)))
		return
	}
	be.PutUint32(l4[4:], be.Uint32(l4[4:])+uint32(at))
	if n > 0 {
		l4[13] &^= tcpCWR
	}
	if !last {
		l4[13] &^= tcpFIN | tcpPSH
	}
}

// offload inserts the checksums that were asked for. The device does not
// clear the fields first: drivers leave the pseudo header's sum in that of
// TCP and UDP, without the length when the packet is segmented, whose length
// addLength is then added here.
func (p *packet) offload(f []byte, addLength int) {
	c := &p.ctx
	if p.legacySum {
		be.PutUint16(f[p.sumAt:], ^sum(0, f[p.sumStart:]))
	}
	if p.ipSum {
		ip := f[c.macLen : c.macLen+c.ipLen]
		be.PutUint16(ip[10:], ^sum(0, ip))
	}
	if !p.l4Sum {
		return
	}
	l4 := f[c.macLen+c.ipLen:]
	if c.l4 == l4SCTP {
		binary.LittleEndian.PutUint32(l4[8:], sctpSum(l4))
		return
	}
	check := ^sum(uint32(addLength), l4)
	if check == 0 && c.l4 == l4UDP {
		check = 0xffff
	}
	be.PutUint16(l4[p.l4Field():], check)
}

// finish inserts the VLAN tag and pads the frame.
func (p *packet) finish(f []byte) []byte {
	if p.insertTag {
		f = append(f, 0, 0, 0, 0)
		copy(f[16:], f[12:])
		be.PutUint16(f[12:], etherVLAN)
		be.PutUint16(f[14:], p.tag)
	}
	for len(f) < minFrame {
		f = append(f, 0)
	}
	return f
}
