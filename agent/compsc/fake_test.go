package compsc

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// testClock jumps ahead instead of waiting, and gives the device a chance to
// do something at each step.
type testClock struct {
	now  time.Time
	tick func()
}

func (c *testClock) Now() time.Time { return c.now }

func (c *testClock) After(d time.Duration) <-chan time.Time {
	c.now = c.now.Add(d)
	if c.tick != nil {
		c.tick()
	}
	fired := make(chan time.Time, 1)
	fired <- c.now
	return fired
}

// pfState is what a PF knows of the fake VF.
type pfState struct {
	cts       bool
	mac       [2]uint32
	api       uint32
	maxFrame  uint32
	xcast     uint32
	vlans     map[uint32]bool
	macVLANs  [][2]uint32
	multicast []uint32
}

// fakeVF is a VF and its PF, as simple as they can be while everything that
// the engine depends on behaves as the silicon does.
type fakeVF struct {
	mu    sync.Mutex
	regs  map[uint32]uint32
	pf    pfState
	xcast uint32 // remembered by the PF across resets

	// Knobs.
	mo             uint32
	refuse         map[uint32]bool // message ids the PF refuses
	replyAfter     int             // ticks until a reply
	mute           bool            // the PF never replies
	lateResets     bool            // the PF finds a reset only after the first message
	talkOver       func() overTalk // asked at each request what becomes of it; nil for nothing
	fixedHeads     bool            // heads cannot be written
	zeroHeads      bool            // heads take only 0
	headsLost      bool            // heads fall to 0 when a queue is enabled
	headsLostOff   bool            // heads fall to 0 when a queue is disabled
	deafTails      bool            // tails are ignored while the queue is off
	stuck          map[uint32]bool // control registers whose queue stays on
	linkDown       bool            // nothing is transmitted
	resetsCounters bool            // a reset clears the counters
	gone           bool
	resetUnseen    bool // by the PF
	deaf           bool // the PF leaves all but RESET unanswered
	reply          []uint32
	replyIn        int
	writes         []uint32          // offsets written, in order
	countdownsLost int               // writes to VTEITR that restart the countdown
	onOff          func(base uint32) // runs when a queue is about to go off
	mem            fakeMemory
	contexts       map[uint32][2]string // by block of a transmit queue
}

func newFake() *fakeVF {
	return &fakeVF{regs: map[uint32]uint32{}, refuse: map[uint32]bool{}, stuck: map[uint32]bool{},
		mem: fakeMemory{}, contexts: map[uint32][2]string{}}
}

// fakeMemory is memory by its aligned 16 bytes; what was never written is 0.
type fakeMemory map[uint64][16]byte

func (m fakeMemory) ReadAt(addr uint64, p []byte) error {
	for i := range p {
		at := addr + uint64(i)
		p[i] = m[at/16][at%16]
	}
	return nil
}

func (m fakeMemory) WriteAt(addr uint64, p []byte) error {
	for i, b := range p {
		at := addr + uint64(i)
		d := m[at/16]
		d[at%16] = b
		m[at/16] = d
	}
	return nil
}

// fakeScratch is a part of that memory.
type fakeScratch struct{ fakeMemory }

func (fakeScratch) Range() (uint64, int) { return 1 << 40, 64 << 10 }

// contextDescriptor is one that fills the slot, and recognisable.
func contextDescriptor(slot int, mark byte) []byte {
	return []byte{mark, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2 << 4, 1 << 5, byte(slot << 4), 0, 0, 0}
}

// queueOf finds the block of a queue register.
func queueOf(off uint32) (base, inner uint32, ok bool) {
	if off < 0x1000 || off >= 0x3000 {
		return 0, 0, false
	}
	return off &^ 0x3f, off & 0x3f, true
}

func (d *fakeVF) enabled(base uint32) bool { return d.regs[base+0x28]&ixgbevf.QueueEnable != 0 }

func (d *fakeVF) Read(off uint32) uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone {
		return allOnes
	}
	value := d.regs[off]
	switch off {
	case ixgbevf.VTEICR:
		d.regs[off] = 0
	case ixgbevf.VFMAILBOX:
		d.regs[off] &^= ixgbevf.MailboxReadClear
	}
	return value
}

