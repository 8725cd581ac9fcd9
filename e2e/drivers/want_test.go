//go:build e2edrivers

package drivers

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
)

const normalMTU = 1500

// want is what the guest asked for, and what its PF is to have granted.
type want struct {
	trusted bool
	// mode is the xcast mode that the PF granted last.
	mode              uint32
	allMulti, promisc bool
	// groups and vlans are those that the guest has now (true), and those
	// that it had (false).
	groups map[string]bool
	vlans  map[int]bool
	mtu    int
	// rx, tx, usecs and features are ethtool's; booted are those at boot.
	rx, tx, usecs int
	features      map[string]bool
	booted        proto.Settings
}

func newWant(trusted bool, booted proto.Settings) *want {
	w := &want{trusted: trusted, booted: booted}
	w.forget()
	return w
}

// forget is what the driver does when it is loaded.
func (w *want) forget() {
	*w = want{
		trusted: w.trusted, booted: w.booted, mode: ixgbevf.XcastMulti, mtu: normalMTU,
		// Two groups and a VLAN that the guest never had.
		groups: map[string]bool{proto.MulticastGroup: true, "239.1.1.200": false, "239.1.1.11": false},
		vlans:  map[int]bool{3000: false},
		rx:     w.booted.RX, tx: w.booted.TX, usecs: w.booted.Usecs, features: map[string]bool{},
	}
	for _, f := range []string{featureTSO, featureTSO6, featureTXSum, featureRXSum, featureGRO, featureVLANInsert, featureVLANStrip, featureVLANFilter} {
		w.features[f] = w.booted.Features[f]
	}
}

// askMode is the guest's request for a mode, as ixgbevf_set_rx_mode makes it,
// and what ixgbe_update_vf_xcast_mode of the PF of an 82599 says to it.
func (w *want) askMode() {
	mode := uint32(ixgbevf.XcastMulti)
	switch {
	case w.promisc:
		mode = ixgbevf.XcastPromisc
	case w.allMulti:
		mode = ixgbevf.XcastAllMulti
	}
	switch {
	case !w.trusted:
		w.mode = ixgbevf.XcastMulti
	case mode != ixgbevf.XcastPromisc:
		w.mode = mode
	}
}

// probe is a frame that the guest is to receive, or not.
type probe struct {
	what  string
	frame []byte
	token uint64
	want  bool
}

// probes are frames of all kinds; their tokens count up from token.
func (w *want) probes(token uint64) []probe {
	var ps []probe
	add := func(what string, to net.HardwareAddr, vlan int, want bool) {
		f := newFrame(to, token)
		if vlan != 0 {
			f = tag(f, vlan)
		}
		ps = append(ps, probe{what, f, token, want})
		token++
	}
	add("its own address", guestMAC, 0, true)
	add("the broadcast address", net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 0, true)
	// An 82599 has no promiscuous VFs, trusted or not.
	add("a foreign address", net.HardwareAddr{0x52, 0x54, 0, 0xee, 0xee, 0xee}, 0, false)
	for group, joined := range w.groups {
		add("group "+group, groupMAC(group), 0, joined || w.mode == ixgbevf.XcastAllMulti)
	}
	for id, member := range w.vlans {
		add(fmt.Sprintf("VLAN %d", id), guestMAC, id, member)
	}
	return ps
}

var guestMAC = mustMAC(harness.MAC)

func mustMAC(s string) net.HardwareAddr {
	mac, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return mac
}

// groupMAC is the Ethernet address of an IPv4 group (RFC 1112).
func groupMAC(group string) net.HardwareAddr {
	ip := netip.MustParseAddr(group).As4()
	return net.HardwareAddr{0x01, 0x00, 0x5e, ip[1] & 0x7f, ip[2], ip[3]}
}

// newFrame is a frame that the guest counts by its token.
func newFrame(to net.HardwareAddr, token uint64) []byte {
	f := append(append([]byte{}, to...), 0x02, 0xc5, 0xee, 0xee, 0xee, 0xee)
	f = binary.BigEndian.AppendUint16(f, proto.FrameType)
	f = binary.BigEndian.AppendUint64(f, token)
	return append(f, make([]byte, 60-len(f))...)
}
