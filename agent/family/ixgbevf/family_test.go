package ixgbevf

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family"
)

func TestNewBoundsQueuePairs(t *testing.T) {
	for pairs, want := range map[int]int{-1: 2, 0: 2, 1: 1, 2: 2, 8: 8, 9: 8} {
		if got := len(New(pairs).Queues()); got != 2*want {
			t.Errorf("New(%d) has %d queues, want %d", pairs, got, 2*want)
		}
	}
}

func TestRegisterTable(t *testing.T) {
	f := New(MaxQueuePairs)
	byName := map[string]family.Register{}
	last := -1
	for _, r := range f.Registers() {
		if int(r.Offset) <= last || r.Offset%4 != 0 || r.Offset >= f.BARSize() {
			t.Errorf("%s at %#x follows %#x", r.Name, r.Offset, last)
		}
		last = int(r.Offset)
		if _, twice := byName[r.Name]; twice || r.Why == "" {
			t.Errorf("%s: named twice (%v) or without a reason", r.Name, twice)
		}
		byName[r.Name] = r
		writable := r.Access&(family.Writable|family.WriteOneSets|family.WriteOneClears) != 0
		if writable != (r.Mask != 0) {
			t.Errorf("%s: access %#x with mask %#x", r.Name, r.Access, r.Mask)
		}
		if r.Class == family.Copy && (!writable || r.Access&family.Readable == 0) {
			t.Errorf("%s is to be copied but cannot be read and written", r.Name)
		}
	}
	// Offsets and classes of the 82599 VF, from the Linux driver's regs.h.
	for _, want := range []struct {
		name   string
		offset uint32
		class  family.Class
	}{
		{"VFCTRL", 0x0, family.Replay}, {"VFSTATUS", 0x8, family.Skip}, {"VFLINKS", 0x10, family.Skip},
		{"VTEICR", 0x100, family.Derive}, {"VTEIMS", 0x108, family.Copy}, {"VTEIMC", 0x10c, family.Skip},
		{"VTIVAR(3)", 0x12c, family.Copy}, {"VTIVAR_MISC", 0x140, family.Copy}, {"VTRSCINT(1)", 0x184, family.Copy},
		{"VFMBMEM(15)", 0x23c, family.Skip}, {"VFMAILBOX", 0x2fc, family.Replay}, {"VFPSRTYPE", 0x300, family.Copy},
		{"VTEITR(2)", 0x828, family.Copy}, {"VFRDBAL(1)", 0x1040, family.Copy}, {"VFRDH(7)", 0x11d0, family.Derive},
		{"VFSRRCTL(0)", 0x1014, family.Copy}, {"VFRDT(0)", 0x1018, family.Copy}, {"VFRXDCTL(0)", 0x1028, family.Copy},
		{"VFRSCCTL(0)", 0x102c, family.Copy}, {"VFGPRC", 0x101c, family.Emulate}, {"VFGORC_MSB", 0x1024, family.Emulate},
		{"VFMPRC", 0x1034, family.Emulate}, {"VFTDH(0)", 0x2010, family.Derive}, {"VFTXDCTL(2)", 0x20a8, family.Copy},
		{"VFTDWBAL(0)", 0x2038, family.Copy}, {"VFTDWBAH(7)", 0x21fc, family.Copy}, {"VFGOTC_LSB", 0x2020, family.Emulate},
		{"VFRXMEMWRAP", 0x3190, family.Skip},
	} {
		if got := byName[want.name]; got.Offset != want.offset || got.Class != want.class {
			t.Errorf("%s: offset %#x class %d, want %#x and %d", want.name, got.Offset, got.Class, want.offset, want.class)
		}
	}
}

// What the descriptions refer to must be in the table, with the values that
// unmodified drivers were seen to write.
func TestDescriptionsFitTable(t *testing.T) {
	f := New(MaxQueuePairs)
	table := map[uint32]family.Register{}
	for _, r := range f.Registers() {
		table[r.Offset] = r
	}
	for _, q := range f.Queues() {
		offsets := []uint32{q.BAL, q.BAH, q.LEN, q.Head, q.Tail, q.Ctl}
		if q.Direction == family.TX {
			offsets = append(offsets, q.WBAL, q.WBAH)
		}
		if q.Assign != VTIVAR(q.Index/2) || q.AssignShift != uint(q.Index%2)*16+uint(q.Direction)*8 {
			t.Errorf("%s queue %d is assigned by %#x at bit %d", q.Direction, q.Index, q.Assign, q.AssignShift)
		}
		for _, off := range offsets {
			if _, ok := table[off]; !ok || !strings.HasPrefix(table[off].Name, map[family.Direction]string{family.RX: "VFR", family.TX: "VFT"}[q.Direction]) {
				t.Errorf("%s queue %d: register %#x is %q", q.Direction, q.Index, off, table[off].Name)
			}
		}
	}
	for _, c := range f.Counters() {
		if table[c.Low].Class != family.Emulate || (c.High != 0) != (c.Width == 36) || c.High != 0 && table[c.High].Class != family.Emulate {
			t.Errorf("counter %s: %+v", c.Name, c)
		}
	}
	irq := f.Interrupts()
	for _, off := range append(slices.Clone(irq.Assign), irq.Cause, irq.CauseSet, irq.MaskSet, irq.MaskClear, irq.AutoClear, irq.AutoMask) {
		if _, ok := table[off]; !ok {
			t.Errorf("interrupt register %#x is not in the table", off)
		}
	}
	for off, value := range map[uint32]uint32{VFTXDCTL(0): 0x02080120, VFSRRCTL(0): 0x12000402, VFRXDCTL(0): 0x42000000,
		VFPSRTYPE: 0x1330, VTIVAR(0): 0x8080, VTIVARMisc: 0x81, VTEIAM: 3, VTEIAC: 3, VTEIMS: 3, VTEIMC: 7} {
		if lost := value &^ table[off].Mask; lost != 0 {
			t.Errorf("%s: the driver's %#x loses %#x", table[off].Name, value, lost)
		}
	}
}

