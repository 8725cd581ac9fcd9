// Package proto is the command protocol between a test and the init program of
// a guest, over the guest's second serial port: one JSON object per line, a
// Request to the guest and a Response back. A serial line has no sessions and
// may lose or mix up bytes (a guest drops what arrived before it opened the
// port, a migration moves the line to another process), so both ends skip what
// does not parse, and the client repeats a request until it is answered. Every
// operation may therefore be carried out twice and must not mind.
package proto

import (
	"time"

	"compsc.io/compsc/e2e/stream"
)

// Limits of a line, in bytes, including its end. Longer lines are skipped.
const (
	MaxRequest  = 4 << 10
	MaxResponse = 1 << 20
)

// Op names an operation of the guest.
type Op string

// The operations of the guest.
const (
	// OpInfo asks for Response.Info.
	OpInfo Op = "info"
	// OpStats asks for Response.Stats.
	OpStats Op = "stats"
	// OpResets asks for Response.Resets.
	OpResets Op = "resets"
	// OpStreams asks for Response.Streams.
	OpStreams Op = "streams"
	// OpRun carries out Request.Action.
	OpRun Op = "run"
)

// Request is what a test asks of a guest.
type Request struct {
	// ID is repeated in the response.
	ID uint64 `json:"id"`
	Op Op     `json:"op"`
	// Action belongs to OpRun.
	Action *Action `json:"action,omitempty"`
}

// ActionName names something that a guest does to itself.
type ActionName string

// The actions of a guest.
const (
	// ActionLink sets the interface up or down, as Action.Up says. Addresses stay.
	ActionLink ActionName = "link"
	// ActionMTU sets the interface's MTU to Action.MTU.
	ActionMTU ActionName = "mtu"
	// ActionVLAN adds (Up) or removes (not Up) the VLAN interface Action.VLAN
	// on top of the interface, and sets it up.
	ActionVLAN ActionName = "vlan"
	// ActionRebind unbinds the interface's driver from its PCI device, binds
	// it again and configures the interface as at boot.
	ActionRebind ActionName = "rebind"
	// ActionPoweroff powers the guest off. It is answered first.
	ActionPoweroff ActionName = "poweroff"
	// ActionReboot resets the guest, which ends QEMU if it runs with
	// -no-reboot. It is answered first.
	ActionReboot ActionName = "reboot"
)

// Action is something that a guest does to itself.
type Action struct {
	Name ActionName `json:"name"`
	// Interface is the name of a network interface; empty means the first VF.
	Interface string `json:"interface,omitempty"`
	Up        bool   `json:"up,omitempty"`
	MTU       int    `json:"mtu,omitempty"`
	VLAN      int    `json:"vlan,omitempty"`
}

// Response is a guest's answer.
type Response struct {
	ID uint64 `json:"id"`
	// To is the operation of the request. It tells a response from the echo of
	// a request, which a serial port gives before the guest has set it up.
	To Op `json:"to"`
	// Error is why the operation failed; empty if it did not.
	Error   string   `json:"error,omitempty"`
	Info    *Info    `json:"info,omitempty"`
	Stats   []Stats  `json:"stats,omitempty"`
	Resets  *Resets  `json:"resets,omitempty"`
	Streams []Stream `json:"streams,omitempty"`
}

// Info describes a guest.
type Info struct {
	// Uptime is the time since the guest's kernel started, as the guest sees it.
	Uptime time.Duration `json:"uptime"`
	// Kernel is the kernel's release, as uname -r prints it.
	Kernel string `json:"kernel"`
	// Interfaces are the network interfaces that are PCI devices, by PCI address.
	Interfaces []Interface `json:"interfaces"`
}

// Interface describes a guest's network interface.
type Interface struct {
	Name string `json:"name"`
	// Driver and DriverVersion are what ethtool -i prints.
	Driver        string `json:"driver"`
	DriverVersion string `json:"driverVersion"`
	// PCI is the address of the device, such as 0000:00:05.0.
	PCI string `json:"pci"`
	MAC string `json:"mac"`
	MTU int    `json:"mtu"`
	// Up says that the interface is administratively up.
	Up bool `json:"up"`
	// Carrier says that it has a link. CarrierDowns counts how often it lost
	// the link since the driver was bound: a driver that resets its device
	// loses the link even where it prints nothing.
	Carrier      bool     `json:"carrier"`
	CarrierDowns uint64   `json:"carrierDowns"`
	Addresses    []string `json:"addresses"`
}

// Stats are the counters of a guest's network interface.
type Stats struct {
	Interface string `json:"interface"`
	// Kernel counts what the kernel's network stack does, by the names of
	// /sys/class/net/*/statistics.
	Kernel map[string]uint64 `json:"kernel"`
	// Driver is what ethtool -S prints.
	Driver map[string]uint64 `json:"driver"`
	// Interrupts counts the device's interrupts on all CPUs, by their names in
	// /proc/interrupts.
	Interrupts map[string]uint64 `json:"interrupts"`
	// Multicast counts the datagrams that came in for MulticastGroup.
	Multicast uint64 `json:"multicast"`
}

// MulticastGroup and MulticastPort are where the guest listens for multicast
// datagrams, on every interface.
const (
	MulticastGroup = "239.1.1.1"
	MulticastPort  = 5002
)

// Resets is what the guest's kernel said since its start that speaks of a
// device being reset, hung or without a link. The driver's module prints the
// first "Link is Up" of a boot too: that is not counted.
type Resets struct {
	// Count is the number of such messages, of which Lines holds the last
	// MaxResetLines.
	Count uint64   `json:"count"`
	Lines []string `json:"lines"`
}

// MaxResetLines bounds Resets.Lines.
const MaxResetLines = 64

// Stream is the guest's end of a stream of package stream.
type Stream struct {
	// Peer is the address and port of the client.
	Peer string `json:"peer"`
	stream.Stats
}
