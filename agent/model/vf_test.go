package model

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"

	"golang.org/x/sys/unix"
)

func TestHeadsSurviveReset(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	for range 5 {
		d.v.Receive(frame(guestMAC, peerMAC, 100))
	}
	for range 3 {
		d.transmit(1, frame(peerMAC, guestMAC, 100))
	}
	d.drained(1)
	want := map[uint32]uint32{
		ixgbevf.VFRDH(0): 5, ixgbevf.VFTDH(1): 3, ixgbevf.VFRDT(0): 15, ixgbevf.VFTDT(1): 3,
		ixgbevf.VFRDBAL(0): rxRing, ixgbevf.VFTDBAL(1): txRing + queueStep, ixgbevf.VFRDLEN(0): 256,
		ixgbevf.VFGPRC: 5, ixgbevf.VFGORCLSB: 500, ixgbevf.VFGPTC: 3, ixgbevf.VFGOTCLSB: 300,
		ixgbevf.VTEIMS: 0, ixgbevf.VTEIAC: 0, ixgbevf.VTEIAM: 0, ixgbevf.VTEICR: 0,
		ixgbevf.VFRXDCTL(0): ixgbevf.RXDCTLVME, ixgbevf.VFTXDCTL(1): 0x00080120,
	}
	for name, reset := range map[string]func(){
		"FLR": d.v.FLR, "VFCTRL.RST": func() { d.v.Write(ixgbevf.VFCTRL, ixgbevf.CtrlRST) },
	} {
		reset()
		for off, val := range want {
			if got := d.v.Read(off); got != val {
				t.Errorf("%s: register %#x = %#x, want %#x", name, off, got, val)
			}
		}
	}
}

func TestHeadSwitches(t *testing.T) {
	for _, tc := range []struct {
		name       string
		change     func(*Config)
		rx, tx     uint32 // after writing 6 with the queue off
		rxOn, txOn uint32 // after enabling, writing 9, disabling
	}{
		{"default", nil, 6, 6, 6, 6},
		{"receive head fixed", func(c *Config) { c.WritableRXHead = false }, 0, 6, 0, 6},
		{"transmit head fixed", func(c *Config) { c.WritableTXHead = false }, 6, 0, 6, 0},
		{"lost on disable", func(c *Config) { c.HeadsPersistAcrossDisable = false }, 6, 6, 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, tc.change)
			read := func() [2]uint32 {
				return [2]uint32{d.v.Read(ixgbevf.VFRDH(0)), d.v.Read(ixgbevf.VFTDH(0))}
			}
			write := func(val uint32) {
				d.v.Write(ixgbevf.VFRDH(0), val)
				d.v.Write(ixgbevf.VFTDH(0), val)
			}
			ctl := func(val uint32) {
				d.v.Write(ixgbevf.VFRXDCTL(0), val)
				d.v.Write(ixgbevf.VFTXDCTL(0), val)
			}
			write(6)
			if got, want := read(), [2]uint32{tc.rx, tc.tx}; got != want {
				t.Errorf("heads %d, want %d", got, want)
			}
			ctl(ixgbevf.QueueEnable)
			write(9)
			if got, want := read(), [2]uint32{tc.rx, tc.tx}; got != want {
				t.Errorf("heads %d after a write with the queue on, want %d", got, want)
			}
			ctl(0)
			if got, want := read(), [2]uint32{tc.rxOn, tc.txOn}; got != want {
				t.Errorf("heads %d after disabling, want %d", got, want)
			}
			write(0)
			if got := read(); got != [2]uint32{} {
				t.Errorf("heads %d, want 0: drivers write that", got)
			}
		})
	}
}

// A head that cannot be written still takes the zero of every driver.
func TestFixedHeadsTakeZero(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.WritableRXHead, c.WritableTXHead = false, false })
	d.up()
	for range 3 {
		d.v.Receive(frame(guestMAC, peerMAC, 100))
		d.transmit(0, frame(peerMAC, guestMAC, 100))
	}
	d.drained(0)
	d.v.FLR()
	for _, step := range []struct{ write, want uint32 }{{6, 3}, {0, 0}} {
		for _, off := range []uint32{ixgbevf.VFRDH(0), ixgbevf.VFTDH(0)} {
			d.v.Write(off, step.write)
			if got := d.v.Read(off); got != step.want {
				t.Errorf("head %#x = %d after writing %d, want %d", off, got, step.write, step.want)
			}
		}
	}
}

