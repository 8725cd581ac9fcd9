//go:build e2esriov

package tests

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/e2e/sriov/card"
)

// engine takes a VF into use without a guest, and with a log of its own.
func engine(t *testing.T, vf card.VF, mem ram, log io.Writer) *compsc.VF {
	t.Helper()
	return compsc.New(igbvf.New(), plug(t, vf, mem).device, compsc.Options{
		VendorID: igbvf.VendorID, DeviceID: igbvf.DeviceID, Memory: mem, Logger: slog.New(slog.NewTextHandler(log, nil))})
}

// TestRehearseBesideOthers: the PF's driver looks whether VFs were reset and
// for their messages in turn, so that a VF is reset in between when others of
// the card are busy. No message may be lost for that.
func TestRehearseBesideOthers(t *testing.T) {
	const rehearsals = 300
	r := guestOn(t, vfs[0][0], igbvf.New())
	record := r.source.Record()
	var logs [2]strings.Builder
	target, other := engine(t, vfs[1][0], r.mem, &logs[0]), engine(t, vfs[1][1], r.mem, &logs[1])

	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error)
	probes := 0
	go func() {
		for ctx.Err() == nil {
			// One that was begun is done.
			if _, err := other.Probe(context.WithoutCancel(ctx)); err != nil {
				ended <- err
				return
			}
			probes++
		}
		ended <- nil
	}()
	for i := range rehearsals {
		if err := target.Rehearse(t.Context(), record, compsc.Rights{}); err != nil {
			t.Fatalf("rehearsal %d: %v", i, err)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("the other VF: %v", err)
	}
	t.Logf("%d rehearsals beside %d probes of another VF", rehearsals, probes)
	if probes < rehearsals/10 {
		t.Errorf("only %d probes of the other VF: it was not busy", probes)
	}
	for i := range logs {
		if strings.Contains(logs[i].String(), "lost") {
			t.Errorf("VF %d: %s", i, logs[i].String())
		}
	}
}
