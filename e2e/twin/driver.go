package twin

import (
	"compsc.io/compsc/agent/family/ixgbevf"
)

// ring is what the driver knows of one of its rings.
type ring struct {
	size, next uint32
	legacy     bool
	headWB     bool
	// part tells that the doorbell was rung within a packet whose rest was not
	// handed over yet, told that the device may have told that it has that part.
	part, told bool
	// slots are the context descriptors it has put in the queue's two slots; nil for one
	// that it has not.
	slots [2]*offload
}

// told is what a PF was asked that must be the same elsewhere: how many queues
// there are, and which features were asked for and granted.
type told struct {
	queues         bool
	asked, granted uint32
}

// driver is the state of the guest's driver.
type driver struct {
	rx, tx []ring
	// bits are read-clear bits of the mailbox register that it has read.
	bits uint32
	// mo is the multicast filter type it was told, mac its own address.
	mo  uint32
	mac int // index in stations
	// maxFrame is the largest frame, with FCS, that it may be sent.
	maxFrame int
	macVLANs int
	txRoomAt uint64
	// told is what the PF has told since the last reset.
	told told
	// revoked tells that a PF no longer heeds the driver's messages, which does
	// not know yet.
	revoked bool
	// associations are handles of security associations, also of such that are
	// no longer there.
	associations []uint32
	// refusedMAC tells that a PF once refused a further address.
	refusedMAC bool
	// streams are TCP connections from which the guest receives.
	streams [3]stream
}

func (d *driver) init(queuePairs int) {
	*d = driver{rx: make([]ring, queuePairs), tx: make([]ring, queuePairs), maxFrame: 1518}
}

// operations are what the guest does, by weight.
var operations = []struct {
	weight int
	name   string
	run    func(*guest)
}{
	{1, "bring up", (*guest).bringUp},
	{2, "reset", (*guest).someReset},
	{12, "mailbox", (*guest).mailboxCall},
	{4, "raw mailbox", (*guest).rawMailbox},
	{4, "PF event", (*guest).pfEvent},
	{3, "set up receive queue", func(g *guest) { g.setUpRX(g.rng.IntN(len(g.rx))) }},
	{3, "set up transmit queue", func(g *guest) { g.setUpTX(g.rng.IntN(len(g.tx))) }},
	{1, "queue off or on", (*guest).toggleQueue},
	{15, "refill", func(g *guest) { g.refill(g.rng.IntN(len(g.rx))) }},
	{25, "traffic in", (*guest).trafficIn},
	{15, "streams in", (*guest).streamsIn},
	{25, "traffic out", (*guest).trafficOut},
	{8, "burst", (*guest).burst},
	{14, "interrupts", (*guest).interruptRegisters},
	{6, "time", (*guest).timePasses},
	{5, "settings", (*guest).settings},
	{6, "counters", (*guest).counters},
	{3, "odd access", (*guest).oddAccess},
}

var weights = func() (sum int) {
	for _, op := range operations {
		sum += op.weight
	}
	return sum
}()

// operate does one random operation.
func (g *guest) operate() {
	n := g.rng.IntN(weights)
	for _, op := range operations {
		if n -= op.weight; n < 0 {
			g.log.add("-- %s", op.name)
			op.run(g)
			return
		}
	}
}

// bringUp does what a driver does when it is loaded, with a few choices.
func (g *guest) bringUp() {
	g.resetHandshake()
	g.negotiate()
	if chance(g.rng, 2, 3) {
		g.call(ixgbevf.MsgGetQueues, 0, 0, 0, 0)
	}
	g.setMAC(g.mac)
	for q := range g.rx {
		g.setUpTX(q)
		g.setUpRX(q)
	}
	g.setUpRSS()
	// Queues for RSS, and what headers are split after.
	g.write(ixgbevf.VFPSRTYPE, uint32(g.rng.IntN(4))<<29|pick(g.rng, 0x1330, 0x1330, g.rng.Uint32()&0x1330))
	for n := range (len(g.rx) + 1) / 2 {
		entry := uint32(0)
		for b := range 4 {
			entry |= (ixgbevf.IVARValid | uint32(g.rng.IntN(2))) << (8 * b)
		}
		g.write(ixgbevf.VTIVAR(n), entry)
	}
	g.write(ixgbevf.VTIVARMisc, ixgbevf.IVARValid|2)
	if chance(g.rng, 2, 3) {
		g.write(ixgbevf.VTEIAC, ixgbevf.VectorMask)
		g.write(ixgbevf.VTEIAM, pick[uint32](g.rng, 0, 3, ixgbevf.VectorMask))
	}
	if chance(g.rng, 1, 2) {
		for n := range 2 {
			g.write(ixgbevf.VTEITR(n), g.interval())
		}
	}
	g.write(ixgbevf.VTEIMS, ixgbevf.VectorMask)
}

