package compsc

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"compsc.io/compsc/agent/family"
)

// relay stands between a guest's ring and a device that cannot take up its
// position: the device works on a shadow ring in scratch memory that starts at
// index 0, and the engine copies descriptors one way and write-backs the
// other. It ends when the guest's ring passes its start, where the device can
// be put on it. Shadow descriptor i is descriptor origin+i of the guest's.
type relay struct {
	place
	origin uint32
	// shadow and spare are addresses in the scratch memory; the device writes
	// its head to spare if the guest asked for that.
	shadow, spare uint64
	format        uint32
	// regs is what the guest finds in the registers that the relay uses.
	regs map[uint32]uint32
	// total counts the descriptors that the guest handed over, given those of
	// them that the device has, done those that the guest has back, told those
	// whose write-backs it has.
	total, given, done, told uint32
	// tail is the guest's last doorbell that makes sense.
	tail uint32
	// limit is where this relay ends: at the start of the guest's ring, or,
	// across it, one lap on because a packet lies there.
	limit  uint32
	across bool
	// reports tells which descriptors are to be written back.
	reports []bool
	// moved is when the device last made progress.
	moved time.Time
	// broken is set when the queue could not be put on again.
	broken bool
}

// relayPatience is how long a receive queue may stand with relayFew
// descriptors left before it is taken for one whose next frame needs more of
// them. No frame needs more: the largest have 9.5 KiB, the smallest buffers 1.
const (
	relayPatience = 10 * time.Millisecond
	relayFew      = 10
)

// relayChunk is how many write-backs are looked at at once.
const relayChunk = 32

// relayIdle is the longest time between two looks at relays that are idle.
const relayIdle = time.Millisecond

// startRelay programs a queue that is off to work on a shadow ring for a
// guest whose ring stands at head. With across the relay goes on for a lap.
func (v *VF) startRelay(r *ring, head uint32, across bool) error {
	if v.direct(r.Tail) {
		return errDirect
	}
	if v.o.Memory == nil {
		return fmt.Errorf("%s: the guest's memory is not at hand", queueName(r.Queue))
	}
	length := v.b.Read(r.LEN)
	p := place{base: uint64(v.b.Read(r.BAH))<<32 | uint64(v.b.Read(r.BAL)), size: length / r.DescriptorSize}
	if head == 0 || head >= p.size {
		return fmt.Errorf("%s: head %d of a ring of %d descriptors is nothing to relay", queueName(r.Queue), head, p.size)
	}
	shadow, spare, err := v.scratchOf(r.Queue, length)
	if err != nil {
		return err
	}
	if err := v.setHead(r.Queue, 0); err != nil {
		return err
	}
	rel := &relay{place: p, origin: head, shadow: shadow, spare: spare, regs: make(map[uint32]uint32),
		tail: head, limit: p.size - head, across: across, reports: make([]bool, p.size), moved: v.o.Clock.Now()}
	if across {
		rel.limit = p.size - 1
	}
	if r.Format != 0 {
		rel.format = v.b.Read(r.Format)
	}
	if err := v.o.Scratch.WriteAt(spare, make([]byte, 4)); err != nil {
		return fmt.Errorf("scratch memory: %w", err)
	}
	for _, off := range []uint32{r.BAL, r.BAH, r.LEN, r.WBAL, r.WBAH} {
		if off != 0 {
			rel.regs[off] = v.b.Read(off)
		}
	}
	rel.regs[r.Tail] = head
	r.relay = rel
	v.b.Write(r.BAL, uint32(shadow))
	v.b.Write(r.BAH, uint32(shadow>>32))
	v.writeBackTo(r)
	v.relays.Add(1)
	v.watchRelays()
	return nil
}

// writeBackTo has the device write its head to the spare memory if the guest
// wants it written.
func (v *VF) writeBackTo(r *ring) {
	if r.WBAL == 0 {
		return
	}
	v.b.Write(r.WBAH, uint32(r.relay.spare>>32))
	if flags := r.relay.regs[r.WBAL] & 3; flags != 0 {
		v.b.Write(r.WBAL, uint32(r.relay.spare)|flags)
	} else {
		v.b.Write(r.WBAL, 0)
	}
}