func (d *fakeVF) Write(off, value uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone {
		return
	}
	d.writes = append(d.writes, off)
	if base, inner, ok := queueOf(off); ok {
		d.writeQueue(base, inner, value)
		return
	}
	switch off {
	case ixgbevf.VFCTRL:
		if value&ixgbevf.CtrlRST != 0 {
			d.reset()
		}
	case ixgbevf.VTEICS:
		d.regs[ixgbevf.VTEICR] |= value
	case ixgbevf.VTEIMS:
		d.regs[off] |= value
	case ixgbevf.VTEIMC:
		d.regs[ixgbevf.VTEIMS] &^= value
	case ixgbevf.VTEICR:
		d.regs[off] &^= value
	case ixgbevf.VFMAILBOX:
		d.writeMailbox(value)
	case ixgbevf.VFSTATUS, ixgbevf.VFLINKS:
	default:
		if off >= ixgbevf.VTEITR(0) && off <= ixgbevf.VTEITR(2) {
			if value&ixgbevf.EITRCountWDis == 0 {
				d.countdownsLost++
			}
			value &^= ixgbevf.EITRCountWDis
		}
		d.regs[off] = value
	}
}

func (d *fakeVF) writeQueue(base, inner, value uint32) {
	off := base + inner
	switch inner {
	case 0x10:
		if !d.fixedHeads && !d.enabled(base) && (value == 0 || !d.zeroHeads) {
			d.regs[off] = value
		}
	case 0x18:
		if d.enabled(base) || !d.deafTails {
			d.regs[off] = value
		}
		if base >= 0x2000 && d.enabled(base) {
			d.transmit(base)
		}
	case 0x1c, 0x20, 0x24, 0x34: // counters
	case 0x28:
		value &^= ixgbevf.QueueFlush
		was := d.enabled(base)
		if d.stuck[off] {
			value |= ixgbevf.QueueEnable
		}
		if was && value&ixgbevf.QueueEnable == 0 && d.onOff != nil {
			d.onOff(base)
		}
		d.regs[off] = value
		if d.enabled(base) && !was && d.headsLost || !d.enabled(base) && was && d.headsLostOff {
			d.regs[base+0x10] = 0
		}
	default:
		d.regs[off] = value
	}
}

func (d *fakeVF) transmit(base uint32) {
	size := d.regs[base+8] / 16
	ring := uint64(d.regs[base+4])<<32 | uint64(d.regs[base])
	for !d.linkDown && size > 0 && d.regs[base+0x10] != d.regs[base+0x18] {
		desc := d.mem[ring/16+uint64(d.regs[base+0x10])]
		if desc[10]>>4 == 2 && desc[11]&(1<<5) != 0 {
			slots := d.contexts[base]
			slots[desc[12]>>4&1] = string(desc[:])
			d.contexts[base] = slots
			d.regs[base+0x10] = (d.regs[base+0x10] + 1) % size
			continue
		}
		d.regs[base+0x10] = (d.regs[base+0x10] + 1) % size
		d.regs[ixgbevf.VFGPTC]++
		d.count36(ixgbevf.VFGOTCLSB, 60)
	}
}

func (d *fakeVF) count36(low uint32, n uint64) {
	sum := (uint64(d.regs[low+4])<<32 | uint64(d.regs[low])) + n
	d.regs[low], d.regs[low+4] = uint32(sum), uint32(sum>>32)&0xf
}

// receive takes n frames of 64 octets from the wire on queue 0.
func (d *fakeVF) receive(n int) (taken int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	size := d.regs[ixgbevf.VFRDLEN(0)] / 16
	for range n {
		if !d.enabled(0x1000) || d.regs[ixgbevf.VFRDH(0)] == d.regs[ixgbevf.VFRDT(0)] {
			return taken
		}
		taken++
		d.regs[ixgbevf.VFRDH(0)] = (d.regs[ixgbevf.VFRDH(0)] + 1) % size
		d.regs[ixgbevf.VFGPRC]++
		d.regs[ixgbevf.VFMPRC]++
		d.count36(ixgbevf.VFGORCLSB, 64)
	}
	return taken
}

