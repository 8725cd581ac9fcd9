package compsc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"compsc.io/compsc/agent/family"
)

// Ways to bring the head of a ring to where it was, in the order in which
// they are tried: what the device does not do, its next one may. A report
// that has "rx=" and "tx=" names one for each direction.
const (
	// HeadsNone: no ring was in use.
	HeadsNone = "none"
	// HeadsWriteVerify: written while the queue was off, and read back before
	// and after it was turned on.
	HeadsWriteVerify = "write-verify"
	// HeadsDummyAdvance: the device advanced it itself, on a ring in scratch
	// memory: of context descriptors, which send nothing, or of buffers for
	// frames that the PF looped to its VF.
	HeadsDummyAdvance = "dummy-advance"
	// HeadsShadowRing: the device works on a ring of its own from the start,
	// and the engine relays between it and the guest's, until the guest's
	// passes its start.
	HeadsShadowRing = "shadow-ring"
)

// headsOrder ranks them.
var headsOrder = []string{HeadsNone, HeadsWriteVerify, HeadsDummyAdvance, HeadsShadowRing}

// headsReport names how the heads of both directions were restored.
func headsReport(by map[family.Direction]string) string {
	rx, tx := by[family.RX], by[family.TX]
	switch {
	case rx == "" && tx == "":
		return HeadsNone
	case rx == tx || tx == "":
		return rx
	case rx == "":
		return tx
	}
	return fmt.Sprintf("rx=%s,tx=%s", rx, tx)
}

// worse returns the later of two ways.
func worse(a, b string) string {
	if slices.Index(headsOrder, b) > slices.Index(headsOrder, a) {
		return b
	}
	return a
}

// bringHead brings the head of a queue that is off, and whose registers are
// as the guest programmed them, to where it was. It returns how, or an
// *IncompatibleError if the device allows none of the ways.
func (v *VF) bringHead(ctx context.Context, r *ring, head uint32, slots [][]byte) (string, error) {
	// A device that was found not to keep what it takes is not asked again.
	ways := headsOrder[1:]
	if v.fixed[r.Direction] && head != 0 {
		ways = ways[1:]
	}
	var all []string
	for _, way := range ways {
		var err error
		switch way {
		case HeadsWriteVerify:
			err = v.setHead(r.Queue, head)
		case HeadsDummyAdvance:
			err = v.advance(ctx, r, head, slots)
		case HeadsShadowRing:
			err = v.startRelay(r, head, false)
		}
		if err == nil {
			return way, nil
		}
		if errors.Is(err, ErrGone) || ctx.Err() != nil {
			return "", err
		}
		all = append(all, way+": "+strings.TrimPrefix(err.Error(), ReasonHeadNotRestorable+": "))
	}
	return "", incompatible(ReasonHeadNotRestorable, "%s", strings.Join(all, "; "))
}

// advance has the device advance the head of a queue that is off.
func (v *VF) advance(ctx context.Context, r *ring, head uint32, slots [][]byte) error {
	if r.Direction == family.TX {
		return v.walkContexts(ctx, r, slots, func(from, size uint32) (uint32, error) {
			if head >= size {
				return 0, fmt.Errorf("head %d is outside of a ring of %d descriptors", head, size)
			}
			return (head + size - from) % size, nil
		}, &head)
	}
	return v.walkFrames(ctx, r, head, v.log.Summary().MAC)
}

// loadRing is the length in descriptors of the ring that contexts are loaded
// with: the shortest there is.
const loadRing = 8

