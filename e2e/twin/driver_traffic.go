package twin

import (
	"compsc.io/compsc/agent/family/ixgbevf"
)

// trafficIn has some frames arrive, for the guest and for others.
func (g *guest) trafficIn() {
	if !g.fleet.cfg.ForceDropEnable && !g.roomForFrames() {
		return // they would wait in the packet buffer, whose content is lost in a move
	}
	for range 1 + g.rng.IntN(4) {
		dst := stations[g.mac]
		switch g.rng.IntN(8) {
		case 0, 1:
			dst = pick(g.rng, groups...)
		case 2:
			dst = broadcast
		case 3:
			dst = pick(g.rng, stations...)
		}
		tag := -1
		if chance(g.rng, 2, 5) {
			tag = int(pick(g.rng, vlans...)) | g.rng.IntN(8)<<13
		}
		room := g.maxFrame - 4 - 14 - 40 - 20
		payload := g.rng.IntN(100)
		if room > 100 && chance(g.rng, 1, 4) {
			payload = g.rng.IntN(room)
		}
		p := newPacket(g.rng, dst, pick(g.rng, stations...), tag, payload)
		if chance(g.rng, 7, 8) {
			p.fill()
		}
		if len(p.data) <= g.maxFrame-4 && g.maxFrame >= 1000 {
			g.receive(p.data)
		}
	}
}

// streamsIn has some segments of TCP streams arrive that the device may
// coalesce: most follow each other.
func (g *guest) streamsIn() {
	if !g.twins[0].vf.Stats().PF.ReceiveEnabled && chance(g.rng, 1, 2) {
		g.bringUp()
	}
	if !g.fleet.cfg.ForceDropEnable && !g.roomForFrames() || g.maxFrame < 1518 {
		return
	}
	tag := -1
	if chance(g.rng, 1, 4) {
		tag = int(pick(g.rng, vlans...))
	}
	if chance(g.rng, 2, 3) {
		// As a driver that moderates its interrupts and has just polled: the
		// first frame raises one, and an interval starts.
		for n := range 2 {
			g.write(ixgbevf.VTEITR(n), 0xff8)
		}
		g.read(ixgbevf.VTEICR)
		g.write(ixgbevf.VTEIMS, ixgbevf.VectorMask)
	}
	var frames [][]byte
	for range 1 + g.rng.IntN(12) {
		n := pick(g.rng, 0, 0, 0, 1, 2)
		frames = append(frames, g.streams[n].segment(g.rng, stations[g.mac], tag, n))
	}
	g.receiveBurst(frames)
}

// roomForFrames tells whether every receive queue that is on could take the
// largest burst of trafficIn.
func (g *guest) roomForFrames() bool {
	for q := range g.rx {
		vf := g.twins[0].vf
		if vf.Read(ixgbevf.VFRXDCTL(q))&ixgbevf.QueueEnable == 0 {
			continue
		}
		size := vf.Read(ixgbevf.VFRDLEN(q)) / descriptorSize
		head, tail := vf.Read(ixgbevf.VFRDH(q)), vf.Read(ixgbevf.VFRDT(q))
		if head >= size || tail >= size || (tail+size-head)%size < 4*10 {
			return false
		}
	}
	return true
}

// offload is a context descriptor.
type offload [descriptorSize]byte

// Fields of transmit descriptors, as in the datasheet.
const (
	txEOP, txRS, txIFCS = 1 << 24, 1 << 27, 1 << 25
	txDEXT, txVLE       = 1 << 29, 1 << 30
	txTSE               = 1 << 31
	txData, txContext   = 3 << 20, 2 << 20
	txIXSM, txTXSM      = 1 << 8, 1 << 9
	txSlot              = 1 << 4
)

// trafficOut sends some frames through one queue.
func (g *guest) trafficOut() {
	q := g.rng.IntN(len(g.tx))
	r := &g.tx[q]
	if r.size == 0 {
		return
	}
	for range 1 + g.rng.IntN(4) {
		src := stations[g.mac]
		if chance(g.rng, 1, 10) {
			src = pick(g.rng, stations...)
		}
		tag := -1
		if chance(g.rng, 1, 8) {
			tag = int(pick(g.rng, vlans...))
		}
		payload := g.rng.IntN(200)
		if chance(g.rng, 1, 5) {
			payload = g.rng.IntN(4000)
		}
		p := newPacket(g.rng, pick(g.rng, append(stations, broadcast)...), src, tag, payload)
		if chance(g.rng, 1, 5) {
			p.fill()
			g.sendLegacy(q, p)
		} else {
			g.sendAdvanced(q, p)
		}
		if chance(g.rng, 1, 4) {
			g.ringTX(q)
		}
	}
	g.ringTX(q)
}

