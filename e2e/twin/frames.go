package twin

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"slices"
)

var (
	be = binary.BigEndian
	le = binary.LittleEndian
)

// The guest's world is small, so that filters hit and miss often.
var (
	// stations are unicast addresses; the first is the administrator's.
	stations = []net.HardwareAddr{
		{0x52, 0x54, 0, 0x10, 0xed, 1}, {0x52, 0x54, 0, 0x10, 0xed, 2}, {0x52, 0x54, 0, 0x10, 0xed, 3},
		{0x52, 0x54, 0, 0x10, 0xed, 4}, {0x52, 0x54, 0, 0x10, 0xed, 5},
	}
	groups = []net.HardwareAddr{
		{0x01, 0, 0x5e, 0, 0, 1}, {0x01, 0, 0x5e, 0x12, 0x34, 0x56}, {0x33, 0x33, 0, 0, 0xab, 0xcd}, {0x33, 0x33, 0, 0, 0, 2},
	}
	broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	vlans     = []uint16{0, 7, 100, 101, 4094}
)

// groupHash takes 12 bits of an address as MCSTCTRL.MO says.
func groupHash(mo uint32, a net.HardwareAddr) uint32 {
	last := uint32(a[5])<<8 | uint32(a[4])
	return last >> [4]uint{4, 3, 2, 0}[mo&3] & 0xfff
}

// packet is a frame with the places of its headers.
type packet struct {
	data           []byte
	ip, l4, header int // offsets; header is where the payload begins
	v6             bool
	proto          byte
}

const (
	protoTCP = 6
	protoUDP = 17
	protoRaw = 0 // no IP packet
)

// newPacket makes a frame with so many bytes of payload. A tag below zero is
// none. Checksums are left out: fill puts them in.
func newPacket(r *rand.Rand, dst, src net.HardwareAddr, tag, payload int) *packet {
	p := &packet{v6: chance(r, 1, 3), proto: pick[byte](r, protoTCP, protoTCP, protoUDP, protoRaw)}
	b := append(append([]byte{}, dst...), src...)
	if tag >= 0 {
		b = append(b, 0x81, 0, byte(tag>>8), byte(tag))
	}
	if p.proto == protoRaw {
		b = append(b, 0x88, 0xb5)
		p.header = len(b)
		p.data = appendRandom(b, r, payload)
		return p
	}
	l4 := 8
	if p.proto == protoTCP {
		l4 = 20
	}
	if p.v6 {
		b = append(b, 0x86, 0xdd)
		p.ip = len(b)
		b = append(b, 0x60, 0, 0, 0, 0, 0, p.proto, 64)
		b = appendRandom(b, r, 32)
		be.PutUint16(b[p.ip+4:], uint16(l4+payload))
	} else {
		b = append(b, 8, 0)
		p.ip = len(b)
		b = append(b, 0x45, 0, 0, 0, byte(r.IntN(256)), 1, 0x40, 0, 64, p.proto, 0, 0)
		b = appendRandom(b, r, 8)
		be.PutUint16(b[p.ip+2:], uint16(20+l4+payload))
	}
	p.l4 = len(b)
	b = append(b, make([]byte, l4)...)
	be.PutUint16(b[p.l4:], uint16(r.IntN(1<<16)))
	be.PutUint16(b[p.l4+2:], 80)
	if p.proto == protoTCP {
		be.PutUint32(b[p.l4+4:], r.Uint32())
		b[p.l4+12], b[p.l4+13] = 5<<4, 0x19
	} else {
		be.PutUint16(b[p.l4+4:], uint16(l4+payload))
	}
	p.header = len(b)
	p.data = appendRandom(b, r, payload)
	return p
}

// appendRandom appends n bytes; few of them are drawn, which is enough to tell
// them apart.
func appendRandom(b []byte, r *rand.Rand, n int) []byte {
	x := r.Uint64()
	for i := range n {
		b = append(b, byte(x>>(8*(i%8)))+byte(i/8))
	}
	return b
}

func checksum(s uint32, b []byte) uint16 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(be.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// fill puts the checksums in, as the sender of a frame does.
func (p *packet) fill() {
	if p.proto == protoRaw {
		return
	}
	addresses := p.data[p.ip+8 : p.l4]
	if !p.v6 {
		be.PutUint16(p.data[p.ip+10:], ^checksum(0, p.data[p.ip:p.l4]))
		addresses = p.data[p.ip+12 : p.l4]
	}
	pseudo := uint32(checksum(uint32(p.proto)+uint32(len(p.data)-p.l4), addresses))
	at := p.l4 + 6
	if p.proto == protoTCP {
		at = p.l4 + 16
	}
	be.PutUint16(p.data[at:], ^checksum(pseudo, p.data[p.l4:]))
}

// stream is a TCP connection to the guest.
type stream struct{ seq, ack uint32 }

// segment makes the next segment of stream number n.
func (s *stream) segment(r *rand.Rand, dst net.HardwareAddr, tag, n int) []byte {
	b := append(append([]byte{}, dst...), stations[1+n]...)
	if tag >= 0 {
		b = append(b, 0x81, 0, byte(tag>>8), byte(tag))
	}
	p := &packet{proto: protoTCP, ip: len(b) + 2, l4: len(b) + 2 + 20}
	payload := r.IntN(1400)
	if chance(r, 1, 3) {
		payload = r.IntN(100)
	}
	b = append(b, 8, 0, 0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protoTCP, 0, 0, 10, 0, 0, byte(n), 10, 0, 1, 1)
	be.PutUint16(b[p.ip+2:], uint16(20+20+payload))
	if chance(r, 1, 16) {
		s.seq++ // as if one had been lost
	}
	if chance(r, 1, 16) {
		s.ack++
	}
	tcp := be.AppendUint32(be.AppendUint32([]byte{0, 80, 0x80, byte(n)}, s.seq), s.ack)
	flags := pick[byte](r, append(slices.Repeat([]byte{0x10}, 14), 0x18, 0x11)...)
	b = append(append(b, tcp...), 5<<4, flags, 0, 0, 0, 0, 0, 0)
	s.seq += uint32(payload)
	p.data = appendRandom(b, r, payload)
	if chance(r, 15, 16) {
		p.fill()
	}
	return p.data
}
