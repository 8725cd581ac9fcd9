package model

import (
	"encoding/binary"
	"hash/crc32"
)

// Sizes and types of the headers that the device parses.
const (
	ethHeader  = 14
	vlanTag    = 4
	ipv4Header = 20
	ipv6Header = 40
	tcpHeader  = 20
	udpHeader  = 8
	sctpHeader = 12

	etherIPv4 = 0x0800
	etherVLAN = 0x8100
	etherIPv6 = 0x86dd

	protoHopByHop = 0
	protoTCP      = 6
	protoUDP      = 17
	protoRouting  = 43
	protoDestOpts = 60
	protoSCTP     = 132
)

// Packet types of the advanced receive descriptor.
const (
	typeIPv4   = 1 << 4
	typeIPv4Ex = 1 << 5
	typeIPv6   = 1 << 6
	typeIPv6Ex = 1 << 7
	typeTCP    = 1 << 8
	typeUDP    = 1 << 9
	typeSCTP   = 1 << 10
)

var be = binary.BigEndian

// castagnoli is the table of SCTP's checksum.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// headers are where the headers of a frame are. Zero offsets mean that there
// is none that the device knows.
type headers struct {
	tagged bool
	tag    uint16
	ip, l4 int // offsets
	end    int // of the IP packet; the rest is padding
	// ipEnd and l4End are where the IP header with its options or extensions
	// and the TCP or UDP header end, 0 where that cannot be told.
	ipEnd, l4End int
	v6           bool
	opts         bool // IPv4 options or IPv6 extension headers
	proto        byte // of the header at l4
}

// parse finds the headers of a frame of at least ethHeader bytes.
func parse(f []byte) headers {
	var h headers
	at := ethHeader
	kind := be.Uint16(f[12:])
	if kind == etherVLAN && len(f) >= at+vlanTag {
		h.tagged, h.tag = true, be.Uint16(f[14:])
		kind = be.Uint16(f[16:])
		at += vlanTag
	}
	switch kind {
	case etherIPv4:
		h.parseIPv4(f, at)
	case etherIPv6:
		h.parseIPv6(f, at)
	}
	return h
}

// untaggedLength is the length of a frame without its VLAN tag.
func (h headers) untaggedLength(f []byte) int {
	if h.tagged {
		return len(f) - vlanTag
	}
	return len(f)
}

func (h *headers) parseIPv4(f []byte, at int) {
	if len(f) < at+ipv4Header || f[at]>>4 != 4 {
		return
	}
	length, total := int(f[at]&15)*4, int(be.Uint16(f[at+2:]))
	if length < ipv4Header || total < length || len(f) < at+total {
		return
	}
	h.ip, h.end, h.opts = at, at+total, length > ipv4Header
	h.ipEnd = at + length
	if be.Uint16(f[at+6:])&0x3fff == 0 { // neither a fragment nor followed by one
		h.setL4(f, at+length, f[at+9])
	}
}

func (h *headers) parseIPv6(f []byte, at int) {
	if len(f) < at+ipv6Header || f[at]>>4 != 6 {
		return
	}
	end := at + ipv6Header + int(be.Uint16(f[at+4:]))
	if len(f) < end {
		return
	}
	h.ip, h.end, h.v6 = at, end, true
	next, l4 := f[at+6], at+ipv6Header
	defer func() { h.ipEnd = min(l4, end) }()
	for next == protoHopByHop || next == protoRouting || next == protoDestOpts {
		h.opts = true
		if l4+8 > end {
			return
		}
		next, l4 = f[l4], l4+8+8*int(f[l4+1])
	}
	h.setL4(f, l4, next)
}

// setL4 notes a transport header that lies in the packet.
func (h *headers) setL4(f []byte, at int, proto byte) {
	var length int
	switch proto {
	case protoTCP:
		length = tcpHeader
	case protoUDP:
		length = udpHeader
	case protoSCTP:
		length = sctpHeader
	default:
		return
	}
	if at+length > h.end {
		return
	}
	h.l4, h.proto = at, proto
	switch {
	case proto == protoUDP:
		h.l4End = at + length
	case proto == protoTCP && f[at+12]>>4 >= tcpHeader/4 && at+int(f[at+12]>>4)*4 <= h.end:
		h.l4End = at + int(f[at+12]>>4)*4
	}
}

// stripped is h for the frame without its VLAN tag.
func (h headers) stripped() headers {
	for _, at := range []*int{&h.ip, &h.l4, &h.end, &h.ipEnd, &h.l4End} {
		*at = max(*at-vlanTag, 0)
	}
	h.tagged = false
	return h
}

// packetType is the PTYPE field of the advanced receive descriptor.
func (h headers) packetType() uint32 {
	var t uint32
	switch {
	case h.ip == 0:
	case !h.v6 && !h.opts:
		t = typeIPv4
	case !h.v6:
		t = typeIPv4 | typeIPv4Ex
	case !h.opts:
		t = typeIPv6
	default:
		t = typeIPv6 | typeIPv6Ex
	}
	switch h.proto {
	case protoTCP:
		t |= typeTCP
	case protoUDP:
		t |= typeUDP
	case protoSCTP:
		t |= typeSCTP
	}
	return t
}

// verify checks a frame's checksums and returns status and error bits.
func (h headers) verify(f []byte) uint32 {
	var s uint32
	if h.ip != 0 && !h.v6 {
		s |= rxIPCS
		if sum(0, f[h.ip:h.ip+int(f[h.ip]&15)*4]) != 0xffff {
			s |= rxIPE
		}
	}
	if h.l4 == 0 {
		return s
	}
	l4, good := f[h.l4:h.end], false
	switch h.proto {
	case protoUDP:
		if be.Uint16(l4[6:]) == 0 {
			return s // sent without one
		}
		s |= rxUDPCS
		good = sum(h.pseudo(f), l4) == 0xffff
	case protoTCP:
		good = sum(h.pseudo(f), l4) == 0xffff
	case protoSCTP:
		good = sctpSum(l4) == binary.LittleEndian.Uint32(l4[8:])
	}
	s |= rxL4CS
	if !good {
		s |= rxL4E
	}
	return s
}

// pseudo sums up the pseudo header of TCP and UDP.
func (h headers) pseudo(f []byte) uint32 {
	length := uint32(h.end - h.l4)
	s := uint32(h.proto) + length>>16 + length&0xffff
	src, dst := h.addresses(f)
	return uint32(sum(uint32(sum(s, src)), dst))
}

// addresses returns the IP addresses of a frame.
func (h headers) addresses(f []byte) (src, dst []byte) {
	if h.v6 {
		return f[h.ip+8 : h.ip+24], f[h.ip+24 : h.ip+40]
	}
	return f[h.ip+12 : h.ip+16], f[h.ip+16 : h.ip+20]
}

// sum adds b to an internet checksum (RFC 1071) and folds it; the complement
// is what goes into a header.
func sum(s uint32, b []byte) uint16 {
	t := uint64(s)
	for ; len(b) >= 2; b = b[2:] {
		t += uint64(be.Uint16(b))
	}
	if len(b) == 1 {
		t += uint64(b[0]) << 8
	}
	for t > 0xffff {
		t = t>>16 + t&0xffff
	}
	return uint16(t)
}

// sctpSum is the CRC32c of an SCTP packet with its checksum field as zero.
func sctpSum(p []byte) uint32 {
	c := crc32.Update(0, castagnoli, p[:8])
	c = crc32.Update(c, castagnoli, make([]byte, 4))
	return crc32.Update(c, castagnoli, p[sctpHeader:])
}