func (d *fakeVF) reset() {
	d.pf = pfState{}
	d.regs[ixgbevf.VTEIMS] = 0
	for n := range ixgbevf.DefaultQueuePairs {
		d.regs[ixgbevf.VFRXDCTL(n)] &^= ixgbevf.QueueEnable
		d.regs[ixgbevf.VFTXDCTL(n)] &^= ixgbevf.QueueEnable
	}
	if d.resetsCounters {
		for _, off := range []uint32{ixgbevf.VFGPRC, ixgbevf.VFGORCLSB, ixgbevf.VFGORCMSB, ixgbevf.VFMPRC,
			ixgbevf.VFGPTC, ixgbevf.VFGOTCLSB, ixgbevf.VFGOTCMSB} {
			d.regs[off] = 0
		}
	}
	d.reply = nil
	d.resetUnseen = d.lateResets
	d.regs[ixgbevf.VFMAILBOX] = ixgbevf.MailboxRSTD
}

// overTalk is what a message that the PF sends unasked does to a request.
type overTalk int

const (
	noTalk       overTalk = iota
	forgets               // the PF has not read the request, and never will
	overwrites            // the PF has done as asked, but the reply is gone
	lostSilently          // no request, no reply, no message
)

func (d *fakeVF) writeMailbox(value uint32) {
	d.regs[ixgbevf.VFMAILBOX] = d.regs[ixgbevf.VFMAILBOX]&^uint32(ixgbevf.MailboxVFU) | value&ixgbevf.MailboxVFU
	if value&ixgbevf.MailboxREQ == 0 || d.mute {
		return
	}
	request := make([]uint32, ixgbevf.MailboxWords)
	for i := range request {
		request[i] = d.regs[ixgbevf.VFMBMEM+4*uint32(i)]
	}
	talk := noTalk
	if d.talkOver != nil {
		talk = d.talkOver()
	}
	if d.deaf && request[0]&ixgbevf.MsgIDMask != ixgbevf.MsgReset {
		return
	}
	if talk == overwrites {
		d.answer(request)
	}
	if talk == forgets || talk == overwrites {
		d.say(ixgbevf.MsgPFControl | ixgbevf.MsgCTS)
	}
	if talk != noTalk {
		return
	}
	d.regs[ixgbevf.VFMAILBOX] |= ixgbevf.MailboxPFACK
	d.reply, d.replyIn = d.answer(request), d.replyAfter
	if d.deaf = d.resetUnseen; d.deaf {
		d.pf, d.resetUnseen = pfState{}, false
	}
	if d.replyIn == 0 {
		d.deliver()
	}
}

// tick delivers a reply that was held back.
func (d *fakeVF) tick() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.replyIn--; d.reply != nil && d.replyIn <= 0 {
		d.deliver()
	}
}

func (d *fakeVF) deliver() {
	for i, w := range d.reply {
		d.regs[ixgbevf.VFMBMEM+4*uint32(i)] = w
	}
	d.reply = nil
	d.regs[ixgbevf.VFMAILBOX] |= ixgbevf.MailboxPFSTS
}

// ping has the PF send a message of its own.
func (d *fakeVF) ping() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.say(ixgbevf.MsgPFControl | ixgbevf.MsgCTS)
}

func (d *fakeVF) say(word uint32) {
	d.regs[ixgbevf.VFMBMEM] = word
	d.regs[ixgbevf.VFMAILBOX] |= ixgbevf.MailboxPFSTS
	d.regs[ixgbevf.VTEICR] |= 1 << 1
}

