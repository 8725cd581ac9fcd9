package domain

import (
	"fmt"
	"regexp"

	"libvirt.org/go/libvirtxml"
)

const (
	// nominalSlot is the first device number on bus 0 of the guest that is kept
	// empty for the nominal interfaces: function 0 of it is never there.
	nominalSlot = 0x18
	// functions are those of a device but for function 0.
	functions = 7
	// maxVFs are those of two device numbers.
	maxVFs = 2 * functions

	// nominalPort is the UDP port that QEMU binds for a nominal interface, at a
	// loopback address of the pod that nobody else uses. It is in the range that
	// Linux gives out (32768 to 60999), which what forwards a pod's ports, such
	// as passt, leaves alone. It cannot be 0, for one that is free: KubeVirt has
	// the domain go through libvirtxml when it migrates, which drops a 0.
	nominalPort = 58870
	// discardPort is where nobody listens (RFC 863).
	discardPort = 9
)

// interfaceName is what KubeVirt allows (pkg/network/admitter/netiface.go).
var interfaceName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,63}$`)

// nominal returns the interfaces by which KubeVirt knows the VFs, and the set of
// their aliases.
//
// KubeVirt takes a network of a network binding whose alias no interface of the
// domain has for one that is to be plugged in, tries that whenever it looks at
// the VMI, and fails (pkg/virt-launcher/virtwrap/network/nichotplug.go of
// KubeVirt 1.8 and 1.9): the VMI would never be Synchronized. The interface that
// it finds instead must not be one for the guest. It is a NIC at a function of a
// device that has no function 0, which no guest and no firmware looks for (PCI
// Local Bus Specification 3.0, section 3.2.2.3.4), and it is connected to a UDP
// socket within the pod that nobody sends to. KubeVirt shows its MAC address in
// the VMI's status, so that is the VF's.
func nominal(vfs []VF) ([]*libvirtxml.DomainInterface, map[string]bool) {
	var out []*libvirtxml.DomainInterface
	aliases := map[string]bool{}
	for n, v := range vfs {
		slot, function := nominalAddress(n)
		address := fmt.Sprintf("127.86.70.%d", 1+n)
		i := &libvirtxml.DomainInterface{
			Source: &libvirtxml.DomainInterfaceSource{UDP: &libvirtxml.DomainInterfaceSourceUDP{
				Address: address, Port: discardPort,
				Local: &libvirtxml.DomainInterfaceSourceLocal{Address: address, Port: nominalPort},
			}},
			Model: &libvirtxml.DomainInterfaceModel{Type: "virtio-non-transitional"},
			ROM:   &libvirtxml.DomainROM{Enabled: "no"},
			// KubeVirt's own prefix of what a user names (virtwrap/api).
			Alias:   &libvirtxml.DomainAlias{Name: "ua-" + v.Name},
			Address: &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{Domain: new(uint), Bus: new(uint), Slot: &slot, Function: &function}},
		}
		if v.MAC != "" {
			i.MAC = &libvirtxml.DomainInterfaceMAC{Address: v.MAC}
		}
		aliases[i.Alias.Name] = true
		out = append(out, i)
	}
	return out, aliases
}

// nominalAddress is where the n-th nominal interface is on bus 0 of the guest.
func nominalAddress(n int) (slot, function uint) {
	return nominalSlot + uint(n/functions), 1 + uint(n%functions)
}
