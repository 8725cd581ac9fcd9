package model

import (
	"encoding/binary"
	"slices"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Fields of transmit descriptors. Dword 2 of data descriptors holds the length
// and the commands, dword 3 status, context, options and payload length.
const (
	txLengthMask = 0xffff
	txTypeShift  = 20
	txTypeMask   = 0xf
	txEOP        = 1 << 24
	txIC         = 1 << 26 // legacy: insert a checksum
	txRS         = 1 << 27
	txDEXT       = 1 << 29 // advanced format
	txVLE        = 1 << 30
	txTSE        = 1 << 31 // advanced: segment
	txIDX        = 1 << 4  // context slot
	txIXSM       = 1 << 8  // insert the IP checksum
	txTXSM       = 1 << 9  // insert the L4 checksum

	typeContext = 2
	typeData    = 3

	txDD = 1
)

// Limits of what one turn of the transmit engine takes on, and of a packet.
const (
	batchDescriptors = 256
	batchBytes       = 256 << 10
	// maxPacket is the largest packet to segment: 18 bits of PAYLEN, and
	// headers.
	maxPacket = 1<<18 + 1024
	// maxTXFrame is the largest frame that is sent as it is.
	maxTXFrame = 15872
)

// txQueue is what a transmit queue keeps outside its registers.
type txQueue struct {
	// contexts are the two slots that context descriptors fill. Software
	// cannot read them.
	contexts [2]txContext
	// packet is being put together; open tells that it has begun, and discard
	// that what follows up to the end of the packet is thrown away.
	packet        packet
	open, discard bool
	// stopping tells that the queue was told to stop while a batch of its
	// was on the way out; it still reads as enabled.
	stopping bool
	// unmapped tells that memory for the next descriptor was not there.
	unmapped bool
	// owed are write-backs whose memory was not there.
	owed []writeBack
}

// batch is what the engine has fetched from one queue: packets that are to be
// sent, and descriptors that are to be written back after that.
type batch struct {
	queue   int
	head    uint32 // after the batch
	packets []packet
	report  []report
	// sent and octets are counted as the batch goes out.
	sent, octets, failed uint64
	// unplugged tells that all of it is lost, for the link is down.
	unplugged bool
}

// report is a descriptor that asked to be told when it is done.
type report struct {
	addr   uint64
	legacy bool
	// head is the position after it.
	head uint32
}

// writeBack is a write to the guest's memory.
type writeBack struct {
	addr uint64
	data []byte
}

// wake makes the engine look at the queues.
func (v *VF) wake() {
	select {
	case v.kick <- struct{}{}:
	default:
	}
}

// engine is the VF's goroutine: it takes turns at the transmit queues. Only
// it calls the wire.
func (v *VF) engine() {
	defer close(v.done)
	for {
		select {
		case <-v.quit:
			return
		case <-v.kick:
		}
		for v.transmitTurn() {
		}
	}
}

// transmitTurn gives every queue one batch, and reports whether any had work.
func (v *VF) transmitTurn() bool {
	worked := false
	for q := range v.tx {
		v.mu.Lock()
		b := v.fetch(q)
		v.busy, v.busyQueue = b != nil, q
		if b != nil {
			b.unplugged = v.unplugged
		}
		epoch := v.epoch.Load()
		v.unlock()
		if b == nil {
			continue
		}
		worked = true
		v.send(b, epoch)
		v.mu.Lock()
		v.finish(b, epoch)
		v.unlock()
	}
	return worked
}

// send puts a batch on the wire, without the lock, for as long as the VF is
// not reset.
func (v *VF) send(b *batch, epoch uint64) {
	for i := range b.packets {
		b.packets[i].frames(func(frame []byte) bool {
			if v.epoch.Load() != epoch {
				return false
			}
			n := uint64(len(frame))
			if !b.unplugged && v.wire.Transmit(frame) != nil {
				b.failed++
			}
			// To the VF a frame that the network loses has been sent.
			b.sent++
			b.octets += n
			return true
		})
	}
}

// finish writes a batch back, unless the VF was reset meanwhile.
func (v *VF) finish(b *batch, epoch uint64) {
	v.busy = false
	v.stats.Transmitted += b.sent
	v.stats.TXFailed += b.failed
	v.counters.GPTC += b.sent
	v.counters.GOTC += b.octets
	if v.epoch.Load() == epoch {
		v.regs[ixgbevf.VFTDH(b.queue)/4] = b.head
		v.report(b)
		if v.tx[b.queue].stopping {
			v.disableTX(b.queue)
		}
	}
	v.resetDone()
	v.idle.Broadcast()
}

// report tells the guest about finished descriptors: by their DD bits, or by
// the head after the last of them if it asked for that. How far the batch went
// beyond does not show, for no guest can rely on it.
func (v *VF) report(b *batch) {
	if len(b.report) == 0 {
		return
	}
	queue := &v.tx[b.queue]
	low := v.regs[ixgbevf.VFTDWBAL(b.queue)/4]
	if low&ixgbevf.TDWBALEnable != 0 {
		high := uint64(v.regs[ixgbevf.VFTDWBAH(b.queue)/4])
		head := binary.LittleEndian.AppendUint32(nil, b.report[len(b.report)-1].head)
		queue.owed = append(queue.owed, writeBack{high<<32 | uint64(low&^3), head})
	} else {
		for _, r := range b.report {
			status := []byte{txDD, 0, 0, 0}
			if r.legacy {
				status = status[:1]
			}
			queue.owed = append(queue.owed, writeBack{r.addr + 12, status})
		}
	}
	v.writeBack(b.queue)
}

// writeBack writes what is owed to the guest.
func (v *VF) writeBack(q int) {
	queue := &v.tx[q]
	for len(queue.owed) > 0 {
		if w := queue.owed[0]; !v.dma(v.mem.WriteAt(w.addr, w.data)) {
			queue.unmapped = true
			v.retryLater()
			return
		}
		queue.owed = queue.owed[1:]
	}
	queue.owed = nil
	v.queueCause(q, true)
}

// fetch takes descriptors of a queue up to the limits of a batch; nil means
// that there is nothing to do. The work is bounded by the ring.
func (v *VF) fetch(q int) *batch {
	queue := &v.tx[q]
	if v.closed || !v.pf.vfte || queue.stopping || queue.unmapped ||
		v.regs[ixgbevf.VFTXDCTL(q)/4]&ixgbevf.QueueEnable == 0 {
		return nil
	}
	if len(queue.owed) > 0 {
		if v.writeBack(q); queue.unmapped {
			return nil
		}
	}
	r := v.ringAt(ixgbevf.VFTDBAL(q))
	b := &batch{queue: q}
	taken, octets := 0, 0
	for taken < min(r.available(), batchDescriptors) && octets < batchBytes {
		var d descriptor
		n, ok := 0, v.dma(v.mem.ReadAt(r.at(taken), d[:]))
		if ok {
			n, ok = v.take(queue, b, &d)
		}
		if !ok {
			queue.unmapped = true
			v.retryLater()
			break
		}
		v.retryDelay = 0
		if d.command()&txRS != 0 {
			b.report = append(b.report, report{r.at(taken), d.command()&txDEXT == 0, r.after(taken + 1)})
		}
		taken++
		octets += n
	}
	if taken == 0 {
		return nil
	}
	b.head = r.after(taken)
	return b
}

// descriptor is one transmit descriptor.
type descriptor [descriptorSize]byte

func (d *descriptor) address() uint64 { return binary.LittleEndian.Uint64(d[:]) }
func (d *descriptor) word(n int) uint32 {
	return binary.LittleEndian.Uint32(d[4*n:])
}
func (d *descriptor) command() uint32 { return d.word(2) }

// take consumes a descriptor. It returns the octets it moved, and false, with
// nothing consumed, if the buffer was not mapped.
func (v *VF) take(queue *txQueue, b *batch, d *descriptor) (int, bool) {
	command := d.command()
	kind := command >> txTypeShift & txTypeMask
	length := int(command & txLengthMask)
	if command&txDEXT != 0 && kind == typeContext {
		queue.contexts[d.word(3)/txIDX&1] = contextOf(d)
		return 0, true
	}
	malformed := command&txDEXT != 0 && kind != typeData
	if malformed || len(queue.packet.data)+length > maxPacket {
		queue.discard = true
		queue.packet.data = nil
	}
	if !queue.discard {
		at := len(queue.packet.data)
		data := slices.Grow(queue.packet.data, length)[:at+length]
		if length > 0 && !v.dma(v.mem.ReadAt(d.address(), data[at:])) {
			return 0, false
		}
		if !queue.open {
			queue.packet = packetOf(d, &queue.contexts)
			queue.open = true
		}
		queue.packet.data = data
	}
	if command&txEOP == 0 {
		return length, true
	}
	v.endPacket(queue, b, d)
	return length, true
}

// endPacket adds the packet that d ends to the batch if it may be sent.
func (v *VF) endPacket(queue *txQueue, b *batch, d *descriptor) {
	p, discard := queue.packet, queue.discard
	queue.packet, queue.open, queue.discard = packet{}, false, false
	if d.command()&txDEXT == 0 {
		p.legacyEnd(d)
	}
	if v.pf.portVLAN != 0 {
		p.insertTag, p.tag = true, v.pf.portVLAN
	}
	switch {
	case discard || !p.valid():
		v.stats.TXMalformed++
	case v.pf.spoofed(p.data[6:12]):
		v.stats.TXSpoofed++
	default:
		b.packets = append(b.packets, p)
	}
}

// writeTX is writeRX for a transmit queue.
func (v *VF) writeTX(q int, inner, val uint32) bool {
	ctl := ixgbevf.VFTXDCTL(q)
	switch inner {
	case ixgbevf.VFTDH(0) - ixgbevf.VFTDBAL(0):
		v.writeHead(ixgbevf.VFTDH(q), ctl, val, v.cfg.WritableTXHead)
	case ixgbevf.VFTDT(0) - ixgbevf.VFTDBAL(0):
		v.regs[ixgbevf.VFTDT(q)/4] = val & 0xffff
		v.tx[q].unmapped = false
		v.wake()
	case ixgbevf.VFTXDCTL(0) - ixgbevf.VFTDBAL(0):
		was := v.regs[ctl/4]
		v.regs[ctl/4] = val & v.spec[ctl/4].Mask &^ ixgbevf.QueueFlush
		switch {
		case val&ixgbevf.QueueEnable != 0:
			v.tx[q].stopping = false
			v.wake()
		case was&ixgbevf.QueueEnable != 0 && v.busy && v.busyQueue == q:
			// It reads as enabled until its batch is done.
			v.regs[ctl/4] |= ixgbevf.QueueEnable
			v.tx[q].stopping = true
		case was&ixgbevf.QueueEnable != 0:
			v.disableTX(q)
		}
	default:
		return false
	}
	return true
}

// disableTX turns a transmit queue off. A packet whose end was never fetched
// is lost.
func (v *VF) disableTX(q int) {
	v.regs[ixgbevf.VFTXDCTL(q)/4] &^= ixgbevf.QueueEnable
	v.tx[q] = txQueue{contexts: v.tx[q].contexts}
	if !v.cfg.HeadsPersistAcrossDisable {
		v.regs[ixgbevf.VFTDH(q)/4] = 0
	}
}
