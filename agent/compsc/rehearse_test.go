package compsc_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// A PF that cannot do what the source's did is found out beforehand, and
// nothing stays behind in either case.
func TestRehearse(t *testing.T) {
	r := newTrackRig(t)
	record := r.vf.Record()
	for _, c := range []struct {
		name  string
		spoil func(*model.Config)
		want  string // in the error, empty for none
	}{
		{"the same PF", func(*model.Config) {}, ""},
		{"no free VLAN filter", func(c *model.Config) { c.VLANs = 0 }, "replay of mailbox operation"},
		{"an older PF driver", func(c *model.Config) { c.APIs = []uint32{ixgbevf.API10} }, "replay of mailbox operation"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := model.DefaultConfig()
			c.spoil(&cfg)
			m := model.New(cfg, r.mem, make(wire, 1), func(int) {})
			t.Cleanup(m.Close)
			v := compsc.New(ixgbevf.New(cfg.QueuePairs), m, compsc.Options{Logger: slog.New(slog.DiscardHandler)})
			err := v.Rehearse(context.Background(), record, compsc.Rights{Addressed: true, Trusted: true})
			var inc *compsc.IncompatibleError
			if c.want == "" && err != nil || c.want != "" && (!errors.As(err, &inc) || inc.Reason != compsc.ReasonMailboxRefused || !strings.Contains(inc.Message, c.want)) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
			if pf := m.Stats().PF; pf.MAC != nil || len(pf.VLANs) > 1 || pf.XcastMode != 0 || pf.ClearToSend && pf.ReceiveEnabled {
				t.Errorf("the PF was left with %+v", pf)
			}
			if v.Summary().MAC != nil {
				t.Errorf("the rehearsal is taken for the guest's doing: %+v", v.Summary())
			}
		})
	}
	var inc *compsc.IncompatibleError
	if err := r.vf.Rehearse(context.Background(), []byte("no record"), compsc.Rights{}); !errors.As(err, &inc) || inc.Reason != compsc.ReasonStateInvalid {
		t.Errorf("rehearsed what is no record: %v", err)
	}
}
