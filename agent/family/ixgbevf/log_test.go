package ixgbevf

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// did notes a message that the PF acknowledged; reply words other than word 0
// are those of the request unless given.
func did(l *Log, request []uint32, reply ...uint32) {
	full := slices.Concat(request, make([]uint32, MailboxWords))[:MailboxWords]
	answer := slices.Clone(full)
	answer[0] |= MsgACK | MsgCTS
	copy(answer[1:], reply)
	l.Completed(full, answer)
}

// refused notes a message that the PF refused.
func refused(l *Log, request ...uint32) {
	full := slices.Concat(request, make([]uint32, MailboxWords))[:MailboxWords]
	answer := slices.Clone(full)
	answer[0] |= MsgNACK | MsgCTS
	l.Completed(full, answer)
}

// tried is full with a further MAC that the PF has no filter for.
func tried() *Log {
	l := full()
	refused(l, MsgSetMACVLAN|3<<16, 2, 1)
	return l
}

// full is the record of a guest that has used every message.
func full() *Log {
	l := &Log{}
	did(l, []uint32{MsgReset}, 0x33221152, 0x5544, 1)
	refused(l, MsgAPINegotiate, API17)
	did(l, []uint32{MsgAPINegotiate, API13})
	did(l, []uint32{MsgGetQueues}, 2, 2, 1, 0)
	did(l, []uint32{MsgFeaturesNegotiate, 3}, 1)
	did(l, []uint32{MsgSetLPE, 1518})
	did(l, []uint32{MsgSetMAC, 0x33221154, 0x6655})
	refused(l, MsgSetMAC, 0xffffffff, 0xffff)
	did(l, []uint32{MsgSetMACVLAN | 1<<16, 1, 1})
	did(l, []uint32{MsgSetMACVLAN | 2<<16, 2, 2})
	did(l, []uint32{MsgSetVLAN | 1<<16, 77})
	did(l, []uint32{MsgSetVLAN | 1<<16, 5})
	did(l, []uint32{MsgSetVLAN | 1<<16, 6})
	did(l, []uint32{MsgSetVLAN, 6})
	did(l, []uint32{MsgSetVLAN | 1<<16, 5})
	refused(l, MsgSetVLAN|1<<16, 9)
	did(l, []uint32{MsgSetMulticast | 1<<16, 0x0fff})
	did(l, []uint32{MsgSetMulticast | 3<<16, 0x00020001, 0x3})
	did(l, []uint32{MsgUpdateXcastMode, XcastAllMulti}, XcastMulti)
	did(l, []uint32{MsgGetRETA})
	did(l, []uint32{MsgGetRSSKey})
	did(l, []uint32{MsgGetLinkState})
	return l
}

// spoken lists what a record replays, without trailing zero words.
func spoken(l *Log) []string {
	var list []string
	for _, m := range l.Replay() {
		words := m.Words
		for len(words) > 1 && words[len(words)-1] == 0 {
			words = words[:len(words)-1]
		}
		list = append(list, fmt.Sprintf("%s %x", m.Name, words))
	}
	return list
}

