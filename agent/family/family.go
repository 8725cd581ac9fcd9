// Package family describes families of virtual functions: which registers a
// VF has, what kind of state each holds, and how its mailbox is spoken. The
// tables drive capture, restore and the model of the silicon; the packages
// below this one hold one family each.
package family

import (
	"fmt"
	"strings"
)

// Class says how a register's state moves to another VF (CompSC, VEE 2012).
type Class uint8

// Classes of state.
const (
	// Skip: the target's own value is right, or there is no state behind it.
	Skip Class = iota
	// Copy: read on the source, written on the target.
	Copy
	// Replay: only operations reach it; they are recorded and done again.
	Replay
	// Emulate: read-only for software; the guest is given hardware + offset.
	Emulate
	// Derive: recomputed on the target from memory or from other state.
	Derive
)

// String names the class.
func (c Class) String() string {
	names := []string{"skip", "copy", "replay", "emulate", "derive"}
	if int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("class %d", uint8(c))
}

// Access says what reads and writes of a register do. Flags combine.
type Access uint8

// Access semantics.
const (
	// Readable: reads return the value; without it they return 0.
	Readable Access = 1 << iota
	// Writable: writes store the value (under the register's mask).
	Writable
	// ReadClears: a read clears what it returned.
	ReadClears
	// WriteOneSets: ones written set bits; zeros leave them.
	WriteOneSets
	// WriteOneClears: ones written clear bits; zeros leave them.
	WriteOneClears
)

// RO, RW and the others are the usual combinations.
const (
	RO = Readable
	WO = Writable
	RW = Readable | Writable
)

// String lists what the access is made of, such as "read, write".
func (a Access) String() string {
	var parts []string
	for _, f := range []struct {
		flag Access
		name string
	}{
		{Readable, "read"}, {ReadClears, "read clears"}, {Writable, "write"},
		{WriteOneSets, "write 1 sets"}, {WriteOneClears, "write 1 clears"},
	} {
		if a&f.flag != 0 {
			parts = append(parts, f.name)
		}
	}
	return strings.Join(parts, ", ")
}

// Register is one register of a VF's BAR0. All are 32 bits wide.
type Register struct {
	// Name as the datasheet and the Linux driver have it, with the index of
	// an array element in parentheses.
	Name string
	// Offset in BAR0, in bytes.
	Offset uint32
	// Access semantics.
	Access Access
	// Class of the state.
	Class Class
	// Mask of the bits that software can write, and that are copied. Reads of
	// a writable register show no other bits; a register that software cannot
	// write has no mask and is read whole.
	Mask uint32
	// Modifier has bits that are set in every write that restores the
	// register: they say how the rest is to be taken and are no state.
	Modifier uint32
	// Why the class is what it is.
	Why string
}

// Direction of a queue.
type Direction uint8

// Directions.
const (
	RX Direction = iota
	TX
)

// String names the direction.
func (d Direction) String() string {
	if d == RX {
		return "rx"
	}
	return "tx"
}

// Queue gives the offsets of one descriptor ring's registers.
type Queue struct {
	Direction Direction
	// Index within its direction.
	Index int
	// Base address low and high, length in bytes, head, tail and control.
	BAL, BAH, LEN, Head, Tail, Ctl uint32
	// WBAL and WBAH are the head write-back address; 0 when the direction
	// has none. They must be written after the mailbox replay.
	WBAL, WBAH uint32
	// Enable is the bit of Ctl that enables the queue and, read back, tells
	// whether it runs.
	Enable uint32
	// Flush is the bit of Ctl that flushes pending write-backs, 0 for none.
	Flush uint32
	// DescriptorSize in bytes: LEN divided by it is the size of the ring.
	DescriptorSize uint32
	// Format is the register that decides the format of the descriptors, 0
	// when each tells its own.
	Format uint32
	// Coalesce is the register with the bit CoalesceEnable that has a receive
	// queue coalesce packets, 0 for none.
	Coalesce, CoalesceEnable uint32
	// Assign is the register that assigns the queue's causes to a vector, in
	// the byte that starts at bit AssignShift.
	Assign      uint32
	AssignShift uint
	// ContextSlots is how many offload contexts the queue remembers: context
	// descriptors fill them, and nothing reads them back.
	ContextSlots int
}

