// Package proto is the command protocol between a test and the init program of
// a guest, over the guest's second serial port: one JSON object per line, a
// Request to the guest and a Response back. A serial line has no sessions and
// may lose or mix up bytes (a guest drops what arrived before it opened the
// port, a migration moves the line to another process), so both ends skip what
// does not parse, and the client repeats a request until it is answered. The
// guest answers a request that it sees again as it did before, and carries it
// out once: an action that takes longer than the client's patience would
// otherwise be repeated under whatever the test does next.
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
	// OpFrames asks for Response.Frames.
	OpFrames Op = "frames"
	// OpSettings asks for Response.Settings of the first VF.
	OpSettings Op = "settings"
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
	// on top of the interface, and sets it up, with Action.Address if there is
	// one.
	ActionVLAN ActionName = "vlan"
	// ActionMulticast joins (Up) or leaves (not Up) Action.Group on the interface.
	ActionMulticast ActionName = "multicast"
	// ActionAllMulti and ActionPromisc turn the interface's flag on (Up) or off.
	ActionAllMulti ActionName = "allmulti"
	ActionPromisc  ActionName = "promisc"
	// ActionRing sets the numbers of descriptors of the interface's rings to
	// Action.RX and Action.TX, as ethtool -G does.
	ActionRing ActionName = "ring"
	// ActionCoalesce sets the interface's rx-usecs to Action.Usecs, as
	// ethtool -C does.
	ActionCoalesce ActionName = "coalesce"
	// ActionFeature turns Action.Feature, a name of `ethtool -k`'s kernel
	// strings such as tx-tcp-segmentation, on (Up) or off, as ethtool -K does.
	// It fails if the feature does not follow.
	ActionFeature ActionName = "feature"
	// ActionRebind unbinds the interface's driver from its PCI device, binds
	// it again and configures the interface as at boot.
	ActionRebind ActionName = "rebind"
	// ActionReload removes the kernel module of the interface's driver, loads
	// it again and configures the interface as at boot.
	ActionReload ActionName = "reload"
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
	// Address of a VLAN interface, such as 192.0.2.10/24; empty for none.
	Address string `json:"address,omitempty"`
	// Group is the IPv4 address of a multicast group.
	Group string `json:"group,omitempty"`
	// RX and TX are numbers of descriptors, Usecs are microseconds.
	RX      int    `json:"rx,omitempty"`
	TX      int    `json:"tx,omitempty"`
	Usecs   int    `json:"usecs,omitempty"`
	Feature string `json:"feature,omitempty"`
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
	// Frames counts the frames of FrameType that came in, by their tokens, of
	// which the last MaxTokens are kept.
	Frames   map[uint64]uint64 `json:"frames,omitempty"`
	Settings *Settings         `json:"settings,omitempty"`
}

// FrameType is the Ethernet type of frames that the guest counts, whatever
// their addresses and VLAN: IEEE 802's first one for local experiments. Behind
// it is the frame's token, 8 bytes, big-endian.
const FrameType = 0x88b5

// MaxTokens bounds Response.Frames.
const MaxTokens = 256

// Settings are what ethtool says of an interface.
type Settings struct {
	// RX and TX are the numbers of descriptors of its rings.
	RX int `json:"rx"`
	TX int `json:"tx"`
	// Usecs is rx-usecs.
	Usecs int `json:"usecs"`
	// Features tells which of the kernel's features are on.
	Features map[string]bool `json:"features"`
	// Fixed are the features that cannot be changed.
	Fixed map[string]bool `json:"fixed"`
}

// Info describes a guest.
type Info struct {
	// Uptime is the time since the guest's kernel started, as the guest sees it.
	Uptime time.Duration `json:"uptime"`
	// Kernel is the kernel's release, as uname -r prints it.
	Kernel string `json:"kernel"`
	// Interfaces are the network interfaces that are PCI devices, by PCI address.
	Interfaces []Interface `json:"interfaces"`
	// PCI are the addresses of all PCI devices that the kernel found, such as
	// 0000:00:05.0, in order.
	PCI []string `json:"pci"`
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