func TestReplayOrder(t *testing.T) {
	want := []string{
		"RESET [1]",
		"API_NEGOTIATE [8 4]",
		"GET_QUEUES [9]",
		"FEATURES_NEGOTIATE [12 3]",
		"SET_LPE [5 5ee]",
		"SET_MAC_ADDR [2 33221154 6655]",
		"SET_MACVLAN [6]",
		"SET_MACVLAN [10006 1 1]",
		"SET_MACVLAN [20006 2 2]",
		"SET_VLAN [10004 5]",
		"SET_VLAN [10004 4d]",
		"SET_MULTICAST [30003 20001 3]",
		"UPDATE_XCAST_MODE [c]",
		"UPDATE_XCAST_MODE [c 2]",
	}
	if diff := cmp.Diff(want, spoken(full())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRecordFollowsMessages(t *testing.T) {
	start := func() *Log {
		l := &Log{}
		did(l, []uint32{MsgReset}, 0, 0, 0)
		return l
	}
	const reset, noMAC = "RESET [1]", "SET_MAC_ADDR [2]"
	// What the PF remembers of the full record after a reset.
	remembered := []string{reset, "API_NEGOTIATE [8 4]", "UPDATE_XCAST_MODE [c]", "UPDATE_XCAST_MODE [c 1]",
		"SET_MAC_ADDR [2 33221154 6655]", "SET_MACVLAN [10006 33221154 6655]", "SET_MACVLAN [6]", "VFCTRL.RST []"}
	for _, tc := range []struct {
		name string
		say  func(*Log)
		want []string
	}{
		{"reset with an address", func(l *Log) { did(l, []uint32{MsgReset}, 1, 2, 0) }, []string{reset, "SET_MAC_ADDR [2 1 2]"}},
		{"reset without an address", func(l *Log) { *l = Log{}; refused(l, MsgReset) }, []string{reset}},
		{"the address outlives a reset", func(l *Log) { did(l, []uint32{MsgSetMAC, 1, 2}); refused(l, MsgReset) },
			[]string{reset, "SET_MAC_ADDR [2 1 2]"}},
		{"reset forgets", func(l *Log) { *l = *full(); refused(l, MsgReset) }, append(slices.Clone(remembered), reset,
			"SET_MAC_ADDR [2 33221154 6655]", "SET_MACVLAN [10006 33221154 6655]", "SET_MACVLAN [6]")},
		{"reset bit forgets", func(l *Log) { *l = *full(); l.Reset() }, remembered},
		{"never used", func(l *Log) { *l = Log{}; l.Reset() }, nil},
		{"nothing before a reset", func(l *Log) { *l = Log{}; did(l, []uint32{MsgSetLPE, 9000}) }, nil},
		{"the mode it has", func(l *Log) { did(l, []uint32{MsgUpdateXcastMode, 0}) }, []string{reset, noMAC}},
		{"no mode", func(l *Log) {
			did(l, []uint32{MsgUpdateXcastMode, 1})
			did(l, []uint32{MsgUpdateXcastMode, 0})
		}, []string{reset, noMAC, "UPDATE_XCAST_MODE [c 1]", "UPDATE_XCAST_MODE [c]"}},
		{"list after the mode", func(l *Log) {
			did(l, []uint32{MsgUpdateXcastMode, 2})
			did(l, []uint32{MsgSetMulticast | 1<<16, 7})
		}, []string{reset, noMAC, "UPDATE_XCAST_MODE [c]", "UPDATE_XCAST_MODE [c 2]", "SET_MULTICAST [10003 7]"}},
		{"frame size refused", func(l *Log) {
			did(l, []uint32{MsgSetLPE, 1518})
			refused(l, MsgSetLPE, 9000)
		}, []string{reset, "SET_LPE [5 5ee]", "SET_LPE [5 2328]", noMAC}},
		{"frame size granted at last", func(l *Log) {
			refused(l, MsgSetLPE, 9000)
			did(l, []uint32{MsgSetLPE, 1518})
		}, []string{reset, "SET_LPE [5 5ee]", noMAC}},
		{"macvlans cleared", func(l *Log) {
			did(l, []uint32{MsgSetMACVLAN | 1<<16, 1, 1})
			did(l, []uint32{MsgSetMACVLAN})
		}, []string{reset, noMAC, "SET_MACVLAN [10006]", "SET_MACVLAN [6]"}},
		{"macvlans started anew", func(l *Log) {
			did(l, []uint32{MsgSetMACVLAN | 1<<16, 1, 1})
			did(l, []uint32{MsgSetMACVLAN | 2<<16, 2, 2})
			did(l, []uint32{MsgSetMACVLAN | 1<<16, 3, 3})
		}, []string{reset, noMAC, "SET_MACVLAN [6]", "SET_MACVLAN [10006 3 3]"}},
		{"a macvlan refused", func(l *Log) { refused(l, MsgSetMACVLAN|1<<16, 2, 1) },
			[]string{reset, noMAC, "SET_MACVLAN [10006]", "SET_MACVLAN [6]"}},
		{"a macvlan refused, and another granted", func(l *Log) {
			did(l, []uint32{MsgSetMACVLAN | 1<<16, 2, 2})
			refused(l, MsgSetMACVLAN|2<<16, 4, 1)
		}, []string{reset, noMAC, "SET_MACVLAN [6]", "SET_MACVLAN [10006 2 2]"}},
		{"macvlans refused that no PF grants", func(l *Log) {
			refused(l, MsgSetMACVLAN, 1, 1)
			refused(l, MsgSetMACVLAN|1<<16, 0, 0)
			refused(l, MsgSetMACVLAN|1<<16, 1, 1)
		}, []string{reset, noMAC}},
		{"refused without clear-to-send", func(l *Log) {
			l.Completed([]uint32{MsgSetMACVLAN | 1<<16, 2, 1}, []uint32{MsgSetMACVLAN | 1<<16 | MsgNACK})
			l.Completed([]uint32{MsgSetLPE, 9000}, []uint32{MsgSetLPE | MsgNACK})
		}, []string{reset, noMAC}},
		{"empty multicast list", func(l *Log) { did(l, []uint32{MsgSetMulticast}) }, []string{reset, noMAC, "SET_MULTICAST [3]"}},
		{"VLAN removed that was not there", func(l *Log) { did(l, []uint32{MsgSetVLAN, 5}) }, []string{reset, noMAC}},
		{"reply to another message", func(l *Log) {
			l.Completed([]uint32{MsgSetLPE, 9000}, []uint32{MsgSetVLAN | MsgACK, 0})
		}, []string{reset, noMAC}},
		{"neither yes nor no", func(l *Log) { l.Completed([]uint32{MsgSetLPE, 9000}, []uint32{MsgSetLPE, 0}) }, []string{reset, noMAC}},
		{"short", func(l *Log) {
			l.Completed(nil, nil)
			l.Completed([]uint32{MsgSetLPE}, []uint32{MsgSetLPE | MsgACK})
			l.Completed([]uint32{MsgSetMAC, 1}, []uint32{MsgSetMAC | MsgACK})
			l.Completed([]uint32{MsgReset}, []uint32{MsgReset | MsgACK, 0, 0})
			l.Completed([]uint32{MsgSetMulticast | 3<<16, 7}, []uint32{MsgSetMulticast | MsgACK})
		}, []string{reset, noMAC, "SET_MULTICAST [20003 7]"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := start()
			tc.say(l)
			if diff := cmp.Diff(tc.want, spoken(l)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Every message is judged by the PF's reply to it.
func TestReplayChecksReplies(t *testing.T) {
	replies := map[string][]uint32{
		"RESET":              {MsgReset | MsgNACK, 0, 0, 1},
		"GET_QUEUES":         {MsgGetQueues | MsgACK, 2, 2, 1, 0},
		"FEATURES_NEGOTIATE": {MsgFeaturesNegotiate | MsgACK, 1},
		"UPDATE_XCAST_MODE":  {MsgUpdateXcastMode | MsgACK, XcastMulti},
	}
	for _, m := range full().Replay() {
		good, ok := replies[m.Name]
		if !ok {
			good = []uint32{m.Words[0] | MsgACK | MsgCTS}
		}
		if err := m.Check(good); err != nil {
			t.Errorf("%s: the same reply as on the source is refused: %v", m.Name, err)
		}
		bad := map[string][]uint32{
			"other message": {MsgPFControl | MsgACK, 2, 2, 1, 0},
			"empty":         {},
			"no verdict":    append([]uint32{good[0] &^ (MsgACK | MsgNACK)}, good[1:]...),
		}
		if m.Name != "RESET" {
			bad["refusal"] = append([]uint32{good[0]&^MsgACK | MsgNACK}, good[1:]...)
		}
		if len(good) > 1 && (m.Name != "UPDATE_XCAST_MODE" || m.Words[1] == XcastAllMulti) {
			bad["short"] = good[:1]
			other := slices.Clone(good)
			other[len(other)-1]++
			bad["other answer"] = other
		}
		for what, reply := range bad {
			if m.Check(reply) == nil {
				t.Errorf("%s: reply %x (%s) is accepted", m.Name, reply, what)
			}
		}
	}
}

func TestSummary(t *testing.T) {
	got := full().Summary()
	if got.API != API13 || got.MulticastFilterType != 1 || !bytes.Equal(got.MAC, []byte{0x54, 0x11, 0x22, 0x33, 0x55, 0x66}) || got.NotMigratable != "" {
		t.Errorf("summary %+v", got)
	}
	early := &Log{}
	did(early, []uint32{MsgAPINegotiate, API13})
	if got := early.Summary(); got.API != 0 {
		t.Errorf("API %d without a reset, want 0", got.API)
	}
	if got := (&Log{}).Summary(); got.MAC != nil || got.NotMigratable != "" {
		t.Errorf("summary of an empty record %+v", got)
	}
}

func TestNotMigratable(t *testing.T) {
	for _, tc := range []struct {
		name string
		say  func(*Log)
		want string
	}{
		{"IPsec", func(l *Log) { did(l, []uint32{MsgIPsecAdd}) }, "IPsec"},
		{"IPsec removed", func(l *Log) { did(l, []uint32{MsgIPsecAdd}); did(l, []uint32{MsgIPsecDel}) }, ""},
		{"IPsec removed too often", func(l *Log) {
			did(l, []uint32{MsgIPsecDel})
			did(l, []uint32{MsgIPsecAdd})
		}, "IPsec"},
		{"IPsec removed twice", func(l *Log) {
			did(l, []uint32{MsgIPsecAdd}, 7)
			did(l, []uint32{MsgIPsecAdd}, 8)
			did(l, []uint32{MsgIPsecDel, 7})
			did(l, []uint32{MsgIPsecDel, 7})
		}, "IPsec"},
		{"IPsec removed after all", func(l *Log) {
			did(l, []uint32{MsgIPsecAdd}, 7)
			did(l, []uint32{MsgIPsecAdd}, 8)
			did(l, []uint32{MsgIPsecDel, 8})
			did(l, []uint32{MsgIPsecDel, 7})
		}, ""},
		{"IPsec refused", func(l *Log) { refused(l, MsgIPsecAdd) }, ""},
		{"unknown message", func(l *Log) { did(l, []uint32{0x77}) }, "0x0077"},
		{"unknown message refused", func(l *Log) { refused(l, 0x77) }, ""},
		{"too many addresses", func(l *Log) {
			for i := range uint32(maxMACVLANs + 1) {
				did(l, []uint32{MsgSetMACVLAN | (i+1)<<16, i, i})
			}
		}, "128"},
		{"reset heals", func(l *Log) { did(l, []uint32{0x77}); refused(l, MsgReset) }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := full()
			tc.say(l)
			restored, err := unmarshalLog(l.Marshal())
			if err != nil {
				t.Fatal(err)
			}
			for _, log := range []*Log{l, restored} {
				if got := log.Summary().NotMigratable; (got == "") != (tc.want == "") || !strings.Contains(got, tc.want) {
					t.Errorf("%q, want %q", got, tc.want)
				}
			}
		})
	}
}

func TestMarshal(t *testing.T) {
	for name, l := range map[string]*Log{"empty": {}, "full": full(), "tried": tried()} {
		b := l.Marshal()
		got, err := New(0).RestoreLog(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(l, got, cmp.AllowUnexported(Log{}, modeRequest{}, kept{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		for n := range b {
			if _, err := New(0).RestoreLog(b[:n]); err == nil {
				t.Errorf("%s: the first %d of %d bytes are accepted", name, n, len(b))
			}
		}
		if _, err := New(0).RestoreLog(append(b, 0)); err == nil {
			t.Errorf("%s: a byte too many is accepted", name)
		}
	}
}

// fullV1 is the record of full as version 1 encoded it.
var fullV1 = []byte{
	0x01, 0x01, 0x7f, 0x00, 0x00, 0x00, 0x01, 0x54, 0x11, 0x22, 0x33, 0x55, 0x66, 0x00, 0x00, 0x00,
	0x04, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00,
	0x00, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x05, 0xee, 0x00, 0x03, 0x00,
	0x01, 0x00, 0x02, 0x00, 0x03, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x01, 0x00, 0x02, 0x00,
	0x05, 0x00, 0x4d, 0x00, 0x02, 0x01, 0x00, 0x00, 0x00, 0x01, 0x00, 0x02, 0x00, 0x00, 0x00, 0x02,
	0x00, 0x00, 0x00, 0x00, 0x00,
}

// A record of version 1 is understood as far as it goes.
func TestVersion1(t *testing.T) {
	l, err := New(0).RestoreLog(fullV1)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(spoken(full()), spoken(l.(*Log))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What each version of the encoding wrote must be read by every later release,
// and a record that needs no more is still written in the old version.
func TestGoldenRecords(t *testing.T) {
	for name, want := range map[string]*Log{"record-v2.bin": full(), "record-v3.bin": tried()} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, want.Marshal(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, want.Marshal()) {
			t.Errorf("%s: encoded differently today", name)
		}
		got, err := New(0).RestoreLog(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(Log{}, modeRequest{}, kept{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestMarshalIsBounded(t *testing.T) {
	l := full()
	for i := range uint32(2 * maxVLANs) {
		did(l, []uint32{MsgSetVLAN | 1<<16, i})
	}
	for i := range uint32(2 * maxMACVLANs) {
		did(l, []uint32{MsgSetMACVLAN | min(i+1, 255)<<16, i, i})
	}
	b := l.Marshal()
	if len(b) > 10<<10 {
		t.Errorf("%d bytes", len(b))
	}
	if _, err := unmarshalLog(b); err != nil {
		t.Error(err)
	}
}

func TestRestoreLogRefuses(t *testing.T) {
	base := &Log{}
	did(base, []uint32{MsgReset}, 0, 0, 0)
	with := func(change func(*Log)) []byte {
		l := *base
		change(&l)
		return l.Marshal()
	}
	for _, tc := range []struct {
		name string
		b    []byte
		text string
	}{
		{"newer", []byte{4, 0}, "version 4"},
		{"flag of version 3", []byte{2, 0, keptTried}, "flags"},
		{"version 3 without need", []byte{3, 0, 0}, "flags"},
		{"ready", []byte{1, 2}, "ready"},
		{"flags", []byte{2, 0, 4}, "flags"},
		{"VLANs out of order", with(func(l *Log) { l.vlans = []uint16{5, 5} }), "VLAN 5"},
		{"no such VLAN", with(func(l *Log) { l.vlans = []uint16{4096} }), "VLAN 4096"},
		{"too many hashes", with(func(l *Log) { l.multicast = make([]uint16, 31) }), "multicast"},
		{"too many addresses", with(func(l *Log) { l.macVLANs = make([]mac, 129) }), "addresses"},
	} {
		if _, err := New(0).RestoreLog(tc.b); err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: error %v, want one with %q", tc.name, err, tc.text)
		}
	}
}

// Any sequence of messages leaves a record that survives its encoding.
func FuzzLog(f *testing.F) {
	f.Add([]byte{MsgReset, 0, 1, 2, MsgSetVLAN, 1, 5, 0, MsgSetMACVLAN, 1, 9, 9})
	f.Add([]byte{MsgReset, 0, 0, 0, MsgSetMulticast, 31, 1, 2, MsgUpdateXcastMode, 0, 3, 1, MsgIPsecAdd, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &Log{}
		for ; len(b) >= 4; b = b[4:] {
			did(l, []uint32{uint32(b[0]&0x1f) | uint32(b[1])<<16, uint32(b[2]), uint32(b[3])}, uint32(b[2]), uint32(b[3]))
		}
		got, err := unmarshalLog(l.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(spoken(l), spoken(got)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// Whatever RestoreLog accepts of this version is just what Marshal writes.
func FuzzRestoreLog(f *testing.F) {
	f.Add((&Log{}).Marshal())
	f.Add(full().Marshal())
	f.Add(tried().Marshal())
	f.Add(fullV1)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := New(0).RestoreLog(b)
		if err != nil {
			return
		}
		if again := l.Marshal(); b[0] > 1 && !bytes.Equal(again, b) {
			t.Errorf("%x comes back as %x", b, again)
		}
	})
}
