package compsc

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"google.golang.org/protobuf/proto"

	"compsc.io/compsc/agent/compsc/statepb"
	"compsc.io/compsc/agent/family"
)

// State is what one VF takes along to another device. It may hold data of the
// guest: it belongs into no log and no API object.
type State struct {
	// Family, VendorID and DeviceID tell which device the state fits.
	Family             string
	VendorID, DeviceID uint16
	// MigrationUID, Interface and Epoch tell which transfer it belongs to.
	// Capture leaves them to the caller; Epoch is that of the target's lease.
	MigrationUID string
	Interface    string
	Epoch        uint64

	// Registers of class Copy, but for the tails, in ascending order of
	// offset, without bits that are no state.
	Registers []RegValue
	// Queues in the order of the family.
	Queues []QueueState
	// Counters as the guest would read them, in the order of the family.
	Counters []CounterValue
	// Mailbox is what of an open transaction the guest has yet to see.
	Mailbox MailboxState
	// Log is the record of mailbox operations, encoded by the family.
	Log []byte
	// Causes are interrupt causes that were pending.
	Causes uint32

	// PCIConfig is the head of the configuration space, MSIXTable the table in
	// the guest's BAR, both as the guest programmed them. Capture leaves them
	// to the caller, and Restore does not look at them.
	PCIConfig []byte
	MSIXTable []byte
}

// RegValue is the value of one register.
type RegValue struct{ Offset, Value uint32 }

// QueueState is where one ring stands.
type QueueState struct {
	Direction family.Direction
	Index     int
	// Head and Tail are indices of descriptors.
	Head, Tail uint32
	Enabled    bool
	// Contexts has, of a transmit queue, the descriptor that filled each
	// context slot, nil for a slot that was never seen filled. It is empty
	// when all are, and in states of format version 1.
	Contexts [][]byte
	// Relied has a bit for each slot whose context the driver has used for a
	// packet after the one that it was filled for. It is 0 in states of format
	// versions 1 and 2.
	Relied uint32
}

// CounterValue is the value of one counter; Offset is that of its low half.
type CounterValue struct {
	Offset uint32
	Value  uint64
	// Latched tells that the guest has read the lower half of a counter and is
	// to find High in the upper one. It is false in states of format versions 1
	// and 2.
	Latched bool
	High    uint32
}

// MailboxState is what the guest has yet to see of the mailbox.
type MailboxState struct {
	// Memory is the message buffer.
	Memory []uint32
	// ReadClear has read-clear bits of the mailbox register that the guest
	// has not seen.
	ReadClear uint32
	// Held tells that the guest holds the mailbox.
	Held bool
}

// MaxStateSize bounds an encoded state, in bytes.
const MaxStateSize = 64 << 10

// The envelope around the protobuf body: magic, format version, length of the
// body, SHA-256 of the body; numbers are big-endian. A state is written in the
// oldest version that holds all of it, so that a node of an older release
// takes it where that is right. Version 2 added the queues' contexts, version 3
// which of them the driver relies on, and latched halves of counters.
const (
	stateMagic   = "CSCS"
	stateVersion = 3
	envelopeSize = len(stateMagic) + 4 + 4 + sha256.Size
)

// Bounds of what Decode accepts, far above what any family has.
const (
	maxRegisters    = 1024
	maxQueues       = 64
	maxCounters     = 64
	maxMailboxWords = 64
	maxNameLength   = 253
	maxLogSize      = 16 << 10
	maxPCIConfig    = 4 << 10
	maxMSIXTable    = 32 << 10
	maxContexts     = 8
	maxDescriptor   = 64
)

