package intel

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
		if p, h := (Descriptors{}).Buffers(test.format, d); p != test.packet || h != test.header {
			t.Errorf("%s: %+v and %+v, want %+v and %+v", test.name, p, h, test.packet, test.header)
		}
	}
}

// Descriptors as the drivers write them and the device writes them back.
func TestDescriptors(t *testing.T) {
	f := Descriptors{}
	d := func(words ...uint32) []byte {
		var b []byte
		for _, w := range append(words, make([]uint32, 4-len(words))...) {
			b = append(b, byte(w), byte(w>>8), byte(w>>16), byte(w>>24))
		}
		return b
	}
	for name, tc := range map[string]struct {
		d       []byte
		slot    int
		context bool
		eop     bool
	}{
		"context 0":        {d(0x1c14, 0, 0x20200400, 0), 0, true, false},
		"context 1":        {d(0x1c14, 0, 0x20200400, 0x10), 1, true, false},
		"idle":             {f.IdleContext(), 0, true, false},
		"advanced data":    {d(0, 0, 0x2b300040, 0x10), 0, false, true},
		"advanced, more":   {d(0, 0, 0x20300040, 0), 0, false, false},
		"legacy":           {d(0, 0, 0x0b000040, 0), 0, false, true},
		"legacy with CSO":  {d(0, 0, 0x00200040, 0), 0, false, false},
		"never written to": {d(), 0, false, false},
	} {
		slot, ok := f.ContextSlot(tc.d)
		if ok != tc.context || slot != tc.slot || f.Packet(tc.d) == tc.context || f.EndOfPacket(family.TX, 0, tc.d) != tc.eop {
			t.Errorf("%s: slot %d (%v), packet %v, end %v", name, slot, ok, f.Packet(tc.d), f.EndOfPacket(family.TX, 0, tc.d))
		}
	}
	const legacy, advanced, split = 0x402, 0x2000402, 0xa000202
	for format, stale := range map[uint32][]byte{legacy: d(0x1000, 0, 60, 3), advanced: d(0x1000, 0, 3, 0), split: d(0x1000, 0, 0x2003, 0)} {
		if f.HandOver(format, stale); f.Done(family.RX, format, stale) || dword(stale, 0) != 0x1000 {
			t.Errorf("format %#x: a descriptor handed over is %x", format, stale)
		}
	}
	if !f.Reports(d(0, 0, 0x2b300040, 0)) || f.Reports(d(0, 0, 0x23300040, 0)) {
		t.Error("RS is not what reports")
	}
	for name, tc := range map[string]struct {
		dir       family.Direction
		format    uint32
		d         []byte
		done, eop bool
	}{
		"handed over":      {family.RX, advanced, f.Buffer(0x1000, 0x2000), false, false},
		"advanced":         {family.RX, advanced, d(0, 0, 3, 0), true, true},
		"advanced, more":   {family.RX, advanced, d(0, 0, 1, 0), true, false},
		"split, more":      {family.RX, split, d(0, 0, 1, 0), true, false},
		"legacy":           {family.RX, legacy, d(0, 0, 60, 3), true, true},
		"legacy, not yet":  {family.RX, legacy, d(0, 0, 3, 0), false, false},
		"transmit, done":   {family.TX, 0, d(0, 0, 0x2b300040, 1), true, true},
		"transmit, is not": {family.TX, 0, d(0, 0, 0x2b300041, 0), false, true},
	} {
		if done, eop := f.Done(tc.dir, tc.format, tc.d), f.EndOfPacket(tc.dir, tc.format, tc.d); done != tc.done || eop != tc.eop {
			t.Errorf("%s: done %v, end %v", name, done, eop)
		}
	}
}
