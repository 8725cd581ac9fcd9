package model

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

var le = binary.LittleEndian

// waitLimit bounds every wait of a test.
const waitLimit = 10 * time.Second

// testMemory is guest memory from address 0.
type testMemory struct {
	mu       sync.Mutex
	data     []byte
	unmapped bool
}

var errUnmapped = errors.New("not mapped")

func (m *testMemory) access(addr uint64, p []byte, write bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.unmapped || addr > uint64(len(m.data)) || uint64(len(p)) > uint64(len(m.data))-addr {
		return errUnmapped
	}
	if write {
		copy(m.data[addr:], p)
	} else {
		copy(p, m.data[addr:])
	}
	return nil
}

func (m *testMemory) ReadAt(addr uint64, p []byte) error  { return m.access(addr, p, false) }
func (m *testMemory) WriteAt(addr uint64, p []byte) error { return m.access(addr, p, true) }

func (m *testMemory) setUnmapped(u bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.unmapped = u
}

// testWire hands frames to the test; hold, when not nil, stops each Transmit
// until it gives.
type testWire struct {
	frames chan []byte
	hold   chan struct{}
	begun  chan struct{}
}

func (w *testWire) Transmit(f []byte) error {
	if w.hold != nil {
		w.begun <- struct{}{}
		<-w.hold
	}
	w.frames <- f
	return nil
}

// Layout of the driver's memory.
const (
	ringSize  = 16 // descriptors
	rxRing    = 0x1000
	txRing    = 0x2000
	queueStep = 0x400
	rxBuffers = 0x10000
	txBuffers = 0x80000
	bufSize   = 2048
	headWB    = 0x3000
	memSize   = 0x200000

	headerBuffers = 0x180000
	headerStep    = 1024
)

// driver uses a VF as ixgbevf does.
type driver struct {
	t        *testing.T
	v        *VF
	mem      *testMemory
	wire     *testWire
	irqs     chan int
	cause    uint32 // read-clear bits of VFMAILBOX that were read
	rxNext   [2]int // next descriptor to clean
	rxTail   [2]int
	txTail   [2]int
	rxBufLen uint32
	legacy   bool
	// srrctl has bits of VFSRRCTL besides the size of buffers, 0 for one
	// buffer a descriptor.
	srrctl uint32
}

var (
	guestMAC = net.HardwareAddr{0x52, 0x54, 0, 0x10, 0xed, 1}
	peerMAC  = net.HardwareAddr{0x52, 0x54, 0, 0x10, 0xed, 2}
)

func newDriver(t *testing.T, change func(*Config)) *driver {
	t.Helper()
	cfg := DefaultConfig()
	cfg.AdminMAC = guestMAC
	if change != nil {
		change(&cfg)
	}
	d := &driver{
		t:    t,
		mem:  &testMemory{data: make([]byte, memSize)},
		wire: &testWire{frames: make(chan []byte, 16384)},
		irqs: make(chan int, 4096), rxBufLen: bufSize,
	}
	d.v = New(cfg, d.mem, d.wire, func(n int) { d.irqs <- n })
	t.Cleanup(d.v.Close)
	return d
}