// loadContexts fills the context slots of a transmit queue that is off with
// what they held. It leaves the head elsewhere.
func (v *VF) loadContexts(ctx context.Context, r *ring, slots [][]byte) error {
	n := uint32(0)
	for _, d := range slots {
		if d != nil {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	// The guest may have no ring there now; the slots outlive the last one.
	length := v.b.Read(r.LEN)
	v.b.Write(r.LEN, loadRing*r.DescriptorSize)
	defer v.b.Write(r.LEN, length)
	return v.walkContexts(ctx, r, slots, func(_, size uint32) (uint32, error) { return n % size, nil }, nil)
}

// walkContexts has a transmit queue consume context descriptors from scratch
// memory, as many as steps says: those of slots in turn, or idle ones if
// there are none. Where it must stand once it is off again is verified if
// given.
func (v *VF) walkContexts(ctx context.Context, r *ring, slots [][]byte, steps func(from, size uint32) (uint32, error), want *uint32) error {
	var fill [][]byte
	for _, d := range slots {
		if d != nil {
			fill = append(fill, d)
		}
	}
	if len(fill) == 0 {
		fill = [][]byte{v.f.Descriptors().IdleContext()}
	}
	return v.onScratch(ctx, r, func(i uint32, _ uint64) []byte { return fill[i%uint32(len(fill))] }, want,
		func(from, size uint32) error {
			n, err := steps(from, size)
			if err != nil || n == 0 {
				return err
			}
			return v.walk(ctx, r, (from+n)%size, nil)
		})
}

// walk rings the doorbell of a queue and waits until its head is there.
func (v *VF) walk(ctx context.Context, r *ring, to uint32, feed func(left uint32) error) error {
	v.b.Write(r.Tail, to)
	size := v.b.Read(r.LEN) / r.DescriptorSize
	return v.poll(ctx, v.o.QueueTimeout, fmt.Sprintf("%s has advanced to %d", queueName(r.Queue), to), func() (bool, error) {
		head := v.b.Read(r.Head)
		switch {
		case head == allOnes:
			return false, ErrGone
		case head == to:
			return true, nil
		case feed == nil:
			return false, nil
		}
		if err := feed((to + size - head) % size); err != nil {
			return false, err
		}
		return v.b.Read(r.Head) == to, nil
	})
}

// walkFrames has a receive queue consume frames that the PF loops to mac. All
// other queues must be off: some of the frames are meant for them. The guest
// sees nothing of the frames, in its counters as elsewhere.
func (v *VF) walkFrames(ctx context.Context, r *ring, head uint32, mac []byte) error {
	looper, ok := v.b.(Looper)
	if !ok {
		return errors.New("the PF cannot loop frames to this VF")
	}
	if len(mac) != 6 {
		return errors.New("the VF has no address to loop frames to")
	}
	for _, q := range v.queues {
		if q.Ctl != r.Ctl && v.b.Read(q.Ctl)&q.Enable != 0 {
			return fmt.Errorf("frames cannot be looped to the VF while its %s is on", queueName(q))
		}
	}
	counted := make([]uint64, len(v.counters))
	for i, c := range v.counters {
		counted[i] = v.value(c)
	}
	v.causes |= v.b.Read(v.irq.Cause) & v.irq.All
	defer func() {
		v.b.Read(v.irq.Cause)
		for i, c := range v.counters {
			v.rebase(c, counted[i])
		}
	}()
	flow := uint32(0)
	// The guest may have its headers split off: they must not go to its memory.
	buffers := func(_ uint32, spare uint64) []byte { return v.f.Descriptors().Buffer(spare, spare+spareSize/2) }
	return v.onScratch(ctx, r, buffers, &head,
		func(from, size uint32) error {
			if head >= size {
				return fmt.Errorf("head %d is outside of a ring of %d descriptors", head, size)
			}
			// Frames spread over the queues, and only those that are meant for
			// this one find it on: flows change, and more are sent than needed.
			return v.walk(ctx, r, head, func(left uint32) error {
				for range left {
					if err := looper.Loop(loopFrame(mac, flow)); err != nil {
						return err
					}
					flow++
				}
				return nil
			})
		})
}

// onScratch turns a queue that is off on with a ring of its own length in
// scratch memory while run works with it, turns it off, and puts its
// registers back. Fill gives the descriptors; run gets the head. If want is
// given, the head must be there once the queue is off.
func (v *VF) onScratch(ctx context.Context, r *ring, fill func(i uint32, spare uint64) []byte, want *uint32, run func(from, size uint32) error) (err error) {
	length := v.b.Read(r.LEN)
	addr, spare, err := v.scratchOf(r.Queue, length)
	if err != nil {
		return err
	}
	size := length / r.DescriptorSize
	from := v.b.Read(r.Head)
	if from >= size {
		if err := v.setHead(r.Queue, 0); err != nil {
			return err
		}
		from = 0
	}
	b := make([]byte, 0, length)
	for i := range size {
		b = append(b, fill(i, spare)...)
	}
	if err := v.o.Scratch.WriteAt(addr, b); err != nil {
		return fmt.Errorf("scratch memory: %w", err)
	}
	saved := make(map[uint32]uint32)
	for off, value := range map[uint32]uint32{r.BAL: uint32(addr), r.BAH: uint32(addr >> 32), r.WBAL: 0, r.WBAH: 0} {
		if off != 0 {
			saved[off] = v.b.Read(off)
			v.b.Write(off, value)
		}
	}
	ctl := v.b.Read(r.Ctl)
	defer func() {
		// Also after a failure the queue must leave this memory.
		undo, cancel := v.undoContext(ctx)
		defer cancel()
		err = errors.Join(err, v.turnOff(undo, r.Queue, v.b.Read(r.Ctl)))
		for off, value := range saved {
			v.b.Write(off, value)
		}
		v.b.Write(r.Ctl, ctl)
		if err == nil && want != nil {
			err = v.verifyHead(r.Queue, *want, "once the queue is off")
		}
	}()
	if err := v.turnOn(ctx, r.Queue, ctl, from, from); err != nil {
		return err
	}
	return run(from, size)
}

// stopHead turns a queue off and returns where its head stopped, even on a
// device that forgets it then: the descriptors written back tell as well.
func (v *VF) stopHead(ctx context.Context, q family.Queue, ctl uint32) (uint32, error) {
	if r := v.rings[q.Ctl]; r.relay != nil {
		return v.endRelay(ctx, r)
	}
	var before []byte
	var p place
	if v.o.Memory != nil && ctl&q.Enable != 0 {
		p = v.placeOf(q)
		before = make([]byte, p.size*q.DescriptorSize)
		if err := v.o.Memory.ReadAt(p.base, before); err != nil {
			before = nil
		}
	}
	last := v.b.Read(q.Head)
	if err := v.turnOff(ctx, q, ctl); err != nil {
		return 0, err
	}
	head := v.b.Read(q.Head)
	if head != 0 || last == allOnes || before == nil || last >= p.size {
		return head, nil
	}
	after := make([]byte, len(before))
	if err := v.o.Memory.ReadAt(p.base, after); err != nil {
		return head, fmt.Errorf("%s: its ring cannot be read: %w", queueName(q), err)
	}
	head = last
	for i, tail := last, v.held[q.Tail]; i != tail && tail < p.size; {
		b := i * q.DescriptorSize
		i = (i + 1) % p.size
		if !slices.Equal(before[b:b+q.DescriptorSize], after[b:b+q.DescriptorSize]) {
			head = i
		}
	}
	return head, nil
}

// loopFrame is a frame of the flow with that number: a UDP packet to the
// discard port of the VF's MAC, from a locally administered one.
func loopFrame(mac []byte, flow uint32) []byte {
	f := make([]byte, 60)
	copy(f, mac)
	copy(f[6:], []byte{2, 0, 0, 0, 0, 1, 0x08, 0x00})
	ip := f[14:34]
	// Addresses of TEST-NET-1 and of the benchmarking range (RFC 6890).
	copy(ip, []byte{0x45, 0, 0, 28, 0, 0, 0, 0, 1, 17, 0, 0, 198, 18, byte(flow >> 8), byte(flow), 192, 0, 2, 1})
	var sum uint32
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	sum = sum>>16 + sum&0xffff
	sum = ^(sum>>16 + sum)
	ip[10], ip[11] = byte(sum>>8), byte(sum)
	copy(f[34:], []byte{0, 9, 0, 9, 0, 8, 0, 0})
	return f
}
