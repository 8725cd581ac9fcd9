package compsc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

const (
	scratchAddr = 1 << 52
	headWB      = 0x3000
	vlan        = 42
)

// traveller is a guest whose driver loads a transmit context once and for
// all, sends packets of several descriptors, and looks at its rings only when
// it is interrupted.
type traveller struct {
	*guest
	irq  chan struct{}
	out  wire
	m    *model.VF
	wb   bool // head write-back instead of DD
	poll bool // looks at its rings all the time
}

// attach makes a VF for the guest.
func (g *traveller) attach(spoil func(*model.Config)) {
	g.t.Helper()
	cfg := model.DefaultConfig()
	cfg.PFMaxFrame = 9014
	spoil(&cfg)
	scratch := model.NewScratch(scratchAddr, 64<<10)
	var engine atomic.Pointer[compsc.VF]
	m := model.New(cfg, scratch.Over(g.mem), g.out, func(vector int) {
		if v := engine.Load(); v != nil {
			v.Interrupt(vector)
		}
		select {
		case g.irq <- struct{}{}:
		default:
		}
	})
	g.t.Cleanup(m.Close)
	v := compsc.New(ixgbevf.New(cfg.QueuePairs), m, compsc.Options{
		VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID, Memory: g.mem, Scratch: scratch,
		// On a busy machine the model may not get a processor for a while; contexts
		// that it does not load in time are done without.
		QueueTimeout: 500 * time.Millisecond,
		Logger:       slog.New(slog.DiscardHandler)})
	engine.Store(v)
	g.m, g.vf = m, v
}

// wait looks whenever there was an interrupt.
func (g *traveller) wait(what string, done func() bool) {
	g.t.Helper()
	if g.poll {
		g.eventually(what, done)
		return
	}
	limit := time.After(10 * time.Second)
	for !done() {
		select {
		case <-limit:
			g.t.Fatalf("no interrupt within 10 s: %s", what)
		case <-g.irq:
		}
	}
}

func (g *traveller) boot() {
	g.start()
	g.message(ixgbevf.MsgSetLPE, 9018)
	if g.wb {
		g.vf.GuestWrite(ixgbevf.VFTDWBAH(0), 0)
		g.vf.GuestWrite(ixgbevf.VFTDWBAL(0), headWB|1)
	}
	// The context of slot 1, loaded once: frames get a VLAN tag.
	g.put(txRing+16*uint64(g.tx), vlan<<16|14<<9, 1<<29|2<<20|1<<36)
	g.tx++
	g.vf.GuestWrite(ixgbevf.VFTDT(0), g.tx)
}

// send sends a packet of n descriptors and waits for its report.
func (g *traveller) send(n int) {
	g.t.Helper()
	g.sent++
	want := frame(bytes.Repeat([]byte{0xff}, 6), guestMAC, g.sent)
	last := uint64(0)
	for i := range n {
		at, from, to := uint64(g.tx), i*len(want)/n, (i+1)*len(want)/n
		if err := g.mem.WriteAt(txBuffers+bufSize*at, want[from:to]); err != nil {
			g.t.Fatal(err)
		}
		command := uint64(to-from) | 3<<20 | 1<<25 | 1<<29 | 1<<30 // VLE
		if i == n-1 {
			command |= 1<<24 | 1<<27
		}
		last = at
		g.put(txRing+16*at, txBuffers+bufSize*at, uint64(len(want))<<46|1<<36|command)
		g.tx = (g.tx + 1) % size
	}
	g.vf.GuestWrite(ixgbevf.VFTDT(0), g.tx)
	want = append(append(append([]byte{}, want[:12]...), 0x81, 0, 0, vlan), want[12:]...)
	select {
	case got := <-g.out:
		if !bytes.Equal(got, want) {
			g.t.Fatalf("sent %x, want %x", got, want)
		}
	case <-time.After(10 * time.Second):
		g.t.Fatalf("packet %d was not sent", g.sent)
	}
	g.wait("report of a packet", func() bool {
		if g.wb {
			var b [4]byte
			_ = g.mem.ReadAt(headWB, b[:])
			return binary.LittleEndian.Uint32(b[:]) == g.tx
		}
		return g.get(txRing+16*last+8)>>32&1 != 0
	})
}

