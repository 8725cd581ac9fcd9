package vfiouser

import "testing"

func TestView(t *testing.T) {
	var g Memory
	defer g.Close()
	for _, m := range []DMAMap{
		{Addr: 0x10000, Size: 0x2000, Readable: true, Writable: true, File: memfd(t, 0x2000)},
		{Addr: 0x12000, Size: 0x1000, Readable: true, File: memfd(t, 0x1000)},
		{Addr: 0x20000, Size: 0x1000, Readable: true, Writable: true},
	} {
		if err := g.Map(m); err != nil {
			t.Fatal(err)
		}
	}
	r, mem, ok := g.View(0x10000)
	if !ok || !r.Mapped || r.Size != 0x2000 || len(mem) != 0x2000 || !r.Writable {
		t.Fatalf("range %+v, %d bytes, %v", r, len(mem), ok)
	}
	mem[5] = 7
	var b [1]byte
	if err := g.ReadAt(0x10005, b[:]); err != nil || b[0] != 7 {
		t.Errorf("another memory: %d (%v)", b[0], err)
	}
	if r, mem, ok := g.View(0x20000); !ok || r.Mapped || mem != nil {
		t.Errorf("without a descriptor: %+v, %d bytes, %v", r, len(mem), ok)
	}
	for _, addr := range []uint64{0, 0x11000, 0x13000, 0x30000} {
		if r, _, ok := g.View(addr); ok {
			t.Errorf("at %#x begins %+v", addr, r)
		}
	}
	for addr, want := range map[uint64]bool{0: false, 0xffff: false, 0x10000: true, 0x11fff: true, 0x12000: false, 0x13000: false, 0x20000: false, 1 << 40: false} {
		if got := g.Writable(addr); got != want {
			t.Errorf("writable at %#x: %v", addr, got)
		}
	}
}
