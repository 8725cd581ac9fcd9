package handoff

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// serve starts a receiver and returns its socket.
func serve(t *testing.T, take func(Handoff, []*os.File) error) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "h.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, slog.New(slog.DiscardHandler), take) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return path
}

func TestHandoffCarriesDescriptionAndFiles(t *testing.T) {
	want := Handoff{
		Interface: "net1", Slot: 5, Of: 2, VF: "0000:03:10.0", PF: "pf0", Family: "ixgbevf", DeviceID: "8086:10ed",
		Backend: BackendModel, MAC: "52:54:00:00:00:01", VLAN: 7, Trust: true, Epoch: 42, Role: RoleTarget,
		Model: Model{ReadOnlyRXHead: true, MulticastFilterType: 2},
	}
	var got Handoff
	var text string
	path := serve(t, func(h Handoff, files []*os.File) error {
		defer CloseAll(files)
		got = h
		if len(files) != 1 {
			t.Errorf("%d files, want 1", len(files))
			return nil
		}
		b := make([]byte, 16)
		n, err := files[0].Read(b)
		text = string(b[:n])
		return err
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	if err := Send(t.Context(), path, want, []*os.File{r}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("handoff differs (-want +got):\n%s", d)
	}
	if text != "through" {
		t.Errorf("read %q through the passed file, want %q", text, "through")
	}
}

func TestRefusalReachesTheSender(t *testing.T) {
	path := serve(t, func(Handoff, []*os.File) error { return errors.New("occupied") })
	err := Send(t.Context(), path, Handoff{Interface: "net1", VF: "0000:03:10.0"}, nil)
	if err == nil || !strings.Contains(err.Error(), "occupied") || !strings.Contains(err.Error(), "0000:03:10.0") {
		t.Errorf("error %v, want one naming the VF and the reason", err)
	}
}

func TestBrokenPeerEndsItsOwnConnectionOnly(t *testing.T) {
	taken := 0
	path := serve(t, func(Handoff, []*os.File) error { taken++; return nil })
	for name, b := range map[string][]byte{
		"nothing":       nil,
		"short length":  {0, 0},
		"too long":      {0xff, 0xff, 0xff, 0xff},
		"not JSON":      frame([]byte("{")),
		"unknown field": frame([]byte(`{"interface":"a","surprise":1}`)),
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, err := c.Write(b); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := c.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		// The receiver answers with an error and closes.
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		a, err := readFrame(c)
		if err != nil {
			t.Fatalf("%s: no answer: %v", name, err)
		}
		var r reply
		if err := json.Unmarshal(a, &r); err != nil || r.Error == "" {
			t.Errorf("%s: answer %q, want an error", name, a)
		}
		c.Close()
	}
	if err := Send(t.Context(), path, Handoff{Interface: "net1"}, nil); err != nil {
		t.Errorf("a sound handoff after broken ones: %v", err)
	}
	if taken != 1 {
		t.Errorf("%d handoffs taken, want the sound one only", taken)
	}
}

func TestSendNeedsAReceiver(t *testing.T) {
	err := Send(t.Context(), filepath.Join(t.TempDir(), "none.sock"), Handoff{Interface: "net1"}, nil)
	if err == nil || !strings.Contains(err.Error(), "net1") {
		t.Errorf("error %v, want one naming the interface", err)
	}
}
