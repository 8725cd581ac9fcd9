package igbvf

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/family"
)

// did notes a message that the PF acknowledged; words of the reply after
// word 0, which only that to a RESET has, are given.
func did(l *Log, request []uint32, reply ...uint32) { answered(l, request, MsgACK|MsgCTS, reply) }

// refused notes a message that the PF refused.
func refused(l *Log, request ...uint32) { answered(l, request, MsgNACK|MsgCTS, nil) }

func answered(l *Log, request []uint32, verdict uint32, reply []uint32) {
	full := slices.Concat(request, make([]uint32, MailboxWords))[:MailboxWords]
	answer := slices.Clone(full)
	answer[0] |= verdict
	copy(answer[1:], reply)
	l.Completed(full, answer)
}

// full is the record of a guest that has used every message.
func full() *Log {
	l := &Log{}
	did(l, []uint32{MsgReset}, 0x33221152, 0x5544)
	did(l, []uint32{MsgSetMAC, 0x33221154, 0x6655})
	refused(l, MsgSetMAC, 0xffffffff, 0xffff)
	did(l, []uint32{MsgSetMulticast | 1<<16, 0x0fff})
	did(l, []uint32{MsgSetMulticast | 3<<16, 0x00020001, 0x3})
	did(l, []uint32{MsgSetMAC | MACFilterClear<<16, 1, 1})
	did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, 1, 1})
	did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, 2, 2})
	did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, 1, 1})
	refused(l, MsgSetMAC|MACFilterAdd<<16, 3, 3)
	did(l, []uint32{MsgSetVLAN | 1<<16, 0})
	did(l, []uint32{MsgSetVLAN | 1<<16, 77})
	did(l, []uint32{MsgSetVLAN | 1<<16, 5})
	did(l, []uint32{MsgSetVLAN | 1<<16, 6})
	did(l, []uint32{MsgSetVLAN, 6})
	refused(l, MsgSetVLAN|1<<16, 9)
	did(l, []uint32{MsgSetLPE, 1522})
	refused(l, MsgSetPromisc|(PromiscUnicast|PromiscMulticast)<<16)
	return l
}

// spoken lists the words of a replay in hexadecimal, without trailing zeros.
func spoken(list []family.Message) []string {
	var lines []string
	for _, m := range list {
		words := m.Words
		for len(words) > 1 && words[len(words)-1] == 0 {
			words = words[:len(words)-1]
		}
		lines = append(lines, fmt.Sprintf("%s %x", m.Name, words))
	}
	return lines
}

const (
	reset    = "RESET [1]"
	lpe      = "SET_LPE [5 5f2]"
	clearOwn = "SET_MAC_ADDR, clear filters [10002 33221154 6655]"
	add1     = "SET_MAC_ADDR, add filter [20002 1 1]"
	add2     = "SET_MAC_ADDR, add filter [20002 2 2]"
	// blindClear is what is sent without an address of the guest.
	blindClear = "SET_MAC_ADDR, clear filters [10002 2 100]"
)