// take has a frame of some length arrive, and checks all of it. The network
// loses frames for which there are no descriptors, and sends them again.
func (g *traveller) take(length int, mark byte) {
	g.t.Helper()
	in := append(frame(guestMAC, []byte{2, 0, 0, 0, 0, 9}, mark), bytes.Repeat([]byte{mark}, length-64)...)
	first := func() uint64 { return g.get(rxRing + 16*uint64(g.rx) + 8) }
	received := g.m.Stats().Received
	g.m.Receive(in)
	for g.m.Stats().Received == received {
		<-time.After(time.Millisecond)
		g.m.Receive(in)
	}
	g.wait("received frame", func() bool { return first()&1 != 0 })
	var got []byte
	for end := false; !end; g.rx = (g.rx + 1) % size {
		at, buffer := rxRing+16*uint64(g.rx), rxBuffers+bufSize*uint64(g.rx)
		g.wait("rest of the frame", func() bool { return g.get(at+8)&1 != 0 })
		status := g.get(at + 8)
		end = status&2 != 0
		header, part := make([]byte, g.get(at)>>21&0x3ff), make([]byte, status>>32&0xffff)
		if err := errors.Join(g.mem.ReadAt(headerBuffer(g.rx), header), g.mem.ReadAt(buffer, part)); err != nil {
			g.t.Fatal(err)
		}
		got = append(append(got, header...), part...)
		if g.srrctl != oneBuffer {
			g.put(at, buffer, headerBuffer(g.rx))
			continue
		}
		// As Linux does: the length goes, the rest of the status stays.
		g.put(at, buffer, status&0xffffffff)
		if err := g.mem.WriteAt(at+12, make([]byte, 4)); err != nil {
			g.t.Fatal(err)
		}
		first = func() uint64 { return 1 }
	}
	if !bytes.Equal(got, in) {
		g.t.Fatalf("received %d octets %x..., want %d octets %x...", len(got), got[:16], len(in), in[:16])
	}
	g.vf.GuestWrite(ixgbevf.VFRDT(0), (g.rx+size-1)%size)
}

// get reads the guest's memory; what a driver that keys on the length takes
// for no write-back reads 0.
func (g *traveller) get(addr uint64) uint64 {
	word := g.guest.get(addr)
	if g.srrctl == oneBuffer && addr >= rxRing && addr < rxRing+16*size && addr%16 == 8 && word>>32&0xffff == 0 {
		return 0
	}
	return word
}

func headerBuffer(i uint32) uint64 { return headerBuffers + headerStep*uint64(i) }

// unused tells whether nobody wrote where the guest has nothing.
func (g *traveller) unused() bool {
	page := make([]byte, 4096)
	if err := g.mem.ReadAt(0, page); err != nil {
		g.t.Fatal(err)
	}
	return !slices.ContainsFunc(page, func(b byte) bool { return b != 0 })
}

// hop moves the guest to another VF and returns the strategy for the heads.
func (g *traveller) hop(spoil func(*model.Config)) string {
	g.t.Helper()
	ctx := context.Background()
	source := g.vf
	must := func(err error) {
		g.t.Helper()
		if err != nil {
			g.t.Fatal(err)
		}
	}
	g.attach(spoil)
	caps, err := g.vf.Probe(ctx)
	must(err)
	must(compsc.CheckSummary(ixgbevf.New(0), source.Summary(), source.HeadsInUse(), caps))
	must(source.Quiesce(ctx))
	s, err := source.Capture(ctx)
	must(err)
	b, err := s.Encode()
	must(err)
	s, err = compsc.Decode(b)
	must(err)
	for _, q := range s.Queues {
		if want := map[bool]uint32{true: g.tx, false: g.rx}[q.Direction == 1]; q.Enabled && q.Head != want {
			g.t.Fatalf("%v captured at head %d, want %d", q.Direction, q.Head, want)
		}
	}
	must(source.Scrub(ctx))
	must(g.vf.Check(s, caps))
	report, err := g.vf.Restore(ctx, s)
	must(err)
	g.vf.Kick()
	return report.HeadsStrategy
}

