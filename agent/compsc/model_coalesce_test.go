package compsc_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"testing"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// Lengths of headers: Ethernet and IPv4, and TCP behind them.
const (
	ipEnd  = 14 + 20
	tcpEnd = ipEnd + 20
)

// tcp is a sender of two streams whose octets count up.
type tcp struct {
	sent [2]uint32 // octets
}

// octet is that at a place in a stream.
func octet(port int, at uint32) byte { return byte(port<<7) + byte(at) + byte(at>>8) }

// segment makes the next segment of a stream.
func (s *tcp) segment(port, n int) []byte {
	f := slices.Concat(guestMAC, []byte{2, 0, 0, 0, 0, 9, 8, 0},
		[]byte{0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}, make([]byte, 20))
	binary.BigEndian.PutUint16(f[16:], uint16(40+n))
	binary.BigEndian.PutUint16(f[24:], ^sum(0, f[14:ipEnd]))
	binary.BigEndian.PutUint16(f[ipEnd:], uint16(port))
	binary.BigEndian.PutUint32(f[ipEnd+4:], s.sent[port])
	f[ipEnd+12], f[ipEnd+13] = 5<<4, 0x10
	for range n {
		f = append(f, octet(port, s.sent[port]))
		s.sent[port]++
	}
	pseudo := sum(uint32(6+20+n), f[26:ipEnd])
	binary.BigEndian.PutUint16(f[ipEnd+16:], ^sum(uint32(pseudo), f[ipEnd:]))
	return f
}

