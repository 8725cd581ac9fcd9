package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/guest/proto"
)

// act carries out an action of a request.
func (g *guest) act(action proto.Action) error {
	switch action.Name {
	case proto.ActionPoweroff:
		restart(unix.LINUX_REBOOT_CMD_POWER_OFF)
		return nil
	case proto.ActionReboot:
		restart(unix.LINUX_REBOOT_CMD_RESTART)
		return nil
	}
	devices, err := pciNetDevices()
	if err != nil {
		return err
	}
	i, err := find(devices, action.Interface)
	if err != nil {
		return err
	}
	device := devices[i]
	switch action.Name {
	case proto.ActionLink:
		return setLink(device.name, action.Up)
	case proto.ActionMTU:
		return configureDevice(device.name, netip.Prefix{}, action.MTU)
	case proto.ActionVLAN:
		return setVLAN(device.name, action.VLAN, action.Up, action.Address)
	case proto.ActionMulticast:
		return g.setGroup(device.name, action.Group, action.Up)
	case proto.ActionAllMulti:
		return setFlag(device.name, action.Up, netlink.LinkSetAllmulticastOn, netlink.LinkSetAllmulticastOff)
	case proto.ActionPromisc:
		return setFlag(device.name, action.Up, netlink.SetPromiscOn, netlink.SetPromiscOff)
	case proto.ActionRing:
		return setRing(device.name, action.RX, action.TX)
	case proto.ActionCoalesce:
		return setCoalesce(device.name, action.Usecs)
	case proto.ActionFeature:
		return setFeature(device.name, action.Feature, action.Up)
	case proto.ActionRebind:
		return g.renew(func() error { return rebind(device) })
	case proto.ActionReload:
		return g.renew(func() error { return reload(device) })
	default:
		return fmt.Errorf("there is no action %q", action.Name)
	}
}

// renew has the interfaces made anew by change and sets them up as at boot.
func (g *guest) renew(change func() error) error {
	g.leaveGroups()
	if err := change(); err != nil {
		return err
	}
	if err := configureNetwork(g.config); err != nil {
		return err
	}
	return g.listenMulticast()
}

// find returns the index of the device with that name, the first for none.
func find(devices []netDevice, name string) (int, error) {
	for i, device := range devices {
		if name == "" || device.name == name {
			return i, nil
		}
	}
	if name == "" {
		return 0, errors.New("the guest has no PCI network interface")
	}
	return 0, fmt.Errorf("the guest has no PCI network interface %q", name)
}

func setLink(name string, up bool) error {
	return setFlag(name, up, netlink.LinkSetUp, netlink.LinkSetDown)
}

// setFlag turns a flag of the interface on or off.
func setFlag(name string, up bool, on, off func(netlink.Link) error) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if up {
		return on(link)
	}
	return off(link)
}

// restart ends the guest a moment later, so that the request is answered first.
func restart(how int) {
	time.AfterFunc(100*time.Millisecond, func() {
		unix.Sync()
		if err := unix.Reboot(how); err != nil {
			fmt.Fprintln(os.Stderr, "init: reboot:", err)
		}
	})
}
