package device

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	"compsc.io/compsc/agent/device/dirty"
	"compsc.io/compsc/agent/device/handoff"
)

// The device process has a family for every VF that it may be handed.
func TestDeviceTypes(t *testing.T) {
	for id, want := range map[string]struct {
		family string
		queues int
	}{
		"8086:10ed": {"ixgbevf", 4}, "8086:15c5": {"ixgbevf", 4}, "8086:10ca": {"igbvf", 4}, "8086:1520": {"igbvf", 2},
	} {
		for _, name := range []string{"", want.family} {
			dt, err := deviceTypeFor(handoff.Handoff{VF: "vf", DeviceID: id, Family: name})
			if err != nil {
				t.Errorf("%s: %v", id, err)
				continue
			}
			if dt.family.Name() != want.family || len(dt.family.Queues()) != want.queues {
				t.Errorf("%s is a VF of family %s with %d queues, want %+v", id, dt.family.Name(), len(dt.family.Queues()), want)
			}
		}
	}
	if _, err := deviceTypeFor(handoff.Handoff{VF: "vf", DeviceID: "8086:10ca", Family: "ixgbevf"}); err == nil {
		t.Error("an 82576 VF is taken for an 82599's")
	}
	if _, err := deviceTypeFor(handoff.Handoff{VF: "vf", DeviceID: "8086:10c9"}); err == nil || !strings.Contains(err.Error(), "8086:1520") {
		t.Errorf("a PF as VF: %v, want what is known", err)
	}
}

// The model refuses a VF that it is no model of, and leaves no file open.
func TestModelIsOfOneFamily(t *testing.T) {
	h := handoff.Handoff{VF: "vf", DeviceID: "8086:10ca", Backend: handoff.BackendModel}
	dt, err := deviceTypeFor(h)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, _, err := openSilicon(h, dt, []*os.File{r}, dirty.Tracked{}, nil, nil, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "igbvf") {
		t.Errorf("error %v, want one about the family", err)
	}
	if err := r.Close(); err == nil {
		t.Error("the file was left open")
	}
}
