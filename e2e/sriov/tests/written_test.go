//go:build e2esriov

package tests

import (
	"slices"
	"testing"

	"compsc.io/compsc/e2e/sriov/driver"
)

// TestWritten: the emulated IOMMU has no dirty bits, whatever interface the VF is
// used by, and the pages that it writes are known from its rings.
func TestWritten(t *testing.T) {
	const page = 4096
	r := newRig(t)
	r.boot()
	if r.source.device.HasDirtyBits() {
		t.Error("the IOMMU has dirty bits, which the product would trust")
	}
	told := map[int]bool{}
	r.source.Track(func(addr uint64, n int) {
		for at := int(addr-base) / page; at <= (int(addr-base)+n-1)/page; at++ {
			told[at] = true
		}
	})
	before := slices.Clone(r.mem)
	// The guest itself writes to its rings only, while it does not send.
	r.must(exchange(r.peer, r.guest, driver.RingSize/3, "to be recorded"))
	r.must(r.source.Quiesce(t.Context()))
	r.must(r.source.FlushTracked())
	written, unchanged := 0, 0
	for at := range len(r.mem) / page {
		switch changed := !slices.Equal(before[at*page:][:page], r.mem[at*page:][:page]); {
		case changed && !told[at]:
			t.Errorf("page %d was written, and not told", at)
		case changed:
			written++
		case told[at]:
			unchanged++
		}
	}
	// The rings are told whole: the guest has put back what the VF wrote there.
	if written < 2 || unchanged > 2 || len(told) != written+unchanged {
		t.Errorf("%d pages were told: %d that were written and %d that were not", len(told), written, unchanged)
	}
}
