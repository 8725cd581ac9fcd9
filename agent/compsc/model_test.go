package compsc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// guestMemory is the guest's RAM, which moves with the guest.
type guestMemory struct {
	mu   sync.Mutex
	data []byte
}

func (m *guestMemory) access(addr uint64, move func([]byte), n int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if addr > uint64(len(m.data)) || uint64(n) > uint64(len(m.data))-addr {
		return errors.New("not mapped")
	}
	move(m.data[addr:])
	return nil
}

func (m *guestMemory) ReadAt(addr uint64, p []byte) error {
	return m.access(addr, func(at []byte) { copy(p, at) }, len(p))
}

func (m *guestMemory) WriteAt(addr uint64, p []byte) error {
	return m.access(addr, func(at []byte) { copy(at, p) }, len(p))
}

type wire chan []byte

func (w wire) Transmit(frame []byte) error {
	w <- frame
	return nil
}

// Layout of the guest's memory.
const (
	size      = 32 // descriptors in each ring
	rxRing    = 0x1000
	txRing    = 0x2000
	rxBuffers = 0x10000
	txBuffers = 0x40000
	bufSize   = 2048

	headerBuffers = 0x80000
	headerStep    = 256
)

// Formats of receive descriptors: one buffer, headers split off into buffers
// of 64 bytes, and such buffers always used.
const (
	oneBuffer   = 1 << 25
	split       = 2<<25 | 1<<8
	splitAlways = 5<<25 | 1<<8
)

var guestMAC = []byte{0x52, 0x54, 0, 1, 2, 3}

// guest is a driver that knows nothing of migrations: it keeps its indices
// and goes on with whatever device answers at its registers.
type guest struct {
	t      *testing.T
	mem    *guestMemory
	vf     *compsc.VF
	rx, tx uint32 // next descriptors
	sent   byte
	// srrctl has the format of the receive descriptors: DESCTYPE and
	// BSIZEHEADER of VFSRRCTL. 0 stands for oneBuffer.
	srrctl uint32
}

func (g *guest) put(addr uint64, words ...uint64) {
	for i, w := range words {
		if err := g.mem.WriteAt(addr+8*uint64(i), binary.LittleEndian.AppendUint64(nil, w)); err != nil {
			g.t.Fatal(err)
		}
	}
}

func (g *guest) get(addr uint64) uint64 {
	var b [8]byte
	if err := g.mem.ReadAt(addr, b[:]); err != nil {
		g.t.Fatal(err)
	}
	return binary.LittleEndian.Uint64(b[:])
}

// eventually polls until done, for at most some seconds.
func (g *guest) eventually(what string, done func() bool) {
	g.t.Helper()
	limit, tick := time.After(10*time.Second), time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-limit:
			g.t.Fatalf("not within 10 s: %s", what)
		case <-tick.C:
		}
	}
}