func TestTailOutsideOfTheRing(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Write(ixgbevf.VFTDT(0), ringSize+5)
	d.mustIdle(0)
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	d.sent()
	d.v.Write(ixgbevf.VFRDT(0), ringSize+5)
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	if got := d.v.Read(ixgbevf.VFRDH(0)); got != 0 {
		t.Errorf("VFRDH = %d, want 0", got)
	}
}

func TestCountersWrap(t *testing.T) {
	start := Counters{GPRC: 1<<32 - 1, GORC: 1<<36 - 1, MPRC: 1<<32 - 1, GPTC: 1<<32 - 1, GOTC: 1<<36 - 1}
	d := newDriver(t, func(c *Config) { c.Counters = start })
	if got := d.v.Read(ixgbevf.VFGORCMSB); got != 0xf {
		t.Errorf("VFGORC_MSB = %#x, want 0xf", got)
	}
	d.up()
	d.must(ixgbevf.MsgSetMulticast|1<<16, multicastWord(net.HardwareAddr{1, 0, 0, 0, 0, 1}))
	d.v.Receive(frame(net.HardwareAddr{1, 0, 0, 0, 0, 1}, peerMAC, 100))
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	d.drained(0)
	for off, want := range map[uint32]uint32{
		ixgbevf.VFGPRC: 0, ixgbevf.VFGORCLSB: 99, ixgbevf.VFGORCMSB: 0, ixgbevf.VFMPRC: 0,
		ixgbevf.VFGPTC: 0, ixgbevf.VFGOTCLSB: 99, ixgbevf.VFGOTCMSB: 0,
	} {
		d.v.Write(off, 12345) // read-only
		if got := d.v.Read(off); got != want {
			t.Errorf("counter %#x = %#x, want %#x", off, got, want)
		}
	}
}

func multicastWord(a net.HardwareAddr) uint32 { return uint32(multicastHash(0, macAddr(a))) }

func TestCountersClearedByReset(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.CountersClearedByReset, c.Counters = true, Counters{GPRC: 7} })
	d.v.FLR()
	if got := d.v.Read(ixgbevf.VFGPRC); got != 0 {
		t.Errorf("VFGPRC = %d, want 0", got)
	}
}

func TestRegisters(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.QueuePairs = 2 })
	for _, tc := range []struct {
		name             string
		off, write, want uint32
	}{
		{"link", ixgbevf.VFLINKS, 0, 0x70000000},
		{"status", ixgbevf.VFSTATUS, 0xffffffff, 0},
		{"ring base", ixgbevf.VFRDBAL(0), 0xffffffff, 0xffffff80},
		{"throttle", ixgbevf.VTEITR(1), 0xffffffff, ixgbevf.EITRInterval},
		{"tail", ixgbevf.VFTDT(0), 0xffffffff, 0xffff},
		{"queue of another", ixgbevf.VFRDBAL(2), 0xffffffff, 0},
		{"causes set while masked", ixgbevf.VTEICS, 0xffffffff, 0},
		{"causes", ixgbevf.VTEICR, 2, 5},
		{"no register", 0x3f00, 0xffffffff, 0},
		{"not aligned", 0x1001, 0xffffffff, 0},
		{"outside", 0x4000, 0xffffffff, 0},
		{"flush", ixgbevf.VFTXDCTL(0), ixgbevf.QueueFlush, 0},
	} {
		d.v.Write(tc.off, tc.write)
		if got := d.v.Read(tc.off); got != tc.want {
			t.Errorf("%s: %#x, want %#x", tc.name, got, tc.want)
		}
	}
	if got := d.v.Read(ixgbevf.VTEICR); got != 0 {
		t.Errorf("VTEICR = %#x on the second read, want 0", got)
	}
}