// someReset is a reset that a driver's life may have in it: whole, without
// the message, or of the function.
func (g *guest) someReset() {
	switch g.rng.IntN(4) {
	case 0:
		g.write(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	case 1:
		g.functionReset()
	case 2:
		g.resetHandshake()
	case 3:
		g.call(ixgbevf.MsgReset)
	}
	g.maxFrame, g.macVLANs = 1518, 0
	if chance(g.rng, 3, 4) {
		g.bringUp()
	}
}

// high is the upper half of an address. Memory wraps far below 4 GiB, and so
// any will do that is not where the scratch memory is.
func (g *guest) high() uint32 { return uint32(g.rng.IntN(scratchAt >> 32)) }

func (g *guest) setUpRX(q int) {
	r := &g.rx[q]
	g.write(ixgbevf.VFRXDCTL(q), 0)
	if chance(g.rng, 3, 4) || r.size == 0 {
		*r = ring{size: g.fleet.ringSize(g.rng)}
	}
	r.next = 0
	// A third legacy, the others with one buffer, headers split off, or header
	// buffers always used.
	format := pick[uint32](g.rng, 0, 0, 1, 2, 2, 5)
	r.legacy = format == 0
	g.write(ixgbevf.VFRDBAL(q), uint32(g.fleet.rxRing(q)))
	g.write(ixgbevf.VFRDBAH(q), g.high())
	g.write(ixgbevf.VFRDLEN(q), r.size*descriptorSize)
	g.write(ixgbevf.VFRDH(q), 0)
	g.write(ixgbevf.VFRDT(q), 0)
	srrctl := pick[uint32](g.rng, 1, 2, 2, 4, 10) | pick[uint32](g.rng, 1, 1, 2, 4, 15)<<8 | format<<25
	if chance(g.rng, 1, 2) {
		srrctl |= 1 << 28
	}
	g.write(ixgbevf.VFSRRCTL(q), srrctl)
	if chance(g.rng, 5, 6) {
		g.write(ixgbevf.VFRSCCTL(q), uint32(g.rng.IntN(16))|pick[uint32](g.rng, 0, 1, 1))
	}
	g.write(ixgbevf.VFRXDCTL(q), ixgbevf.QueueEnable|uint32(g.rng.IntN(2))*ixgbevf.RXDCTLVME|g.packetLength())
	g.read(ixgbevf.VFRXDCTL(q))
	if chance(g.rng, 7, 8) {
		g.refill(q)
	}
}

// refill gives a receive queue more descriptors, often all there are.
func (g *guest) refill(q int) {
	r := &g.rx[q]
	if r.size == 0 {
		return
	}
	head := g.read(ixgbevf.VFRDH(q))
	free := (head + r.size - 1 - r.next%r.size) % r.size
	if head >= r.size || free == 0 {
		return
	}
	n := free
	if chance(g.rng, 1, 3) {
		n = uint32(g.rng.IntN(int(free) + 1))
	}
	for range n {
		var d [descriptorSize]byte
		le.PutUint64(d[:], g.fleet.atRX+uint64(g.rng.IntN(rxRoom/256))*256)
		le.PutUint64(d[8:], g.fleet.atRX+uint64(g.rng.IntN(rxRoom/64))*64)
		g.poke(g.fleet.rxRing(q)+uint64(r.next)*descriptorSize, d[:])
		r.next = (r.next + 1) % r.size
	}
	g.write(ixgbevf.VFRDT(q), r.next)
}

func (g *guest) setUpTX(q int) {
	r := &g.tx[q]
	ctl := uint32(g.rng.IntN(33)) | uint32(g.rng.IntN(3))<<8 | uint32(g.rng.IntN(9))<<16
	g.write(ixgbevf.VFTXDCTL(q), pick[uint32](g.rng, 0, ctl, ctl|ixgbevf.QueueFlush))
	// A slot is the queue's, not the ring's: it outlives a new set-up, but a
	// driver does not count on that.
	*r = ring{size: g.fleet.ringSize(g.rng)}
	g.write(ixgbevf.VFTDBAL(q), uint32(g.fleet.txRing(q)))
	g.write(ixgbevf.VFTDBAH(q), g.high())
	g.write(ixgbevf.VFTDLEN(q), r.size*descriptorSize)
	g.write(ixgbevf.VFTDH(q), 0)
	g.write(ixgbevf.VFTDT(q), 0)
	r.headWB = chance(g.rng, 1, 3)
	if r.headWB {
		g.write(ixgbevf.VFTDWBAH(q), g.high())
		g.write(ixgbevf.VFTDWBAL(q), atHeadWB+uint32(q)*16|ixgbevf.TDWBALEnable)
	} else {
		g.write(ixgbevf.VFTDWBAL(q), 0)
	}
	g.write(ixgbevf.VFTXDCTL(q), ctl|ixgbevf.QueueEnable)
	g.read(ixgbevf.VFTXDCTL(q))
}

// toggleQueue turns a queue off, or on where it is. Where not every head can
// be put back while a queue is off, it starts over.
func (g *guest) toggleQueue() {
	q := g.rng.IntN(len(g.rx))
	r, ctl, head, tail := &g.rx[q], ixgbevf.VFRXDCTL(q), ixgbevf.VFRDH(q), ixgbevf.VFRDT(q)
	if chance(g.rng, 1, 2) {
		r, ctl, head, tail = &g.tx[q], ixgbevf.VFTXDCTL(q), ixgbevf.VFTDH(q), ixgbevf.VFTDT(q)
	}
	value := g.read(ctl)
	if g.fleet.headsVary && value&ixgbevf.QueueEnable == 0 {
		g.write(head, 0)
		g.write(tail, 0)
		r.next = 0
	}
	g.write(ctl, value^ixgbevf.QueueEnable)
}
