package compsc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Quiesce stops the VF: interrupts masked, every queue off with its
// descriptors written back, and nothing under way in the mailbox. The guest
// must be stopped; of accesses that still arrive, those that would start
// something are kept for later. It is idempotent. On error the VF runs as
// before, and if not even that could be had, the error says so.
func (v *VF) Quiesce(ctx context.Context) error {
	v.mu.Lock()
	defer v.unlock()
	if v.lost != nil {
		return fmt.Errorf("quiesce: %w", ErrGone)
	}
	if v.held != nil {
		return nil
	}
	v.held, v.heads, v.kept = make(map[uint32]uint32), make(map[uint32]uint32), make(map[uint32]bool)
	err := v.stop(ctx)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("quiesce: %w", err)
	undo, cancel := v.undoContext(ctx)
	defer cancel()
	if undoErr := v.resume(undo); undoErr != nil {
		err = errors.Join(err, fmt.Errorf("the VF may not run any more: %w", undoErr))
	}
	return err
}

// stop does the work of Quiesce and leaves what it changed in held.
func (v *VF) stop(ctx context.Context) error {
	mask := v.b.Read(v.irq.MaskSet)
	if mask == allOnes {
		return ErrGone
	}
	v.held[v.irq.MaskSet] = v.readMask(mask) & v.irq.All
	v.b.Write(v.irq.MaskClear, v.irq.All)
	for _, q := range v.queues {
		ctl := v.b.Read(q.Ctl)
		if ctl == allOnes {
			return ErrGone
		}
		v.held[q.Ctl] = ctl &^ q.Flush
		v.held[q.Tail] = v.current(q.Tail)
		if err := v.drain(ctx, q, ctl); err != nil {
			return err
		}
		// Once the queue is off, no device knows any more what it had of an open
		// packet: on the source as well, the guest could not go on.
		r := v.rings[q.Ctl]
		lap, err := v.lapOf(r, ctl)
		if err != nil {
			return err
		}
		r.lap = lap
		if _, err := v.openPacket(r, v.current(q.Head)); err != nil {
			return err
		}
		head, err := v.stopHead(ctx, q, ctl)
		if err != nil {
			return err
		}
		v.heads[q.Head] = head
		start, err := v.openPacket(r, head)
		if err != nil {
			return err
		}
		if start != head {
			v.heads[q.Head], v.held[q.Head] = start, head
		}
		if err := v.stopDirect(q); err != nil {
			return err
		}
	}
	_, err := v.settleMailbox(ctx)
	return err
}

// openPacket returns where a transmit queue with its head there must go on: at
// the beginning of the packet of which the device has a part, for that part is
// gone once the queue is off. It fails if the guest may have taken that part
// back already, because the device has told that it is through with it: by a
// write-back, or by its head, which the guest has read.
func (v *VF) openPacket(r *ring, head uint32) (uint32, error) {
	m := r.followed()
	if m == nil || head >= m.size {
		return head, nil
	}
	end := m.end(v.f.Descriptors(), head)
	start, told := end.start, end.reports
	if start == head {
		return head, nil
	}
	// within tells whether a head that the guest knows of lies in the part.
	within := func(known uint32) bool {
		at := (known%m.size + m.size - start) % m.size
		return at > 0 && at <= (head+m.size-start)%m.size
	}
	if low := v.current(r.WBAL); r.WBAL != 0 && low&1 != 0 {
		var b [4]byte
		if err := v.o.Memory.ReadAt(uint64(v.current(r.WBAH))<<32|uint64(low&^3), b[:]); err != nil {
			return head, fmt.Errorf("%s: the head that the device has written back cannot be read: %w", queueName(r.Queue), err)
		}
		told = within(binary.LittleEndian.Uint32(b[:]))
	}
	told = told || r.wasRead && within(r.read)
	if told {
		return head, incompatible(ReasonHeadNotRestorable, "%s: the guest has handed over a part of a packet, from descriptor %d on, and the device "+
			"has told that it is through with that part: try again once the guest has handed over the rest", queueName(r.Queue), start)
	}
	return start, nil
}