func TestInterruptsNotLost(t *testing.T) {
	d := newDriver(t, nil)
	d.v.Write(ixgbevf.VTEICS, 5)
	if len(d.irqs) != 0 {
		t.Fatal("interrupt while masked")
	}
	d.v.Write(ixgbevf.VTEIMS, 4)
	d.v.Write(ixgbevf.VTEIMS, 1)
	if got := []int{<-d.irqs, <-d.irqs}; got[0] != 2 || got[1] != 0 {
		t.Errorf("vectors %v, want 2 and 0", got)
	}
	// Without auto-clear the cause stays until it is read.
	if got := d.v.Read(ixgbevf.VTEICR); got != 5 {
		t.Errorf("VTEICR = %#x, want 5", got)
	}
	d.v.Write(ixgbevf.VTEIMC, 7)
	d.v.Write(ixgbevf.VTEIMS, 7)
	if len(d.irqs) != 0 {
		t.Error("interrupt without a cause")
	}
}

func TestVectorAssignment(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Write(ixgbevf.VTIVAR(0), 0x80828180) // tx 1, rx 1, tx 0, rx 0
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	if got := []int{<-d.irqs, <-d.irqs}; got[0] != 0 || got[1] != 1 {
		t.Errorf("receive and transmit raised %v, want 0 and 1", got)
	}
	if got := d.v.Read(ixgbevf.VTEICR); got != 0 {
		t.Errorf("VTEICR = %#x, want 0 by VTEIAC", got)
	}
	d.v.Write(ixgbevf.VTIVAR(0), 0)
	d.v.Write(ixgbevf.VTEIMS, 7)
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	if len(d.irqs) != 0 || d.v.Read(ixgbevf.VTEICR) != 0 {
		t.Error("interrupt of a queue that has no vector")
	}
}

func TestResetStopsTheBatch(t *testing.T) {
	d := newDriver(t, nil)
	d.wire.hold, d.wire.begun = make(chan struct{}), make(chan struct{}, 16)
	d.up()
	for range 4 {
		d.data(0, frame(peerMAC, guestMAC, 100), 100, 0, 0)
	}
	d.doorbell(0)
	<-d.wire.begun
	d.v.Write(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	if got := d.v.Read(ixgbevf.VFMAILBOX); got&ixgbevf.MailboxRSTI == 0 || got&ixgbevf.MailboxRSTD != 0 {
		t.Errorf("VFMAILBOX = %#x with a frame on its way, want RSTI", got)
	}
	close(d.wire.hold)
	d.waitMailbox(ixgbevf.MailboxRSTD)
	if n := len(d.wire.frames); n != 1 {
		t.Errorf("%d frames, want only the one that was under way", n)
	}
	if head := d.v.Read(ixgbevf.VFTDH(0)); head != 0 {
		t.Errorf("VFTDH = %d, want 0", head)
	}
}

func TestClosed(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Close()
	d.v.Close()
	d.v.FLR()
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	d.v.Write(ixgbevf.VTEICS, 7)
	if got := d.v.Read(ixgbevf.VFLINKS); got != 0xffffffff {
		t.Errorf("read %#x, want all ones", got)
	}
}

// Two VFs face each other; everything happens at once.
func TestConcurrentUse(t *testing.T) {
	pair := [2]*driver{newDriver(t, nil), newDriver(t, func(c *Config) { c.AdminMAC = peerMAC })}
	for i, d := range pair {
		d.wire.frames = make(chan []byte, 1<<16)
		other := pair[1-i].v
		d.v.wire = wireFunc(other.Receive)
		d.reset()
		d.queues()
	}
	var all sync.WaitGroup
	for i, d := range pair {
		src, dst := guestMAC, peerMAC
		if i == 1 {
			src, dst = dst, src
		}
		all.Go(func() {
			for range 300 {
				for q := range 2 {
					d.transmit(q, frame(dst, src, 200))
				}
				d.receive(0)
			}
		})
		all.Go(func() {
			for n := range 300 {
				d.v.Stats()
				d.v.Read(ixgbevf.VTEICR)
				d.v.Write(ixgbevf.VTEIMS, 7)
				if n%50 == 0 {
					d.v.FLR()
					d.v.SetTrust(n%100 == 0)
				}
			}
		})
		all.Go(func() {
			for range 300 {
				select {
				case <-d.irqs:
				default:
				}
			}
		})
	}
	all.Wait()
}

type wireFunc func([]byte)

func (w wireFunc) Transmit(f []byte) error {
	w(f)
	return nil
}

func TestTapWire(t *testing.T) {
	// A pair of packet sockets keeps frames apart as a tap does.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	host := os.NewFile(uintptr(fds[1]), "host")
	defer host.Close()
	tap := NewTapWire(os.NewFile(uintptr(fds[0]), "tap"))
	for round := range 2 { // a wire can be run again
		ctx, cancel := context.WithCancel(context.Background())
		got, ended := make(chan []byte, 4), make(chan error, 1)
		go func() { ended <- tap.Run(ctx, func(f []byte) { got <- bytes.Clone(f) }) }()
		for _, n := range []int{60, 9014, 65000} {
			f := frame(guestMAC, peerMAC, n)
			if _, err := host.Write(f); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(<-got, f) {
				t.Errorf("round %d: frame of %d differs", round, n)
			}
		}
		f := frame(peerMAC, guestMAC, 100)
		if err := tap.Transmit(f); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 200)
		if n, err := host.Read(buf); err != nil || !bytes.Equal(buf[:n], f) {
			t.Errorf("round %d: host got %x, %v", round, buf[:n], err)
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("round %d: Run: %v", round, err)
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- tap.Run(context.Background(), func([]byte) {}) }()
	if err := tap.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("Run on a closed tap: %v", err)
	}
	if tap.Transmit(make([]byte, 60)) == nil {
		t.Error("transmitted on a closed tap")
	}
}

