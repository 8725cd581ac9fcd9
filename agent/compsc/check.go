package compsc

import (
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
)

// Reasons of an IncompatibleError, fit for a condition of an API object.
const (
	// ReasonFamilyMismatch: the families, or their tables, differ.
	ReasonFamilyMismatch = "FamilyMismatch"
	// ReasonDeviceMismatch: the PCI ids differ.
	ReasonDeviceMismatch = "DeviceMismatch"
	// ReasonStateInvalid: the state contradicts itself or the family.
	ReasonStateInvalid = "StateInvalid"
	// ReasonNotMigratable: the guest uses what no other PF can be brought to.
	ReasonNotMigratable = "NotMigratable"
	// ReasonAPINotAccepted: the target's PF refuses the guest's mailbox API.
	ReasonAPINotAccepted = "MailboxAPINotAccepted"
	// ReasonMulticastFilterMismatch: the PFs hash multicast addresses
	// differently.
	ReasonMulticastFilterMismatch = "MulticastFilterTypeMismatch"
	// ReasonHeadNotRestorable: the device does not take a ring's position.
	ReasonHeadNotRestorable = "HeadNotRestorable"
	// ReasonContextNotRestorable: the device does not take the offload contexts
	// of a transmit queue that its driver relies on.
	ReasonContextNotRestorable = "ContextNotRestorable"
	// ReasonMailboxRefused: the target's PF answered a replayed message
	// otherwise than the source's PF.
	ReasonMailboxRefused = "MailboxRefused"
)

// IncompatibleError tells that a VF cannot take a state over, now or ever:
// trying again without a change does not help.
type IncompatibleError struct {
	// Reason is one of the Reason constants.
	Reason string
	// Message tells a person what is wrong and what to do.
	Message string
}

// Error returns reason and message.
func (e *IncompatibleError) Error() string { return e.Reason + ": " + e.Message }