// followZeroed takes over that the PF has turned head write-back off, as ixgbe
// does with every RESET message: relayed rings have it off for the guest too.
func (v *VF) followZeroed() {
	for _, q := range v.queues {
		r := v.rings[q.Ctl]
		if r.relay != nil && r.WBAL != 0 && r.relay.regs[r.WBAL] != 0 && v.b.Read(r.WBAL) == 0 {
			r.relay.regs[r.WBAL], r.relay.regs[r.WBAH] = 0, v.b.Read(r.WBAH)
		}
	}
}

// show is what the guest finds in a register of a relayed queue.
func (rel *relay) show(r *ring, off uint32) (uint32, bool) {
	if off == r.Head {
		return rel.at(rel.done), true
	}
	value, ok := rel.regs[off]
	return value, ok
}

// at is the guest's index of a shadow descriptor.
func (rel *relay) at(i uint32) uint32 { return (rel.origin + i) % rel.size }

// relayWrite takes a guest's write to a register of a relayed queue.
func (v *VF) relayWrite(r *ring, off, val uint32) {
	rel := r.relay
	switch off {
	case r.Tail:
		v.relayTail(r, val)
	case r.Head: // ignored while the queue is on
	case r.Ctl:
		v.b.Write(off, val)
		if val&r.Enable != 0 {
			return
		}
		ctx, cancel := v.undoContext(context.Background())
		defer cancel()
		head, err := v.endRelay(ctx, r)
		if err != nil {
			v.o.Logger.Error("a queue under relay does not stop", "queue", queueName(r.Queue), "error", err)
		}
		v.showHead(r, head)
	default:
		rel.regs[off] = val
		v.writeBackTo(r)
	}
}

// relayTail takes the guest's doorbell.
func (v *VF) relayTail(r *ring, tail uint32) {
	rel := r.relay
	if tail < rel.size {
		rel.total += (tail + rel.size - rel.tail) % rel.size
		rel.tail = tail
	}
	rel.regs[r.Tail] = tail
	v.feed(r)
}

// feed gives the device what it may have: up to the limit, and of what is to
// be sent only whole packets, for one that is cut in two is lost.
func (v *VF) feed(r *ring) {
	rel, f, size := r.relay, v.f.Descriptors(), r.DescriptorSize
	want := min(rel.total, rel.limit)
	if want <= rel.given {
		return
	}
	b := make([]byte, (want-rel.given)*size)
	for at := rel.given; at < want; {
		n := min(want-at, rel.size-rel.at(at))
		part := b[(at-rel.given)*size:][:n*size]
		if err := v.o.Memory.ReadAt(rel.base+uint64(rel.at(at)*size), part); err != nil {
			v.o.Logger.Debug("descriptors cannot be read", "queue", queueName(r.Queue), "error", err)
			return // again with the next look
		}
		at += n
	}
	end, open := rel.given, false
	for i := rel.given; i < want; i++ {
		d := b[(i-rel.given)*size:][:size]
		switch {
		case r.Direction == family.RX:
			f.HandOver(rel.format, d)
			end = i + 1
			continue
		case f.Packet(d):
			open = !f.EndOfPacket(family.TX, 0, d)
		}
		rel.reports[i] = f.Reports(d) && f.Packet(d)
		if !open {
			end = i + 1
		}
	}
	if end == rel.given {
		return
	}
	if err := v.o.Scratch.WriteAt(rel.shadow+uint64(rel.given*size), b[:(end-rel.given)*size]); err != nil {
		v.o.Logger.Error("scratch memory", "error", err)
		return
	}
	rel.given = end
	v.b.Write(r.Tail, end)
}

// collect gives the guest the write-backs that the device has made, and tells
// whether there were any.
func (v *VF) collect(r *ring) (bool, error) {
	rel := r.relay
	from := rel.done
	collect := v.collectTX
	if r.Direction == family.RX {
		collect = v.collectRX
	}
	told, err := collect(r)
	if rel.done != from {
		rel.moved = v.o.Clock.Now()
	}
	return told, err
}