// Whatever the silicon does not allow, the guest goes on where it was, with
// its contexts, in whole packets and without a lost interrupt, over many hops
// and vetoes.
func TestLadder(t *testing.T) {
	for n := range 32 {
		rxFixed, txFixed, forgets, loops := n&1 != 0, n&2 != 0, n&4 != 0, n&8 != 0
		srrctl := []uint32{oneBuffer, split, splitAlways}[(n+n>>2)%3]
		t.Run(fmt.Sprintf("rx fixed %v, tx fixed %v, forgets %v, loops %v, polls %v", rxFixed, txFixed, forgets, loops, n&16 != 0), func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, uint64(n)))
			spoil := func(c *model.Config) {
				c.WritableRXHead, c.WritableTXHead, c.HeadsPersistAcrossDisable, c.Loopback = !rxFixed, !txFixed, !forgets, loops
				c.PFMaxFrame = 9014
			}
			way := func(fixed, canAdvance bool) string {
				switch {
				case !fixed:
					return compsc.HeadsWriteVerify
				case canAdvance && !forgets:
					return compsc.HeadsDummyAdvance
				}
				return compsc.HeadsShadowRing
			}
			want := way(rxFixed, loops)
			if tx := way(txFixed, true); tx != want {
				want = "rx=" + want + ",tx=" + tx
			}
			g := &traveller{guest: &guest{t: t, mem: &guestMemory{data: make([]byte, 1<<20)}}, irq: make(chan struct{}, 1),
				out: make(wire, 64), wb: n%3 == 0, poll: n&16 != 0}
			g.srrctl = srrctl
			g.attach(spoil)
			g.boot()
			for hop := range 6 {
				for i := range 10 + r.IntN(3*size) {
					g.take([]int{64, 64, 1500, 5000}[r.IntN(4)], byte(i))
					g.send(1 + r.IntN(3))
					if r.IntN(20) == 0 {
						if err := g.vf.Quiesce(context.Background()); err != nil {
							t.Fatal(err)
						}
						if err := g.vf.Unquiesce(context.Background()); err != nil {
							t.Fatal(err)
						}
						g.vf.Kick()
					}
					if head := g.vf.GuestRead(ixgbevf.VFRDH(0)); head != g.rx {
						t.Fatalf("the guest reads receive head %d, want %d", head, g.rx)
					}
					if base := g.vf.GuestRead(ixgbevf.VFTDBAL(0)); base != txRing {
						t.Fatalf("the guest reads ring base %#x, want %#x", base, txRing)
					}
				}
				for g.rx == 0 || g.tx == 0 {
					g.take(64, 1)
					g.send(1)
				}
				if got := g.hop(spoil); got != want {
					t.Fatalf("hop %d: strategy %q, want %q", hop, got, want)
				}
				if !g.unused() {
					t.Fatalf("hop %d: the device wrote where the guest has no buffers", hop)
				}
			}
			if !strings.Contains(want, compsc.HeadsShadowRing) {
				return
			}
			// With frames of one descriptor the rings pass their starts, and
			// the device works on them itself.
			for i := range 2 * size {
				g.take(64, byte(i))
				g.send(1)
			}
			g.wait("end of the relays", func() bool {
				g.vf.Interrupt(0)
				return g.m.Read(ixgbevf.VFRDBAL(0)) == rxRing && g.m.Read(ixgbevf.VFTDBAL(0)) == txRing
			})
			if rx, tx := g.m.Read(ixgbevf.VFRDH(0)), g.m.Read(ixgbevf.VFTDH(0)); rx != g.rx || tx != g.tx {
				t.Errorf("the device stands at %d and %d, want %d and %d", rx, tx, g.rx, g.tx)
			}
		})
	}
}

// A guest that asks for heads to be written back while its ring is relayed gets
// none before the device is through with the next packet that asks for it.
func TestHeadsAskedForUnderARelay(t *testing.T) {
	spoil := func(c *model.Config) { c.WritableTXHead, c.HeadsPersistAcrossDisable = false, false }
	g := &traveller{guest: &guest{t: t, mem: &guestMemory{data: make([]byte, 1<<20)}}, irq: make(chan struct{}, 1), out: make(wire, 64)}
	g.srrctl = oneBuffer
	g.attach(spoil)
	g.boot()
	g.send(1)
	if got := g.hop(spoil); !strings.Contains(got, compsc.HeadsShadowRing) {
		t.Fatalf("strategy %q", got)
	}
	g.send(1)
	g.vf.GuestWrite(ixgbevf.VFTDWBAH(0), 0)
	g.vf.GuestWrite(ixgbevf.VFTDWBAL(0), headWB|1)
	g.vf.Interrupt(0)
	if got := g.get(headWB); got != 0 {
		t.Errorf("head %d was written back that nobody asked for", got)
	}
	g.wb = true
	g.send(1)
	// The PF turns it off with a RESET message.
	g.message(ixgbevf.MsgReset)
	if got := g.vf.GuestRead(ixgbevf.VFTDWBAL(0)); got != 0 {
		t.Errorf("the guest reads %#x for where its heads go, want 0", got)
	}
	g.wb = false
	g.send(1)
}