func incompatible(reason, format string, args ...any) error {
	return &IncompatibleError{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Capabilities is what Probe has found out about a VF and its PF.
type Capabilities struct {
	// WritableRXHeads and WritableTXHeads tell whether every head of the
	// direction takes a value other than zero while its queue is off, and
	// keeps it when the queue is turned on.
	WritableRXHeads, WritableTXHeads bool
	// RXHeads and TXHeads name the way to bring a head of the direction to
	// where it was, one of the Heads constants, where it cannot be written;
	// empty for none.
	RXHeads, TXHeads string
	// Offer is what the PF offers.
	Offer family.Offer
}

// CheckSummary judges, before there is a State, whether a VF of family f with
// these capabilities can take over the VF that the summary describes.
// headsInUse tells whether any of its rings runs. The error is an
// *IncompatibleError.
func CheckSummary(f family.Family, sum family.Summary, headsInUse bool, caps Capabilities) error {
	if sum.NotMigratable != "" {
		return incompatible(ReasonNotMigratable, "%s", sum.NotMigratable)
	}
	if len(sum.MAC) > 0 {
		if !slices.Contains(caps.Offer.APIs, sum.API) {
			return incompatible(ReasonAPINotAccepted, "the guest's %s driver negotiated mailbox API code %d, the target's PF accepts only %v: "+
				"use the same PF driver on both nodes", f.Name(), sum.API, caps.Offer.APIs)
		}
		if sum.MulticastFilterType != caps.Offer.MulticastFilterType {
			return incompatible(ReasonMulticastFilterMismatch, "the guest hashes multicast addresses by filter type %d, the target's PF by type %d: "+
				"set both PFs to the same type", sum.MulticastFilterType, caps.Offer.MulticastFilterType)
		}
	}
	return caps.checkHeads(headsInUse, headsInUse)
}

// checkHeads judges whether heads other than zero can be restored.
func (c Capabilities) checkHeads(rx, tx bool) error {
	if rx && !c.WritableRXHeads && c.RXHeads == "" {
		return incompatible(ReasonHeadNotRestorable, "receive rings are in use, and the target's VF does not take the position of a receive ring by any means")
	}
	if tx && !c.WritableTXHeads && c.TXHeads == "" {
		return incompatible(ReasonHeadNotRestorable, "transmit rings are in use, and the target's VF does not take the position of a transmit ring by any means")
	}
	return nil
}

// Check judges whether this VF, with what Probe found out, can take the state
// over. The error is an *IncompatibleError. It touches no register.
func (v *VF) Check(s *State, c Capabilities) error {
	log, err := v.validate(s)
	if err != nil {
		return err
	}
	if err := CheckSummary(v.f, log.Summary(), false, c); err != nil {
		return err
	}
	needs := map[family.Direction]bool{}
	for i, q := range s.Queues {
		if q.Relied != 0 {
			if _, _, err := v.scratchOf(v.queues[i], loadRing*v.queues[i].DescriptorSize); err != nil {
				return incompatible(ReasonContextNotRestorable, "the guest's driver relies on offload contexts that it has loaded before, and: %v", err)
			}
		}
		if !q.Enabled || q.Head == 0 {
			continue
		}
		needs[q.Direction] = true
		if q.Direction == family.RX && c.WritableRXHeads || q.Direction == family.TX && c.WritableTXHeads {
			continue
		}
		at, _ := slices.BinarySearchFunc(s.Registers, v.queues[i].LEN, func(r RegValue, off uint32) int { return int(r.Offset) - int(off) })
		if _, _, err := v.scratchOf(v.queues[i], s.Registers[at].Value); err != nil {
			return incompatible(ReasonHeadNotRestorable, "the position of a ring cannot be written on the target's VF, and: %v", err)
		}
	}
	return c.checkHeads(needs[family.RX], needs[family.TX])
}

// validate checks a state against the family and returns its mailbox record.
func (v *VF) validate(s *State) (family.Log, error) {
	if s.Family != v.f.Name() {
		return nil, incompatible(ReasonFamilyMismatch, "the state is of a VF of family %q, this one is of family %q", s.Family, v.f.Name())
	}
	if s.VendorID != v.o.VendorID || s.DeviceID != v.o.DeviceID {
		return nil, incompatible(ReasonDeviceMismatch, "the state is of a device %04x:%04x, this one is %04x:%04x",
			s.VendorID, s.DeviceID, v.o.VendorID, v.o.DeviceID)
	}
	registers := v.copied()
	offsets := func(yield func(uint32) bool) {
		for _, r := range s.Registers {
			if !yield(r.Offset) {
				return
			}
		}
	}
	if got := slices.Collect(offsets); !slices.EqualFunc(got, registers, func(off uint32, r family.Register) bool { return off == r.Offset }) {
		return nil, incompatible(ReasonFamilyMismatch, "the state has %d registers to copy that are not the %d of this VF: "+
			"both VFs must have the same number of queues, and both nodes the same release", len(got), len(registers))
	}
	values := make(map[uint32]uint32, len(s.Registers))
	for i, r := range s.Registers {
		if extra := r.Value &^ registers[i].Mask; extra != 0 {
			return nil, incompatible(ReasonStateInvalid, "register %s has value %#x with bits %#x that it does not have",
				registers[i].Name, r.Value, extra)
		}
		values[r.Offset] = r.Value
	}
	if err := v.validateQueues(s, values); err != nil {
		return nil, err
	}
	if err := v.validateRest(s); err != nil {
		return nil, err
	}
	log, err := v.f.RestoreLog(s.Log)
	if err != nil {
		return nil, incompatible(ReasonStateInvalid, "%v", err)
	}
	if why := log.Summary().NotMigratable; why != "" {
		return nil, incompatible(ReasonNotMigratable, "%s", why)
	}
	return log, nil
}

// validateQueues checks that every ring's position lies in the ring.
func (v *VF) validateQueues(s *State, values map[uint32]uint32) error {
	if len(s.Queues) != len(v.queues) {
		return incompatible(ReasonFamilyMismatch, "the state has %d queues, this VF has %d", len(s.Queues), len(v.queues))
	}
	for i, q := range s.Queues {
		want := v.queues[i]
		if q.Direction != want.Direction || q.Index != want.Index {
			return incompatible(ReasonStateInvalid, "queue %d of the state is %s %d, want %s", i, q.Direction, q.Index, queueName(want))
		}
		mask := v.regs[want.Head].Mask & v.regs[want.Tail].Mask
		if q.Head&^mask != 0 || q.Tail&^mask != 0 {
			return incompatible(ReasonStateInvalid, "%s: head %d or tail %d is out of range", queueName(want), q.Head, q.Tail)
		}
		if len(q.Contexts) > want.ContextSlots {
			return incompatible(ReasonStateInvalid, "%s has %d context slots, the state %d", queueName(want), want.ContextSlots, len(q.Contexts))
		}
		for slot, d := range q.Contexts {
			if d == nil {
				continue
			}
			if len(d) != int(want.DescriptorSize) {
				return incompatible(ReasonStateInvalid, "%s: context %d has %d bytes, want %d", queueName(want), slot, len(d), want.DescriptorSize)
			}
			if got, ok := v.f.Descriptors().ContextSlot(d); !ok || got != slot {
				return incompatible(ReasonStateInvalid, "%s: the context of slot %d is none that fills it", queueName(want), slot)
			}
		}
		for slot := range 32 {
			if q.Relied>>slot&1 != 0 && (slot >= len(q.Contexts) || q.Contexts[slot] == nil) {
				return incompatible(ReasonStateInvalid, "%s: the driver relies on the context of slot %d, which is not there", queueName(want), slot)
			}
		}
		if !q.Enabled {
			continue
		}
		if size := values[want.LEN] / want.DescriptorSize; q.Head >= size || q.Tail > size {
			return incompatible(ReasonStateInvalid, "%s: head %d or tail %d is outside of a ring of %d descriptors",
				queueName(want), q.Head, q.Tail, size)
		}
	}
	return nil
}

// validateRest checks counters, mailbox and causes.
func (v *VF) validateRest(s *State) error {
	if len(s.Counters) != len(v.counters) {
		return incompatible(ReasonFamilyMismatch, "the state has %d counters, this VF has %d", len(s.Counters), len(v.counters))
	}
	for i, c := range s.Counters {
		if want := v.counters[i]; c.Offset != want.Low || c.Value&^want.mask() != 0 {
			return incompatible(ReasonStateInvalid, "counter %d of the state is %#x with value %d, want %s (%#x) of %d bits",
				i, c.Offset, c.Value, want.Name, want.Low, want.Width)
		}
		if want := v.counters[i]; c.Latched && (want.High == 0 || uint64(c.High)&^(want.mask()>>32) != 0) || !c.Latched && c.High != 0 {
			return incompatible(ReasonStateInvalid, "counter %s of %d bits has %#x for its upper half (to be read %v)", want.Name, want.Width, c.High, c.Latched)
		}
	}
	if len(s.Mailbox.Memory) != v.box.Words {
		return incompatible(ReasonStateInvalid, "the mailbox has %d words, want %d", len(s.Mailbox.Memory), v.box.Words)
	}
	if extra := s.Mailbox.ReadClear &^ v.box.ReadClear; extra != 0 {
		return incompatible(ReasonStateInvalid, "mailbox bits %#x are not read-clear", extra)
	}
	if extra := s.Causes &^ v.irq.All; extra != 0 {
		return incompatible(ReasonStateInvalid, "interrupt causes %#x do not exist", extra)
	}
	return nil
}

// copied lists the registers that a state carries, in ascending order of
// offset: those of class Copy but for the tails, which go with their queue.
func (v *VF) copied() []family.Register {
	tails := make(map[uint32]bool)
	for _, q := range v.queues {
		tails[q.Tail] = true
	}
	var list []family.Register
	for _, r := range v.f.Registers() {
		if r.Class == family.Copy && !tails[r.Offset] {
			list = append(list, r)
		}
	}
	return list
}
