package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"compsc.io/compsc/agent/host/journal"
)

// Answer has the PF deliver frames to the VF for the MAC that it was prepared
// with, or no more: of the two VFs that a VM has during a migration only one
// answers at a time, though both be on one wire, and a PF that keeps the
// filter of a VM that has left swallows what its own VFs send there. It takes
// moments, and waits for no VF that is being prepared or released. Repeating
// it changes nothing. A VF that is gone, or not prepared, cannot be made to
// answer, and does not. For a VF that was prepared without a MAC it does
// nothing: the filter is what the guest asks for.
func (h *SRIOV) Answer(_ context.Context, address string, on bool) error {
	if err := h.answer(address, on); err != nil {
		return fmt.Errorf("VF %s: %w", address, err)
	}
	return nil
}

func (h *SRIOV) answer(address string, on bool) error {
	e, ok, err := h.journal.Load(address)
	if err != nil {
		return err
	}
	node, err := h.sys.node(address)
	gone := errors.Is(err, fs.ErrNotExist)
	if err != nil && !gone {
		return err
	}
	if !ok || e.Released || gone || !h.current(e, node) {
		if !on {
			return nil
		}
		return errors.New("it is not prepared, or was removed: its MAC cannot be set")
	}
	if e.PreparedMAC == "" {
		return nil
	}
	pf, err := h.sys.netdev(e.PF)
	if err != nil {
		return err
	}
	if pf == "" {
		return fmt.Errorf("its PF %s has no network interface: its driver was unbound", e.PF)
	}
	_, err = h.administer(pf, address, e.Index, func(s *journal.Settings) {
		if s.MAC = noMAC; on {
			s.MAC = e.PreparedMAC
		}
	})
	return err
}

// administer changes a PF's settings for a VF and returns them. It refuses a
// MAC that somebody else has on the PF, unless address is empty.
func (h *SRIOV) administer(pf, address string, index int, change func(*journal.Settings)) (journal.Settings, error) {
	h.admin.Lock()
	defer h.admin.Unlock()
	l, err := h.links.get(pf)
	if err != nil {
		return journal.Settings{}, err
	}
	have, err := settingsOf(l, pf, index)
	if err != nil {
		return have, err
	}
	want := have
	change(&want)
	if address != "" {
		if err := checkUnique(l, pf, address, index, want.MAC); err != nil {
			return have, err
		}
	}
	return want, apply(h.links, pf, index, have, want)
}

// original is what Release brings a VF's settings back to.
func original(e journal.Entry) journal.Settings {
	s := e.Settings
	if strings.EqualFold(s.MAC, e.PreparedMAC) {
		s.MAC = noMAC
	}
	return s
}