// reset resets the VF and sends RESET; it returns the reply.
func (d *driver) reset() [4]uint32 {
	d.t.Helper()
	d.v.Write(ixgbevf.VTEIMC, ixgbevf.VectorMask)
	d.v.Write(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	d.waitMailbox(ixgbevf.MailboxRSTD)
	d.cause = 0
	r := d.message(ixgbevf.MsgReset)
	return [4]uint32(r[:4])
}

func (d *driver) waitMailbox(bit uint32) {
	d.t.Helper()
	eventually(d.t, func() bool {
		d.cause |= d.v.Read(ixgbevf.VFMAILBOX) & ixgbevf.MailboxReadClear
		return d.cause&bit != 0
	})
	d.cause &^= bit
}

// message sends a mailbox message and returns the reply.
func (d *driver) message(words ...uint32) [ixgbevf.MailboxWords]uint32 {
	d.t.Helper()
	d.v.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	if d.v.Read(ixgbevf.VFMAILBOX)&ixgbevf.MailboxVFU == 0 {
		d.t.Fatal("mailbox: VFU not granted")
	}
	for i, w := range words {
		d.v.Write(ixgbevf.VFMBMEM+4*uint32(i), w)
	}
	d.v.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	d.waitMailbox(ixgbevf.MailboxPFACK)
	d.waitMailbox(ixgbevf.MailboxPFSTS)
	var reply [ixgbevf.MailboxWords]uint32
	for i := range reply {
		reply[i] = d.v.Read(ixgbevf.VFMBMEM + 4*uint32(i))
	}
	d.v.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	return reply
}

// must sends a message that the PF is to agree to.
func (d *driver) must(words ...uint32) [ixgbevf.MailboxWords]uint32 {
	d.t.Helper()
	r := d.message(words...)
	if r[0]&ixgbevf.MsgACK == 0 || r[0]&ixgbevf.MsgCTS == 0 {
		d.t.Fatalf("message %#x: reply %#x, want ACK and CTS", words, r[0])
	}
	return r
}

// refused sends a message that the PF is not to agree to.
func (d *driver) refused(words ...uint32) {
	d.t.Helper()
	if r := d.message(words...); r[0]&ixgbevf.MsgNACK == 0 || r[0]&ixgbevf.MsgACK != 0 {
		d.t.Fatalf("message %#x: reply %#x, want NACK", words, r[0])
	}
}

func macWords(a net.HardwareAddr) (low, high uint32) {
	return le.Uint32(a), uint32(le.Uint16(a[4:]))
}

// up resets the VF, brings the mailbox up and both queue pairs on.
func (d *driver) up() {
	d.t.Helper()
	d.reset()
	d.must(ixgbevf.MsgAPINegotiate, ixgbevf.API14)
	low, high := macWords(guestMAC)
	d.must(ixgbevf.MsgSetMAC, low, high)
	d.queues()
}

func (d *driver) queues() {
	for q := range 2 {
		d.setupTX(q)
		d.setupRX(q)
	}
	d.v.Write(ixgbevf.VTIVAR(0), 0x81818080)
	d.v.Write(ixgbevf.VTIVARMisc, 0x82)
	d.v.Write(ixgbevf.VTEIAC, 7)
	d.v.Write(ixgbevf.VTEIAM, 7)
	d.v.Write(ixgbevf.VTEIMS, 7)
}

func (d *driver) setupTX(q int) {
	d.v.Write(ixgbevf.VFTXDCTL(q), 0)
	d.v.Write(ixgbevf.VFTDBAL(q), txRing+queueStep*uint32(q))
	d.v.Write(ixgbevf.VFTDBAH(q), 0)
	d.v.Write(ixgbevf.VFTDLEN(q), ringSize*16)
	d.v.Write(ixgbevf.VFTDH(q), 0)
	d.v.Write(ixgbevf.VFTDT(q), 0)
	d.v.Write(ixgbevf.VFTXDCTL(q), 0x02080120)
	d.txTail[q] = 0
}

func (d *driver) setupRX(q int) {
	d.v.Write(ixgbevf.VFRXDCTL(q), 0)
	d.v.Write(ixgbevf.VFRDBAL(q), rxRing+queueStep*uint32(q))
	d.v.Write(ixgbevf.VFRDBAH(q), 0)
	d.v.Write(ixgbevf.VFRDLEN(q), ringSize*16)
	srrctl := uint32(1<<25) | d.rxBufLen>>10
	if d.legacy {
		srrctl = d.rxBufLen >> 10
	}
	if d.srrctl != 0 {
		srrctl = d.srrctl | d.rxBufLen>>10
	}
	d.v.Write(ixgbevf.VFSRRCTL(q), srrctl)
	d.v.Write(ixgbevf.VFRDH(q), 0)
	d.v.Write(ixgbevf.VFRDT(q), 0)
	d.v.Write(ixgbevf.VFRXDCTL(q), ixgbevf.QueueEnable|ixgbevf.RXDCTLVME)
	d.rxNext[q], d.rxTail[q] = 0, 0
	d.refill(q, ringSize-1)
}

func rxBuffer(q, i int) uint64 { return rxBuffers + uint64(q*ringSize+i)*bufSize }

func headerBuffer(q, i int) uint64 { return headerBuffers + uint64(q*ringSize+i)*headerStep }

// refill gives n descriptors to the hardware.
func (d *driver) refill(q, n int) {
	for range n {
		at := rxRing + queueStep*uint64(q) + 16*uint64(d.rxTail[q])
		var desc [16]byte
		le.PutUint64(desc[:], rxBuffer(q, d.rxTail[q]))
		le.PutUint64(desc[8:], headerBuffer(q, d.rxTail[q]))
		_ = d.mem.WriteAt(at, desc[:])
		d.rxTail[q] = (d.rxTail[q] + 1) % ringSize
	}
	d.v.Write(ixgbevf.VFRDT(q), uint32(d.rxTail[q]))
}

// got is a received frame with what its last descriptor says.
type got struct {
	data        []byte
	info, hash  uint32
	status      uint32
	tag         uint16
	descriptors int
}

// receive cleans one frame off a ring, or returns nil.
func (d *driver) receive(q int) *got {
	d.t.Helper()
	var g got
	for {
		var desc [16]byte
		i := d.rxNext[q]
		_ = d.mem.ReadAt(rxRing+queueStep*uint64(q)+16*uint64(i), desc[:])
		status, n := le.Uint32(desc[8:]), int(le.Uint16(desc[12:]))
		if d.legacy {
			status, n = uint32(desc[12])|uint32(desc[13])<<24, int(le.Uint16(desc[8:]))
		}
		if status&rxDD == 0 || i == d.rxTail[q] {
			if g.descriptors > 0 {
				d.t.Fatalf("frame ends without EOP after %d descriptors", g.descriptors)
			}
			return nil
		}
		if info := le.Uint32(desc[0:]); !d.legacy && d.srrctl != 0 && status&rxHBO == 0 {
			buf := make([]byte, info>>rxHeaderShift&maxHeader)
			_ = d.mem.ReadAt(headerBuffer(q, i), buf)
			g.data = append(g.data, buf...)
		}
		buf := make([]byte, n)
		_ = d.mem.ReadAt(rxBuffer(q, i), buf)
		g.data = append(g.data, buf...)
		g.descriptors++
		d.rxNext[q] = (i + 1) % ringSize
		if status&rxEOP == 0 {
			continue
		}
		if !d.legacy {
			g.info, g.hash = le.Uint32(desc[0:]), le.Uint32(desc[4:])
		}
		g.status, g.tag = status, le.Uint16(desc[14:])
		d.refill(q, g.descriptors)
		return &g
	}
}

// post puts a transmit descriptor on a ring without telling the hardware.
func (d *driver) post(q int, addr uint64, low, high uint32) {
	var desc [16]byte
	le.PutUint64(desc[:], addr)
	le.PutUint32(desc[8:], low)
	le.PutUint32(desc[12:], high)
	_ = d.mem.WriteAt(txRing+queueStep*uint64(q)+16*uint64(d.txTail[q]), desc[:])
	d.txTail[q] = (d.txTail[q] + 1) % ringSize
}

// context posts a context descriptor.
func (d *driver) context(q int, c txContext, slot uint32) {
	lens := uint64(c.tag)<<16 | uint64(c.macLen)<<9 | uint64(c.ipLen)
	kind := uint32(txDEXT | typeContext<<txTypeShift | c.l4<<ctxL4Shift)
	if c.ipv4 {
		kind |= ctxIPv4
	}
	d.post(q, lens, kind, uint32(c.mss)<<16|uint32(c.l4Len)<<8|slot<<4)
}

// doorbell tells the hardware about what was posted.
func (d *driver) doorbell(q int) { d.v.Write(ixgbevf.VFTDT(q), uint32(d.txTail[q])) }

// data posts a frame in chunks of at most chunk bytes.
func (d *driver) data(q int, frame []byte, chunk int, commands, options uint32) {
	_ = d.mem.WriteAt(txBuffers, frame)
	for at := 0; at < len(frame); at += chunk {
		n := min(chunk, len(frame)-at)
		low := uint32(txDEXT|typeData<<txTypeShift) | commands | uint32(n)
		if at+n == len(frame) {
			low |= txEOP | txRS
		}
		d.post(q, txBuffers+uint64(at), low, options|uint32(len(frame))<<14)
	}
}

// transmit sends one frame without offloads.
func (d *driver) transmit(q int, frame []byte) {
	d.data(q, frame, len(frame), 0, 0)
	d.doorbell(q)
}

// sent waits for a frame on the wire.
func (d *driver) sent() []byte {
	d.t.Helper()
	select {
	case f := <-d.wire.frames:
		return f
	case <-time.After(waitLimit):
		d.t.Fatal("no frame on the wire")
		return nil
	}
}

// drained waits until the head of a transmit queue reaches its tail.
func (d *driver) drained(q int) {
	d.t.Helper()
	eventually(d.t, func() bool { return d.v.Read(ixgbevf.VFTDH(q)) == d.v.Read(ixgbevf.VFTDT(q)) })
}

// mustIdle checks that the transmit engine finds nothing to do on a queue and
// never did.
func (d *driver) mustIdle(q int) {
	d.t.Helper()
	d.v.mu.Lock()
	defer d.v.unlock()
	if d.v.busy || d.v.regs[ixgbevf.VFTDH(q)/4] != 0 || d.v.fetch(q) != nil {
		d.t.Fatalf("transmit queue %d is not silent", q)
	}
}

// eventually waits for a condition that no event announces.
func eventually(t *testing.T, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	limit := time.After(waitLimit)
	for !cond() {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("condition not reached")
		}
	}
}

