package compsc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// part rings the doorbell for the first descriptors of a packet of n, which
// have more command bits, and returns what rings it for the rest and waits for
// the packet.
func (g *traveller) part(first, n int, more uint64) (rest func()) {
	g.t.Helper()
	g.sent++
	want := frame(bytes.Repeat([]byte{0xff}, 6), guestMAC, g.sent)
	put := func(from, to int) {
		for i := from; i < to; i++ {
			at, begin, end := uint64(g.tx)+uint64(i), i*len(want)/n, (i+1)*len(want)/n
			at %= size
			if err := g.mem.WriteAt(txBuffers+bufSize*at, want[begin:end]); err != nil {
				g.t.Fatal(err)
			}
			command := uint64(end-begin) | 3<<20 | 1<<25 | 1<<29 | more
			if i == n-1 {
				command |= 1 << 24
			}
			g.put(txRing+16*at, txBuffers+bufSize*at, uint64(len(want))<<46|command)
		}
		g.vf.GuestWrite(ixgbevf.VFTDT(0), (g.tx+uint32(to))%size)
	}
	put(0, first)
	return func() {
		g.t.Helper()
		put(first, n)
		g.tx = (g.tx + uint32(n)) % size
		select {
		case got := <-g.out:
			if !bytes.Equal(got, want) {
				g.t.Fatalf("sent %d octets %x, want %d octets %x", len(got), got, len(want), want)
			}
		case <-time.After(10 * time.Second):
			g.t.Fatalf("packet %d was not sent", g.sent)
		}
	}
}

// A driver rings the doorbell within a packet: the device has a part of it
// when it is stopped, and sends it whole, once, wherever it goes on.
func TestPartOfAPacketMoves(t *testing.T) {
	for name, spoil := range map[string]func(*model.Config){
		"written":  func(*model.Config) {},
		"advanced": func(c *model.Config) { c.WritableTXHead = false },
		"relayed":  func(c *model.Config) { c.WritableTXHead, c.HeadsPersistAcrossDisable = false, false },
	} {
		for _, wb := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, head written back %v", name, wb), func(t *testing.T) {
				t.Parallel()
				ctx := context.Background()
				g := &traveller{guest: &guest{t: t, mem: &guestMemory{data: make([]byte, 1<<20)}}, irq: make(chan struct{}, 1),
					out: make(wire, 64), wb: wb}
				g.attach(spoil)
				g.boot()
				g.send(1)
				for range 2 * size {
					rest := g.part(2, 4, 0)
					if err := errors.Join(g.vf.Quiesce(ctx), g.vf.Unquiesce(ctx)); err != nil {
						t.Fatal(err)
					}
					rest()
				}
				for range 20 {
					rest := g.part(1, 3, 0)
					g.hop(spoil)
					rest()
					g.send(2)
				}
				select {
				case f := <-g.out:
					t.Fatalf("%x was sent besides", f)
				default:
				}
			})
		}
	}
}

// A driver that was told that the device is through with a part of a packet may
// have taken its buffers back: there is no way to go on, and so none is tried.
func TestPartOfAPacketThatWasReported(t *testing.T) {
	ctx := context.Background()
	const rs = 1 << 27
	for name, test := range map[string]struct {
		wb    bool
		flags uint64
		told  func(g *traveller, begin uint32) bool
	}{
		"written back": {false, rs, func(g *traveller, begin uint32) bool { return g.get(txRing+16*uint64(begin+1)+8)>>32&1 != 0 }},
		"head written back": {true, rs, func(g *traveller, begin uint32) bool {
			var head [4]byte
			_ = g.mem.ReadAt(headWB, head[:])
			return binary.LittleEndian.Uint32(head[:]) == begin+2
		}},
		"head read": {false, 0, func(g *traveller, begin uint32) bool { return g.vf.GuestRead(ixgbevf.VFTDH(0)) == begin+2 }},
	} {
		t.Run(name, func(t *testing.T) {
			g := &traveller{guest: &guest{t: t, mem: &guestMemory{data: make([]byte, 1<<20)}}, irq: make(chan struct{}, 1),
				out: make(wire, 64), wb: test.wb}
			g.attach(func(*model.Config) {})
			g.boot()
			g.send(1)
			begin := g.tx
			rest := g.part(2, 4, test.flags)
			g.eventually("report of the part", func() bool { return test.told(g, begin) })
			var why *compsc.IncompatibleError
			if err := g.vf.Quiesce(ctx); !errors.As(err, &why) || why.Reason != compsc.ReasonHeadNotRestorable {
				t.Fatalf("quiesce: %v, want an error with reason %s", err, compsc.ReasonHeadNotRestorable)
			}
			rest()
			if err := errors.Join(g.vf.Quiesce(ctx), g.vf.Unquiesce(ctx)); err != nil {
				t.Error(err)
			}
			g.send(1)
		})
	}
}