// readMask is the mask of enabled vectors, given what the device says it is.
func (v *VF) readMask(value uint32) uint32 {
	if v.irq.MaskUnreadable {
		return v.mask
	}
	return value
}

// drain waits for a transmit queue to run empty. One that does not, say
// because the link is down, is no error: what the device has not taken is
// still in the ring, and the target will send it.
func (v *VF) drain(ctx context.Context, q family.Queue, ctl uint32) error {
	if q.Direction != family.TX || ctl&q.Enable == 0 {
		return nil
	}
	r := v.rings[q.Ctl]
	err := v.poll(ctx, v.o.DrainTimeout, queueName(q)+" is empty", func() (bool, error) {
		tail := v.held[q.Tail]
		if r.relay != nil {
			v.pump(r)
		}
		head := v.current(q.Head)
		switch {
		case head == allOnes:
			return false, ErrGone
		case r.relay != nil && r.mirror != nil && tail < r.mirror.size && head < r.mirror.size:
			// It keeps back what is open.
			start, size := r.mirror.end(v.f.Descriptors(), tail).start, r.mirror.size
			return (tail+size-head)%size <= (tail+size-start)%size, nil
		}
		return head == tail, nil
	})
	if errors.Is(err, errTimeout) {
		v.o.Logger.Warn("a transmit queue did not run empty; its rest is left to the target",
			"queue", q.Index, "head", v.current(q.Head), "tail", v.held[q.Tail])
		return nil
	}
	return err
}

// turnOff disables a queue and waits until it is off; only then the head
// holds still. A transmit queue is told to write its descriptors back with
// the same write, as the Linux driver does.
func (v *VF) turnOff(ctx context.Context, q family.Queue, ctl uint32) error {
	if ctl&q.Enable == 0 {
		return nil
	}
	off := ctl &^ (q.Enable | q.Flush)
	if q.Direction == family.TX {
		v.b.Write(q.Ctl, off|q.Flush)
	} else {
		v.b.Write(q.Ctl, off)
	}
	if err := v.awaitBits(ctx, v.o.QueueTimeout, queueName(q)+" is off", q.Ctl, q.Enable, 0); err != nil {
		return err
	}
	if q.Flush != 0 && v.b.Read(q.Ctl)&q.Flush != 0 {
		v.b.Write(q.Ctl, off) // a device that does not clear the bit by itself
	}
	return nil
}

// Unquiesce makes a quiesced VF run exactly as before: queues on at the heads
// where they stopped, tails and interrupt mask back, causes raised that came
// up meanwhile. It does nothing to a VF that runs. After an error the VF
// counts as running, as far as it does.
func (v *VF) Unquiesce(ctx context.Context) error {
	v.mu.Lock()
	defer v.unlock()
	if v.lost != nil {
		return fmt.Errorf("unquiesce: %w", ErrGone)
	}
	if v.held == nil {
		return nil
	}
	if err := v.resume(ctx); err != nil {
		return fmt.Errorf("unquiesce: %w", err)
	}
	return nil
}

// resume puts back what is in held, and goes on after a failure: a queue that
// runs is better than none. Heads come first, for they may take looped frames,
// which none of the guest's rings may get.
func (v *VF) resume(ctx context.Context) error {
	var errs []error
	failed := make(map[uint32]bool)
	v.heedDoorbells()
	for _, q := range v.queues {
		if head, stopped := v.heads[q.Head]; stopped && v.held[q.Ctl]&q.Enable != 0 {
			r := v.rings[q.Ctl]
			v.follow(r, head)
			way, err := v.bringHead(ctx, r, head, v.contexts(r, head))
			failed[q.Ctl] = err != nil
			if way != HeadsWriteVerify {
				delete(v.kept, q.Tail) // it had another ring meanwhile
			}
			errs = append(errs, err)
		}
	}
	for _, q := range v.startOrder() {
		if ctl, ok := v.held[q.Ctl]; ok && !failed[q.Ctl] {
			errs = append(errs, v.resumeQueue(ctx, q, ctl))
		}
	}
	v.mask = v.held[v.irq.MaskSet]
	v.b.Write(v.irq.MaskSet, v.mask)
	v.held, v.heads, v.kept = nil, nil, nil
	v.raise()
	return errors.Join(errs...)
}

