package host

import (
	"fmt"
	"net"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/host/journal"
)

// rtnetlink administers PFs in the network namespace of the thread that
// calls it.
type rtnetlink struct{}

func (rtnetlink) get(pf string) (link, error) {
	l, err := netlink.LinkByName(pf)
	if err != nil {
		return link{}, fmt.Errorf("PF %s: %w", pf, err)
	}
	a := l.Attrs()
	out := link{name: a.Name, mac: a.HardwareAddr.String(), mtu: a.MTU, up: a.Flags&net.FlagUp != 0, vfs: make([]journal.Settings, len(a.Vfs))}
	for i, v := range a.Vfs {
		s := journal.Settings{MAC: v.Mac.String(), VLAN: v.Vlan, QoS: v.Qos, Proto: v.VlanProto, SpoofCheck: v.Spoofchk,
			// Drivers without the notion leave all ones.
			Trust: v.Trust == 1, MinRate: int(v.MinTxRate), MaxRate: int(v.MaxTxRate), LinkState: v.LinkState}
		if len(v.Mac) != 6 {
			s.MAC = noMAC
		}
		out.vfs[i] = s
	}
	return out, nil
}

// on calls do with the PF's interface.
func on(pf string, do func(netlink.Link) error) error {
	l, err := netlink.LinkByName(pf)
	if err != nil {
		return err
	}
	return do(l)
}

func (rtnetlink) setMAC(pf string, vf int, mac net.HardwareAddr) error {
	return on(pf, func(l netlink.Link) error { return netlink.LinkSetVfHardwareAddr(l, vf, mac) })
}

func (rtnetlink) setVLAN(pf string, vf, vlan, qos, proto int) error {
	return on(pf, func(l netlink.Link) error {
		if proto == 0 || proto == unix.ETH_P_8021Q {
			return netlink.LinkSetVfVlanQos(l, vf, vlan, qos)
		}
		return netlink.LinkSetVfVlanQosProto(l, vf, vlan, qos, proto)
	})
}

func (rtnetlink) setSpoofCheck(pf string, vf int, v bool) error {
	return on(pf, func(l netlink.Link) error { return netlink.LinkSetVfSpoofchk(l, vf, v) })
}

func (rtnetlink) setTrust(pf string, vf int, v bool) error {
	return on(pf, func(l netlink.Link) error { return netlink.LinkSetVfTrust(l, vf, v) })
}

func (rtnetlink) setRate(pf string, vf, min, max int) error {
	return on(pf, func(l netlink.Link) error { return netlink.LinkSetVfRate(l, vf, min, max) })
}

func (rtnetlink) setLinkState(pf string, vf int, state uint32) error {
	return on(pf, func(l netlink.Link) error { return netlink.LinkSetVfState(l, vf, state) })
}

func (rtnetlink) driver(pf string) (name, version, firmware string, err error) {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return "", "", "", err
	}
	defer e.Close()
	i, err := e.DriverInfo(pf)
	return i.Driver, i.Version, i.FwVersion, err
}

func (rtnetlink) send(pf string, frame []byte) error {
	l, err := netlink.LinkByName(pf)
	if err != nil {
		return err
	}
	// Protocol 0: it receives nothing.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: l.Attrs().Index})
}
