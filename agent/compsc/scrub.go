package compsc

import (
	"context"
	"errors"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Scrub makes the VF silent and clean: reset, so that the PF drops its
// filters; every queue off; and nothing left of the last guest, for rings and
// heads of an 82599 survive a reset. The record and the counters' offsets are
// dropped as well. It does all it can even if a part fails.
func (v *VF) Scrub(ctx context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.scrub(ctx); err != nil {
		return fmt.Errorf("scrub: %w", err)
	}
	return nil
}

func (v *VF) scrub(ctx context.Context) error {
	v.held, v.heads, v.causes, v.mail = nil, nil, 0, mail{}
	v.log = v.f.NewLog()
	for _, c := range v.counters {
		c.offset, c.latched = 0, false
	}
	err := v.resetDevice(ctx)
	for _, r := range v.f.Registers() {
		if r.Class == family.Copy && r.Access == family.RW {
			v.b.Write(r.Offset, r.Modifier)
		}
	}
	for _, q := range v.queues {
		v.b.Write(q.Head, 0)
	}
	v.writeMailboxMemory(make([]uint32, v.box.Words))
	if v.b.Read(v.irq.MaskSet) == allOnes {
		return errors.Join(err, ErrGone)
	}
	return err
}

// Probe finds out what the VF and its PF can do: which heads take a value
// other than zero, and what the PF offers through the mailbox. It is only for
// a VF that nobody uses, and leaves it scrubbed. Asking the PF makes it
// install the VF's address filter for as long as the questions take; all
// queues are off.
func (v *VF) Probe(ctx context.Context) (Capabilities, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	caps, err := v.probe(ctx)
	undo, cancel := v.undoContext(ctx)
	defer cancel()
	if err = errors.Join(err, v.scrub(undo)); err != nil {
		return Capabilities{}, fmt.Errorf("probe: %w", err)
	}
	return caps, nil
}

func (v *VF) probe(ctx context.Context) (Capabilities, error) {
	if err := v.scrub(ctx); err != nil {
		return Capabilities{}, err
	}
	caps := Capabilities{WritableRXHeads: true, WritableTXHeads: true}
	for _, q := range v.queues {
		ok := v.probeHead(q)
		if q.Direction == family.RX {
			caps.WritableRXHeads = caps.WritableRXHeads && ok
		} else {
			caps.WritableTXHeads = caps.WritableTXHeads && ok
		}
	}
	var replies [][]uint32
	for _, request := range v.f.Probe() {
		reply, err := v.exchange(ctx, request)
		if err != nil {
			return Capabilities{}, fmt.Errorf("message %#x: %w", request[0], err)
		}
		replies = append(replies, reply)
	}
	offer, err := v.f.Offer(replies)
	if err != nil {
		return Capabilities{}, err
	}
	caps.Offer = offer
	return caps, nil
}

// probeHead tells whether the head of a queue that is off takes a value and
// gives it up again. It is not turned on: the ring has no memory.
func (v *VF) probeHead(q family.Queue) bool {
	const descriptors, probe = 256, 0x55
	v.b.Write(q.LEN, descriptors*q.DescriptorSize)
	v.b.Write(q.Head, probe)
	took := v.b.Read(q.Head) == probe
	v.b.Write(q.Head, 0)
	gone := v.b.Read(q.Head) == 0
	v.b.Write(q.LEN, 0)
	return took && gone
}
