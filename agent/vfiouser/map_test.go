package vfiouser

import (
	"bytes"
	"errors"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// mappedDevice is a fakeDevice two pages of whose BAR0 can be mapped.
type mappedDevice struct {
	*fakeDevice
	file *os.File
}

const barSize, barAt = 4 * 4096, 3 * 4096

func (d *mappedDevice) Info() Info {
	return Info{Regions: []Region{
		{Index: RegionBAR0, Size: barSize, Flags: RegionReadable | RegionWritable,
			Map: &RegionMap{File: d.file, Offset: barAt, Areas: []Area{{0x1000, 0x1000}, {0x3000, 0x1000}}}},
		{Index: RegionBAR3, Size: 0x4000, Flags: RegionReadable},
	}}
}

func connectMapped(t *testing.T) (*mappedDevice, *Client) {
	t.Helper()
	d := &mappedDevice{newFakeDevice(), memfd(t, barAt+barSize)}
	path, _ := start(t, d, Options{})
	c, err := Dial(testContext(t), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return d, c
}

// A client maps what it is told to, and what it writes there is in the device's
// file; all else it reaches by messages.
func TestMappedRegion(t *testing.T) {
	d, c := connectMapped(t)
	ctx := testContext(t)
	if m, err := c.RegionMap(ctx, RegionBAR3); m != nil || err != nil {
		t.Errorf("region 3 can be mapped: %v, %v", m, err)
	}
	m, err := c.RegionMap(ctx, RegionBAR0)
	if err != nil || m == nil {
		t.Fatalf("region 0 cannot be mapped: %v", err)
	}
	defer m.File.Close()
	if diff := cmp.Diff([]Area{{0x1000, 0x1000}, {0x3000, 0x1000}}, m.Areas); diff != "" {
		t.Error(diff)
	}
	for n, a := range m.Areas {
		mem, err := m.Map(a)
		if err != nil {
			t.Fatal(err)
		}
		copy(mem[16:], []byte{byte(n), 7, 7, 7})
		var got [4]byte
		if _, err := d.file.ReadAt(got[:], barAt+int64(a.Offset)+16); err != nil || !bytes.Equal(got[:], mem[16:20]) {
			t.Errorf("the device's file has % x at area %d (%v)", got, n, err)
		}
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	}
	if err := c.RegionWrite(ctx, RegionBAR0, 0, []byte{1, 2, 3, 4}); err != nil || len(d.written()) != 1 {
		t.Errorf("a message did not reach the device: %v, %v", d.written(), err)
	}
}

// What QEMU 11.1 relies on: a first query allows for no capabilities, and the
// answer to it must have neither their flag nor more bytes than it allows for.
func TestMappedRegionIsAskedForTwice(t *testing.T) {
	_, c := connectMapped(t)
	r, err := c.query(testContext(t), cmdGetRegionInfo, regionInfoSize, RegionBAR0)
	if err != nil {
		t.Fatal(err)
	}
	const want = regionInfoSize + sparseSize + 2*areaSize
	if size, flags, capOffset := le.Uint32(r), le.Uint32(r[4:]), le.Uint32(r[12:]); size != want || flags != 7 || capOffset != 0 {
		t.Errorf("the answer names a size of %d, flags %#x and capabilities at %d; want %d, 7 and 0", size, flags, capOffset, want)
	}
}

// The descriptor that a client does not take is not left behind, on neither side.
func TestMappedRegionLeavesNoDescriptors(t *testing.T) {
	d, c := connectMapped(t)
	ctx := testContext(t)
	before := openFDs(t)
	for range 50 {
		b := make([]byte, regionInfoSize)
		putUint32s(b, 4096, 0, RegionBAR0)
		if _, err := c.link.request(ctx, cmdGetRegionInfo, b); err != nil {
			t.Fatal(err)
		}
	}
	if now := openFDs(t); now != before {
		t.Errorf("%d descriptors were open, now %d are", before, now)
	}
	// A file that is gone is an error, and no end of the session.
	d.file.Close()
	if m, err := c.RegionMap(ctx, RegionBAR0); !errors.Is(err, syscall.EIO) {
		t.Errorf("the file is closed, and the client got %v, %v", m, err)
	}
	if _, err := c.Info(ctx); err != nil {
		t.Error(err)
	}
}

func TestParseRegionMap(t *testing.T) {
	good := make([]byte, regionInfoSize+sparseSize+areaSize)
	putUint32s(good, uint32(len(good)), regionFlagMap|regionFlagCaps, 0, regionInfoSize)
	putAreas(good[regionInfoSize:], []Area{{4096, 8192}})
	if m, err := parseRegionMap(good); err != nil || len(m.Areas) != 1 || m.Areas[0] != (Area{4096, 8192}) {
		t.Errorf("got %v, %v", m, err)
	}
	for what, change := range map[string]func([]byte) []byte{
		"short":             func(b []byte) []byte { return b[:len(b)-1] },
		"no flag":           func(b []byte) []byte { b[4] = byte(regionFlagMap); return b },
		"another place":     func(b []byte) []byte { b[12]++; return b },
		"another id":        func(b []byte) []byte { b[regionInfoSize]++; return b },
		"more areas":        func(b []byte) []byte { b[regionInfoSize+8]++; return b },
		"very many areas":   func(b []byte) []byte { b[regionInfoSize+11] = 0x80; return b },
		"nothing of a body": func([]byte) []byte { return nil },
	} {
		if m, err := parseRegionMap(change(bytes.Clone(good))); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: got %v, %v", what, m, err)
		}
	}
}
