package compsc

import (
	"context"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

func TestProbe(t *testing.T) {
	all := []uint32{ixgbevf.API10, ixgbevf.API11, ixgbevf.API12, ixgbevf.API13, ixgbevf.API14, ixgbevf.API15, ixgbevf.API16, ixgbevf.API17}
	for _, tc := range []struct {
		name  string
		spoil func(*fakeVF)
		want  Capabilities
	}{
		{"all", func(d *fakeVF) { d.mo = 3 }, Capabilities{WritableRXHeads: true, WritableTXHeads: true, Offer: family.Offer{APIs: all, MulticastFilterType: 3}}},
		{"no heads", func(d *fakeVF) { d.fixedHeads = true }, Capabilities{Offer: family.Offer{APIs: all}}},
		{"heads lost when turned on", func(d *fakeVF) { d.headsLost = true }, Capabilities{Offer: family.Offer{APIs: all}}},
		{"heads lost when turned off", func(d *fakeVF) { d.headsLostOff = true }, Capabilities{Offer: family.Offer{APIs: all}}},
		{"no API", func(d *fakeVF) { d.refuse[ixgbevf.MsgAPINegotiate] = true }, Capabilities{WritableRXHeads: true, WritableTXHeads: true, Offer: family.Offer{}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := usedTarget()
			v, _ := newVF(d)
			tc.spoil(d)
			got, err := v.Probe(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			checkClean(t, d, "after the probe")
		})
	}
	d := usedTarget()
	d.mute = true
	v, _ := newVF(d)
	if _, err := v.Probe(context.Background()); err == nil {
		t.Error("probed a PF that does not answer")
	}
	checkClean(t, d, "after a failed probe")

	stuck := newFake()
	stuck.stuck[ixgbevf.VFTXDCTL(1)] = true
	v, _ = newVF(stuck)
	if _, err := v.Probe(context.Background()); err == nil || !strings.Contains(err.Error(), "tx queue 1 is off") {
		t.Errorf("error %v for a queue that stays on", err)
	}
}

func TestCheck(t *testing.T) {
	source := newFake()
	v, _ := newVF(source)
	boot(t, v, source)
	encoded, err := capture(t, v).Encode()
	if err != nil {
		t.Fatal(err)
	}
	target := usedTarget()
	w := newMemoryVF(target)
	caps, err := w.Probe(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	writes := len(target.writes)
	for _, tc := range []struct {
		name   string
		change func(*State, *Capabilities)
		want   string
	}{
		{"fits", func(*State, *Capabilities) {}, ""},
		{"family", func(s *State, _ *Capabilities) { s.Family = "igbvf" }, ReasonFamilyMismatch},
		{"vendor", func(s *State, _ *Capabilities) { s.VendorID = 1 }, ReasonDeviceMismatch},
		{"device", func(s *State, _ *Capabilities) { s.DeviceID = 0x1515 }, ReasonDeviceMismatch},
		{"register missing", func(s *State, _ *Capabilities) { s.Registers = s.Registers[1:] }, ReasonFamilyMismatch},
		{"register unknown", func(s *State, _ *Capabilities) { s.Registers[0].Offset = 4 }, ReasonFamilyMismatch},
		{"bits unknown", func(s *State, _ *Capabilities) { s.Registers[0].Value = 0x80 }, ReasonStateInvalid},
		{"queue missing", func(s *State, _ *Capabilities) { s.Queues = s.Queues[1:] }, ReasonFamilyMismatch},
		{"queue order", func(s *State, _ *Capabilities) { s.Queues[0], s.Queues[1] = s.Queues[1], s.Queues[0] }, ReasonStateInvalid},
		{"head outside", func(s *State, _ *Capabilities) { s.Queues[0].Head = ringSize }, ReasonStateInvalid},
		{"tail outside", func(s *State, _ *Capabilities) { s.Queues[0].Tail = ringSize + 1 }, ReasonStateInvalid},
		{"head too wide", func(s *State, _ *Capabilities) { s.Queues[0].Enabled, s.Queues[0].Head = false, 1<<16 }, ReasonStateInvalid},
		{"too many contexts", func(s *State, _ *Capabilities) { s.Queues[2].Contexts = make([][]byte, 3) }, ReasonStateInvalid},
		{"context of a receive queue", func(s *State, _ *Capabilities) { s.Queues[0].Contexts = make([][]byte, 1) }, ReasonStateInvalid},
		{"context of the other slot", func(s *State, _ *Capabilities) {
			s.Queues[2].Contexts = [][]byte{contextDescriptor(1, 0)}
		}, ReasonStateInvalid},
		{"no context", func(s *State, _ *Capabilities) { s.Queues[2].Contexts = [][]byte{make([]byte, 16)} }, ReasonStateInvalid},
		{"short context", func(s *State, _ *Capabilities) { s.Queues[2].Contexts = [][]byte{make([]byte, 15)} }, ReasonStateInvalid},
		{"relies on nothing", func(s *State, _ *Capabilities) { s.Queues[3].Contexts, s.Queues[3].Relied = nil, 1 }, ReasonStateInvalid},
		{"latched half of a short counter", func(s *State, _ *Capabilities) { s.Counters[0].Latched = true }, ReasonStateInvalid},
		{"latched half too wide", func(s *State, _ *Capabilities) { s.Counters[1].Latched, s.Counters[1].High = true, 16 }, ReasonStateInvalid},
		{"half not latched", func(s *State, _ *Capabilities) { s.Counters[1].High = 1 }, ReasonStateInvalid},
		{"counter missing", func(s *State, _ *Capabilities) { s.Counters = s.Counters[1:] }, ReasonFamilyMismatch},
		{"counter too wide", func(s *State, _ *Capabilities) { s.Counters[0].Value = 1 << 32 }, ReasonStateInvalid},
		{"mailbox short", func(s *State, _ *Capabilities) { s.Mailbox.Memory = nil }, ReasonStateInvalid},
		{"mailbox bits", func(s *State, _ *Capabilities) { s.Mailbox.ReadClear = 1 }, ReasonStateInvalid},
		{"causes", func(s *State, _ *Capabilities) { s.Causes = 8 }, ReasonStateInvalid},
		{"record", func(s *State, _ *Capabilities) { s.Log = []byte{9} }, ReasonStateInvalid},
		{"API", func(_ *State, c *Capabilities) { c.Offer.APIs = []uint32{ixgbevf.API14} }, ReasonAPINotAccepted},
		{"filter type", func(_ *State, c *Capabilities) { c.Offer.MulticastFilterType = 1 }, ReasonMulticastFilterMismatch},
		{"receive heads", func(_ *State, c *Capabilities) { c.WritableRXHeads = false }, ReasonHeadNotRestorable},
		{"transmit heads", func(_ *State, c *Capabilities) { c.WritableTXHeads = false }, ReasonHeadNotRestorable},
		{"heads by other ways", func(_ *State, c *Capabilities) {
			c.WritableRXHeads, c.RXHeads = false, HeadsDummyAdvance
			c.WritableTXHeads, c.TXHeads = false, HeadsDummyAdvance
		}, ""},
		{"too little scratch memory", func(_ *State, c *Capabilities) {
			c.WritableRXHeads, c.RXHeads = false, HeadsShadowRing
			w.o.Scratch = smallScratch{}
		}, ReasonHeadNotRestorable},
		{"heads at zero", func(s *State, c *Capabilities) {
			for i := range s.Queues {
				s.Queues[i].Head = 0
			}
			c.WritableRXHeads, c.WritableTXHeads = false, false
		}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := Decode(encoded)
			if err != nil {
				t.Fatal(err)
			}
			c := caps
			tc.change(s, &c)
			wantReason(t, w.Check(s, c), tc.want)
			if len(target.writes) != writes {
				t.Error("the check wrote to the device")
			}
		})
	}
}
