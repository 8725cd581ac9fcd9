package igbvf

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family"
)

func table(f *Family) map[string]family.Register {
	byName := map[string]family.Register{}
	for _, r := range f.Registers() {
		byName[r.Name] = r
	}
	return byName
}

func TestRegisterTable(t *testing.T) {
	f := New()
	byName := table(f)
	last := -1
	for _, r := range f.Registers() {
		if int(r.Offset) <= last || r.Offset%4 != 0 || r.Offset >= f.BARSize() {
			t.Errorf("%s at %#x follows %#x", r.Name, r.Offset, last)
		}
		last = int(r.Offset)
		if byName[r.Name].Offset != r.Offset || r.Why == "" {
			t.Errorf("%s: named twice or without a reason", r.Name)
		}
		writable := r.Access&(family.Writable|family.WriteOneSets|family.WriteOneClears) != 0
		if writable != (r.Mask != 0) {
			t.Errorf("%s: access %#x with mask %#x", r.Name, r.Access, r.Mask)
		}
		if r.Class == family.Copy && (!writable || r.Access&family.Readable == 0) {
			t.Errorf("%s is to be copied but cannot be read and written", r.Name)
		}
		if reads := r.Access&family.ReadClears != 0; reads && r.Class == family.Copy {
			t.Errorf("%s is to be copied, but a read destroys it", r.Name)
		}
	}
	// Offsets and classes, from the Linux driver's regs.h and QEMU's igbvf.c.
	for _, want := range []struct {
		name   string
		offset uint32
		class  family.Class
	}{
		{"CTRL", 0x0, family.Replay}, {"STATUS", 0x8, family.Skip}, {"VMBMEM(0)", 0x800, family.Skip},
		{"VMBMEM(15)", 0x83c, family.Skip}, {"V2PMAILBOX", 0xc40, family.Replay}, {"PBACL", 0xf04, family.Skip},
		{"PSRTYPE", 0xf0c, family.Copy}, {"VFGPRC", 0xf10, family.Emulate}, {"VFGPTC", 0xf14, family.Emulate},
		{"VFGORC", 0xf18, family.Emulate}, {"VFGOTC", 0xf34, family.Emulate}, {"VFMPRC", 0xf3c, family.Emulate},
		{"VFGPRLBC", 0xf40, family.Emulate}, {"VFGPTLBC", 0xf44, family.Emulate}, {"VFGORLBC", 0xf48, family.Emulate},
		{"VFGOTLBC", 0xf50, family.Emulate}, {"FRTIMER", 0x1048, family.Skip}, {"EICS", 0x1520, family.Replay},
		{"EIMS", 0x1524, family.Copy}, {"EIMC", 0x1528, family.Skip}, {"EIAC", 0x152c, family.Copy}, {"EIAM", 0x1530, family.Copy},
		{"EICR", 0x1580, family.Derive}, {"EITR(2)", 0x1688, family.Copy}, {"IVAR0", 0x1700, family.Copy},
		{"IVAR_MISC", 0x1740, family.Copy}, {"RDBAL(0)", 0x2800, family.Copy}, {"RDBAH(1)", 0x2904, family.Copy},
		{"RDLEN(0)", 0x2808, family.Copy}, {"SRRCTL(0)", 0x280c, family.Copy}, {"RDH(0)", 0x2810, family.Derive},
		{"DCA_RXCTRL(0)", 0x2814, family.Copy}, {"RDT(1)", 0x2918, family.Copy}, {"RXDCTL(0)", 0x2828, family.Copy},
		{"RQDPC(1)", 0x2930, family.Emulate}, {"TDBAL(0)", 0x3800, family.Copy}, {"TDBAH(0)", 0x3804, family.Copy},
		{"TDLEN(1)", 0x3908, family.Copy}, {"TDH(0)", 0x3810, family.Derive}, {"DCA_TXCTRL(0)", 0x3814, family.Copy},
		{"TDT(0)", 0x3818, family.Copy}, {"TXDCTL(0)", 0x3828, family.Copy}, {"TDWBAL(0)", 0x3838, family.Copy},
		{"TDWBAH(1)", 0x393c, family.Copy}, {"PBRWAC", 0x24e8, family.Skip}, {"PBTWAC", 0x34e8, family.Skip},
	} {
		if got := byName[want.name]; got.Offset != want.offset || got.Class != want.class {
			t.Errorf("%s: offset %#x, %s; want %#x, %s", want.name, got.Offset, got.Class, want.offset, want.class)
		}
	}
}

