package igbvf

import (
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

// Family is the register table and the mailbox dialect of one member of the
// family. It is immutable and safe for concurrent use.
type Family struct {
	registers []family.Register
	queues    []family.Queue
	counters  []family.Counter
}

var _ family.Family = (*Family)(nil)

// Member is one device of the family.
type Member struct {
	// Device is the VF's PCI device id; the vendor is VendorID.
	Device uint16
	// Name of the controller.
	Name string
	// QueuePairs is how many queue pairs each VF has; no mode of the PF changes
	// that.
	QueuePairs int
	// Timestamp tells that SRRCTL can have time stamps put into packets.
	Timestamp bool
}

// Members lists the devices of the family, the 82576 first. Hyper-V's variants
// of their VFs have no mailbox in BAR0 and do not belong here.
func Members() []Member {
	return []Member{
		{Device: DeviceID, Name: "82576", QueuePairs: 2},
		{Device: DeviceIDI350, Name: "I350", QueuePairs: 1, Timestamp: true},
	}
}

// New returns the family with the table of an 82576 VF.
func New() *Family { return newFamily(Members()[0]) }

// ForDevice returns the family with the table of the device with that PCI id.
// It fails for a device that is no member.
func ForDevice(vendor, device uint16) (*Family, error) {
	for _, m := range Members() {
		if vendor == VendorID && device == m.Device {
			return newFamily(m), nil
		}
	}
	return nil, fmt.Errorf("device %04x:%04x is no VF of the %s family", vendor, device, Name)
}

func newFamily(m Member) *Family {
	f := &Family{registers: controlRegisters(m.QueuePairs), counters: counters()}
	srrctl := uint32(maskSRRCTL)
	if m.Timestamp {
		srrctl |= SRRCTLTimestamp
	}
	for n := range m.QueuePairs {
		f.registers = append(f.registers, receiveRegisters(n, srrctl)...)
		f.counters = append(f.counters, dropped(n))
		f.queues = append(f.queues, family.Queue{
			Direction: family.RX, Index: n,
			BAL: RDBAL(n), BAH: RDBAH(n), LEN: RDLEN(n), Head: RDH(n), Tail: RDT(n), Ctl: RXDCTL(n),
			Enable: QueueEnable, Flush: QueueFlush, DescriptorSize: intel.DescriptorSize,
			Format: SRRCTL(n), Assign: IVAR0, AssignShift: 16 * uint(n),
		})
	}
	for n := range m.QueuePairs {
		f.registers = append(f.registers, transmitRegisters(n)...)
		f.queues = append(f.queues, family.Queue{
			Direction: family.TX, Index: n,
			BAL: TDBAL(n), BAH: TDBAH(n), LEN: TDLEN(n), Head: TDH(n), Tail: TDT(n), Ctl: TXDCTL(n),
			WBAL: TDWBAL(n), WBAH: TDWBAH(n),
			Enable: QueueEnable, Flush: QueueFlush, DescriptorSize: intel.DescriptorSize,
			ContextSlots: intel.ContextSlots, Assign: IVAR0, AssignShift: 16*uint(n) + 8,
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
func (f *Family) Counters() []family.Counter { return slices.Clone(f.counters) }

// Interrupts gives the interrupt registers. EIMS is not believed: QEMU's igb
// reads back what was written to it last, and not the mask.
func (f *Family) Interrupts() family.Interrupts {
	return family.Interrupts{
		Cause: EICR, CauseSet: EICS, MaskSet: EIMS, MaskClear: EIMC, AutoClear: EIAC, AutoMask: EIAM,
		MaskUnreadable: true,
		All:            VectorMask, Vectors: MSIXVectors,
		Assign:      []uint32{IVAR0, IVARMisc},
		AssignValid: IVARValid, AssignVector: IVARVector,
		Mailbox: IVARMisc,
	}
}

// Mailbox gives the mailbox's layout. RSTI and RSTD tell of resets of the PF,
// and not of the VF: Linux's driver waits while either is set.
func (f *Family) Mailbox() family.Mailbox {
	return family.Mailbox{
		Memory: VMBMEM, Words: MailboxWords, Control: V2PMAILBOX,
		Req: MailboxREQ, Ack: MailboxACK, VFU: MailboxVFU, PFU: MailboxPFU,
		PFSts: MailboxPFSTS, PFAck: MailboxPFACK, RstI: MailboxRSTI, RstD: MailboxRSTD,
		ReadClear: MailboxReadClear,
		IDMask:    MsgIDMask, Replied: MsgACK | MsgNACK, Reset: MsgReset,
	}
}

// ResetRegister tells that CTRL.RST resets the VF.
func (f *Family) ResetRegister() (offset, bit uint32) { return CTRL, CtrlRST }

// LinkRegister tells that STATUS.LU shows the link.
func (f *Family) LinkRegister() (offset, bit uint32) { return STATUS, StatusLU }

// NewLog returns an empty record, that of a VF whose driver is not loaded.
func (f *Family) NewLog() family.Log { return &Log{} }

// RestoreLog rebuilds a record from what Log.Marshal returned. It accepts
// nothing that Marshal would not write.
func (f *Family) RestoreLog(b []byte) (family.Log, error) {
	l, err := unmarshalLog(b)
	if err != nil {
		return nil, fmt.Errorf("igbvf mailbox record: %w", err)
	}
	return l, nil
}

// onlyAPI stands for the dialect, of which there is but one version.
const onlyAPI = 0

// standardFrame is the largest frame of a VF whose PF was never told: a tagged
// one of a network without jumbo frames, with the checksum, in bytes.
const standardFrame = 1522

// Probe asks for a reset, which finds out whether the PF answers, and has it
// forget what the VF's last user asked for: no reset takes back further
// addresses and the largest frame.
func (f *Family) Probe() [][]uint32 {
	return [][]uint32{{MsgReset}, clearFilters(nil), {MsgSetLPE, standardFrame}}
}

// Offer reads the replies to the messages of Probe. All PFs of the family
// offer the same; whether one let go of further addresses it may refuse to
// say, for it grants none to a VF that is not trusted either.
func (f *Family) Offer(replies [][]uint32) (family.Offer, error) {
	requests := f.Probe()
	if len(replies) != len(requests) {
		return family.Offer{}, fmt.Errorf("igbvf probe: %d replies to %d messages", len(replies), len(requests))
	}
	for i, reply := range replies {
		if _, err := intel.Verdict(requests[i], reply); err != nil {
			return family.Offer{}, fmt.Errorf("igbvf probe: %w", err)
		}
	}
	return family.Offer{APIs: []uint32{onlyAPI}}, nil
}

// Descriptors gives the formats of the descriptors.
func (f *Family) Descriptors() family.Descriptors { return intel.Descriptors{} }
