package igbvf

import (
	"encoding/binary"
	"testing"

	"compsc.io/compsc/agent/family"
)

func TestBuffers(t *testing.T) {
	d := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, 0x12345000), 0x6789a001)
	packet := func(kib uint32) family.Span { return family.Span{Addr: 0x12345000, Size: kib << 10} }
	for _, test := range []struct {
		name           string
		format         uint32
		packet, header family.Span
	}{
		{"legacy", 2, packet(2), family.Span{}},
		{"one buffer", 1<<25 | 4<<8 | 3 | 1<<28, packet(3), family.Span{}},
		{"no size", 1 << 25, packet(2), family.Span{}},
		{"header split", 2<<25 | 4<<8 | 2, packet(2), family.Span{Addr: 0x6789a000, Size: 256}},
		{"header split always", 5<<25 | 0x3f<<8 | 0x7f, packet(127), family.Span{Addr: 0x6789a000, Size: 63 * 64}},
	} {
		if p, h := (descriptors{}).Buffers(test.format, d); p != test.packet || h != test.header {
			t.Errorf("%s: %+v and %+v, want %+v and %+v", test.name, p, h, test.packet, test.header)
		}
	}
}
