package compsc

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"compsc.io/compsc/agent/compsc/statepb"
	"compsc.io/compsc/agent/family"
)

var update = flag.Bool("update", false, "write the golden files anew")

// goldenState has a value in every field.
func goldenState() *State {
	return &State{
		Family: "ixgbevf", VendorID: 0x8086, DeviceID: 0x10ed,
		MigrationUID: "0b5a7a1e-6c0c-4f0e-9d0b-0d8a4f2f9a11", Interface: "net1", Epoch: 7,
		Registers: []RegValue{{0x110, 3}, {0x120, 0x8080}, {0x1000, 0xfffff000}},
		Queues: []QueueState{{Direction: family.RX, Head: 5, Tail: 250, Enabled: true}, {Direction: family.RX, Index: 1},
			{Direction: family.TX, Head: 17, Tail: 20, Enabled: true}, {Direction: family.TX, Index: 1}},
		Counters: []CounterValue{{Offset: 0x101c, Value: 1 << 31}, {Offset: 0x1020, Value: 1<<36 - 1}},
		Mailbox:  MailboxState{Memory: []uint32{0x80000005, 0, 0xffffffff}, ReadClear: 0x30, Held: true},
		Log:      []byte{1, 0}, Causes: 2,
		PCIConfig: []byte{0x86, 0x80, 0xed, 0x10}, MSIXTable: []byte{0, 0, 0xe0, 0xfe},
	}
}

func TestStateRoundTrip(t *testing.T) {
	b, err := goldenState().Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(goldenState(), got); diff != "" {
		t.Errorf("decoded differently (-want +got):\n%s", diff)
	}
	again, err := got.Encode()
	if err != nil || !bytes.Equal(b, again) {
		t.Errorf("encoded differently the second time: %v", err)
	}
}

// goldenStateV2 has what version 2 added.
func goldenStateV2() *State {
	s := goldenState()
	s.Queues[2].Contexts = [][]byte{nil, contextDescriptor(1, 42)}
	return s
}

// goldenStateV3 has what version 3 added.
func goldenStateV3() *State {
	s := goldenStateV2()
	s.Queues[2].Relied = 2
	s.Counters[1].Latched, s.Counters[1].High = true, 14
	return s
}

// A state written by any version must be readable by every later release, and
// one that needs no more is still written in the old version.
func TestDecodeGolden(t *testing.T) {
	for name, want := range map[string]*State{"state-v1.bin": goldenState(), "state-v2.bin": goldenStateV2(), "state-v3.bin": goldenStateV3()} {
		path := filepath.Join("testdata", name)
		encoded, err := want.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(path, encoded, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, encoded) {
			t.Errorf("%s: encoded differently today", name)
		}
		got, err := Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s decoded differently (-want +got):\n%s", name, diff)
		}
	}
}

// envelope wraps any body.
func envelope(version uint32, body []byte) []byte {
	b := binary.BigEndian.AppendUint32([]byte(stateMagic), version)
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	sum := sha256.Sum256(body)
	return append(append(b, sum[:]...), body...)
}