// answer is the PF driver.
func (d *fakeVF) answer(m []uint32) []uint32 {
	id, info := m[0]&ixgbevf.MsgIDMask, m[0]>>ixgbevf.MsgInfoShift&ixgbevf.MsgInfoMask
	reply := slices.Clone(m)
	if id == ixgbevf.MsgReset {
		d.pf = pfState{cts: true}
		for n := range ixgbevf.DefaultQueuePairs {
			d.regs[ixgbevf.VFTDWBAL(n)], d.regs[ixgbevf.VFTDWBAH(n)] = 0, 0
		}
		reply[0], reply[3] = ixgbevf.MsgReset|ixgbevf.MsgNACK, d.mo
		return reply
	}
	switch {
	case !d.pf.cts:
		reply[0] |= ixgbevf.MsgNACK
		return reply
	case d.refuse[id]: // a PF that refuses a request has still granted access
		reply[0] |= ixgbevf.MsgNACK | ixgbevf.MsgCTS
		return reply
	}
	reply[0] |= ixgbevf.MsgACK | ixgbevf.MsgCTS
	switch id {
	case ixgbevf.MsgSetMAC:
		d.pf.mac = [2]uint32{m[1], m[2]}
	case ixgbevf.MsgSetMulticast:
		d.pf.multicast = slices.Clone(m[:1+(info+1)/2])
	case ixgbevf.MsgSetVLAN:
		if d.pf.vlans == nil {
			d.pf.vlans = map[uint32]bool{}
		}
		d.pf.vlans[m[1]] = true
		if info == 0 {
			delete(d.pf.vlans, m[1])
		}
	case ixgbevf.MsgSetLPE:
		d.pf.maxFrame = m[1]
	case ixgbevf.MsgSetMACVLAN:
		if info <= 1 {
			d.pf.macVLANs = nil
		}
		if info > 0 {
			d.pf.macVLANs = append(d.pf.macVLANs, [2]uint32{m[1], m[2]})
		}
	case ixgbevf.MsgAPINegotiate:
		if m[1] == ixgbevf.API20 {
			reply[0] = id | ixgbevf.MsgNACK | ixgbevf.MsgCTS
			return reply
		}
		d.pf.api = m[1]
	case ixgbevf.MsgGetQueues:
		copy(reply[1:], []uint32{2, 2, 1, 0})
	case ixgbevf.MsgUpdateXcastMode:
		if d.xcast != m[1] { // as the driver: what it remembers is skipped
			d.xcast, d.pf.xcast = m[1], m[1]
		}
	}
	return reply
}

// snapshot is everything of the VF that a restore must bring over, and the
// PF's view of it; counters and the mailbox register are apart.
func (d *fakeVF) snapshot() (map[uint32]uint32, pfState) {
	d.mu.Lock()
	defer d.mu.Unlock()
	regs := maps.Clone(d.regs)
	for _, off := range []uint32{ixgbevf.VFGPRC, ixgbevf.VFGORCLSB, ixgbevf.VFGORCMSB, ixgbevf.VFMPRC,
		ixgbevf.VFGPTC, ixgbevf.VFGOTCLSB, ixgbevf.VFGOTCMSB, ixgbevf.VFLINKS, ixgbevf.VFSTATUS, ixgbevf.VFMAILBOX} {
		delete(regs, off)
	}
	maps.DeleteFunc(regs, func(_, value uint32) bool { return value == 0 })
	return regs, d.pf
}

// newMemoryVF puts an engine on a fake device, with memory.
func newMemoryVF(d *fakeVF) *VF {
	v, _ := newVF(d)
	v.o.Memory, v.o.Scratch = d.mem, fakeScratch{d.mem}
	return v
}

// newVF puts an engine on a fake device.
func newVF(d *fakeVF) (*VF, *testClock) {
	clock := &testClock{now: time.Unix(1000, 0), tick: d.tick}
	return New(ixgbevf.New(0), d, Options{VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID,
		Clock: clock, Logger: slog.New(slog.DiscardHandler)}), clock
}

// send has the guest's driver send a message and take the reply.
func send(t *testing.T, v *VF, words ...uint32) []uint32 {
	t.Helper()
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	if v.GuestRead(ixgbevf.VFMAILBOX)&ixgbevf.MailboxVFU == 0 {
		t.Fatalf("message %#x: the mailbox is busy", words[0])
	}
	for i, w := range words {
		v.GuestWrite(ixgbevf.VFMBMEM+4*uint32(i), w)
	}
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if got := v.GuestRead(ixgbevf.VFMAILBOX); got&ixgbevf.MailboxPFSTS == 0 {
		t.Fatalf("message %#x: no reply, VFMAILBOX reads %#x", words[0], got)
	}
	reply := make([]uint32, ixgbevf.MailboxWords)
	for i := range reply {
		reply[i] = v.GuestRead(ixgbevf.VFMBMEM + 4*uint32(i))
	}
	v.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	return reply
}