// Descriptors knows the formats of a family's descriptors, as far as a ring
// can be worked on without its driver. Each method takes one whole descriptor.
type Descriptors interface {
	// ContextSlot tells which context slot of its queue a transmit descriptor
	// fills; ok is false for one that fills none.
	ContextSlot(d []byte) (slot int, ok bool)
	// UsesContext tells which context slot the packet of a transmit descriptor
	// takes what it needs from; ok is false for one that needs none.
	UsesContext(d []byte) (slot int, ok bool)
	// IdleContext returns a transmit descriptor that fills context slot 0 and
	// does nothing else: no frame, no write-back.
	IdleContext() []byte
	// Buffer returns a receive descriptor as a driver hands it to the device:
	// a buffer for packets and one for headers, both at even addresses. Which
	// the device uses depends on the format.
	Buffer(packet, header uint64) []byte
	// Done tells whether the device has written the descriptor back. Format is
	// the value of the queue's format register.
	Done(d Direction, format uint32, descriptor []byte) bool
	// EndOfPacket tells whether the descriptor is the last of its packet: a
	// transmit descriptor as the driver wrote it, a receive descriptor as the
	// device wrote it back.
	EndOfPacket(d Direction, format uint32, descriptor []byte) bool
	// Next tells where the packet of a receive descriptor that is not its last
	// goes on, if the device says so: the index of a descriptor of the ring. ok
	// is false if it is the next one.
	Next(format uint32, descriptor []byte) (index uint32, ok bool)
	// SetNext changes what Next tells.
	SetNext(format uint32, descriptor []byte, index uint32)
	// HandOver makes a receive descriptor that its driver refilled fit to tell
	// with Done when the device is through with it: drivers may leave that of
	// the last lap.
	HandOver(format uint32, descriptor []byte)
	// Reports tells whether a transmit descriptor asks to be written back.
	Reports(descriptor []byte) bool
	// Packet tells whether a transmit descriptor is part of a packet; a
	// context descriptor is not.
	Packet(descriptor []byte) bool
	// Buffers tells what memory the device may write for a receive descriptor
	// as its driver hands it over, besides the descriptor itself. A span of
	// size 0 stands for none.
	Buffers(format uint32, descriptor []byte) (packet, header Span)
}

// Span is a range of memory as the device addresses it.
type Span struct {
	Addr uint64
	Size uint32 // bytes
}

// Counter is one statistics counter that the guest can read but not write.
type Counter struct {
	Name string
	// Low is the offset of the counter or of its low half.
	Low uint32
	// High is the offset of the high half, 0 for a 32-bit counter.
	High uint32
	// Width in bits; the counter wraps there.
	Width uint
	// Frames tells that it counts the frames received, or those sent.
	Frames bool
	// ReadClears tells that a read clears the counter: what a reader finds is
	// what came up since the last read, up to the largest value. Such a counter
	// has no high half.
	ReadClears bool
}

// Interrupts gives the offsets of the interrupt registers.
type Interrupts struct {
	// Cause, CauseSet, MaskSet, MaskClear, AutoClear and AutoMask are the
	// EICR, EICS, EIMS, EIMC, EIAC and EIAM of the VF.
	Cause, CauseSet, MaskSet, MaskClear, AutoClear, AutoMask uint32
	// MaskUnreadable tells that a read of MaskSet does not tell for certain
	// which vectors are enabled. What was written is taken for it then, which
	// has vectors too that the device has masked by itself since: the guest
	// may get a spurious interrupt, which is harmless.
	MaskUnreadable bool
	// All is the mask of every vector.
	All uint32
	// Vectors is the size of the MSI-X table.
	Vectors int
	// Assign lists the registers that assign causes to vectors. Each byte is
	// one assignment: in use if it has AssignValid, to the vector in
	// AssignVector.
	Assign                    []uint32
	AssignValid, AssignVector uint8
	// Mailbox is the one of them that assigns the mailbox.
	Mailbox uint32
}

