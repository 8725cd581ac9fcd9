//go:build e2e

package tests

import (
	"testing"
	"time"
)

// TestTenHops: ten migrations in a row under traffic. What every hop must
// keep is checked by Hop: the stream, the driver, its counters, and pings
// lost only in the stop.
func TestTenHops(t *testing.T) {
	ctx := within(t, 5*time.Minute)
	for i := range 10 {
		r := hop(t, ctx)
		if !r.StreamIntact || r.DriverResets != 0 || r.StreamBytes == 0 {
			t.Fatalf("hop %d: %+v", i+1, r)
		}
		if r.StateBytes <= 0 || r.PagesMarked <= 0 || r.VMStoppedMs <= 0 || r.DeviceStoppedMs <= 0 || len(r.Steps) == 0 {
			t.Errorf("hop %d measured nothing: %+v", i+1, r)
		}
		t.Logf("hop %d: VM stopped %.1f ms, device %.1f ms, %d pings lost, %d bytes of state, %d pages marked",
			i+1, r.VMStoppedMs, r.DeviceStoppedMs, r.PingsLost, r.StateBytes, r.PagesMarked)
	}
}