func TestReplayOrder(t *testing.T) {
	want := []string{
		reset,
		"SET_MAC_ADDR [2 33221154 6655]",
		lpe, clearOwn, add1, add2,
		"SET_VLAN [10004]",
		"SET_VLAN [10004 5]",
		"SET_VLAN [10004 4d]",
		"SET_MULTICAST [30003 20001 3]",
		"SET_PROMISC [30006]",
	}
	if diff := cmp.Diff(want, spoken(full().Replay())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRecordFollowsMessages(t *testing.T) {
	for _, tc := range []struct {
		name string
		say  func(*Log)
		want []string
	}{
		{"reset with an address", func(l *Log) { did(l, []uint32{MsgReset}, 1, 2) }, []string{reset, "SET_MAC_ADDR [2 1 2]"}},
		{"reset without an address", func(*Log) {}, []string{reset}},
		{"nothing before a reset", func(l *Log) { *l = Log{}; did(l, []uint32{MsgSetLPE, 9000}) }, nil},
		{"never used", func(l *Log) { *l = Log{}; l.Reset() }, nil},
		{"a reset leaves what is kept", func(l *Log) { *l = *full(); refused(l, MsgReset) }, []string{reset, lpe, blindClear, add1, add2}},
		{"the reset bit too", func(l *Log) { *l = *full(); l.Reset() }, []string{reset, lpe, blindClear, add1, add2, "CTRL.RST []"}},
		{"further addresses cleared", func(l *Log) {
			did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, 1, 1})
			did(l, []uint32{MsgSetMAC | MACFilterClear<<16, 0, 0})
		}, []string{reset}},
		{"further addresses not cleared", func(l *Log) {
			did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, 1, 1})
			refused(l, MsgSetMAC|MACFilterClear<<16)
		}, []string{reset, blindClear, add1}},
		{"stripping off", func(l *Log) {
			did(l, []uint32{MsgSetVLAN | 1<<16, 7})
			did(l, []uint32{MsgSetVLAN | 1<<16, 0})
		}, []string{reset, "SET_VLAN [10004 7]", "SET_VLAN [10004]"}},
		{"VLAN 0 is never removed", func(l *Log) {
			did(l, []uint32{MsgSetVLAN | 1<<16, 0})
			did(l, []uint32{MsgSetVLAN | 1<<16, 7})
			did(l, []uint32{MsgSetVLAN, 0})
		}, []string{reset, "SET_VLAN [10004]", "SET_VLAN [10004 7]"}},
		{"stripping on without a VLAN", func(l *Log) {
			did(l, []uint32{MsgSetVLAN | 1<<16, 0})
			did(l, []uint32{MsgSetVLAN | 1<<16, 7})
			did(l, []uint32{MsgSetVLAN, 7})
		}, []string{reset, "SET_VLAN [10004]", "SET_VLAN [4 7]"}},
		{"VLAN removed that was not there", func(l *Log) { did(l, []uint32{MsgSetVLAN, 5}) }, []string{reset, "SET_VLAN [4 5]"}},
		{"empty multicast list", func(l *Log) { did(l, []uint32{MsgSetMulticast}) }, []string{reset, "SET_MULTICAST [3]"}},
		{"more multicast addresses than fit", func(l *Log) {
			did(l, slices.Concat([]uint32{MsgSetMulticast | 0x9e<<16}, slices.Repeat([]uint32{0x00020001}, 15)))
		}, []string{reset, "SET_MULTICAST [9e0003" + strings.Repeat(" 20001", 15) + "]"}},
		{"promiscuous", func(l *Log) { did(l, []uint32{MsgSetPromisc | PromiscMulticast<<16}) }, []string{reset, "SET_PROMISC [20006]"}},
		{"the PF took nothing up", func(l *Log) {
			answered(l, []uint32{MsgSetPromisc | 3<<16}, MsgNACK, nil)
		}, []string{reset}},
		{"reply to another message", func(l *Log) {
			l.Completed([]uint32{MsgSetLPE, 9000}, []uint32{MsgSetVLAN | MsgACK, 0})
		}, []string{reset}},
		{"neither yes nor no", func(l *Log) { l.Completed([]uint32{MsgSetLPE, 9000}, []uint32{MsgSetLPE, 0}) }, []string{reset}},
		{"short", func(l *Log) {
			l.Completed(nil, nil)
			l.Completed([]uint32{MsgSetLPE}, []uint32{MsgSetLPE | MsgACK})
			l.Completed([]uint32{MsgSetMAC, 1}, []uint32{MsgSetMAC | MsgACK})
			l.Completed([]uint32{MsgReset}, []uint32{MsgReset | MsgACK, 0})
			l.Completed([]uint32{MsgSetMulticast | 3<<16, 7}, []uint32{MsgSetMulticast | MsgACK})
		}, []string{reset, "SET_MULTICAST [30003 7]"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := &Log{}
			refused(l, MsgReset)
			tc.say(l)
			restored, err := unmarshalLog(l.Marshal())
			if err != nil {
				t.Fatal(err)
			}
			for _, log := range []*Log{l, restored} {
				if diff := cmp.Diff(tc.want, spoken(log.Replay())); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestRelease(t *testing.T) {
	afterReset := full()
	afterReset.Reset()
	fresh := &Log{}
	refused(fresh, MsgReset)
	for _, tc := range []struct {
		name string
		l    *Log
		want []string
	}{
		{"never used", &Log{}, nil},
		{"with an address filter", fresh, []string{reset, "CTRL.RST []"}},
		{"with further addresses", full(), []string{reset, clearOwn, "CTRL.RST []"}},
		{"after a reset", afterReset, []string{reset, blindClear, "CTRL.RST []"}},
	} {
		list := tc.l.Release()
		if diff := cmp.Diff(tc.want, spoken(list)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
		for _, m := range list {
			if len(m.Words) == 0 {
				continue
			}
			if m.Check([]uint32{m.Words[0] | MsgACK, 0, 0}) != nil || m.Check([]uint32{m.Words[0] | MsgNACK, 0, 0}) != nil {
				t.Errorf("%s: %s fails although the PF answered", tc.name, m.Name)
			}
			if m.Check([]uint32{MsgPFControl}) == nil {
				t.Errorf("%s: %s is done with a message that is no answer", tc.name, m.Name)
			}
		}
	}
}

// Every message is judged by the PF's reply to it.
func TestReplayChecksReplies(t *testing.T) {
	for _, m := range full().Replay() {
		good := []uint32{m.Words[0] | MsgACK | MsgCTS}
		switch m.Name {
		case "RESET":
			good = []uint32{MsgReset | MsgNACK, 0, 0}
		case "SET_PROMISC":
			good = []uint32{MsgSetPromisc | MsgNACK | MsgCTS}
		}
		if err := m.Check(good); err != nil {
			t.Errorf("%s: the same reply as on the source is refused: %v", m.Name, err)
		}
		bad := map[string][]uint32{
			"other message": {MsgPFControl | MsgACK, 0, 0},
			"empty":         {},
			"no verdict":    append([]uint32{good[0] &^ (MsgACK | MsgNACK)}, good[1:]...),
		}
		if m.Name == "RESET" {
			bad["short"] = good[:1]
		} else {
			bad["other verdict"] = append([]uint32{good[0] ^ (MsgACK | MsgNACK)}, good[1:]...)
		}
		for what, reply := range bad {
			if m.Check(reply) == nil {
				t.Errorf("%s: reply %x (%s) is accepted", m.Name, reply, what)
			}
		}
	}
}

// A PF whose administrator set the address refuses to have it set, but says
// which it is.
func TestReplayAcceptsAdministratorsAddress(t *testing.T) {
	for name, tc := range map[string]struct {
		reply []uint32
		ok    bool
	}{
		"the guest's":     {[]uint32{MsgReset | MsgACK, 0x33221154, 0x6655}, true},
		"another":         {[]uint32{MsgReset | MsgACK, 0x33221152, 0x6655}, false},
		"none":            {[]uint32{MsgReset | MsgNACK, 0, 0}, false},
		"none, but words": {[]uint32{MsgReset | MsgNACK, 0x33221154, 0x6655}, false},
	} {
		list := full().Replay()
		if err := list[0].Check(tc.reply); err != nil {
			t.Fatal(err)
		}
		if err := list[1].Check([]uint32{MsgSetMAC | MsgNACK | MsgCTS}); (err == nil) != tc.ok {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestSummary(t *testing.T) {
	got := full().Summary()
	if got.API != 0 || got.MulticastFilterType != 0 || !bytes.Equal(got.MAC, []byte{0x54, 0x11, 0x22, 0x33, 0x55, 0x66}) || got.NotMigratable != "" {
		t.Errorf("summary %+v", got)
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
		{"unknown message", func(l *Log) { did(l, []uint32{0x77}) }, "0x0077"},
		{"unknown argument", func(l *Log) { did(l, []uint32{MsgSetMAC | 3<<16, 1, 1}) }, "0x0002"},
		{"unknown message refused", func(l *Log) { refused(l, 0x77) }, ""},
		{"too many addresses", func(l *Log) {
			for i := range uint32(maxFilters + 1) {
				did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, i, i})
			}
		}, "32"},
		{"no longer too many", func(l *Log) {
			for i := range uint32(maxFilters + 1) {
				did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, i, i})
			}
			did(l, []uint32{MsgSetMAC | MACFilterClear<<16, 0, 0})
		}, ""},
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

// fullV1 is the record of full as version 1 encodes it: what a release wrote,
// every later one must read.
var fullV1 = []byte{
	0x01, 0xfb, 0x00, 0x02, 0x01, 0x00, 0x00, 0x00, 0x01, 0x00, 0x02, 0x00, 0x00, 0x00, 0x02, 0x00,
	0x00, 0x00, 0x05, 0xf2, 0x54, 0x11, 0x22, 0x33, 0x55, 0x66, 0x00, 0x06, 0x00, 0x03, 0x00, 0x00,
	0x00, 0x05, 0x00, 0x4d, 0x03, 0x00, 0x03, 0x00, 0x01, 0x00, 0x02, 0x00, 0x03, 0x03, 0x00, 0x00,
	0x00,
}

func TestMarshal(t *testing.T) {
	if b := full().Marshal(); !bytes.Equal(b, fullV1) {
		t.Errorf("encoded differently today: %#v", b)
	}
	for name, l := range map[string]*Log{"empty": {}, "full": full()} {
		b := l.Marshal()
		got, err := New().RestoreLog(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(l, got, cmp.AllowUnexported(Log{}, settled{}, kept{}, promiscRequest{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		for n := range b {
			if _, err := New().RestoreLog(b[:n]); err == nil {
				t.Errorf("%s: the first %d of %d bytes are accepted", name, n, len(b))
			}
		}
		if _, err := New().RestoreLog(append(b, 0)); err == nil {
			t.Errorf("%s: a byte too many is accepted", name)
		}
	}
}

func TestMarshalIsBounded(t *testing.T) {
	l := full()
	for i := range uint32(2 * maxVLANs) {
		did(l, []uint32{MsgSetVLAN | 1<<16, i})
	}
	for i := range uint32(2 * maxFilters) {
		did(l, []uint32{MsgSetMAC | MACFilterAdd<<16, i, i})
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
	with := func(change func(*Log)) []byte {
		l := full()
		change(l)
		return l.Marshal()
	}
	for _, tc := range []struct {
		name string
		b    []byte
		text string
	}{
		{"newer", []byte{2, 0, 0, 0}, "version 2"},
		{"not ready", []byte{1, hasMAC, 0, 0}, "not ready"},
		{"VLANs out of order", with(func(l *Log) { l.vlans = []uint16{5, 5} }), "VLAN 5"},
		{"no such VLAN", with(func(l *Log) { l.vlans = []uint16{4096} }), "VLAN 4096"},
		{"no such last VLAN", with(func(l *Log) { l.lastVLAN = new(uint16(4096)) }), "VLAN 4096"},
		{"VLAN 0 lost", with(func(l *Log) { l.lastVLAN, l.vlans = new(uint16(0)), []uint16{5} }), "VLAN 0"},
		{"too many hashes", with(func(l *Log) { l.multicast, l.multicasts = make([]uint16, 31), 31 }), "multicast"},
		{"more hashes than addresses", with(func(l *Log) { l.multicasts = 2 }), "multicast"},
		{"too many addresses", with(func(l *Log) { l.filters = make([]mac, 33) }), "addresses"},
		{"a flag of 2", slices.Concat(fullV1[:len(fullV1)-3], []byte{2, 0, 0}), "flag is 2"},
	} {
		if _, err := New().RestoreLog(tc.b); err == nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: error %v, want one with %q", tc.name, err, tc.text)
		}
	}
}

// Any sequence of messages leaves a record that survives its encoding.
func FuzzLog(f *testing.F) {
	f.Add([]byte{MsgReset, 0x80, 1, 2, MsgSetVLAN, 0x81, 5, 0, MsgSetMAC, 0x82, 9, 9})
	f.Add([]byte{MsgReset, 0, 0, 0, MsgSetMulticast, 0x9f, 1, 2, MsgSetPromisc, 3, 0, 0, MsgSetLPE, 0x80, 5, 0})
	f.Add([]byte{MsgReset, 0, 0, 0, MsgSetVLAN, 0x81, 0, 0, MsgSetVLAN, 0x81, 7, 0, MsgSetVLAN, 0x80, 7, 0, 0xff, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		l := &Log{}
		for ; len(b) >= 4; b = b[4:] {
			request := []uint32{uint32(b[0]&0x0f) | uint32(b[1]&0x7f)<<16, uint32(b[2]), uint32(b[3])}
			switch {
			case b[0] == 0xff:
				l.Reset()
			case b[1]&0x80 != 0:
				did(l, request, uint32(b[2]), uint32(b[3]))
			default:
				refused(l, request...)
			}
		}
		got, err := unmarshalLog(l.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(spoken(l.Replay()), spoken(got.Replay())) + cmp.Diff(spoken(l.Release()), spoken(got.Release())); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// Whatever RestoreLog accepts is just what Marshal writes.
func FuzzRestoreLog(f *testing.F) {
	f.Add((&Log{}).Marshal())
	f.Add(fullV1)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := New().RestoreLog(b)
		if err != nil {
			return
		}
		if again := l.Marshal(); !bytes.Equal(again, b) {
			t.Errorf("%x comes back as %x", b, again)
		}
	})
}
