package device

import (
	"bytes"
	"encoding/binary"
	"testing"
)

func TestPCIConfig(t *testing.T) {
	c := newPCIConfig(0x8086, 0x10ed, 3)
	read := func(off uint64, n int) uint32 {
		var b [4]byte
		c.read(off, b[:n])
		return binary.LittleEndian.Uint32(b[:])
	}
	if got := read(cfgVendor, 4); got != 0x10ed8086 {
		t.Errorf("id = %#x", got)
	}
	// Walk the capability list as a driver does.
	found := map[uint32]bool{}
	for p := read(cfgCapPtr, 1); p != 0; p = read(uint64(p)+1, 1) {
		id := read(uint64(p), 1)
		if found[id] {
			t.Fatalf("capability %#x twice: the list loops", id)
		}
		found[id] = true
	}
	if !found[0x11] || !found[0x10] {
		t.Errorf("capabilities %v, want MSI-X (0x11) and PCI Express (0x10)", found)
	}
	if n := read(cfgMSIX+2, 2)&0x7ff + 1; n != 3 {
		t.Errorf("MSI-X table of %d vectors, want 3", n)
	}

	for _, w := range []struct {
		name      string
		off       uint64
		p         []byte
		want      uint32
		n         int
		wantOther bool
	}{
		{name: "id is read-only", off: cfgVendor, p: []byte{0, 0, 0, 0}, n: 4, want: 0x10ed8086},
		{name: "BAR0 keeps its type", off: cfgBAR0, p: []byte{0xff, 0xff, 0xff, 0xff}, n: 4, want: 0xfffffffc},
		{name: "command takes memory and bus master", off: cfgCommand, p: []byte{0x06, 0xf8}, n: 2, want: 0x0006},
		{name: "MSI-X enable, not the table size", off: cfgMSIX + 2, p: []byte{0xff, 0x80}, n: 2, want: 0x8002},
		{name: "beyond the end", off: configSize - 1, p: []byte{1, 2, 3, 4}, n: 1, want: 0},
		{name: "far beyond the end", off: 1 << 60, p: []byte{1}, n: 1, want: 0},
	} {
		t.Run(w.name, func(t *testing.T) {
			c.write(w.off, w.p)
			if got := read(w.off, w.n); got != w.want {
				t.Errorf("reads back %#x, want %#x", got, w.want)
			}
		})
	}
	if l := c.legacy(); len(l) != 256 || !bytes.Equal(l, c.b[:256]) {
		t.Errorf("legacy() differs from the first 256 bytes")
	}
}