// collectRX gives the guest whole packets, so that one that the device could
// not finish is received anew. It goes by the write-backs alone, for the head
// may run ahead of them.
func (v *VF) collectRX(r *ring) (bool, error) {
	rel, f, size := r.relay, v.f.Descriptors(), r.DescriptorSize
	var b []byte
	end := rel.done
	var open openPackets
	for i := rel.done; i < rel.given; i++ {
		if at := (i - rel.done) * size; at == uint32(len(b)) {
			b = append(b, make([]byte, min(rel.given-i, relayChunk)*size)...)
			if err := v.o.Scratch.ReadAt(rel.shadow+uint64(i*size), b[at:]); err != nil {
				return false, err
			}
		}
		d := b[(i-rel.done)*size:][:size]
		if !f.Done(family.RX, rel.format, d) {
			break
		}
		if open.read(f, rel.format, i, d) {
			end = i + 1
		}
	}
	for i := rel.done; i < end; i++ {
		d := b[(i-rel.done)*size:][:size]
		if next, ok := f.Next(rel.format, d); ok {
			f.SetNext(rel.format, d, rel.at(next))
		}
		addr := rel.base + uint64(rel.at(i)*size)
		// Drivers look at the last half: it makes the rest valid.
		for _, half := range [][]byte{d[:size/2], d[size/2:]} {
			if err := v.o.Memory.WriteAt(addr, half); err != nil {
				rel.done, end = i, i
				return i > rel.told, err // again with the next look
			}
			addr += uint64(len(half))
		}
	}
	told := end > rel.done
	rel.done, rel.told = end, end
	return told, nil
}

// collectTX gives the guest the status of the descriptors that ask for it, or
// the device's head if the guest asked for that instead. A device that forgets
// its head when its queue stops is at least where its write-backs say.
func (v *VF) collectTX(r *ring) (told bool, err error) {
	rel, f, size := r.relay, v.f.Descriptors(), r.DescriptorSize
	head := v.b.Read(r.Head)
	if head == allOnes {
		return false, ErrGone
	}
	if head > rel.given {
		return false, fmt.Errorf("%s: the device is at %d of %d descriptors", queueName(r.Queue), head, rel.given)
	}
	rel.done = max(rel.done, head)
	if low := rel.regs[r.WBAL]; low&1 != 0 {
		var b [4]byte
		if err := v.o.Scratch.ReadAt(rel.spare, b[:]); err != nil {
			return false, err
		}
		at := binary.LittleEndian.Uint32(b[:])
		if at <= rel.told || at > rel.given {
			return false, nil // none that the guest has not been told of, since it asked for heads
		}
		binary.LittleEndian.PutUint32(b[:], rel.at(at))
		if err := v.o.Memory.WriteAt(uint64(rel.regs[r.WBAH])<<32|uint64(low&^3), b[:]); err != nil {
			return false, err
		}
		rel.told, rel.done = at, max(rel.done, at)
		return true, nil
	}
	d := make([]byte, size)
	for ; rel.told < rel.given; rel.told++ {
		if !rel.reports[rel.told] {
			continue
		}
		if err := v.o.Scratch.ReadAt(rel.shadow+uint64(rel.told*size), d); err != nil {
			return told, err
		}
		if !f.Done(family.TX, 0, d) {
			return told, nil
		}
		status := size - 4
		if err := v.o.Memory.WriteAt(rel.base+uint64(rel.at(rel.told)*size+status), d[status:]); err != nil {
			return told, err
		}
		told = true
		rel.done = max(rel.done, rel.told+1)
	}
	return told, nil
}

// endRelay turns a relayed queue off, gives the guest its last write-backs and
// puts the registers back. It returns where the guest's ring stands.
func (v *VF) endRelay(ctx context.Context, r *ring) (uint32, error) {
	rel := r.relay
	err := v.turnOff(ctx, r.Queue, v.b.Read(r.Ctl)|r.Enable)
	if err == nil {
		_, err = v.collect(r)
	}
	r.relay = nil
	v.relays.Add(-1)
	for off, value := range rel.regs {
		v.b.Write(off, value)
	}
	return rel.at(rel.done), err
}

// showHead has the guest see head in a queue that is off, whatever the device
// has there.
func (v *VF) showHead(r *ring, head uint32) {
	r.head, r.headShown = head, v.b.Read(r.Head) != head
}

