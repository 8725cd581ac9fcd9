package agent

import (
	"cmp"
	"context"
	"maps"
	"os"
	"slices"
	"sync"

	"compsc.io/compsc/agent/host"
)

// fakeHost is a node with two VFs.
type fakeHost struct {
	mu       sync.Mutex
	prepared map[string]string // address to MAC
	answers  map[string]bool
	total    int
	err      error
	settled  int
	damage   []host.Damage
	settings *host.Settings
	backend  string // host.BackendModel if empty
	// releaseError fails Release.
	releaseError error
	// answerError fails Answer; told hears of whatever it, or Prepare, changes.
	answerError error
	told        func(address string, on bool)
	// announced has address and frame of each announcement.
	announced []string
}

func (h *fakeHost) Inventory(context.Context) ([]host.PF, error) {
	vf := func(a string) host.VF { return host.VF{Address: a, DeviceID: "8086:10ed", Family: "ixgbevf"} }
	return []host.PF{{Name: "pf0", Backend: cmp.Or(h.backend, host.BackendModel), VFs: []host.VF{vf("0000:03:10.0"), vf("0000:03:10.2")}}}, nil
}

func (h *fakeHost) Prepare(_ context.Context, r host.Request) (*host.Prepared, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err != nil {
		return nil, h.err
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	h.prepared[r.Address] = r.MAC
	h.answer(r.Address, r.MAC != "" && !r.Silent)
	h.total++
	return &host.Prepared{PF: "pf0", VF: host.VF{Address: r.Address}, Backend: host.BackendModel, Files: []*os.File{f}}, nil
}

func (h *fakeHost) Release(_ context.Context, address string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.releaseError != nil {
		return h.releaseError
	}
	delete(h.prepared, address)
	h.answer(address, false)
	return nil
}

func (h *fakeHost) Answer(_ context.Context, address string, on bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.answerError != nil {
		return h.answerError
	}
	h.answer(address, on)
	return nil
}

// answer notes who answers. The caller holds the lock.
func (h *fakeHost) answer(address string, on bool) {
	if h.answers == nil {
		h.answers = map[string]bool{}
	}
	h.answers[address] = on
	if h.told != nil {
		h.told(address, on)
	}
}

func (h *fakeHost) answersTo(address string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answers[address]
}

func (h *fakeHost) Held(context.Context) ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.prepared)), h.err
}

func (h *fakeHost) Settings(context.Context, string) (*host.Settings, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.settings, nil
}

// set has the administrator set the same for all VFs.
func (h *fakeHost) set(s host.Settings) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settings = &s
}

func (h *fakeHost) Settle(context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settled++
	return nil
}

func (h *fakeHost) Damage(context.Context) ([]host.Damage, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.damage, nil
}

func (h *fakeHost) Announce(_ context.Context, address string, frame []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.announced = append(h.announced, address+" "+string(frame))
	return nil
}

func (h *fakeHost) has(address string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.prepared[address]
	return ok
}