// room tells whether a ring has place for n descriptors more.
func (g *guest) room(q, n int) bool {
	r := &g.tx[q]
	head := g.read(ixgbevf.VFTDH(q))
	return head < r.size && (head+r.size-1-r.next)%r.size >= uint32(n)
}

// put writes one descriptor to a transmit ring.
func (g *guest) put(q int, d [descriptorSize]byte) {
	r := &g.tx[q]
	g.poke(g.fleet.txRing(q)+uint64(r.next)*descriptorSize, d[:])
	r.next = (r.next + 1) % r.size
}

// pieces cuts a frame up for several descriptors.
func (g *guest) pieces(data []byte) [][]byte {
	var list [][]byte
	for n := 1 + g.rng.IntN(4); n > 1 && len(data) > 1; n-- {
		at := 1 + g.rng.IntN(len(data)-1)
		list, data = append(list, data[:at]), data[at:]
	}
	return append(list, data)
}

// buffer puts data where the device will fetch it.
func (g *guest) buffer(data []byte) uint64 {
	if g.txRoomAt+uint64(len(data)) > txRoom {
		g.txRoomAt = 0
	}
	at := atTX + g.txRoomAt
	g.txRoomAt += uint64(len(data))
	g.poke(at, data)
	return at
}

// forgetContexts drops what the driver has put into the slots of a queue that
// it turns off. The slots may keep it, but no driver counts on that: DPDK's
// empties its cache with the queue, and Linux's has none.
func (g *guest) forgetContexts(off, value uint32) {
	for q := range g.tx {
		if off == ixgbevf.VFCTRL {
			g.told = told{}
		}
		if off == ixgbevf.VFCTRL || off == ixgbevf.VFTXDCTL(q) && value&ixgbevf.QueueEnable == 0 {
			g.tx[q].slots = [2]*offload{}
		}
	}
}

// putPacket writes the descriptors of a packet, rings the doorbell between some
// of them, and gives each but the last RS or not. Where heads vary, a relay
// may have the device get nothing before it gets all: the guest asks for no
// report of a part then.
func (g *guest) putPacket(q int, pieces [][]byte, describe func(piece []byte, last bool) (d [descriptorSize]byte)) {
	r := &g.tx[q]
	headWB := g.twins[0].vf.Read(ixgbevf.VFTDWBAL(q))&ixgbevf.TDWBALEnable != 0
	parts := chance(g.rng, 1, 4) && !(g.fleet.headsVary && headWB)
	for i, piece := range pieces {
		last := i == len(pieces)-1
		d := describe(piece, last)
		if rs := uint32(g.rng.IntN(2)) * txRS; !last && !(parts && g.fleet.headsVary) {
			le.PutUint32(d[8:], le.Uint32(d[8:])|rs)
		}
		g.put(q, d)
		r.told = r.told || headWB || le.Uint32(d[8:])&txRS != 0
		if ring := chance(g.rng, 1, 2); ring && parts && !last {
			r.part = true
			g.write(ixgbevf.VFTDT(q), r.next)
		}
	}
}

// ringTX hands over all that the driver has put into a transmit ring.
func (g *guest) ringTX(q int) {
	r := &g.tx[q]
	g.write(ixgbevf.VFTDT(q), r.next)
	r.part, r.told = false, false
}

func (g *guest) sendLegacy(q int, p *packet) {
	pieces := g.pieces(p.data)
	if !g.room(q, len(pieces)) {
		return
	}
	command := uint32(txIFCS)
	var tag, start uint32
	if chance(g.rng, 1, 4) {
		command, tag = command|txVLE, uint32(pick(g.rng, vlans...))
	}
	if p.l4 != 0 && chance(g.rng, 1, 4) {
		command, start = command|1<<26|uint32(p.l4+6)<<16, uint32(p.l4)
	}
	g.putPacket(q, pieces, func(piece []byte, last bool) (d [descriptorSize]byte) {
		c := command
		if last {
			c |= txEOP | txRS
		}
		le.PutUint64(d[:], g.buffer(piece))
		le.PutUint32(d[8:], c|uint32(len(piece)))
		le.PutUint32(d[12:], tag<<16|start<<8)
		return d
	})
}