// What the descriptions refer to must be in the table, with the values that
// Linux's driver writes.
func TestDescriptionsFitTable(t *testing.T) {
	f := New()
	byOffset := map[uint32]family.Register{}
	for _, r := range f.Registers() {
		byOffset[r.Offset] = r
	}
	if n := len(f.Queues()); n != 4 {
		t.Errorf("%d queues, want 4", n)
	}
	for _, q := range f.Queues() {
		offsets := []uint32{q.BAL, q.BAH, q.LEN, q.Head, q.Tail, q.Ctl}
		prefix := "R"
		if q.Direction == family.TX {
			offsets, prefix = append(offsets, q.WBAL, q.WBAH), "T"
		}
		if q.Assign != IVAR0 || q.AssignShift != uint(q.Index)*16+uint(q.Direction)*8 {
			t.Errorf("%s queue %d is assigned by %#x at bit %d", q.Direction, q.Index, q.Assign, q.AssignShift)
		}
		for _, off := range offsets {
			if r, ok := byOffset[off]; !ok || !strings.HasPrefix(r.Name, prefix) || !strings.HasSuffix(r.Name, []string{"(0)", "(1)"}[q.Index]) {
				t.Errorf("%s queue %d: register %#x is %q", q.Direction, q.Index, off, r.Name)
			}
		}
	}
	emulated := 0
	for _, r := range byOffset {
		if r.Class == family.Emulate {
			emulated++
		}
	}
	for _, c := range f.Counters() {
		r := byOffset[c.Low]
		if r.Class != family.Emulate || r.Name != c.Name || c.High != 0 || c.ReadClears != (r.Access&family.ReadClears != 0) {
			t.Errorf("counter %+v is register %+v", c, r)
		}
	}
	if n := len(f.Counters()); n != emulated {
		t.Errorf("%d counters, but %d registers to emulate", n, emulated)
	}
	irq := f.Interrupts()
	for _, off := range append(slices.Clone(irq.Assign), irq.Cause, irq.CauseSet, irq.MaskSet, irq.MaskClear, irq.AutoClear, irq.AutoMask) {
		if _, ok := byOffset[off]; !ok {
			t.Errorf("interrupt register %#x is not in the table", off)
		}
	}
	// From igbvf's netdev.c: split and one-buffer SRRCTL, thresholds, vectors.
	for off, values := range map[uint32][]uint32{TXDCTL(0): {0x02000000}, SRRCTL(0): {0x82000002, 0x8a000202}, RXDCTL(0): {0x02010810},
		IVAR0: {0x00008180}, IVARMisc: {0x82}, EIAM: {7}, EIAC: {7}, EIMS: {7}, EIMC: {7}, EITR(0): {488, 980, 196, 56},
		TDLEN(0): {256 * 16, 4096 * 16}, RDLEN(0): {80 * 16}, DCATXCTRL(0): {0x2200}} {
		for _, value := range values {
			if lost := value &^ byOffset[off].Mask; lost != 0 {
				t.Errorf("%s: the driver's %#x loses %#x", byOffset[off].Name, value, lost)
			}
		}
	}
}

func TestMembers(t *testing.T) {
	i350, err := ForDevice(VendorID, DeviceIDI350)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(i350.Queues()); n != 2 {
		t.Errorf("an I350 VF has %d queues, want 2", n)
	}
	both, one := table(New()), table(i350)
	for name, want := range both {
		got, ok := one[name]
		switch {
		case strings.HasSuffix(name, "(1)") && !strings.HasPrefix(name, "VMBMEM") && !strings.HasPrefix(name, "EITR"):
			if ok {
				t.Errorf("an I350 VF has %s", name)
			}
			continue
		case name == "IVAR0":
			want.Mask = 0x8383
		case name == "SRRCTL(0)":
			want.Mask |= 1 << 30
		}
		if got != want {
			t.Errorf("I350: %s is %+v, want %+v", name, got, want)
		}
	}
	for _, id := range [][2]uint16{{VendorID, 0x10ed}, {VendorID, 0x152d}, {0x1234, DeviceID}} {
		if _, err := ForDevice(id[0], id[1]); err == nil {
			t.Errorf("%04x:%04x is taken for a member", id[0], id[1])
		}
	}
	f, err := ForDevice(VendorID, DeviceID)
	if err != nil || f.Name() != "igbvf" || len(f.Registers()) != len(both) {
		t.Errorf("the 82576 VF is %v, %v", f, err)
	}
}

func TestTableIsNotShared(t *testing.T) {
	f := New()
	f.Registers()[0].Name = "changed"
	f.Queues()[0].Index = 9
	f.Counters()[0].Name = "changed"
	if f.Registers()[0].Name != "CTRL" || f.Queues()[0].Index != 0 || f.Counters()[0].Name != "VFGPRC" {
		t.Error("a caller can change the table")
	}
}

func TestOffer(t *testing.T) {
	f := New()
	replies := func(change func([][]uint32)) [][]uint32 {
		var list [][]uint32
		for _, request := range f.Probe() {
			list = append(list, []uint32{request[0] | MsgNACK, 0, 0})
		}
		change(list)
		return list
	}
	got, err := f.Offer(replies(func([][]uint32) {}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(family.Offer{APIs: []uint32{0}}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for name, bad := range map[string][][]uint32{
		"none":    nil,
		"other":   replies(func(l [][]uint32) { l[1] = l[0] }),
		"empty":   replies(func(l [][]uint32) { l[0] = nil }),
		"verdict": replies(func(l [][]uint32) { l[1][0] &^= MsgACK | MsgNACK }),
	} {
		if offer, err := f.Offer(bad); err == nil {
			t.Errorf("%s: offer %+v from bad replies", name, offer)
		}
	}
}
