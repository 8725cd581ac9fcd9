// Package host knows the VFs of a node: which there are, and how one is made
// ready to be handed to a device process. It is the only package that touches
// the node's network devices.
package host

import (
	"os"

	"compsc.io/compsc/agent/host/journal"
)

// Settings are what a PF's administrator has set for a VF.
type Settings = journal.Settings

// Backends of VFs.
const (
	// BackendModel has VFs that are behavioural models of the silicon; each is
	// wired to the node's network by a tap device.
	BackendModel = "model"
	// BackendVFIO has the VFs of the node's NICs, by the kernel's vfio-pci.
	BackendVFIO = "vfio"
)

// PF is one physical function.
type PF struct {
	// Name is the network interface's name.
	Name string
	// Backend says what serves its VFs, such as BackendModel.
	Backend string
	// VFs are its virtual functions, in the order of their numbers.
	VFs []VF

	// What follows is of real PFs only.

	// Address is the PF's PCI address.
	Address string
	// Driver that is bound to it with its version, and the version of its
	// firmware, as ethtool -i has them; empty where not known.
	Driver, DriverVersion, Firmware string
	// TotalVFs is how many VFs it can have.
	TotalVFs int
	// NUMANode it is at, -1 if there is none.
	NUMANode int
}

// VF is one virtual function.
type VF struct {
	// Address is the PCI address, such as 0000:03:10.0.
	Address string
	// DeviceID is vendor:device in hexadecimal, such as 8086:10ed.
	DeviceID string
	// Family names the register family, such as ixgbevf.
	Family string

	// What follows is of real VFs only.

	// Index is the VF's number on its PF.
	Index int
	// Driver that is bound to it, empty for none.
	Driver string
	// IOMMUGroup is the number of its IOMMU group, -1 for none.
	IOMMUGroup int
	// Obstacle says in words why it cannot be prepared at all, and what to
	// do; empty if it can.
	Obstacle string
}

// Request says how a VF must be prepared.
type Request struct {
	// Address is the VF's PCI address.
	Address string
	// MAC is the address that the VF will answer to, empty if unknown. No two
	// prepared VFs of a node have the same.
	MAC string
	// Silent: nothing answers to the MAC before Answer says so, for the VF
	// waits for a VM that has the MAC elsewhere.
	Silent bool
	// VLAN is the port VLAN, at most 4094; 0 leaves what is set.
	VLAN int
}

// Prepared is a VF that can be handed to a device process.
type Prepared struct {
	// PF and VF are the VF's descriptions.
	PF string
	VF VF
	// Backend says what Files are; for BackendModel: one, a queue of a tap
	// device without packet information; for BackendVFIO: those of package
	// vfio for its interface API.
	Backend string
	// API is the kernel's interface that Files are of, for BackendVFIO.
	API string
	// VLAN is the port VLAN that is set, 0 for none.
	VLAN int
	// Trust tells whether the PF trusts the VF.
	Trust bool
	// Model holds the traits of the modelled silicon.
	Model ModelTraits
	// Files belong to the caller, who closes them.
	Files []*os.File
}

// Damage is something that happened to a prepared VF behind compsc's back.
type Damage struct {
	// VF is its PCI address.
	VF string
	// What says in words what happened, and what to do.
	What string
}

// String names the VF.
func (d Damage) String() string { return "VF " + d.VF + ": " + d.What }

// Close closes the VF's files; whoever they were passed to keeps his own.
func (p *Prepared) Close() {
	for _, f := range p.Files {
		f.Close()
	}
	p.Files = nil
}

// ModelTraits are what the datasheet leaves open, or a PF may configure.
type ModelTraits struct {
	// ReadOnlyRXHead and ReadOnlyTXHead make writes to the receive and
	// transmit rings' heads have no effect.
	ReadOnlyRXHead bool
	ReadOnlyTXHead bool
	// MulticastFilterType is the PF's MO (MCSTCTRL), 0 to 3.
	MulticastFilterType uint32
	// MTU is the PF's own, 0 for 1500. Above 1500 the 82599's rule for jumbo
	// frames lets its VFs use them too (specification update 3.1,
	// clarification 14).
	MTU int
	// Trust tells whether the PF trusts its VFs.
	Trust bool
}
