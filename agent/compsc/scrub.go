package compsc

import (
	"context"
	"errors"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Scrub makes the VF silent and clean: reset, so that the PF drops its
// filters, and asked to drop those that a reset leaves; every queue off; and
// nothing left of the last guest, for rings and heads of an 82599 survive a
// reset. The record and the counters' offsets are dropped as well. It does all
// it can even if a part fails.
func (v *VF) Scrub(ctx context.Context) error {
	v.mu.Lock()
	defer v.unlock()
	if err := v.scrub(ctx); err != nil {
		return fmt.Errorf("scrub: %w", err)
	}
	return nil
}

func (v *VF) scrub(ctx context.Context) error {
	if v.lost != nil {
		return ErrGone
	}
	v.forget()
	err := v.resetDevice(ctx)
	if !errors.Is(err, ErrGone) {
		err = errors.Join(err, v.release(ctx))
	}
	for _, c := range v.counters {
		if c.ReadClears {
			v.sample(c)
		}
		c.offset, c.latched = 0, false
	}
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

// release takes back what the PF still does for the guest although the VF was
// reset. The record is dropped with it: if it fails, it is due again.
func (v *VF) release(ctx context.Context) error {
	if _, err := v.replay(ctx, v.log.Release()); err != nil {
		v.log.Reset()
		return fmt.Errorf("the PF may still keep frames for the last guest: %w", err)
	}
	v.log = v.f.NewLog()
	return nil
}

// forget drops all that the engine knows of the guest but for its record and
// its counters. The device is to be reset next.
func (v *VF) forget() {
	v.held, v.heads, v.kept, v.causes, v.mask, v.mail = nil, nil, nil, 0, 0, mail{}
	for _, q := range v.queues {
		r := v.rings[q.Ctl]
		if r.relay != nil {
			v.relays.Add(-1)
		}
		*r = ring{Queue: q}
	}
}

// Probe finds out what the VF and its PF can do: which heads take a value
// other than zero and keep it, and what the PF offers through the mailbox. It is only for
// a VF that nobody uses, and leaves it scrubbed. Asking the PF makes it
// install the VF's address filter for as long as the questions take; all
// queues are off then.
func (v *VF) Probe(ctx context.Context) (Capabilities, error) {
	v.mu.Lock()
	defer v.unlock()
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
		ok, err := v.probeWrite(ctx, q)
		if err != nil {
			return Capabilities{}, err
		}
		if q.Direction == family.RX {
			caps.WritableRXHeads = caps.WritableRXHeads && ok
		} else {
			caps.WritableTXHeads = caps.WritableTXHeads && ok
		}
	}
	replies, err := v.askAll(ctx)
	if err != nil {
		return Capabilities{}, err
	}
	offer, err := v.f.Offer(replies)
	if err != nil {
		return Capabilities{}, err
	}
	caps.Offer = offer
	if err := v.probeWays(ctx, &caps); err != nil {
		return Capabilities{}, err
	}
	v.fixed = map[family.Direction]bool{family.RX: !caps.WritableRXHeads, family.TX: !caps.WritableTXHeads}
	return caps, nil
}

// probeWays finds the ways for heads that cannot be written. The PF has seen
// a RESET, so that the VF may send and receive.
func (v *VF) probeWays(ctx context.Context, caps *Capabilities) error {
	for _, d := range []struct {
		family.Direction
		writable bool
		way      *string
	}{
		{family.RX, caps.WritableRXHeads, &caps.RXHeads},
		{family.TX, caps.WritableTXHeads, &caps.TXHeads},
	} {
		if d.writable {
			continue
		}
		for _, q := range v.queues {
			if q.Direction != d.Direction {
				continue
			}
			way, err := v.probeWay(ctx, v.rings[q.Ctl])
			if err != nil {
				return err
			}
			if *d.way = worse(*d.way, way); way == "" {
				*d.way = ""
				break
			}
			if d.Direction == family.RX {
				break // without RSS set up, every frame goes to the first queue
			}
		}
	}
	return nil
}

// probeWay tries the ways for one queue that do not write its head.
func (v *VF) probeWay(ctx context.Context, r *ring) (string, error) {
	if _, _, err := v.scratchOf(r.Queue, probeRing*r.DescriptorSize); err != nil {
		v.o.Logger.Info("a head that cannot be written cannot be brought anywhere", "queue", queueName(r.Queue), "error", err)
		return "", nil
	}
	v.b.Write(r.LEN, probeRing*r.DescriptorSize)
	var err error
	if r.Direction == family.TX {
		err = v.advance(ctx, r, probeHead, nil)
	} else {
		err = v.walkFrames(ctx, r, probeHead, broadcast)
	}
	offErr := v.turnOff(ctx, r.Queue, v.b.Read(r.Ctl))
	v.b.Write(r.LEN, 0)
	switch {
	case err == nil:
		return HeadsDummyAdvance, offErr
	case errors.Is(err, ErrGone) || ctx.Err() != nil:
		return "", err
	case offErr == nil && v.o.Memory != nil && !v.direct(r.Tail) && v.setHead(r.Queue, 0) == nil:
		return HeadsShadowRing, nil
	}
	v.o.Logger.Info("a head cannot be advanced on this VF", "queue", queueName(r.Queue), "error", err)
	return "", offErr
}

// What heads are probed with: a ring of that many descriptors, and a place in
// it that no device comes to by itself.
const probeRing, probeHead = 256, 0x55

// broadcast is the address that the PF lets through without being asked.
var broadcast = []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// probeWrite tells whether the head of a queue takes a value, keeps it while
// the queue is turned on, and gives it up; and without the guest's memory,
// which also tells where a queue stopped, also while it is turned off. The
// queue is turned on with an empty ring, so that the device touches no memory.
func (v *VF) probeWrite(ctx context.Context, q family.Queue) (bool, error) {
	v.b.Write(q.LEN, probeRing*q.DescriptorSize)
	err := v.setHead(q, probeHead)
	if err == nil {
		err = v.turnOn(ctx, q, 0, probeHead, probeHead)
	}
	if err == nil {
		err = v.turnOff(ctx, q, q.Enable)
	}
	if err == nil && v.o.Memory == nil {
		err = v.verifyHead(q, probeHead, "once the queue is off")
	}
	var no *IncompatibleError
	if err != nil && !errors.As(err, &no) {
		return false, err
	}
	// Whatever it was, the next guest finds the queue off and at 0.
	offErr := v.turnOff(ctx, q, v.b.Read(q.Ctl))
	v.b.Write(q.Head, 0)
	v.b.Write(q.LEN, 0)
	if no != nil {
		v.o.Logger.Info("a head cannot be written on this VF", "error", err)
	}
	return no == nil && v.b.Read(q.Head) == 0, offErr
}