// pump looks after one relay: gives, collects, and ends it where it ends. It
// tells whether the guest is to be interrupted.
func (v *VF) pump(r *ring) bool {
	rel := r.relay
	if rel.broken {
		return false
	}
	v.feed(r)
	told, err := v.collect(r)
	if err != nil {
		v.o.Logger.Debug("write-backs cannot be relayed", "queue", queueName(r.Queue), "error", err)
		return told
	}
	across := false
	switch idle := rel.done == rel.given && rel.total > rel.given; {
	case rel.done == rel.limit && (r.Direction == family.RX || v.allTold(r)):
	case r.Direction == family.TX && idle && rel.total >= rel.limit && v.allTold(r):
		across = true // the next packet lies across the limit
	case r.Direction == family.RX && rel.given == rel.limit && rel.limit-rel.done < relayFew && (rel.done > 0 || !rel.across) &&
		v.o.Clock.Now().Sub(rel.moved) > relayPatience:
		across = true // the next frame may
	default:
		return told
	}
	ctx, cancel := v.undoContext(context.Background())
	defer cancel()
	if err := v.moveOn(ctx, r, across); err != nil {
		v.o.Logger.Error("a queue under relay stands still; its driver will reset the VF", "queue", queueName(r.Queue), "error", err)
		if r.relay != nil {
			r.relay.broken = true
		}
	}
	return true
}

// allTold tells whether nothing is left to be written back.
func (v *VF) allTold(r *ring) bool {
	rel := r.relay
	if rel.regs[r.WBAL]&1 != 0 {
		return true // the last head may be one that nobody asked for
	}
	return !slices.Contains(rel.reports[min(rel.told, rel.done):rel.done], true)
}

// moveOn ends a relay at its limit: with the guest's ring at its start the
// device is put on it, anywhere else the relay goes on from there.
func (v *VF) moveOn(ctx context.Context, r *ring, across bool) error {
	ctl, tail := v.b.Read(r.Ctl), r.relay.regs[r.Tail]
	head, err := v.endRelay(ctx, r)
	if err != nil {
		return err
	}
	if head != 0 {
		err = v.startRelay(r, head, across)
	} else {
		err = v.setHead(r.Queue, 0)
	}
	if err == nil {
		err = v.turnOn(ctx, r.Queue, ctl, head, tail)
	}
	if err != nil {
		return err
	}
	v.ringTail(r, tail)
	return nil
}

// ringTail rings the doorbell of a queue that is on.
func (v *VF) ringTail(r *ring, tail uint32) {
	if r.relay != nil {
		v.relayTail(r, tail)
		return
	}
	v.b.Write(r.Tail, tail)
}

// Interrupt must be called before a vector is signalled to the guest: what the
// device has written back before it must reach the guest before it does. It
// never waits for another call, and may be called during any.
func (v *VF) Interrupt(int) {
	if v.relays.Load() == 0 {
		return
	}
	v.due.Store(true)
	if !v.mu.TryLock() {
		return // who has the lock does it, and interrupts the guest again
	}
	v.due.Store(false)
	v.pumpAll(false)
	v.unlock()
}

// unlock releases the lock once what came up meanwhile is done.
func (v *VF) unlock() {
	for {
		if v.due.Load() && v.due.Swap(false) { // to look costs less than to write
			v.pumpAll(true)
		}
		v.mu.Unlock()
		if !v.due.Load() || !v.mu.TryLock() {
			return
		}
	}
}

// pumpAll looks after every relay, and interrupts the guest where it found
// something if asked to. It tells whether it did find something.
func (v *VF) pumpAll(interrupt bool) bool {
	if v.relays.Load() == 0 || v.held != nil {
		return false
	}
	found := false
	var vectors uint32
	for _, q := range v.queues {
		if r := v.rings[q.Ctl]; r.relay != nil && v.pump(r) {
			found = true
			if b := uint8(v.b.Read(q.Assign) >> q.AssignShift); b&v.irq.AssignValid != 0 {
				vectors |= 1 << (b & v.irq.AssignVector)
			}
		}
	}
	if vectors &= v.irq.All; interrupt && vectors != 0 {
		v.b.Write(v.irq.CauseSet, vectors)
	}
	return found
}

// watchRelays looks after the relays of guests that poll, and of interrupts
// that are masked, for as long as there are any. It is called with the lock
// held.
func (v *VF) watchRelays() {
	if v.watching {
		return
	}
	v.watching = true
	go func() {
		wait := v.o.RelayPoll
		t := time.NewTimer(wait)
		defer t.Stop()
		for range t.C {
			v.mu.Lock()
			if v.pumpAll(true) {
				wait = v.o.RelayPoll
			} else {
				wait = min(2*wait, max(relayIdle, v.o.RelayPoll))
			}
			if v.relays.Load() == 0 {
				v.watching = false
			}
			watching := v.watching
			v.unlock()
			if !watching {
				return
			}
			t.Reset(wait)
		}
	}()
}
