package kubevirt

import (
	"fmt"
	"regexp"
	"strconv"

	virtv1 "kubevirt.io/api/core/v1"
)

const (
	// FirstSlot is the device number of the first VF on bus 0 of the guest.
	// libvirt fills that bus from below (root ports, eight to a device number)
	// and QEMU's chipset has 0x1f; KubeVirt itself names device numbers only
	// with its placePCIDevicesOnRootComplex annotation, from 2 on
	// (pkg/virt-launcher/virtwrap/converter/pci-placement.go).
	FirstSlot = 0x10
	// MaxInterfaces is how many VFs a VM may have.
	MaxInterfaces = 8

	chipsetSlot = 0x1f
)

var guestAddress = regexp.MustCompile(`^0000:00:([01][0-9a-fA-F])\.0$`)

// Slots returns the guest's device number, on PCI bus 0, of each of the VMI's
// interfaces with the compsc network binding, by the interface's name. It is
// the one of the interface's pciAddress if it has that, else FirstSlot for the
// first, and so on: the same wherever the VM runs. An interface that is being
// unplugged keeps its place.
//
// It is an error if there is none or too many, if two have the same, or if a
// pciAddress is not on bus 0.
func Slots(vmi *virtv1.VirtualMachineInstance) (map[string]int, error) {
	out, users := map[string]int{}, map[int]string{}
	n := 0
	for i := range vmi.Spec.Domain.Devices.Interfaces {
		iface := &vmi.Spec.Domain.Devices.Interfaces[i]
		if !ours(iface) {
			continue
		}
		slot := FirstSlot + n
		n++
		if n > MaxInterfaces {
			return nil, fmt.Errorf("interface %s: at most %d interfaces may have the network binding %s", iface.Name, MaxInterfaces, BindingName)
		}
		if iface.State == virtv1.InterfaceStateAbsent {
			continue
		}
		if iface.PciAddress != "" {
			var err error
			if slot, err = guestSlot(iface.PciAddress); err != nil {
				return nil, fmt.Errorf("interface %s: %w", iface.Name, err)
			}
		}
		if other, taken := users[slot]; taken {
			return nil, fmt.Errorf("interfaces %s and %s are both at PCI address 0000:00:%02x.0 of the guest", other, iface.Name, slot)
		}
		out[iface.Name], users[slot] = slot, iface.Name
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no interface of the VMI has the network binding %s", BindingName)
	}
	return out, nil
}

// guestSlot reads a pciAddress. The device must be on bus 0: the PCI state that
// is replayed into a QEMU that waits for a VM does not reach a bridge's bus.
func guestSlot(address string) (int, error) {
	m := guestAddress.FindStringSubmatch(address)
	if m == nil {
		return 0, fmt.Errorf("pciAddress %.32q is not on the guest's bus 0: use one such as 0000:00:%02x.0, or none", address, FirstSlot)
	}
	slot, err := strconv.ParseUint(m[1], 16, 8)
	if err != nil || slot == 0 || slot == chipsetSlot {
		return 0, fmt.Errorf("pciAddress %s belongs to the chipset: use one such as 0000:00:%02x.0, or none", address, FirstSlot)
	}
	return int(slot), nil
}

// CheckAttached tells whether the VFs that a device process has are those that
// the VMI asks for, at their places.
func CheckAttached(vmi *virtv1.VirtualMachineInstance, have []Interface) error {
	slots, err := Slots(vmi)
	if err != nil {
		return err
	}
	for _, i := range have {
		switch slot, ok := slots[i.Name]; {
		case !ok:
			return fmt.Errorf("interface %s: a VF is attached, but the VMI has no such interface with the network binding %s: restart the VM", i.Name, BindingName)
		case slot != i.Slot:
			return fmt.Errorf("interface %s: its VF is attached as device %#x of the guest, the VMI says %#x: restart the VM", i.Name, i.Slot, slot)
		}
		delete(slots, i.Name)
	}
	for name := range slots {
		return fmt.Errorf("interface %s: no VF is attached: was the interface added after the pod was made? Restart the VM", name)
	}
	return nil
}

// CheckNetworkInfo tells whether the VFs are those that KubeVirt's annotation
// kubevirt.io/network-info names for the VMI's networks. An empty text says
// nothing.
func CheckNetworkInfo(text string, have []Interface) error {
	if text == "" {
		return nil
	}
	info, err := parseNetworkInfo(text)
	if err != nil {
		return err
	}
	for _, i := range have {
		if e, ok := info[i.Name]; ok {
			if err := e.check(i); err != nil {
				return fmt.Errorf("interface %s: %w", i.Name, err)
			}
		}
	}
	return nil
}