func marshal(t *testing.T, p *statepb.State) []byte {
	t.Helper()
	b, err := proto.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDecodeRefuses(t *testing.T) {
	good, err := goldenState().Encode()
	if err != nil {
		t.Fatal(err)
	}
	changed := func(at int) []byte {
		b := bytes.Clone(good)
		b[at] ^= 1
		return b
	}
	unknown := []byte{0x98, 0x06, 0x01} // field 99, varint 1
	for _, tc := range []struct {
		name string
		b    []byte
		text string
	}{
		{"nothing", nil, "less than an envelope"},
		{"too large", make([]byte, MaxStateSize+1), "at most"},
		{"other magic", changed(0), "not the state of a VF"},
		{"newer version", envelope(4, nil), "newer"},
		{"version 0", envelope(0, nil), "version 0 is unknown"},
		{"length", changed(11), "envelope says"},
		{"checksum", changed(12), "checksum"},
		{"body", changed(len(good) - 1), "checksum"},
		{"cut", good[:len(good)-1], "envelope says"},
		{"longer", append(bytes.Clone(good), 0), "envelope says"},
		{"no protobuf", envelope(1, []byte{0xff}), "decode state"},
		{"unknown field", envelope(1, unknown), "does not know"},
		{"unknown field within", envelope(1, append([]byte{0x3a, byte(len(unknown))}, unknown...)), "does not know"},
		{"device id", envelope(1, marshal(t, &statepb.State{DeviceId: 1 << 16})), "device id"},
		{"long name", envelope(1, marshal(t, &statepb.State{Interface: strings.Repeat("x", 254)})), "interface"},
		{"registers out of order", envelope(1, marshal(t, &statepb.State{
			Registers: []*statepb.Register{{Offset: 8}, {Offset: 8}}})), "ascend"},
		{"queue index", envelope(1, marshal(t, &statepb.State{Queues: []*statepb.Queue{{Index: 64}}})), "queue index"},
		{"queues", envelope(1, marshal(t, &statepb.State{Queues: make([]*statepb.Queue, 65)})), "queues"},
		{"contexts in version 1", envelope(1, marshal(t, &statepb.State{Queues: []*statepb.Queue{{Contexts: [][]byte{{1}}}}})), "field of version 2"},
		{"relied on in version 2", envelope(2, marshal(t, &statepb.State{Queues: []*statepb.Queue{{Relied: 1}}})), "field of version 3"},
		{"latched in version 2", envelope(2, marshal(t, &statepb.State{Counters: []*statepb.Counter{{Latched: true}}})), "field of version 3"},
		{"contexts", envelope(2, marshal(t, &statepb.State{Queues: []*statepb.Queue{{Contexts: make([][]byte, 9)}}})), "contexts"},
		{"long context", envelope(2, marshal(t, &statepb.State{Queues: []*statepb.Queue{{Contexts: [][]byte{make([]byte, 65)}}}})), "context, bytes"},
		{"counters", envelope(1, marshal(t, &statepb.State{Counters: make([]*statepb.Counter, 65)})), "counters"},
		{"mailbox", envelope(1, marshal(t, &statepb.State{Mailbox: &statepb.Mailbox{Memory: make([]uint32, 65)}})), "mailbox words"},
		{"record", envelope(1, marshal(t, &statepb.State{Log: make([]byte, maxLogSize+1)})), "mailbox record"},
		{"configuration", envelope(1, marshal(t, &statepb.State{PciConfig: make([]byte, maxPCIConfig+1)})), "PCI configuration"},
		{"MSI-X table", envelope(1, marshal(t, &statepb.State{MsixTable: make([]byte, maxMSIXTable+1)})), "MSI-X table"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := Decode(tc.b)
			if err == nil || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("decoded %+v, error %v, want one with %q", s, err, tc.text)
			}
		})
	}
}

func TestEncodeRefusesWhatDecodeWould(t *testing.T) {
	s := goldenState()
	s.Log = make([]byte, maxLogSize+1)
	if _, err := s.Encode(); err == nil || !strings.Contains(err.Error(), "mailbox record") {
		t.Errorf("error %v, want one on the mailbox record", err)
	}
	s = goldenState()
	s.Log, s.PCIConfig, s.MSIXTable = make([]byte, maxLogSize), make([]byte, maxPCIConfig), make([]byte, maxMSIXTable)
	s.Registers = nil
	for i := range maxRegisters {
		s.Registers = append(s.Registers, RegValue{uint32(1<<28 + i), 1})
	}
	if _, err := s.Encode(); err == nil || !strings.Contains(err.Error(), "at most 65536") {
		t.Errorf("error %v, want one on the size", err)
	}
}

// Whatever Decode accepts comes out the same after another round.
func FuzzDecode(f *testing.F) {
	good, err := goldenState().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[envelopeSize:])
	newer, err := goldenStateV2().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(newer[envelopeSize:])
	newest, err := goldenStateV3().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(newest[envelopeSize:])
	f.Add([]byte{})
	f.Add([]byte{0x3a, 0x05, 0x08, 0x01, 0x15, 0, 0})
	f.Fuzz(func(t *testing.T, body []byte) {
		_, _ = Decode(body) // as it is: must not panic
		s, err := Decode(envelope(stateVersion, body))
		if err != nil {
			return
		}
		b, err := s.Encode()
		if err != nil {
			t.Fatalf("decoded but not encoded: %v", err)
		}
		again, err := Decode(b)
		if err != nil {
			t.Fatalf("encoded but not decoded: %v", err)
		}
		if diff := cmp.Diff(s, again); diff != "" {
			t.Errorf("different after another round:\n%s", diff)
		}
	})
}
