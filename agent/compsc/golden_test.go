package compsc

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// golden captures a VF's state, which must be what the file in testdata has, and
// returns what that decodes to.
func golden(t *testing.T, v *VF, name string) *State {
	t.Helper()
	encoded, err := capture(t, v).Encode()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, encoded, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(golden, encoded) {
		t.Error("captured or encoded differently today")
	}
	s, err := Decode(golden)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The whole state of a booted VF, with a record of all that its driver asked
// for, as this and every later release must read it: a driver that relies on a
// context, is between the halves of a counter, and was refused a filter.
func TestGoldenState(t *testing.T) {
	source, target := newFake(), usedTarget()
	v, w := newMemoryVF(source), newMemoryVF(target)
	for i, d := range [][]byte{contextDescriptor(1, 1), dataDescriptor(1), dataDescriptor(1)} {
		_ = source.mem.WriteAt(txBase+16*uint64(17+i), d)
	}
	boot(t, v, source)
	source.refuse[ixgbevf.MsgSetMACVLAN] = true
	send(t, v, ixgbevf.MsgSetMACVLAN|2<<16, 0x33221156, 0x5544)
	source.regs[ixgbevf.VFGORCMSB] = 3
	v.GuestRead(ixgbevf.VFGORCLSB)
	s := golden(t, v, "state-ixgbevf-v3.bin")
	if _, err := w.Restore(context.Background(), s); err != nil {
		t.Fatal(err)
	}
	if err := v.Unquiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	if diff := differences(t, source, target, guestView(v), guestView(w)); diff != "" {
		t.Errorf("the target differs from the source (-source +target):\n%s", diff)
	}
}