// sendAdvanced sends a packet with what offloads come up: by a context of its
// own as Linux's driver does, or by one it has put there before as DPDK's.
func (g *guest) sendAdvanced(q int, p *packet) {
	r := &g.tx[q]
	slot := g.rng.IntN(2)
	command, options := uint32(txDEXT|txData|txIFCS), uint32(slot)*txSlot
	var ctx *offload
	header := 0
	if p.proto != protoRaw && chance(g.rng, 1, 2) || chance(g.rng, 1, 6) {
		tso := p.proto != protoRaw && len(p.data)-p.header > 300 && chance(g.rng, 2, 3)
		ctx = g.newOffload(p, slot, tso)
		if p.proto != protoRaw {
			options |= txIXSM | txTXSM
			if p.v6 {
				options &^= txIXSM
			}
		}
		if tso {
			command |= txTSE
			header = p.header
		}
		if chance(g.rng, 1, 3) {
			command |= txVLE
		}
	}
	pieces := g.pieces(p.data)
	if !g.room(q, len(pieces)+1) {
		return
	}
	switch {
	case ctx == nil:
	case r.slots[slot] != nil && *r.slots[slot] == *ctx && chance(g.rng, 1, 2):
	default:
		g.put(q, *ctx)
		r.slots[slot] = ctx
	}
	if ctx == nil && r.slots[slot] != nil && chance(g.rng, 1, 2) {
		command |= txVLE // the tag of a context sent before
	}
	options |= uint32(len(p.data)-header) << 14
	g.putPacket(q, pieces, func(piece []byte, last bool) (d [descriptorSize]byte) {
		c := command
		if last {
			c |= txEOP
			if chance(g.rng, 5, 6) {
				c |= txRS
			}
		}
		le.PutUint64(d[:], g.buffer(piece))
		le.PutUint32(d[8:], c|uint32(len(piece)))
		le.PutUint32(d[12:], options)
		return d
	})
}

func (g *guest) newOffload(p *packet, slot int, tso bool) *offload {
	var c offload
	lengths, kind, mss := uint32(0), uint32(txDEXT|txContext), uint32(0)
	if p.proto != protoRaw {
		lengths = uint32(p.ip)<<9 | uint32(p.l4-p.ip)
		if !p.v6 {
			kind |= 1 << 10
		}
		if p.proto == protoTCP {
			kind |= 1 << 11
		}
	} else {
		lengths = 14 << 9
	}
	if tso {
		mss = uint32(100+g.rng.IntN(3)*50)<<16 | uint32(p.header-p.l4)<<8
	}
	le.PutUint32(c[0:], lengths|uint32(vlans[1+g.rng.IntN(2)])<<16)
	le.PutUint32(c[8:], kind)
	le.PutUint32(c[12:], mss|uint32(slot)<<4)
	return &c
}

// burst has as many short frames go one way as brings a long ring far on.
func (g *guest) burst() {
	if !g.fleet.long() {
		return
	}
	n := 1 + g.rng.IntN(2000)
	g.hurry = true
	defer func() { g.hurry = false }()
	if chance(g.rng, 1, 2) {
		g.burstIn(n)
	} else {
		g.burstOut(n)
	}
}

// burstIn has short frames of many flows arrive, no more than there are
// descriptors for.
func (g *guest) burstIn(n int) {
	if chance(g.rng, 1, 2) {
		for q := range g.rx {
			g.refill(q)
		}
	}
	if g.maxFrame < 1518 {
		return
	}
	var frames [][]byte
	for range n {
		p := newPacket(g.rng, stations[g.mac], stations[1], -1, g.rng.IntN(8))
		frames = append(frames, p.data)
	}
	vf := g.twins[0].vf
	room := n
	for q := range g.rx {
		if vf.Read(ixgbevf.VFRXDCTL(q))&ixgbevf.QueueEnable != 0 {
			room = min(room, int(free(vf.Read, q))/3)
		}
	}
	for frames = frames[:room]; len(frames) > 0; {
		g.hurry = false
		g.step()
		g.hurry = true
		part := frames[:min(len(frames), 200)]
		frames = frames[len(part):]
		g.receiveBurst(part)
	}
}

// burstOut hands over short frames at once.
func (g *guest) burstOut(n int) {
	q := g.rng.IntN(len(g.tx))
	for i := range n {
		g.hurry = i%200 != 0
		if g.tx[q].size == 0 || !g.room(q, 8) {
			break
		}
		g.sendAdvanced(q, newPacket(g.rng, broadcast, stations[g.mac], -1, g.rng.IntN(8)))
	}
	g.ringTX(q)
}