func (g *guest) message(words ...uint32) {
	g.t.Helper()
	g.vf.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	for i, w := range words {
		g.vf.GuestWrite(ixgbevf.VFMBMEM+4*uint32(i), w)
	}
	g.vf.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	g.eventually("reply of the PF", func() bool { return g.vf.GuestRead(ixgbevf.VFMAILBOX)&ixgbevf.MailboxPFSTS != 0 })
	reply := g.vf.GuestRead(ixgbevf.VFMBMEM)
	g.vf.GuestWrite(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	if words[0] != ixgbevf.MsgReset && reply&ixgbevf.MsgACK == 0 {
		g.t.Fatalf("message %#x is answered %#x", words[0], reply)
	}
}

func (g *guest) start() {
	if g.srrctl == 0 {
		g.srrctl = oneBuffer
	}
	w := g.vf.GuestWrite
	w(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	g.eventually("end of the reset", func() bool {
		return g.vf.GuestRead(ixgbevf.VFMAILBOX)&(ixgbevf.MailboxRSTD|ixgbevf.MailboxRSTI) != 0
	})
	g.message(ixgbevf.MsgReset)
	g.message(ixgbevf.MsgAPINegotiate, ixgbevf.API13, 0)
	g.message(ixgbevf.MsgGetQueues, 0, 0, 0, 0)
	g.message(ixgbevf.MsgSetLPE, 1518)
	g.message(ixgbevf.MsgSetMAC, binary.LittleEndian.Uint32(guestMAC), uint32(binary.LittleEndian.Uint16(guestMAC[4:])))
	g.message(ixgbevf.MsgSetVLAN|1<<16, 42)
	g.message(ixgbevf.MsgSetMulticast|2<<16, 0x0a1b0c2d)
	g.message(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastMulti)
	w(ixgbevf.VFTDBAL(0), txRing)
	w(ixgbevf.VFTDBAH(0), 0)
	w(ixgbevf.VFTDLEN(0), size*16)
	w(ixgbevf.VFTDH(0), 0)
	w(ixgbevf.VFTDT(0), 0)
	w(ixgbevf.VFTXDCTL(0), ixgbevf.QueueEnable|0x20)
	for n := range uint64(size) {
		g.put(rxRing+16*n, rxBuffers+bufSize*n, headerBuffers+headerStep*n)
	}
	w(ixgbevf.VFRDBAL(0), rxRing)
	w(ixgbevf.VFRDBAH(0), 0)
	w(ixgbevf.VFRDLEN(0), size*16)
	w(ixgbevf.VFSRRCTL(0), g.srrctl|1<<28|2)
	w(ixgbevf.VFPSRTYPE, 1<<12) // after the Ethernet header
	w(ixgbevf.VFRDH(0), 0)
	w(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
	w(ixgbevf.VFRDT(0), size-1)
	w(ixgbevf.VTIVAR(0), 0x8080)
	w(ixgbevf.VTIVARMisc, 0x81)
	w(ixgbevf.VTEIMS, 3)
}

// frame is one for or from the guest, told apart by its last byte.
func frame(to, from []byte, mark byte) []byte {
	return append(slices.Concat(to, from, []byte{0x88, 0xb5}, make([]byte, 49)), mark)
}

// transmit puts one frame into the ring.
func (g *guest) transmit() (want []byte) {
	g.sent++
	want = frame(bytes.Repeat([]byte{0xff}, 6), guestMAC, g.sent)
	n := uint64(g.tx)
	if err := g.mem.WriteAt(txBuffers+bufSize*n, want); err != nil {
		g.t.Fatal(err)
	}
	length := uint64(len(want))
	g.put(txRing+16*n, txBuffers+bufSize*n, length<<46|1<<29|1<<27|1<<25|1<<24|3<<20|length)
	g.tx = (g.tx + 1) % size
	g.vf.GuestWrite(ixgbevf.VFTDT(0), g.tx)
	return want
}

// receive waits for the next descriptor, checks its frame and refills it.
func (g *guest) receive(want []byte) {
	g.t.Helper()
	at, buffer := rxRing+16*uint64(g.rx), rxBuffers+bufSize*uint64(g.rx)
	g.eventually("received frame", func() bool { return g.get(at+8)&1 != 0 })
	got := make([]byte, len(want))
	if err := g.mem.ReadAt(buffer, got); err != nil || !bytes.Equal(got, want) {
		g.t.Fatalf("descriptor %d has frame %x (%v), want %x", g.rx, got, err, want)
	}
	g.put(at, buffer, 0)
	g.vf.GuestWrite(ixgbevf.VFRDT(0), g.rx)
	g.rx = (g.rx + 1) % size
}

// A driver on the model of the silicon, moved several times: frames in both
// directions use the descriptors that follow, the PFs hold the same, and the
// statistics show every frame.
func TestModelMigration(t *testing.T) {
	ctx := context.Background()
	logger := slog.New(slog.DiscardHandler)
	mem, out := &guestMemory{data: make([]byte, 1<<20)}, make(wire, 64)
	device := func(spoil func(*model.Config)) (*model.VF, *compsc.VF) {
		cfg := model.DefaultConfig()
		cfg.PFLatency = time.Millisecond
		spoil(&cfg)
		m := model.New(cfg, mem, out, func(int) {})
		t.Cleanup(m.Close)
		return m, compsc.New(ixgbevf.New(cfg.QueuePairs), m, compsc.Options{
			VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID, Logger: logger})
	}
	m, v := device(func(c *model.Config) { c.Counters.GPRC, c.Counters.GORC = 1<<32-5, 1<<36-100 })
	g := &guest{t: t, mem: mem, vf: v}
	g.start()
	const hops, frames = 4, 20
	for hop := range hops {
		for n := range frames {
			in := frame(guestMAC, []byte{2, 0, 0, 0, 0, 9}, byte(hop*frames+n))
			m.Receive(in)
			g.receive(in)
			want := g.transmit()
			select {
			case got := <-out:
				if !bytes.Equal(got, want) {
					t.Fatalf("hop %d: sent %x, want %x", hop, got, want)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("hop %d: frame %d was not sent", hop, n)
			}
		}
		if got, want := v.GuestRead(ixgbevf.VFGPRC), uint32(1<<32-5)+uint32((hop+1)*frames); got != want {
			t.Errorf("hop %d: VFGPRC %d, want %d", hop, got, want)
		}

		mNext, vNext := device(func(c *model.Config) {
			c.Counters.GPRC, c.CountersClearedByReset, c.FilterModesClearedByReset = 7, hop%2 == 0, hop%2 == 1
		})
		caps, err := vNext.Probe(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if pf := mNext.Stats().PF; pf.MAC != nil || pf.ClearToSend && pf.ReceiveEnabled {
			t.Errorf("hop %d: the probe left the target's PF with %+v", hop, pf)
		}
		if err := compsc.CheckSummary(ixgbevf.New(0), v.Summary(), v.HeadsInUse(), caps); err != nil {
			t.Fatal(err)
		}
		if err := v.Quiesce(ctx); err != nil {
			t.Fatal(err)
		}
		s, err := v.Capture(ctx)
		if err != nil {
			t.Fatal(err)
		}
		pf := m.Stats().PF
		if err := v.Scrub(ctx); err != nil {
			t.Fatal(err)
		}
		if err := vNext.Check(s, caps); err != nil {
			t.Fatal(err)
		}
		if _, err := vNext.Restore(ctx, s); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(pf, mNext.Stats().PF); diff != "" {
			t.Errorf("hop %d: the PFs differ (-source +target):\n%s", hop, diff)
		}
		m, v, g.vf = mNext, vNext, vNext
	}
}

// What the model can be told not to do is found out by the probe.
func TestModelProbe(t *testing.T) {
	for _, tc := range []struct {
		name   string
		spoil  func(*model.Config)
		rx, tx bool
	}{
		{"all", func(*model.Config) {}, true, true},
		{"receive heads take only zero", func(c *model.Config) { c.WritableRXHead = false }, false, true},
		{"transmit heads take only zero", func(c *model.Config) { c.WritableTXHead = false }, true, false},
		{"heads do not persist", func(c *model.Config) { c.HeadsPersistAcrossDisable = false }, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := model.DefaultConfig()
			cfg.MulticastFilterType = 2
			tc.spoil(&cfg)
			m := model.New(cfg, &guestMemory{}, make(wire), func(int) {})
			t.Cleanup(m.Close)
			caps, err := compsc.New(ixgbevf.New(0), m, compsc.Options{Logger: slog.New(slog.DiscardHandler)}).Probe(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			if caps.WritableRXHeads != tc.rx || caps.WritableTXHeads != tc.tx {
				t.Errorf("%+v, want heads %v and %v", caps, tc.rx, tc.tx)
			}
			if caps.Offer.MulticastFilterType != 2 || !slices.Equal(caps.Offer.APIs, cfg.APIs) {
				t.Errorf("offer %+v, want APIs %v and filter type 2", caps.Offer, cfg.APIs)
			}
		})
	}
}