// Encode returns the state in its envelope. Equal states have equal
// encodings. It fails when the state is larger than Decode accepts.
func (s *State) Encode() ([]byte, error) {
	p := &statepb.State{
		Family: s.Family, VendorId: uint32(s.VendorID), DeviceId: uint32(s.DeviceID),
		MigrationUid: s.MigrationUID, Interface: s.Interface, Epoch: s.Epoch,
		Mailbox: &statepb.Mailbox{Memory: s.Mailbox.Memory, ReadClear: s.Mailbox.ReadClear, Held: s.Mailbox.Held},
		Log:     s.Log, Causes: s.Causes, PciConfig: s.PCIConfig, MsixTable: s.MSIXTable,
	}
	for _, r := range s.Registers {
		p.Registers = append(p.Registers, &statepb.Register{Offset: r.Offset, Value: r.Value})
	}
	for _, q := range s.Queues {
		p.Queues = append(p.Queues, &statepb.Queue{Tx: q.Direction == family.TX, Index: uint32(q.Index),
			Head: q.Head, Tail: q.Tail, Enabled: q.Enabled, Contexts: q.Contexts, Relied: q.Relied})
	}
	for _, c := range s.Counters {
		p.Counters = append(p.Counters, &statepb.Counter{Offset: c.Offset, Value: c.Value, Latched: c.Latched, High: c.High})
	}
	if err := validateBody(p); err != nil {
		return nil, fmt.Errorf("encode state: %w", err)
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode state: %w", err)
	}
	if size := envelopeSize + len(body); size > MaxStateSize {
		return nil, fmt.Errorf("encode state: %d bytes, at most %d are allowed", size, MaxStateSize)
	}
	sum := sha256.Sum256(body)
	b := append(make([]byte, 0, envelopeSize+len(body)), stateMagic...)
	b = binary.BigEndian.AppendUint32(b, versionOf(p))
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	b = append(b, sum[:]...)
	return append(b, body...), nil
}

// Decode reads what Encode wrote. It checks the envelope and the bounds of
// everything; whether the state fits a device is for VF.Check.
func Decode(b []byte) (*State, error) {
	version, body, err := openEnvelope(b)
	if err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	p := &statepb.State{}
	if err := proto.Unmarshal(body, p); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	if err := validateBody(p); err != nil {
		return nil, fmt.Errorf("decode state: %w", err)
	}
	if need := versionOf(p); need > version {
		return nil, fmt.Errorf("decode state: format version %d has a field of version %d", version, need)
	}
	s := &State{
		Family: p.Family, VendorID: uint16(p.VendorId), DeviceID: uint16(p.DeviceId),
		MigrationUID: p.MigrationUid, Interface: p.Interface, Epoch: p.Epoch,
		Mailbox: MailboxState{Memory: p.Mailbox.GetMemory(), ReadClear: p.Mailbox.GetReadClear(), Held: p.Mailbox.GetHeld()},
		Log:     p.Log, Causes: p.Causes, PCIConfig: p.PciConfig, MSIXTable: p.MsixTable,
	}
	for _, r := range p.Registers {
		s.Registers = append(s.Registers, RegValue{Offset: r.Offset, Value: r.Value})
	}
	for _, q := range p.Queues {
		d := family.RX
		if q.Tx {
			d = family.TX
		}
		s.Queues = append(s.Queues, QueueState{Direction: d, Index: int(q.Index), Head: q.Head, Tail: q.Tail, Enabled: q.Enabled,
			Contexts: contextsOf(q), Relied: q.Relied})
	}
	for _, c := range p.Counters {
		s.Counters = append(s.Counters, CounterValue{Offset: c.Offset, Value: c.Value, Latched: c.Latched, High: c.High})
	}
	return s, nil
}

// versionOf is the oldest format version that holds all of the body.
func versionOf(p *statepb.State) uint32 {
	switch {
	case slices.ContainsFunc(p.Counters, func(c *statepb.Counter) bool { return c.GetLatched() || c.GetHigh() != 0 }),
		slices.ContainsFunc(p.Queues, func(q *statepb.Queue) bool { return q.GetRelied() != 0 }):
		return 3
	case slices.ContainsFunc(p.Queues, func(q *statepb.Queue) bool { return len(q.GetContexts()) > 0 }):
		return 2
	}
	return 1
}

// contextsOf has nil for what is empty, as Capture has it.
func contextsOf(q *statepb.Queue) [][]byte {
	contexts := slices.Clone(q.Contexts)
	for i, d := range contexts {
		if len(d) == 0 {
			contexts[i] = nil
		}
	}
	return contexts
}