func TestTapWireBlocking(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	tap := NewTapWire(f)
	defer tap.Close()
	if err := tap.Run(context.Background(), func([]byte) {}); !errors.Is(err, os.ErrNoDeadline) {
		t.Errorf("Run of a file that cannot be waited for: %v", err)
	}
}

// foldedMemory maps every address, so that hostile rings find something.
type foldedMemory struct {
	mu   sync.Mutex
	data [1 << 14]byte
}

func (m *foldedMemory) ReadAt(addr uint64, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(p) > 0 {
		n := copy(p, m.data[addr%uint64(len(m.data)):])
		p, addr = p[n:], addr+uint64(n)
	}
	return nil
}

func (m *foldedMemory) WriteAt(addr uint64, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(p) > 0 {
		n := copy(m.data[addr%uint64(len(m.data)):], p)
		p, addr = p[n:], addr+uint64(n)
	}
	return nil
}

// FuzzVF writes registers at random over rings of random content. The VF must
// neither panic nor hang, and must be silent after a reset.
func FuzzVF(f *testing.F) {
	op := func(b []byte, off, val uint32) []byte {
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(b, off), val)
	}
	up := op(nil, ixgbevf.VFMBMEM, ixgbevf.MsgReset)
	up = op(up, ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	up = op(up, ixgbevf.VFTDLEN(0), 0xfff80)
	up = op(up, ixgbevf.VFRDLEN(0), 0xfff80)
	up = op(up, ixgbevf.VFTXDCTL(0), ixgbevf.QueueEnable)
	up = op(up, ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
	up = op(up, ixgbevf.VFRDT(0), 100)
	up = op(up, ixgbevf.VFTDT(0), 0xff00)
	seg := make([]byte, 32)
	le.PutUint32(seg, 14<<9|20)
	le.PutUint32(seg[8:], txDEXT|typeContext<<txTypeShift|l4TCP<<ctxL4Shift|ctxIPv4)
	le.PutUint32(seg[12:], minMSS<<16|20<<8)
	le.PutUint32(seg[24:], txDEXT|typeData<<txTypeShift|txTSE|txEOP|txRS|0xffff)
	le.PutUint32(seg[28:], txTXSM|txIXSM)
	f.Add(up, seg)
	f.Add(up, bytes.Repeat([]byte{0xff}, 16))
	coalesce := op(op(op(up, ixgbevf.VFRSCCTL(0), rsc16), ixgbevf.VFSRRCTL(0), always|1), ixgbevf.VFPSRTYPE, allSplits)
	coalesce = op(op(op(coalesce, ixgbevf.VTIVAR(0), 0x8080), ixgbevf.VTEIMS, 1), ixgbevf.VTEITR(0), ixgbevf.EITRInterval)
	coalesce = op(op(op(coalesce, ixgbevf.VFRDT(0), 0x100), ixgbevf.VFRDLEN(0), 0x80), ixgbevf.VFRXDCTL(0), 0)
	f.Add(coalesce, seg)
	f.Add(op(nil, ixgbevf.VFCTRL, ixgbevf.CtrlRST), []byte{1})
	f.Fuzz(func(t *testing.T, ops, content []byte) {
		mem := &foldedMemory{}
		for at := 0; len(content) > 0 && at < len(mem.data); at += len(content) {
			copy(mem.data[at:], content)
		}
		cfg := DefaultConfig()
		cfg.AdminMAC, cfg.SpoofCheck, cfg.Coalescing = guestMAC, false, true
		v := New(cfg, mem, wireFunc(func([]byte) {}), func(int) {})
		defer v.Close()
		for n := 0; len(ops) >= 8 && n < 256; n, ops = n+1, ops[8:] {
			off, val := binary.LittleEndian.Uint32(ops), binary.LittleEndian.Uint32(ops[4:])
			v.Write(off%0x4100, val)
			v.Read(off % 0x4100)
			v.Receive(frame(guestMAC, peerMAC, 60+int(val%1455)))
			v.Receive(content)
			for _, s := range stream(uint16(val%2), int(val>>8%1400), 100) {
				v.Receive(s.frame())
			}
		}
		v.FLR()
		before := v.Stats()
		v.Receive(frame(guestMAC, peerMAC, 100))
		if after := v.Stats(); after.Received != before.Received || after.Transmitted != before.Transmitted {
			t.Errorf("not silent after a reset: %+v, then %+v", before, after)
		}
	})
}

// A ring that is one endless order to segment must not keep a reset waiting.
func TestHostileRing(t *testing.T) {
	mem := &foldedMemory{}
	for at := 0; at < len(mem.data); at += 32 {
		le.PutUint32(mem.data[at:], 14<<9|20)
		le.PutUint32(mem.data[at+8:], txDEXT|typeContext<<txTypeShift|l4TCP<<ctxL4Shift|ctxIPv4)
		le.PutUint32(mem.data[at+12:], minMSS<<16|20<<8)
		le.PutUint32(mem.data[at+24:], txDEXT|typeData<<txTypeShift|txTSE|txEOP|txRS|0xffff)
		le.PutUint32(mem.data[at+28:], txTXSM|txIXSM)
	}
	cfg := DefaultConfig()
	cfg.SpoofCheck = false
	first := make(chan struct{})
	var once sync.Once
	v := New(cfg, mem, wireFunc(func([]byte) { once.Do(func() { close(first) }) }), nil)
	defer v.Close()
	v.Write(ixgbevf.VFMBMEM, ixgbevf.MsgReset)
	v.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	v.Write(ixgbevf.VFTDLEN(0), 0xfff80)
	v.Write(ixgbevf.VFTXDCTL(0), ixgbevf.QueueEnable)
	v.Write(ixgbevf.VFTDT(0), 0xff00)
	<-first
	reset := make(chan struct{})
	go func() {
		defer close(reset)
		v.FLR()
	}()
	select {
	case <-reset:
	case <-time.After(waitLimit):
		t.Fatal("reset hangs")
	}
	if v.Stats().Transmitted == 0 || v.Read(ixgbevf.VFTDT(0)) == v.Read(ixgbevf.VFTDH(0)) {
		t.Error("the ring was worked off before the reset: it is no test")
	}
}
