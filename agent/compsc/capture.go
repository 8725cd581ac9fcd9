package compsc

import (
	"context"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Capture returns the state of a quiesced VF, which stays quiesced; it may be
// called again. It fails with ErrNotQuiesced for a VF that runs, and with an
// *IncompatibleError when the state could be restored nowhere, so that a
// migration ends while the VF can still go on where it is.
func (v *VF) Capture(ctx context.Context) (*State, error) {
	v.mu.Lock()
	defer v.unlock()
	if v.lost != nil {
		return nil, fmt.Errorf("capture: %w", ErrGone)
	}
	if v.held == nil {
		return nil, fmt.Errorf("capture: %w", ErrNotQuiesced)
	}
	v.heedDoorbells()
	control, err := v.settleMailbox(ctx)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	v.causes |= v.b.Read(v.irq.Cause) & v.irq.All
	s := &State{
		Family: v.f.Name(), VendorID: v.o.VendorID, DeviceID: v.o.DeviceID,
		Log: v.log.Marshal(), Causes: v.causes,
		Mailbox: MailboxState{
			Memory:    v.readMailboxMemory(),
			ReadClear: v.mail.readClear,
			Held:      control&v.box.VFU != 0,
		},
	}
	switches := v.switches()
	for _, r := range v.copied() {
		value := v.current(r.Offset) & r.Mask &^ r.Modifier &^ switches[r.Offset]
		s.Registers = append(s.Registers, RegValue{Offset: r.Offset, Value: value})
	}
	for _, q := range v.queues {
		head := v.heads[q.Head]
		s.Queues = append(s.Queues, QueueState{
			Direction: q.Direction, Index: q.Index,
			Head: head, Tail: v.current(q.Tail),
			Enabled:  v.current(q.Ctl)&q.Enable != 0,
			Contexts: v.contexts(v.rings[q.Ctl], head),
			Relied:   v.relied(v.rings[q.Ctl], head),
		})
	}
	for _, c := range v.counters {
		s.Counters = append(s.Counters, c.state(v.value(c)))
	}
	// A device that was lost on the way shows last of all.
	if v.b.Read(v.irq.MaskSet) == allOnes {
		return nil, fmt.Errorf("capture: %w", ErrGone)
	}
	if _, err := v.validate(s); err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	return s, nil
}

// switches gives the bits of each queue's control register that are no
// settings: whether it is on is kept with the queue, and a flush is over.
func (v *VF) switches() map[uint32]uint32 {
	bits := make(map[uint32]uint32, len(v.queues))
	for _, q := range v.queues {
		bits[q.Ctl] = q.Enable | q.Flush
	}
	return bits
}

// lateRegisters are the interrupt registers that Restore writes last of all.
func (v *VF) lateRegisters() []uint32 {
	return []uint32{v.irq.AutoClear, v.irq.AutoMask, v.irq.MaskSet}
}

// restoring is the value to write for a register of a state.
func restoring(r family.Register, value uint32) uint32 { return value&r.Mask | r.Modifier }
