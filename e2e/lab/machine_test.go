//go:build e2e

package lab

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"
)

// TestPlug: whoever wants a node's address asks the machine.
func TestPlug(t *testing.T) {
	l := newLab(t)
	port, address, err := l.Plug("a")
	if err != nil {
		t.Fatal(err)
	}
	defer port.Close()
	if address.Addr() != l.Nodes["a"].IP {
		t.Errorf("the machine is to have %s, the node has %s", address, l.Nodes["a"].IP)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	go func() {
		_, _ = (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(address.Addr().String(), "1")) // nobody answers
	}()
	if err := port.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	question := []byte{0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1}
	for {
		frame := make([]byte, 2000)
		n, err := port.Read(frame)
		if err != nil {
			t.Fatalf("no ARP request reaches the machine: %v", err)
		}
		if n >= 42 && bytes.Equal(frame[12:22], question) && bytes.Equal(frame[38:42], address.Addr().AsSlice()) {
			return
		}
	}
}
