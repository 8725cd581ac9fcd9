package model

import (
	"net"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Memory is the guest's physical memory as the device reaches it by DMA.
//
// Both methods move all of p or fail; a range that is not mapped right now is
// an error, which the model takes as "later". Implementations are called with
// the model's lock held: they must be safe for concurrent use, must not call
// the VF, and must not wait for anybody who does.
type Memory interface {
	ReadAt(addr uint64, p []byte) error
	WriteAt(addr uint64, p []byte) error
}

// Wire carries frames from the VF to the network, without preamble and FCS.
//
// Transmit is called from one goroutine of the VF, without its lock, in the
// order of transmission; it owns the frame it is given. An error loses the
// frame. It must not block without bound, and must not call FLR or Close of
// the VF that sends; calling Receive of another VF is fine.
type Wire interface {
	Transmit(frame []byte) error
}

// Counters are the values of a VF's statistics registers. They wrap at 32
// bits, the octet counters at 36.
type Counters struct {
	GPRC, GORC, MPRC, GPTC, GOTC uint64
}

// Config chooses among behaviours. Start from DefaultConfig: the zero value
// of a field is a choice too. See the package comment for what is known of
// each.
type Config struct {
	// DeviceID is the VF's PCI device id, one of ixgbevf.Members; 0, and any
	// that is none of these, stands for the 82599's.
	DeviceID uint16
	// QueuePairs the PF gives the VF, 1 to 8; only 2 or more allow RSS.
	QueuePairs int
	// WritableRXHead lets software write any value to VFRDH of a disabled
	// queue. Otherwise only zero can be written, which every driver does.
	WritableRXHead bool
	// WritableTXHead is the same for VFTDH.
	WritableTXHead bool
	// HeadsPersistAcrossDisable keeps head and tail when a queue is disabled;
	// otherwise the head goes to zero there.
	HeadsPersistAcrossDisable bool
	// Loopback lets Loop send frames from the PF to the VF.
	Loopback bool
	// CountersClearedByReset zeroes the statistics on every reset of the VF.
	CountersClearedByReset bool
	// ClearToSendSurvivesFLR leaves the VF clear to send messages to the PF
	// when it was reset but sent no RESET message yet.
	ClearToSendSurvivesFLR bool
	// FilterModesClearedByReset drops the multicast and promiscuous bits of
	// the PF's filter at a reset, while the PF driver still remembers the mode
	// it last granted.
	FilterModesClearedByReset bool
	// ForceDropEnable is what the Linux PF driver does at RESET: every queue
	// drops frames that find no descriptor, whatever VFSRRCTL.DROP_EN says.
	ForceDropEnable bool
	// Coalescing is what the PF has in RFCTL.RSC_DIS: whether receive-side
	// coalescing is there for who turns it on with VFRSCCTL. The Linux PF
	// driver turns it off for everybody while there are VFs.
	Coalescing bool
	// MulticastFilterType is the PF's MCSTCTRL.MO, 0 to 3: which 12 bits of an
	// address are its hash.
	MulticastFilterType uint32
	// APIs are the codes of the mailbox API versions that the PF accepts.
	APIs []uint32
	// Features are the bits that the PF grants in FEATURES_NEGOTIATE.
	Features uint32
	// Associations is how many IPsec security associations of this VF the PF
	// takes, while the administrator trusts the VF.
	Associations int
	// PFMaxFrame is the PF's own largest frame in bytes with its header,
	// without FCS: 1514 for an MTU of 1500. Above 1514 the 82599's rule for
	// jumbo frames holds: the VF receives nothing until it asks for a maximum
	// frame under API 1.1 or later.
	PFMaxFrame int
	// MACVLANs is how many further MAC filters the PF has free for this VF.
	MACVLANs int
	// VLANs is how many entries of the PF's VLAN table are free for this VF,
	// that of VLAN 0 or of the port VLAN included.
	VLANs int
	// AdminMAC is the MAC the administrator gave the VF; empty for none.
	AdminMAC net.HardwareAddr
	// SpoofCheck drops transmitted frames whose source is not the VF's own.
	SpoofCheck bool
	// PacketBuffer bounds the received frames that wait for descriptors, in
	// bytes over all queues.
	PacketBuffer int
	// PFLatency is how long the PF takes to answer a mailbox message. At zero
	// the answer is there when the write of the request returns.
	PFLatency time.Duration
	// Counters are the statistics to start from.
	Counters Counters
	// Clock measures the intervals of interrupt moderation; nil for the
	// system's.
	Clock Clock
}

// DefaultConfig returns the model's best knowledge of an 82599 VF under the
// upstream Linux PF driver, with two queue pairs and no admin MAC.
func DefaultConfig() Config {
	return Config{
		QueuePairs:                ixgbevf.DefaultQueuePairs,
		WritableRXHead:            true,
		WritableTXHead:            true,
		HeadsPersistAcrossDisable: true,
		ForceDropEnable:           true,
		APIs: []uint32{
			ixgbevf.API10, ixgbevf.API11, ixgbevf.API12, ixgbevf.API13,
			ixgbevf.API14, ixgbevf.API16, ixgbevf.API17,
		},
		PFMaxFrame:   1514,
		MACVLANs:     16,
		VLANs:        64,
		SpoofCheck:   true,
		PacketBuffer: 512 << 10,
	}
}

// Stats tells what a VF did since New, for tests and diagnostics; unlike the
// registers they are never reset and never wrap.
type Stats struct {
	// Received and Transmitted are frames that crossed the VF.
	Received, Transmitted uint64
	// RXFiltered frames were not for this VF, RXNoDescriptor found no
	// descriptor, RXDisabled came while the VF or the queue was off.
	RXFiltered, RXNoDescriptor, RXDisabled uint64
	// RXCoalesced frames became part of one before them.
	RXCoalesced uint64
	// RXHeld descriptors are in use and not written back now, the others are
	// counts.
	RXHeld int
	// TXSpoofed frames had somebody else's source address, TXMalformed had
	// descriptors that make no frame, TXFailed were refused by the wire.
	TXSpoofed, TXMalformed, TXFailed uint64
	// Unmapped counts DMA attempts that were put off.
	Unmapped uint64
	// Interrupts raised, per vector.
	Interrupts [ixgbevf.MSIXVectors]uint64
	// Messages that the PF answered, and Refused among them.
	Messages, Refused uint64
	// Resets of the VF, by its reset bit or by FLR.
	Resets uint64
	// PF is the PF's view of the VF.
	PF PFState
}

// PFState is what the PF holds for a VF.
type PFState struct {
	// ClearToSend is set by the RESET message.
	ClearToSend bool
	// ReceiveEnabled and TransmitEnabled are the VF's bits of VFRE and VFTE.
	ReceiveEnabled, TransmitEnabled bool
	// API code that was negotiated.
	API uint32
	// MAC whose filter is installed; nil for none.
	MAC net.HardwareAddr
	// AdminMAC tells that the MAC was set by the administrator.
	AdminMAC bool
	// MACVLANs are the further unicast filters, in the order of their coming.
	MACVLANs []net.HardwareAddr
	// VLANs whose frames are received, ascending.
	VLANs []uint16
	// PortVLAN of the administrator, 0 for none.
	PortVLAN uint16
	// Multicast hashes, in the order given.
	Multicast []uint16
	// XcastMode last granted. It outlives resets.
	XcastMode uint32
	// Broadcast, MulticastHash, AllMulticast and Untagged tell which frames
	// besides the exact ones are received.
	Broadcast, MulticastHash, AllMulticast, Untagged bool
	// Associations counts the security associations.
	Associations int
	// MaxFrame in bytes with FCS: what the PF lets in (it never shrinks).
	MaxFrame uint32
	// Trusted and SpoofCheck are the administrator's settings.
	Trusted, SpoofCheck bool
}
