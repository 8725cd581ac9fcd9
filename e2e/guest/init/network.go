package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/pid1"
)

// netDevice is a network interface that is a PCI device.
type netDevice struct {
	name   string
	pci    string // such as 0000:00:05.0
	driver string
}

// pciNetDevices lists them by PCI address.
func pciNetDevices() ([]netDevice, error) {
	paths, err := filepath.Glob("/sys/class/net/*/device")
	if err != nil {
		return nil, err
	}
	var devices []netDevice
	for _, path := range paths {
		device, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, err
		}
		driver, err := filepath.EvalSymlinks(path + "/driver")
		if err != nil {
			return nil, err
		}
		devices = append(devices, netDevice{
			name:   filepath.Base(filepath.Dir(path)),
			pci:    filepath.Base(device),
			driver: filepath.Base(driver),
		})
	}
	sort.Slice(devices, func(i, j int) bool { return devices[i].pci < devices[j].pci })
	return devices, nil
}

// configureNetwork sets up the loopback interface and all PCI interfaces.
func configureNetwork(c config) error {
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(loopback); err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	devices, err := pciNetDevices()
	if err != nil {
		return err
	}
	if len(devices) < len(c.addresses) {
		return fmt.Errorf("the kernel command line has addresses for %d interfaces, there are %d", len(c.addresses), len(devices))
	}
	for i, device := range devices {
		var address netip.Prefix
		if i < len(c.addresses) {
			address = c.addresses[i]
		}
		if err := configureDevice(device.name, address, c.mtu); err != nil {
			return fmt.Errorf("%s (%s): %w", device.name, device.pci, err)
		}
	}
	return nil
}

// configureDevice sets one interface up; address and mtu are optional.
func configureDevice(name string, address netip.Prefix, mtu int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if mtu != 0 {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("MTU %d: %w", mtu, err)
		}
	}
	if address.IsValid() {
		ipNet := &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), address.Addr().BitLen())}
		if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipNet}); err != nil {
			return fmt.Errorf("address %s: %w", address, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting up: %w", err)
	}
	return nil
}

// setVLAN adds or removes the VLAN interface vlan on top of the interface
// name; the address is optional.
func setVLAN(name string, vlan int, present bool, address string) error {
	if vlan < 1 || vlan > 4094 {
		return fmt.Errorf("VLAN %d is not between 1 and 4094", vlan)
	}
	parent, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	vlanName := fmt.Sprintf("%s.%d", name, vlan)
	link, err := netlink.LinkByName(vlanName)
	switch {
	case !present && err != nil:
		return nil // gone already
	case !present:
		return netlink.LinkDel(link)
	case err != nil:
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex = vlanName, parent.Attrs().Index
		link = &netlink.Vlan{LinkAttrs: attrs, VlanId: vlan}
		if err := netlink.LinkAdd(link); err != nil {
			return fmt.Errorf("adding %s: %w", vlanName, err)
		}
	}
	var prefix netip.Prefix
	if address != "" {
		if prefix, err = netip.ParsePrefix(address); err != nil {
			return fmt.Errorf("%s: %w", vlanName, err)
		}
	}
	return configureDevice(vlanName, prefix, 0)
}

// rebind takes the device from its driver and gives it back.
func rebind(device netDevice) error {
	for _, file := range []string{"unbind", "bind"} {
		path := filepath.Join("/sys/bus/pci/drivers", device.driver, file)
		if err := os.WriteFile(path, []byte(device.pci), 0); err != nil {
			return fmt.Errorf("%s of %s: %w", file, device.pci, err)
		}
	}
	return nil
}

// reload removes the module of the device's driver and loads it again.
func reload(device netDevice) error {
	if err := unix.DeleteModule(device.driver, 0); err != nil {
		return fmt.Errorf("removing module %s: %w", device.driver, err)
	}
	return pid1.LoadModule(device.driver)
}

// interrupts sums up the lines of /proc/interrupts whose names speak of one of
// the names, over all CPUs.
func interrupts(table string, names ...string) map[string]uint64 {
	lines := strings.Split(table, "\n")
	cpus := len(strings.Fields(lines[0]))
	sums := map[string]uint64{}
	for _, line := range lines[1:] {
		fields := strings.Fields(line)
		if len(fields) < cpus+2 || !containsAny(fields[len(fields)-1], names) {
			continue
		}
		for _, field := range fields[1 : cpus+1] {
			var n uint64
			if _, err := fmt.Sscan(field, &n); err == nil {
				sums[fields[len(fields)-1]] += n
			}
		}
	}
	return sums
}

func containsAny(s string, parts []string) bool {
	for _, part := range parts {
		if strings.Contains(s, part) {
			return true
		}
	}
	return false
}
