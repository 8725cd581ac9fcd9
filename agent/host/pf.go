package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"compsc.io/compsc/agent/host/journal"
)

// link is what a PF's network interface tells.
type link struct {
	name, mac string
	mtu       int
	up        bool
	// vfs has the settings of each VF, by its number.
	vfs []journal.Settings
}

// links administers PFs. The real one speaks rtnetlink.
type links interface {
	get(pf string) (link, error)
	setMAC(pf string, vf int, mac net.HardwareAddr) error
	setVLAN(pf string, vf, vlan, qos, proto int) error
	setSpoofCheck(pf string, vf int, on bool) error
	setTrust(pf string, vf int, on bool) error
	setRate(pf string, vf, min, max int) error
	setLinkState(pf string, vf int, state uint32) error
	// driver tells driver, its version and the firmware's.
	driver(pf string) (name, version, firmware string, err error)
	// send transmits a frame from the PF's interface.
	send(pf string, frame []byte) error
}

// noMAC is how a PF shows that there is no administratively set address.
const noMAC = "00:00:00:00:00:00"

// settingsOf returns what the PF has set for a VF.
func settingsOf(l link, pf string, index int) (journal.Settings, error) {
	if index < 0 || index >= len(l.vfs) {
		return journal.Settings{}, fmt.Errorf("PF %s: its driver tells the settings of %d VFs, and not of number %d", pf, len(l.vfs), index)
	}
	return l.vfs[index], nil
}

// Settings returns what the PF has set for a VF now.
func (h *SRIOV) Settings(_ context.Context, address string) (*Settings, error) {
	p, v, err := h.find(address)
	if err != nil {
		return nil, err
	}
	l, err := h.links.get(p.Name)
	if err != nil {
		return nil, fmt.Errorf("VF %s: %w", address, err)
	}
	s, err := settingsOf(l, p.Name, v.Index)
	if err != nil {
		return nil, fmt.Errorf("VF %s: %w", address, err)
	}
	return &s, nil
}

// Differences says in words in which settings two VFs differ that a VM may move
// between, but for the MAC, which moves with it.
func Differences(from, to Settings) []string {
	var out []string
	differs := func(what string, from, to any) {
		if from != to {
			out = append(out, fmt.Sprintf("%s %v, here %v", what, from, to))
		}
	}
	differs("port VLAN", from.VLAN, to.VLAN)
	differs("port VLAN's QoS", from.QoS, to.QoS)
	if from.VLAN != 0 && to.VLAN != 0 && from.Proto != 0 && to.Proto != 0 {
		differs("port VLAN's protocol", fmt.Sprintf("%#x", from.Proto), fmt.Sprintf("%#x", to.Proto))
	}
	onOff := map[bool]string{true: "on", false: "off"}
	differs("spoof check", onOff[from.SpoofCheck], onOff[to.SpoofCheck])
	differs("trust", onOff[from.Trust], onOff[to.Trust])
	differs("least rate in Mbit/s", from.MinRate, to.MinRate)
	differs("greatest rate in Mbit/s", from.MaxRate, to.MaxRate)
	differs("link state", linkState(from.LinkState), linkState(to.LinkState))
	return out
}

// linkState names a link state as ip-link(8) does.
func linkState(s uint32) string {
	switch s {
	case 0:
		return "auto"
	case 1:
		return "enable"
	case 2:
		return "disable"
	}
	return fmt.Sprint(s)
}

// apply brings a VF's settings from what they are to what they shall be. What
// is so already is not touched: a driver may reset the VF with any of them, or
// have no such setting. It does all it can even if a part fails.
func apply(l links, pf string, index int, have, want journal.Settings) error {
	var errs []error
	set := func(what string, differs bool, do func() error) {
		if !differs {
			return
		}
		if err := do(); err != nil {
			errs = append(errs, fmt.Errorf("PF %s, VF %d, %s: %w", pf, index, what, err))
		}
	}
	mac, err := net.ParseMAC(want.MAC)
	set("MAC "+want.MAC, !strings.EqualFold(have.MAC, want.MAC), func() error {
		if err != nil {
			return err
		}
		return l.setMAC(pf, index, mac)
	})
	set(fmt.Sprintf("VLAN %d", want.VLAN), have.VLAN != want.VLAN || have.QoS != want.QoS || have.VLAN != 0 && have.Proto != want.Proto, func() error {
		return l.setVLAN(pf, index, want.VLAN, want.QoS, want.Proto)
	})
	set("spoof check", have.SpoofCheck != want.SpoofCheck, func() error { return l.setSpoofCheck(pf, index, want.SpoofCheck) })
	set("trust", have.Trust != want.Trust, func() error { return l.setTrust(pf, index, want.Trust) })
	set("rate", have.MinRate != want.MinRate || have.MaxRate != want.MaxRate, func() error { return l.setRate(pf, index, want.MinRate, want.MaxRate) })
	set("link state", have.LinkState != want.LinkState, func() error { return l.setLinkState(pf, index, want.LinkState) })
	return errors.Join(errs...)
}

// checkUnique refuses a MAC that the PF itself or another of its VFs has: its
// switch would give one the other's frames.
func checkUnique(l link, pf, address string, index int, mac string) error {
	if mac == "" || mac == noMAC {
		return nil
	}
	if strings.EqualFold(l.mac, mac) {
		return fmt.Errorf("VF %s: MAC %s is that of its PF %s: the NIC would give one the other's frames; give the VM another", address, mac, pf)
	}
	for i, v := range l.vfs {
		if i != index && strings.EqualFold(v.MAC, mac) {
			return fmt.Errorf("VF %s: MAC %s is in use by VF %d of PF %s: the NIC would give one the other's frames; end what uses that VF, or take its MAC away (ip link set %s vf %d mac %s)",
				address, mac, i, pf, pf, i, noMAC)
		}
	}
	return nil
}

// tagged puts a frame into a VLAN, as the PF does with what its VF transmits.
func tagged(frame []byte, vlan, qos, proto int) []byte {
	if vlan == 0 {
		return frame
	}
	if proto == 0 {
		proto = 0x8100
	}
	out := append([]byte(nil), frame[:12]...)
	out = append(out, byte(proto>>8), byte(proto), byte(qos<<5|vlan>>8), byte(vlan))
	return append(out, frame[12:]...)
}