// frame makes an untyped frame of n bytes in all.
func frame(dst, src net.HardwareAddr, n int) []byte {
	f := make([]byte, n)
	copy(f, dst)
	copy(f[6:], src)
	be.PutUint16(f[12:], 0x88b5)
	for i := ethHeader; i < n; i++ {
		f[i] = byte(i*7 + n)
	}
	return f
}

// tagged inserts a VLAN tag.
func tagged(f []byte, tag uint16) []byte {
	t := append([]byte{}, f[:12]...)
	t = be.AppendUint16(be.AppendUint16(t, etherVLAN), tag)
	return append(t, f[12:]...)
}

// tcpFrame makes a TCP segment with right checksums.
func tcpFrame(v6 bool, dst, src net.HardwareAddr, payload []byte) []byte {
	l4 := make([]byte, tcpHeader, tcpHeader+len(payload))
	be.PutUint16(l4[0:], 5001)
	be.PutUint16(l4[2:], 40000)
	be.PutUint32(l4[4:], 0xfffffff0) // wraps within a few bytes
	l4[12], l4[13] = 5<<4, tcpFIN|tcpPSH|tcpCWR|0x10
	return ipFrame(v6, dst, src, protoTCP, append(l4, payload...), 16)
}

func udpFrame(v6 bool, dst, src net.HardwareAddr, payload []byte) []byte {
	l4 := make([]byte, udpHeader, udpHeader+len(payload))
	be.PutUint16(l4[0:], 53)
	be.PutUint16(l4[2:], 40000)
	be.PutUint16(l4[4:], uint16(udpHeader+len(payload)))
	return ipFrame(v6, dst, src, protoUDP, append(l4, payload...), 6)
}

func ipFrame(v6 bool, dst, src net.HardwareAddr, proto byte, l4 []byte, field int) []byte {
	f := append(append([]byte{}, dst...), src...)
	if v6 {
		f = be.AppendUint16(f, etherIPv6)
		ip := make([]byte, ipv6Header)
		ip[0], ip[6], ip[7] = 6<<4, proto, 64
		be.PutUint16(ip[4:], uint16(len(l4)))
		ip[8], ip[23], ip[24], ip[39] = 0xfd, 1, 0xfd, 2
		f = append(f, ip...)
	} else {
		f = be.AppendUint16(f, etherIPv4)
		ip := make([]byte, ipv4Header)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		be.PutUint16(ip[2:], uint16(ipv4Header+len(l4)))
		be.PutUint16(ip[4:], 0xffff)
		copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
		be.PutUint16(ip[10:], ^sum(0, ip))
		f = append(f, ip...)
	}
	at := len(f)
	f = append(f, l4...)
	h := headers{ip: ethHeader, l4: at, end: len(f), v6: v6, proto: proto}
	be.PutUint16(f[at+field:], ^sum(h.pseudo(f), f[at:]))
	return f
}
