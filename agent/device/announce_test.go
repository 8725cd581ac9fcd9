package device

import (
	"bytes"
	"encoding/hex"
	"testing"
)

func TestAnnouncement(t *testing.T) {
	got := announcement([]byte{0x52, 0x54, 0, 0, 0, 1})
	want, err := hex.DecodeString("ffffffffffff" + "525400000001" + "8035" + // Ethernet: to all, RARP
		"0001" + "0800" + "06" + "04" + "0003" + // request reverse
		"525400000001" + "00000000" + "525400000001" + "00000000" + "000000000000000000000000000000000000")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}