// Mailbox gives the place and the control bits of the mailbox.
type Mailbox struct {
	// Memory is the offset of the message buffer, Words its length in dwords.
	Memory uint32
	Words  int
	// Control is the offset of the mailbox register.
	Control uint32
	// Req, Ack, VFU, PFU, PFSts, PFAck, RstI and RstD are its bits.
	Req, Ack, VFU, PFU, PFSts, PFAck, RstI, RstD uint32
	// ResetShows tells that the end of a reset of the VF shows in RstI or RstD.
	// Without it a reset of the VF takes no time, and these bits tell of one
	// of the PF: the VF must wait while either is set.
	ResetShows bool
	// ReadClear is the mask of bits that a read clears.
	ReadClear uint32
	// IDMask selects the message id in word 0. A reply has the request's id
	// and at least one bit of Replied.
	IDMask, Replied uint32
	// Reset is the id of the message with which a VF tells that it was reset.
	Reset uint32
}

// Family is everything static about one family of VFs. Implementations are
// immutable and safe for concurrent use.
type Family interface {
	// Name of the family, such as "ixgbevf".
	Name() string
	// BARSize is the size of BAR0 in bytes.
	BARSize() uint32
	// Registers lists every register in ascending order of offset.
	Registers() []Register
	// Queues lists every descriptor ring, receive rings first.
	Queues() []Queue
	// Counters lists the statistics counters.
	Counters() []Counter
	// Interrupts gives the interrupt registers.
	Interrupts() Interrupts
	// Mailbox gives the mailbox's layout.
	Mailbox() Mailbox
	// Descriptors gives the formats of the descriptors.
	Descriptors() Descriptors
	// ResetRegister and ResetBit start a reset of the VF when written.
	ResetRegister() (offset, bit uint32)
	// LinkRegister returns a register and the bit in it that is set while the
	// VF's link is up.
	LinkRegister() (offset, bit uint32)
	// NewLog returns an empty record of mailbox operations.
	NewLog() Log
	// RestoreLog rebuilds a record from what Log.Marshal returned. It fails on
	// bytes it does not understand.
	RestoreLog(b []byte) (Log, error)
	// Probe lists the messages that find out what a PF offers, to be sent in
	// this order to the PF of a VF just reset. The VF must be reset afterwards.
	Probe() [][]uint32
	// Offer reads the replies to the messages of Probe. It fails when there
	// are not as many replies as messages, or when a reply makes no sense.
	Offer(replies [][]uint32) (Offer, error)
}

// Offer is what a PF offers its VFs, as far as it decides whether a record can
// be replayed there.
type Offer struct {
	// APIs lists the API codes the PF accepts, in ascending order.
	APIs []uint32
	// MulticastFilterType tells which bits of an address the PF hashes.
	MulticastFilterType uint32
}

// Log is the record of what the guest has asked of the PF: not a list of
// messages but the state they add up to. Not safe for concurrent use.
type Log interface {
	// Reset notes that the VF was reset by its reset bit, which takes what the
	// PF did for it.
	Reset()
	// Completed notes one message and the PF's reply to it. Words it does not
	// know how to read are kept out of the record.
	Completed(request, reply []uint32)
	// Replay lists the messages that bring a freshly reset VF's PF to the
	// recorded state, in the order the PF demands.
	Replay() []Message
	// Release lists the messages that take back what a reset of the VF leaves
	// of the guest in the PF, to be sent once the VF was reset; nil for none.
	Release() []Message
	// Summary tells what the target's verdict needs.
	Summary() Summary
	// Marshal encodes the record.
	Marshal() []byte
}

// Message is one mailbox message to replay.
type Message struct {
	// Name of the operation, for reports.
	Name string
	// Words of the message; none stand for a reset of the VF by its reset bit.
	Words []uint32
	// Check judges the PF's reply; nil error means the target PF did as the
	// source's PF had done.
	Check func(reply []uint32) error
}

// Summary is what the target must know of a record beforehand.
type Summary struct {
	// API code that was negotiated.
	API uint32
	// MulticastFilterType the PF told the guest in its reply to the reset.
	MulticastFilterType uint32
	// MAC the guest uses, empty when it never completed a reset.
	MAC []byte
	// FurtherAddresses is how many unicast addresses the guest has besides.
	FurtherAddresses int
	// NotMigratable says in words why the record cannot be replayed on any
	// PF; empty when it can.
	NotMigratable string
}
