package ixgbevf

import (
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

// Family is the register table and the mailbox dialect of a VF with a certain
// number of queue pairs. It is immutable and safe for concurrent use.
type Family struct {
	registers []family.Register
	queues    []family.Queue
}

var _ family.Family = (*Family)(nil)

// New returns the family with the table of an 82599 VF of that many queue pairs. A number
// below 1 stands for DefaultQueuePairs, one above MaxQueuePairs for
// MaxQueuePairs.
//
// The number of queue pairs must be the one that the PF's mode gives each VF, and the same on both
// sides of a migration: a table with more would count on registers that the
// device lacks, one with fewer would hide queues from the guest. It is not
// what GET_QUEUES answers, for drivers use a second pair even when that says
// one.
func New(queuePairs int) *Family { return newFamily(Members()[0], queuePairs) }

// Member is one device of the family: what it has beyond an 82599 VF.
type Member struct {
	// Device is the VF's PCI device id; the vendor is VendorID.
	Device uint16
	// Name of the controller.
	Name string
	// PacketLength tells that VFRXDCTL bounds the length of packets (RLPML).
	PacketLength bool
	// RSS tells that the VF has an RSS key and a redirection table of its own.
	RSS bool
}

// Members lists the devices of the family, the 82599 first. Hyper-V's variants
// of their VFs have no mailbox in BAR0 and do not belong here.
func Members() []Member {
	return []Member{
		{Device: DeviceID, Name: "82599"},
		{Device: DeviceIDX540, Name: "X540", PacketLength: true},
		{Device: DeviceIDX550, Name: "X550", PacketLength: true, RSS: true},
		{Device: DeviceIDX550EMX, Name: "X552 (X550EM_x)", PacketLength: true, RSS: true},
		{Device: DeviceIDX550EMA, Name: "X553 (X550EM_a)", PacketLength: true, RSS: true},
	}
}

// ForDevice returns the family with the table of the device with that PCI id;
// queuePairs is as for New. It fails for a device that is no member.
func ForDevice(vendor, device uint16, queuePairs int) (*Family, error) {
	for _, m := range Members() {
		if vendor == VendorID && device == m.Device {
			return newFamily(m, queuePairs), nil
		}
	}
	return nil, fmt.Errorf("device %04x:%04x is no VF of the %s family", vendor, device, Name)
}

func newFamily(m Member, queuePairs int) *Family {
	if queuePairs < 1 {
		queuePairs = DefaultQueuePairs
	}
	queuePairs = min(queuePairs, MaxQueuePairs)
	f := &Family{}
	f.registers = append(f.registers, controlRegisters()...)
	rxdctl := uint32(maskRX)
	if m.PacketLength {
		rxdctl |= RXDCTLLength | RXDCTLLengthEnable
	}
	if m.RSS {
		f.registers = append(f.registers, rssRegisters()...)
	}
	for n := range queuePairs {
		f.registers = append(f.registers, receiveRegisters(n, rxdctl)...)
		f.queues = append(f.queues, family.Queue{
			Direction: family.RX, Index: n,
			BAL: VFRDBAL(n), BAH: VFRDBAH(n), LEN: VFRDLEN(n),
			Head: VFRDH(n), Tail: VFRDT(n), Ctl: VFRXDCTL(n),
			Enable: QueueEnable, Flush: QueueFlush, DescriptorSize: intel.DescriptorSize,
			Format: VFSRRCTL(n), Coalesce: VFRSCCTL(n), CoalesceEnable: RSCCTLEnable,
			Assign: VTIVAR(n / 2), AssignShift: 16 * uint(n%2),
		})
	}
	for n := range queuePairs {
		f.registers = append(f.registers, transmitRegisters(n)...)
		f.queues = append(f.queues, family.Queue{
			Direction: family.TX, Index: n,
			BAL: VFTDBAL(n), BAH: VFTDBAH(n), LEN: VFTDLEN(n),
			Head: VFTDH(n), Tail: VFTDT(n), Ctl: VFTXDCTL(n),
			WBAL: VFTDWBAL(n), WBAH: VFTDWBAH(n),
			Enable: QueueEnable, Flush: QueueFlush, DescriptorSize: intel.DescriptorSize,
			ContextSlots: intel.ContextSlots, Assign: VTIVAR(n / 2), AssignShift: 16*uint(n%2) + 8,
		})
	}
	slices.SortFunc(f.registers, func(a, b family.Register) int { return int(a.Offset) - int(b.Offset) })
	return f
}

// Name of the family.
func (f *Family) Name() string { return Name }

// BARSize is the size of BAR0 in bytes.
func (f *Family) BARSize() uint32 { return BARSize }

// Registers lists every register in ascending order of offset.
func (f *Family) Registers() []family.Register { return slices.Clone(f.registers) }

// Queues lists every descriptor ring, receive rings first.
func (f *Family) Queues() []family.Queue { return slices.Clone(f.queues) }

// Counters lists the statistics counters.
func (f *Family) Counters() []family.Counter {
	return []family.Counter{
		{Name: "VFGPRC", Low: VFGPRC, Width: 32, Frames: true},
		{Name: "VFGORC", Low: VFGORCLSB, High: VFGORCMSB, Width: 36},
		{Name: "VFMPRC", Low: VFMPRC, Width: 32},
		{Name: "VFGPTC", Low: VFGPTC, Width: 32, Frames: true},
		{Name: "VFGOTC", Low: VFGOTCLSB, High: VFGOTCMSB, Width: 36},
	}
}

// Interrupts gives the interrupt registers.
func (f *Family) Interrupts() family.Interrupts {
	return family.Interrupts{
		Cause: VTEICR, CauseSet: VTEICS, MaskSet: VTEIMS, MaskClear: VTEIMC,
		AutoClear: VTEIAC, AutoMask: VTEIAM,
		All: VectorMask, Vectors: MSIXVectors,
		Assign:      []uint32{VTIVAR(0), VTIVAR(1), VTIVAR(2), VTIVAR(3), VTIVARMisc},
		AssignValid: IVARValid, AssignVector: IVARVector,
		Mailbox: VTIVARMisc,
	}
}

// Mailbox gives the mailbox's layout.
func (f *Family) Mailbox() family.Mailbox {
	return family.Mailbox{
		Memory: VFMBMEM, Words: MailboxWords, Control: VFMAILBOX,
		Req: MailboxREQ, Ack: MailboxACK, VFU: MailboxVFU, PFU: MailboxPFU,
		PFSts: MailboxPFSTS, PFAck: MailboxPFACK, RstI: MailboxRSTI, RstD: MailboxRSTD,
		ResetShows: true, ReadClear: MailboxReadClear,
		IDMask: MsgIDMask, Replied: MsgACK | MsgNACK, Reset: MsgReset,
	}
}

// ResetRegister tells that VFCTRL.RST resets the VF.
func (f *Family) ResetRegister() (offset, bit uint32) { return VFCTRL, CtrlRST }

// LinkRegister tells that VFLINKS shows the link.
func (f *Family) LinkRegister() (offset, bit uint32) { return VFLINKS, LinksUp }

// NewLog returns an empty record, that of a VF whose driver is not loaded.
func (f *Family) NewLog() family.Log { return &Log{} }

// RestoreLog rebuilds a record from what Log.Marshal returned. It accepts
// nothing that Marshal would not write.
func (f *Family) RestoreLog(b []byte) (family.Log, error) {
	l, err := unmarshalLog(b)
	if err != nil {
		return nil, fmt.Errorf("ixgbevf mailbox record: %w", err)
	}
	return l, nil
}

// apiCodes are the API versions a PF is asked for by Probe, in ascending order.
var apiCodes = []uint32{API10, API11, API12, API13, API14, API15, API16, API17}

// Probe asks for a reset, whose reply holds the multicast filter type, and
// then for every API version: a PF forgets the version with the next reset. It
// remembers the mode of the VF's last user, though: that becomes NONE again,
// under the highest version accepted. The RESET after it has the PF let
// broadcasts through as before.
func (f *Family) Probe() [][]uint32 {
	requests := [][]uint32{{MsgReset}}
	for _, code := range apiCodes {
		requests = append(requests, []uint32{MsgAPINegotiate, code, 0})
	}
	return append(requests, []uint32{MsgUpdateXcastMode, XcastMulti}, []uint32{MsgUpdateXcastMode, XcastNone}, []uint32{MsgReset})
}

// Offer reads the replies to the messages of Probe.
func (f *Family) Offer(replies [][]uint32) (family.Offer, error) {
	requests := f.Probe()
	if len(replies) != len(requests) {
		return family.Offer{}, fmt.Errorf("ixgbevf probe: %d replies to %d messages", len(replies), len(requests))
	}
	var offer family.Offer
	for i, reply := range replies {
		acked, err := intel.Verdict(requests[i], reply)
		if err != nil {
			return family.Offer{}, fmt.Errorf("ixgbevf probe: %w", err)
		}
		switch {
		case i == 0 && len(reply) < resetReplyWords:
			return family.Offer{}, fmt.Errorf("ixgbevf probe: reply to RESET has %d words, want %d", len(reply), resetReplyWords)
		case i == 0:
			offer.MulticastFilterType = reply[3]
		case acked && requests[i][0] == MsgAPINegotiate:
			offer.APIs = append(offer.APIs, requests[i][1])
		}
	}
	return offer, nil
}