// What members have beyond an 82599 VF, and that all else is the same.
func TestMembers(t *testing.T) {
	table := func(device uint16) map[string]family.Register {
		f, err := ForDevice(VendorID, device, 1)
		if err != nil {
			t.Fatal(err)
		}
		byName := map[string]family.Register{}
		for _, r := range f.Registers() {
			byName[r.Name] = r
		}
		return byName
	}
	base := table(DeviceID)
	for device, want := range map[uint16]struct {
		rxdctl uint32
		more   int
	}{0x10ed: {0x46000000, 0}, 0x1515: {0x4600bfff, 0}, 0x1565: {0x4600bfff, 27}, 0x15a8: {0x4600bfff, 27}, 0x15c5: {0x4600bfff, 27}} {
		got := table(device)
		if mask := got["VFRXDCTL(0)"].Mask; mask != want.rxdctl || len(got) != len(base)+want.more {
			t.Errorf("%#x: VFRXDCTL has %#x, want %#x; %d registers, want %d", device, mask, want.rxdctl, len(got), len(base)+want.more)
		}
		if _, rss := got["VFMRQC"]; rss != (want.more > 0) {
			t.Errorf("%#x has RSS of its own: %v", device, rss)
		}
		for name, r := range base {
			if name != "VFRXDCTL(0)" && got[name] != r {
				t.Errorf("%#x: %s is %+v, want %+v", device, name, got[name], r)
			}
		}
	}
	x550 := table(DeviceIDX550)
	for name, off := range map[string]uint32{"VFMRQC": 0x3000, "VFRSSRK(9)": 0x3124, "VFRETA(15)": 0x323c} {
		if r := x550[name]; r.Offset != off || r.Class != family.Copy {
			t.Errorf("%s is %+v, want a copied one at %#x", name, r, off)
		}
	}
	for _, id := range [][2]uint16{{VendorID, 0x10ca}, {VendorID, 0x1530}, {0x1234, DeviceID}} {
		if _, err := ForDevice(id[0], id[1], 2); err == nil {
			t.Errorf("%04x:%04x is taken for a member", id[0], id[1])
		}
	}
}

// Where frames go on that were coalesced.
func TestNext(t *testing.T) {
	f := New(1).Descriptors()
	const legacy, advanced = 0x402, 0x2000402
	for name, tc := range map[string]struct {
		format     uint32
		info, word uint32
		next       uint32
		ok         bool
	}{
		"goes on":        {advanced, 3 << 17, 0x1234<<4 | 1, 0x1234, true},
		"last":           {advanced, 3 << 17, 0x1234<<4 | 3, 0, false},
		"not coalesced":  {advanced, 1 << 21, 0x1234<<4 | 1, 0, false},
		"legacy":         {legacy, 3 << 17, 0x1234<<4 | 1, 0, false},
		"and is split":   {advanced&^(1<<25) | 5<<25, 1<<31 | 54<<21 | 1<<17, 7<<4 | 1, 7, true},
		"highest number": {advanced, 15 << 17, 0xffff<<4 | 1, 0xffff, true},
	} {
		d := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, tc.info), 0)
		d = append(binary.LittleEndian.AppendUint32(d, 0xfff<<20|tc.word), 9, 9, 9, 9)
		if next, ok := f.Next(tc.format, d); next != tc.next || ok != tc.ok {
			t.Errorf("%s: next %d (%v), want %d (%v)", name, next, ok, tc.next, tc.ok)
		}
		before := slices.Clone(d)
		f.SetNext(tc.format, d, 0x4321)
		if got := binary.LittleEndian.Uint32(d[8:]); got != 0xfff<<20|0x4321<<4|tc.word&3 || !slices.Equal(d[:8], before[:8]) || !slices.Equal(d[12:], before[12:]) {
			t.Errorf("%s: changed to %x from %x", name, d, before)
		}
	}
}

func TestTableIsNotShared(t *testing.T) {
	f := New(1)
	f.Registers()[0].Name = "changed"
	f.Queues()[0].Index = 9
	if f.Registers()[0].Name != "VFCTRL" || f.Queues()[0].Index != 0 {
		t.Error("a caller can change the table")
	}
}

func TestOffer(t *testing.T) {
	f := New(0)
	replies := func(change func([][]uint32)) [][]uint32 {
		var list [][]uint32
		for _, request := range f.Probe() {
			reply := slices.Concat(request, make([]uint32, MailboxWords))[:MailboxWords]
			reply[0] |= MsgNACK
			if reply[0]&MsgIDMask == MsgReset {
				reply[3] = 2
			} else if reply[1] == API12 || reply[1] == API14 {
				reply[0] ^= MsgNACK | MsgACK
			}
			list = append(list, reply)
		}
		change(list)
		return list
	}
	got, err := f.Offer(replies(func([][]uint32) {}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(family.Offer{APIs: []uint32{API12, API14}, MulticastFilterType: 2}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for name, bad := range map[string][][]uint32{
		"none":    nil,
		"other":   replies(func(l [][]uint32) { l[1] = l[0] }),
		"short":   replies(func(l [][]uint32) { l[0] = l[0][:3] }),
		"verdict": replies(func(l [][]uint32) { l[2][0] &^= MsgACK | MsgNACK }),
	} {
		if offer, err := f.Offer(bad); err == nil {
			t.Errorf("%s: offer %+v from bad replies", name, offer)
		}
	}
}