func (v *VF) resumeQueue(ctx context.Context, q family.Queue, ctl uint32) error {
	head, stopped := v.heads[q.Head]
	r := v.rings[q.Ctl]
	if ctl&q.Enable == 0 {
		v.unfollow(r)
	}
	switch {
	case ctl&q.Enable == 0 || !stopped:
		// It was off before, or it failed to turn off.
		if v.b.Read(q.Ctl) != ctl {
			v.b.Write(q.Ctl, ctl)
		}
	default:
		if on, err := v.goOn(ctx, q, ctl, head); on || err != nil {
			return err
		}
		if err := v.turnOn(ctx, q, ctl, head, v.held[q.Tail]); err != nil {
			return err
		}
	}
	tail := v.held[q.Tail]
	v.handOver(r, tail)
	if r.relay != nil || stopped && ctl&q.Enable != 0 || v.b.Read(q.Tail) != tail {
		v.ringTail(r, tail)
	}
	return nil
}

// startOrder lists the queues in the order they are turned on: transmit
// queues first, so that what is received can be answered.
func (v *VF) startOrder() []family.Queue {
	order := make([]family.Queue, 0, len(v.queues))
	for _, d := range []family.Direction{family.TX, family.RX} {
		for _, q := range v.queues {
			if q.Direction == d {
				order = append(order, q)
			}
		}
	}
	return order
}

// setHead writes the head of a queue that is off, unless it is there already,
// and verifies it: whether an 82599 takes it is not certain.
func (v *VF) setHead(q family.Queue, head uint32) error {
	if v.b.Read(q.Head) == head {
		return nil
	}
	v.b.Write(q.Head, head)
	return v.verifyHead(q, head, "once written")
}

func (v *VF) verifyHead(q family.Queue, head uint32, when string) error {
	switch got := v.b.Read(q.Head); got {
	case head:
		return nil
	case allOnes:
		return ErrGone
	default:
		return &IncompatibleError{Reason: ReasonHeadNotRestorable,
			Message: fmt.Sprintf("%s: the head must be %d but reads %d %s", queueName(q), head, got, when)}
	}
}

// turnOn enables a queue that is off at head and waits until it is on. The
// tail is put on the head for that time: the ring is empty then, and the head
// must stand still. A device that ignores its tail while the queue is off is
// accepted only if it has the wanted one; any other would make it use
// descriptors that are not its own.
func (v *VF) turnOn(ctx context.Context, q family.Queue, ctl, head, tail uint32) error {
	if v.rings[q.Ctl].relay != nil {
		head, tail = 0, 0 // of the shadow ring, which has no descriptors yet
	}
	v.b.Write(q.Tail, head)
	there := v.b.Read(q.Tail)
	if there != head && there != tail {
		return &IncompatibleError{Reason: ReasonHeadNotRestorable,
			Message: fmt.Sprintf("%s: the tail was written as %d but reads %d while the queue is off", queueName(q), head, there)}
	}
	v.b.Write(q.Ctl, ctl&^q.Flush|q.Enable)
	if err := v.awaitBits(ctx, v.o.QueueTimeout, queueName(q)+" is on", q.Ctl, q.Enable, q.Enable); err != nil {
		return err
	}
	if there != head {
		return nil // it runs already
	}
	return v.verifyHead(q, head, "once the queue is on")
}

// raise raises the causes that were taken from the device.
func (v *VF) raise() {
	if v.causes != 0 {
		v.b.Write(v.irq.CauseSet, v.causes)
		v.causes = 0
	}
}
