package harness

import (
	"testing"
	"time"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/traffic"
)

// The checks of a hop must be able to fail.

func counters(driver map[string]uint64, multicast uint64) Health {
	return Health{Stats: proto.Stats{Driver: driver, Multicast: multicast}}
}

func TestCheckCounters(t *testing.T) {
	before := counters(map[string]uint64{"rx_packets": 100, "rx_bytes": 1000, "multicast": 7}, 0)
	tests := map[string]struct {
		now map[string]uint64
		ok  bool
	}{
		"onward":         {map[string]uint64{"rx_packets": 200, "rx_bytes": 1 << 30, "multicast": 7}, true},
		"new":            {map[string]uint64{"rx_packets": 200, "rx_bytes": 2000, "multicast": 7, "more": 9}, true},
		"backwards":      {map[string]uint64{"rx_packets": 99, "rx_bytes": 2000, "multicast": 7}, false},
		"from zero":      {map[string]uint64{"rx_packets": 200, "rx_bytes": 2000, "multicast": 0}, false},
		"jump":           {map[string]uint64{"rx_packets": 100 + maxJump + 1, "rx_bytes": 2000, "multicast": 7}, false},
		"wrapped 32 bit": {map[string]uint64{"rx_packets": 200, "rx_bytes": 2000, "multicast": 1<<32 + 6}, false},
		"jump of bytes":  {map[string]uint64{"rx_packets": 200, "rx_bytes": 1000 + maxJump<<10 + 1, "multicast": 7}, false},
		"vanished":       {map[string]uint64{"rx_packets": 200, "rx_bytes": 2000}, false},
	}
	for name, test := range tests {
		if err := checkCounters(before, counters(test.now, 0)); (err == nil) != test.ok {
			t.Errorf("%s: %v, want none: %v", name, err, test.ok)
		}
	}
}

func stop(d time.Duration) standin.Timing {
	at := time.Unix(1000, 0)
	return standin.Timing{Stopped: at, Resumed: at.Add(d)}
}

func TestCheckMulticast(t *testing.T) {
	// A stop of 100 ms and the slack on both sides of it are 20 intervals.
	const sent, most = 150, 21
	tests := map[string]struct {
		counted, arrived uint64
		ok               bool
	}{
		"all":                      {sent, sent, true},
		"some in the stop":         {sent - most, sent - most, true},
		"too few counted":          {sent - most - 1, sent - most - 1, false},
		"counted, did not arrive":  {sent, sent - most - 1, false},
		"arrived, was not counted": {sent - 2, sent - 1, false},
		"counted twice":            {sent + 1, sent, false},
	}
	for name, test := range tests {
		before := counters(map[string]uint64{"multicast": 40}, 30)
		after := counters(map[string]uint64{"multicast": 40 + test.counted}, 30+test.arrived)
		if err := checkMulticast(before, after, sent, stop(100*time.Millisecond)); (err == nil) != test.ok {
			t.Errorf("%s: %v, want none: %v", name, err, test.ok)
		}
	}
}

func TestCheckPings(t *testing.T) {
	s := stop(100 * time.Millisecond)
	tests := map[string]struct {
		lost []time.Time
		ok   bool
	}{
		"none":      {nil, true},
		"in it":     {[]time.Time{s.Stopped, s.Resumed}, true},
		"long ago":  {[]time.Time{s.Stopped.Add(-pingSlack - 1)}, false},
		"long past": {[]time.Time{s.Stopped, s.Resumed.Add(pingSlack + 1)}, false},
	}
	for name, test := range tests {
		if err := checkPings(traffic.PingReport{Lost: len(test.lost), LostAt: test.lost}, s); (err == nil) != test.ok {
			t.Errorf("%s: %v, want none: %v", name, err, test.ok)
		}
	}
}
