package family_test

import (
	"slices"
	"testing"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// What a guest may be given, and what counters it then has from the device.
func TestDoorbellPages(t *testing.T) {
	for _, c := range []struct {
		f        family.Family
		pages    []uint32
		counters []string
	}{
		{igbvf.New(), []uint32{0x2000, 0x3000}, []string{"RQDPC(0)", "RQDPC(1)"}},
		{ixgbevf.New(0), []uint32{0x1000, 0x2000}, []string{"VFGPRC", "VFGORC", "VFMPRC", "VFGPTC", "VFGOTC"}},
	} {
		pages := family.DoorbellPages(c.f)
		if !slices.Equal(pages, c.pages) {
			t.Errorf("%s: pages %#x, want %#x", c.f.Name(), pages, c.pages)
		}
		var on []string
		for _, k := range c.f.Counters() {
			if family.OnPages(pages, k.Low) {
				on = append(on, k.Name)
			}
		}
		slices.Sort(on)
		slices.Sort(c.counters)
		if !slices.Equal(on, c.counters) {
			t.Errorf("%s: counters %q on them, want %q", c.f.Name(), on, c.counters)
		}
		for _, q := range c.f.Queues() {
			if !family.OnPages(pages, q.Tail) || !family.OnPages(pages, q.Head) {
				t.Errorf("%s: %s queue %d is not on them", c.f.Name(), q.Direction, q.Index)
			}
		}
	}
}

// quiet has its mailbox on the page of its transmit rings.
type quiet struct{ family.Family }

func (q quiet) Mailbox() family.Mailbox {
	m := q.Family.Mailbox()
	m.Control = 0x3400
	return m
}

// A page with anything that must be seen is not given away.
func TestDoorbellPagesLeaveTheMailbox(t *testing.T) {
	if pages := family.DoorbellPages(quiet{igbvf.New()}); !slices.Equal(pages, []uint32{0x2000}) {
		t.Errorf("pages %#x, want 0x2000 only", pages)
	}
}