// openEnvelope checks the envelope and returns format version and body.
func openEnvelope(b []byte) (uint32, []byte, error) {
	if len(b) > MaxStateSize {
		return 0, nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), MaxStateSize)
	}
	if len(b) < envelopeSize {
		return 0, nil, fmt.Errorf("%d bytes are less than an envelope of %d", len(b), envelopeSize)
	}
	if got := string(b[:len(stateMagic)]); got != stateMagic {
		return 0, nil, fmt.Errorf("starts with %q, not with %q: this is not the state of a VF", got, stateMagic)
	}
	rest := b[len(stateMagic):]
	version, length := binary.BigEndian.Uint32(rest), binary.BigEndian.Uint32(rest[4:])
	sum, body := rest[8:8+sha256.Size], rest[8+sha256.Size:]
	switch {
	case version > stateVersion:
		return 0, nil, fmt.Errorf("format version %d is newer than version %d, the newest this release reads: "+
			"upgrade this node's release", version, stateVersion)
	case version == 0:
		return 0, nil, fmt.Errorf("format version %d is unknown", version)
	case uint64(length) != uint64(len(body)):
		return 0, nil, fmt.Errorf("the body has %d bytes, its envelope says %d", len(body), length)
	case sha256.Sum256(body) != [sha256.Size]byte(sum):
		return 0, nil, errors.New("the checksum does not match: the state was damaged on its way")
	}
	return version, body, nil
}

// validateBody checks every bound, and that nothing is in the body that this
// release would silently drop.
func validateBody(p *statepb.State) error {
	tooMany := func(what string, n, limit int) error {
		if n > limit {
			return fmt.Errorf("%s: %d, at most %d are allowed", what, n, limit)
		}
		return nil
	}
	err := errors.Join(
		tooMany("family, characters", len(p.Family), maxNameLength),
		tooMany("migration UID, characters", len(p.MigrationUid), maxNameLength),
		tooMany("interface, characters", len(p.Interface), maxNameLength),
		tooMany("vendor id", int(p.VendorId), math.MaxUint16),
		tooMany("device id", int(p.DeviceId), math.MaxUint16),
		tooMany("registers", len(p.Registers), maxRegisters),
		tooMany("queues", len(p.Queues), maxQueues),
		tooMany("counters", len(p.Counters), maxCounters),
		tooMany("mailbox words", len(p.Mailbox.GetMemory()), maxMailboxWords),
		tooMany("mailbox record, bytes", len(p.Log), maxLogSize),
		tooMany("PCI configuration, bytes", len(p.PciConfig), maxPCIConfig),
		tooMany("MSI-X table, bytes", len(p.MsixTable), maxMSIXTable),
	)
	if err != nil {
		return err
	}
	unknown := len(p.ProtoReflect().GetUnknown()) + len(p.Mailbox.ProtoReflect().GetUnknown())
	for i, r := range p.Registers {
		unknown += len(r.ProtoReflect().GetUnknown())
		if i > 0 && r.GetOffset() <= p.Registers[i-1].GetOffset() {
			return fmt.Errorf("register %#x follows %#x: offsets must ascend", r.GetOffset(), p.Registers[i-1].GetOffset())
		}
	}
	for _, q := range p.Queues {
		unknown += len(q.ProtoReflect().GetUnknown())
		if err := tooMany("queue index", int(q.GetIndex()), maxQueues-1); err != nil {
			return err
		}
		if err := tooMany("contexts of a queue", len(q.GetContexts()), maxContexts); err != nil {
			return err
		}
		for _, d := range q.GetContexts() {
			if err := tooMany("context, bytes", len(d), maxDescriptor); err != nil {
				return err
			}
		}
	}
	for _, c := range p.Counters {
		unknown += len(c.ProtoReflect().GetUnknown())
	}
	if unknown > 0 {
		return fmt.Errorf("%d bytes of fields that this release does not know: the state would not be restored whole", unknown)
	}
	return nil
}