// sum is the internet checksum (RFC 1071), not complemented.
func sum(s uint32, b []byte) uint16 {
	for i, x := range b {
		s += uint32(x) << (8 * (1 - i%2))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// receiver takes streams off the receive ring as Linux's ixgbe driver does:
// descriptors in the order of the ring, frames along NEXTP.
type receiver struct {
	*traveller
	open map[uint32][]byte
	got  [2]uint32 // octets
	// chained counts frames that went on at another descriptor than the next.
	frames, chained int
}

// collect takes what is there, and checks every octet.
func (r *receiver) collect() {
	r.t.Helper()
	for {
		at, buffer := rxRing+16*uint64(r.rx), rxBuffers+bufSize*uint64(r.rx)
		info, status := r.guest.get(at), r.guest.get(at+8)
		if status&1 == 0 {
			return
		}
		part := make([]byte, status>>32&0xffff)
		if err := r.mem.ReadAt(buffer, part); err != nil {
			r.t.Fatal(err)
		}
		frame := append(r.open[r.rx], part...)
		delete(r.open, r.rx)
		r.put(at, buffer, headerBuffer(r.rx))
		r.vf.GuestWrite(ixgbevf.VFRDT(0), r.rx)
		r.rx = (r.rx + 1) % size
		if status&2 != 0 {
			r.frames++
			r.check(frame)
			continue
		}
		if info>>17&0xf == 0 {
			r.t.Fatalf("a frame goes on without RSCCNT: %#x %#x", info, status)
		}
		next := uint32(status >> 4 & 0xffff)
		if next != r.rx {
			r.chained++
		}
		if next >= size || r.open[next] != nil {
			r.t.Fatalf("descriptor %d goes on at %d", r.rx, next)
		}
		r.open[next] = frame
	}
}

func (r *receiver) check(frame []byte) {
	r.t.Helper()
	if total := int(binary.BigEndian.Uint16(frame[16:])); total != len(frame)-14 || sum(0, frame[14:ipEnd]) != 0xffff {
		r.t.Fatalf("a frame of %d octets has an IP header of %d: %x", len(frame), total, frame[14:ipEnd])
	}
	port := int(binary.BigEndian.Uint16(frame[ipEnd:]))
	if seq := binary.BigEndian.Uint32(frame[ipEnd+4:]); seq != r.got[port] {
		r.t.Fatalf("stream %d goes on at %d, want %d", port, seq, r.got[port])
	}
	want := make([]byte, len(frame)-tcpEnd)
	for i := range want {
		want[i] = octet(port, r.got[port])
		r.got[port]++
	}
	if !bytes.Equal(frame[tcpEnd:], want) {
		r.t.Fatalf("stream %d is damaged before %d", port, r.got[port])
	}
}

// Streams are coalesced by every silicon that the guest comes to, in a shadow
// ring too, where the place at which a frame goes on is another. What is being
// put together when the VF is stopped is given to the guest whole.
func TestModelCoalescing(t *testing.T) {
	ctx := context.Background()
	clock := model.NewManualClock()
	on := func(rxFixed bool) func(*model.Config) {
		return func(c *model.Config) { c.Clock, c.Coalescing, c.WritableRXHead = clock, true, !rxFixed }
	}
	g := &traveller{guest: &guest{t: t, mem: &guestMemory{data: make([]byte, 1<<20)}, srrctl: oneBuffer},
		irq: make(chan struct{}, 1), out: make(wire, 64), poll: true}
	g.attach(on(false))
	g.boot()
	g.vf.GuestWrite(ixgbevf.VFRSCCTL(0), 1|2<<2) // 8 descriptors
	g.vf.GuestWrite(ixgbevf.VTEIAC, 3)
	g.vf.GuestWrite(ixgbevf.VTEITR(0), intervalValue)
	s, r := &tcp{}, &receiver{traveller: g, open: make(map[uint32][]byte)}
	burst := func(segments int) {
		for n := range 2 * segments {
			sent, received := s.sent, g.m.Stats().Received
			if g.m.Receive(s.segment(n%2, 700+n)); g.m.Stats().Received == received {
				s.sent = sent // lost for want of descriptors: to be sent again
				return
			}
		}
	}
	all := func(what string) {
		t.Helper()
		g.eventually(what, func() bool { r.collect(); return r.got == s.sent })
		if len(r.open) > 0 {
			t.Fatalf("%s: %d frames have no end", what, len(r.open))
		}
	}
	for hop := range 8 {
		for range 3 * size {
			burst(1) // starts the interval
			burst(4)
			clock.Advance(interval)
			all("streams")
			clock.Advance(interval)
		}
		g.eventually("frames being put together", func() bool {
			burst(1)
			clock.Advance(interval) // and starts the next
			all("start of the interval")
			burst(3)
			return g.m.Stats().RXHeld > 0
		})
		if err := g.vf.Quiesce(ctx); err != nil {
			t.Fatal(err)
		}
		all("what was being put together")
		if hop%3 == 2 {
			if err := g.vf.Unquiesce(ctx); err != nil {
				t.Fatal(err)
			}
			continue
		}
		state, err := g.vf.Capture(ctx)
		if err != nil {
			t.Fatal(err)
		}
		source := g.vf
		g.attach(on(hop%2 == 0))
		report, err := g.vf.Restore(ctx, state)
		if err != nil {
			t.Fatal(err)
		}
		if err := source.Scrub(ctx); err != nil {
			t.Fatal(err)
		}
		// A head that cannot be written may be where it is to be by chance.
		fixed := hop%2 == 0 && state.Queues[0].Head != 0
		if relayed := report.HeadsStrategy != compsc.HeadsWriteVerify; relayed != fixed {
			t.Fatalf("hop %d: heads by %s, head %d", hop, report.HeadsStrategy, state.Queues[0].Head)
		}
		if n := g.m.Stats().RXHeld; n != 0 {
			t.Errorf("hop %d: %d descriptors are held on the target", hop, n)
		}
	}
	if segments := int(s.sent[0]+s.sent[1]) / 700; r.frames > segments/2 || r.chained == 0 {
		t.Errorf("%d frames of some %d segments, %d of them chained past another: nothing was coalesced", r.frames, segments, r.chained)
	}
}