const (
	macLow, macHigh = 0x33221152, 0x5544
	ringSize        = 256
)

// boot does what the Linux driver does until the interface is up, on both
// queue pairs, and leaves the rings somewhere in their middle.
func boot(t *testing.T, v *VF, d *fakeVF) {
	t.Helper()
	w := v.GuestWrite
	w(ixgbevf.VTEIMC, 7)
	w(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	if v.GuestRead(ixgbevf.VFMAILBOX)&ixgbevf.MailboxRSTD == 0 {
		t.Fatal("the reset does not end")
	}
	send(t, v, ixgbevf.MsgReset)
	send(t, v, ixgbevf.MsgAPINegotiate, ixgbevf.API13, 0)
	send(t, v, ixgbevf.MsgGetQueues, 0, 0, 0, 0)
	send(t, v, ixgbevf.MsgSetLPE, 1518)
	send(t, v, ixgbevf.MsgSetMAC, macLow, macHigh)
	send(t, v, ixgbevf.MsgSetMACVLAN, 0, 0)
	send(t, v, ixgbevf.MsgSetMACVLAN|1<<16, 0x33221154, 0x5544)
	send(t, v, ixgbevf.MsgSetVLAN|1<<16, 0)
	send(t, v, ixgbevf.MsgSetVLAN|1<<16, 77)
	send(t, v, ixgbevf.MsgSetMulticast|3<<16, 0x0a1b0c2d, 0x0333)
	send(t, v, ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastMulti)
	for n := range ixgbevf.DefaultQueuePairs {
		base := uint32(0x10000 * (n + 1))
		w(ixgbevf.VFTDBAL(n), base)
		w(ixgbevf.VFTDBAH(n), 1)
		w(ixgbevf.VFTDLEN(n), ringSize*16)
		w(ixgbevf.VFTDWBAL(n), base+0x8001)
		w(ixgbevf.VFTDWBAH(n), 2)
		w(ixgbevf.VFDCATXCTRL(n), 0x2200)
		w(ixgbevf.VFTDH(n), 0)
		w(ixgbevf.VFTDT(n), 0)
		w(ixgbevf.VFTXDCTL(n), 0x00080120|ixgbevf.QueueEnable)
		w(ixgbevf.VFRDBAL(n), base+0x4000)
		w(ixgbevf.VFRDBAH(n), 3)
		w(ixgbevf.VFRDLEN(n), ringSize*16)
		w(ixgbevf.VFSRRCTL(n), 0x12000402)
		w(ixgbevf.VFDCARXCTRL(n), 0xa200)
		w(ixgbevf.VFRDH(n), 0)
		w(ixgbevf.VFRXDCTL(n), ixgbevf.RXDCTLVME|ixgbevf.QueueEnable)
		w(ixgbevf.VFRDT(n), ringSize-1)
		w(ixgbevf.VTEITR(n), 0x3d0|ixgbevf.EITRCountWDis)
		w(ixgbevf.VFTDT(n), uint32(20+n))
	}
	w(ixgbevf.VFPSRTYPE, 0x20001330)
	w(ixgbevf.VTIVAR(0), 0x81818080)
	w(ixgbevf.VTIVARMisc, 0x82)
	w(ixgbevf.VTEIAM, 7)
	w(ixgbevf.VTEIAC, 7)
	w(ixgbevf.VTEIMS, 7)
	if got := d.receive(10); got != 10 {
		t.Fatalf("received %d of 10 frames", got)
	}
}

// capture quiesces and captures.
func capture(t *testing.T, v *VF) *State {
	t.Helper()
	if err := v.Quiesce(context.Background()); err != nil {
		t.Fatal(err)
	}
	s, err := v.Capture(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s
}
