package model

import (
	"fmt"
	"net"
)

// SetAdminMAC does what `ip link set PF vf N mac` does: the PF filters for the
// address and tells it to the driver at its next RESET, and an untrusted VF
// may use no other. The zero address takes that back, with the filter. It
// fails for what is no unicast Ethernet address.
func (v *VF) SetAdminMAC(mac net.HardwareAddr) error {
	var a macAddr
	if len(mac) == len(a) {
		a = macAddr(mac)
	}
	if len(mac) != len(a) || a != (macAddr{}) && !a.usable() {
		return fmt.Errorf("set admin MAC %q: want six octets of a unicast address", mac.String())
	}
	v.mu.Lock()
	defer v.unlock()
	v.pf.setAdminMAC(a)
	return nil
}

// SetVLAN does what `ip link set PF vf N vlan` does: the VF only receives
// frames of that VLAN, and all it sends is tagged with it. 0 takes it back. It
// fails above 4094.
func (v *VF) SetVLAN(vid uint16) error {
	if vid > 4094 {
		return fmt.Errorf("set port VLAN %d: want 0 to 4094", vid)
	}
	v.mu.Lock()
	defer v.unlock()
	v.pf.setPortVLAN(vid)
	return nil
}

// SetTrust does what `ip link set PF vf N trust` does. A change takes the
// VF's clear-to-send away and pings it, whereupon its driver resets it.
func (v *VF) SetTrust(trusted bool) {
	v.mu.Lock()
	defer v.unlock()
	if v.pf.trusted == trusted {
		return
	}
	v.pf.trusted = trusted
	v.pf.cts = false
	v.ping()
}

// Ping has the PF send its unsolicited message, as its driver does when it
// wants its VFs to look at the link.
func (v *VF) Ping() {
	v.mu.Lock()
	defer v.unlock()
	v.ping()
}

// SetLink takes the link of the PF down or up, and tells the VF. While it is
// down nothing arrives from the network, and what is sent there is lost.
func (v *VF) SetLink(up bool) {
	v.mu.Lock()
	defer v.unlock()
	if v.unplugged == !up {
		return
	}
	v.unplugged = !up
	v.ping()
}

// ResetPF does what the PF's driver does to a VF when it resets its device, say
// for another MTU: the VF neither receives nor sends until its driver has reset
// it, nor is a message of it heeded, and it is told so.
func (v *VF) ResetPF() {
	v.mu.Lock()
	defer v.unlock()
	v.pf.cts, v.pf.vfre, v.pf.vfte = false, false, false
	v.ping()
}

// SetFree changes how many further filters the PF has for the VF, as its other
// VFs take and release theirs: see Config.MACVLANs and Config.VLANs. What the VF
// has it keeps.
func (v *VF) SetFree(macvlans, vlans int) {
	v.mu.Lock()
	defer v.unlock()
	v.cfg.MACVLANs, v.cfg.VLANs = macvlans, vlans
}

// SetSpoofCheck does what `ip link set PF vf N spoofchk` does.
func (v *VF) SetSpoofCheck(on bool) {
	v.mu.Lock()
	defer v.unlock()
	v.pf.spoofCheck = on
}
