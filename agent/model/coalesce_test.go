package model

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Values of VFRSCCTL: on, with at most 1, 4, 8 or 16 descriptors.
const (
	rsc1 = rscctlEnable | iota<<rscctlMaxShift
	rsc4
	rsc8
	rsc16
)

// coalescingInterval is that of the vector that ends coalesced frames.
const coalescingInterval = 100 * time.Microsecond

// newCoalescing is a driver of a VF that coalesces, in whose vector's interval
// frames are put together.
func newCoalescing(t *testing.T, rscctl, srrctl, buffer uint32) (*driver, *ManualClock) {
	c := NewManualClock()
	d := newDriver(t, func(cfg *Config) { cfg.Clock, cfg.Coalescing = c, true })
	d.srrctl, d.rxBufLen = srrctl, buffer
	d.up()
	d.must(ixgbevf.MsgSetVLAN|1<<16, 9)
	d.v.Write(ixgbevf.VFPSRTYPE, allSplits)
	d.v.Write(ixgbevf.VFRSCCTL(0), rscctl)
	d.v.Write(ixgbevf.VTEIAM, 0)
	d.v.Write(ixgbevf.VTEIMS, ixgbevf.VectorMask)
	d.v.Write(ixgbevf.VTEITR(0), eitr(coalescingInterval))
	for d.v.Read(ixgbevf.VTEICR); len(d.irqs) > 0; <-d.irqs {
	}
	d.v.Receive(udpFrame(false, guestMAC, peerMAC, make([]byte, 200)))
	if got := d.frames(); len(got) != 1 || got[0].segments != 0 {
		t.Fatalf("the first frame arrives as %+v", got)
	}
	d.wantInterrupts(1, "at the first frame")
	return d, c
}

// whole is a frame as a driver takes it off the ring.
type whole struct {
	data        []byte
	segments    int // by RSCCNT
	descriptors int
	status      uint32
	tag         uint16
}

// frames cleans all that is done off the ring as Linux's driver does: in the
// order of the ring, frames that are not whole handed on along NEXTP.
func (d *driver) frames() []whole {
	d.t.Helper()
	var list []whole
	open := map[int]*whole{}
	for {
		var desc [descriptorSize]byte
		i := d.rxNext[0]
		_ = d.mem.ReadAt(rxRing+16*uint64(i), desc[:])
		info, status := le.Uint32(desc[0:]), le.Uint32(desc[8:])
		if status&rxDD == 0 || i == d.rxTail[0] {
			break
		}
		w := open[i]
		if delete(open, i); w == nil {
			w = &whole{}
		}
		if status&rxHBO == 0 || status&rxEOP != 0 {
			header := make([]byte, info>>rxHeaderShift&maxHeader)
			_ = d.mem.ReadAt(headerBuffer(0, i), header)
			w.data = append(w.data, header...)
		}
		part := make([]byte, le.Uint16(desc[12:]))
		_ = d.mem.ReadAt(rxBuffer(0, i), part)
		w.data = append(w.data, part...)
		count := int(info >> rxCountShift & maxCount)
		w.segments += count
		w.descriptors++
		next := (i + 1) % ringSize
		d.rxNext[0] = next
		if status&rxEOP == 0 {
			if count > 0 {
				next = int(status >> rxNextShift & 0xffff)
			}
			open[next] = w
			continue
		}
		w.status, w.tag = status, le.Uint16(desc[14:])
		list = append(list, *w)
	}
	if len(open) > 0 {
		d.t.Fatalf("%d frames have no end", len(open))
	}
	if head := d.v.Read(ixgbevf.VFRDH(0)); int(head) != d.rxNext[0] {
		d.t.Fatalf("VFRDH = %d, driver is at %d", head, d.rxNext[0])
	}
	n := (d.rxNext[0] + 2*ringSize - 1 - d.rxTail[0]) % ringSize
	d.refill(0, n)
	return list
}

// segment is one of a stream of TCP to the given port.
type segment struct {
	port         uint16
	seq, ack     uint32
	flags        byte
	stamp, other bool // the time stamp option, or another one
	v6, bad      bool
	payload      []byte
}

func (s segment) frame() []byte {
	l4 := make([]byte, tcpHeader)
	be.PutUint16(l4[0:], 5001)
	be.PutUint16(l4[2:], 40000+s.port)
	be.PutUint32(l4[4:], s.seq)
	be.PutUint32(l4[8:], s.ack)
	if s.stamp {
		l4 = append(be.AppendUint32(l4, tcpTimestamp), 0, 0, 0, 1, 0, 0, 0, 2)
	}
	if s.other {
		l4 = append(l4, 2, 4, 5, 0xb4)
	}
	l4[12], l4[13] = byte(len(l4)/4)<<4, s.flags
	f := ipFrame(s.v6, guestMAC, peerMAC, protoTCP, append(l4, s.payload...), 16)
	if s.bad {
		f[len(f)-1]++
	}
	return f
}

// stream makes segments that follow each other.
func stream(port uint16, sizes ...int) []segment {
	var list []segment
	seq := uint32(0xffffff00) // wraps
	for i, n := range sizes {
		payload := make([]byte, n)
		for at := range payload {
			payload[at] = byte(int(port) + 31*i + at + at>>8)
		}
		list = append(list, segment{port: port, seq: seq, ack: 77, flags: tcpACK, payload: payload})
		seq += uint32(n)
	}
	return list
}

// together is the frame that segments make: headers of the first, but with
// the length of all, and PSH if one has it.
func together(list []segment) []byte {
	f := list[0].frame()
	for _, s := range list[1:] {
		f = append(f, s.payload...)
		f[ethHeader+ipv4Header+tcpFlags] |= s.flags
	}
	ip := f[ethHeader : ethHeader+ipv4Header]
	be.PutUint16(ip[2:], uint16(len(f)-ethHeader))
	be.PutUint16(ip[10:], 0)
	be.PutUint16(ip[10:], ^sum(0, ip))
	return f
}

// Segments that follow each other within an interval become one frame, in
// every format and over as many descriptors as it takes, and the interrupt
// comes at the end of the interval.
func TestCoalescing(t *testing.T) {
	sizes := []int{700, 1, 900, 1300, 64, 1024}
	for _, tc := range []struct {
		name        string
		srrctl      uint32
		buffer      uint32
		tag         int
		descriptors int
	}{
		{"one large buffer", 1 << srrctlDescShift, 2048, -1, 2},
		{"small buffers", 1 << srrctlDescShift, 1024, -1, 4},
		{"split", split, 1024, -1, 4},
		{"header buffers always", always, 1024, -1, 4},
		{"with a tag", split, 1024, 9, 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, c := newCoalescing(t, rsc16, tc.srrctl, tc.buffer)
			for round := range 3 * ringSize {
				segments := stream(uint16(round), sizes...)
				for i, s := range segments {
					f := s.frame()
					if tc.tag >= 0 {
						f = tagged(f, uint16(tc.tag))
					}
					if d.v.Receive(f); i < 2 && len(d.frames()) != 0 {
						t.Fatalf("round %d: something arrives before the interval ends", round)
					}
				}
				d.wantInterrupts(0, "within the interval")
				c.Advance(coalescingInterval)
				d.wantInterrupts(1, "at its end")
				got, want := d.frames(), together(segments)
				if len(got) != 1 || !bytes.Equal(got[0].data, want) {
					t.Fatalf("round %d: %d frames arrive: %.200x, want %.200x", round, len(got), got, want)
				}
				g := got[0]
				if g.descriptors != tc.descriptors || g.segments < len(sizes) || g.segments > len(sizes)+g.descriptors-1 {
					t.Fatalf("round %d: %d descriptors of %d segments, want %d of %d", round, g.descriptors, g.segments, tc.descriptors, len(sizes))
				}
				if want := uint32(rxIPCS | rxL4CS); g.status&(rxIPCS|rxL4CS|rxIPE|rxL4E) != want {
					t.Fatalf("round %d: status %#x, want %#x", round, g.status, want)
				}
				if tc.tag >= 0 && (g.status&rxVP == 0 || int(g.tag) != tc.tag) {
					t.Fatalf("round %d: status %#x and tag %d", round, g.status, g.tag)
				}
			}
			if got, want := d.v.Stats().RXCoalesced, uint64(3*ringSize*(len(sizes)-1)); got != want {
				t.Errorf("%d frames coalesced, want %d", got, want)
			}
			if got, want := d.v.Read(ixgbevf.VFGPRC), uint32(3*ringSize*len(sizes)+1); got != want {
				t.Errorf("VFGPRC %d, want every segment: %d", got, want)
			}
		})
	}
}

// What ends a frame, and what is none to be coalesced.
func TestCoalescingEnds(t *testing.T) {
	three := func(change func(list []segment)) []segment {
		list := stream(1, 300, 300, 300)
		change(list)
		return list
	}
	for _, tc := range []struct {
		name     string
		rscctl   uint32
		segments []segment
		want     []int // segments of each frame, 0 for one that is not coalesced
	}{
		{"nothing", rsc4, three(func([]segment) {}), []int{3}},
		{"off", rsc4 &^ rscctlEnable, three(func([]segment) {}), []int{0, 0, 0}},
		{"time stamps", rsc4, three(func(l []segment) { l[0].stamp, l[1].stamp, l[2].stamp = true, true, true }), []int{3}},
		{"time stamp missing", rsc4, three(func(l []segment) { l[0].stamp, l[1].stamp = true, true }), []int{2, 1}},
		{"PSH", rsc4, three(func(l []segment) { l[1].flags |= tcpPSH }), []int{2, 1}},
		{"PSH at once", rsc4, three(func(l []segment) { l[0].flags |= tcpPSH }), []int{1, 2}},
		{"FIN", rsc4, three(func(l []segment) { l[1].flags |= tcpFIN }), []int{1, 0, 1}},
		{"other option", rsc4, three(func(l []segment) { l[1].other = true }), []int{1, 0, 1}},
		{"gap", rsc4, three(func(l []segment) { l[1].seq++ }), []int{1, 1, 1}},
		{"new acknowledgement", rsc4, three(func(l []segment) { l[1].ack++; l[2].ack++ }), []int{1, 2}},
		{"pure acknowledgement", rsc4, three(func(l []segment) { l[1].payload = nil }), []int{1, 0, 1}},
		{"bad checksum", rsc4, three(func(l []segment) { l[1].bad = true }), []int{1, 0, 1}},
		{"IPv6", rsc4, three(func(l []segment) { l[0].v6, l[1].v6, l[2].v6 = true, true, true }), []int{0, 0, 0}},
		{"padded", rsc4, stream(1, 2, 300), []int{0, 1}},
		{"two flows", rsc4, slices.Concat(stream(1, 300, 300), stream(2, 300, 300)), []int{2, 2}},
		{"one descriptor", rsc1, stream(1, 900, 900, 900), []int{2, 1}},
		{"four descriptors", rsc4, stream(1, 1400, 1400, 1400, 1400, 1400, 1400, 1400), []int{5, 2}},
		{"fifteen segments of a descriptor", rsc16, stream(1, slices.Repeat([]int{70}, 20)...), []int{15, 5}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d, c := newCoalescing(t, tc.rscctl, 1<<srrctlDescShift, 2048)
			for _, s := range tc.segments {
				d.v.Receive(s.frame())
			}
			c.Advance(coalescingInterval)
			var data int
			var got []int
			for _, g := range d.frames() {
				n := g.segments
				if n > 0 && g.descriptors > 1 {
					n = (len(g.data) - tcp4 + 1399) / 1400
				}
				got = append(got, n)
				data += len(g.data)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("frames of %v segments, want %v", got, tc.want)
			}
			if data == 0 {
				t.Error("no data at all")
			}
		})
	}
}

// Frames of two flows that come in turns have descriptors in turns, and NEXTP
// tells which belong together.
func TestCoalescingInterleaved(t *testing.T) {
	d, c := newCoalescing(t, rsc16, split, 1024)
	a, b := stream(1, 1000, 1000, 1000), stream(2, 1000, 1000, 1000)
	for i := range a {
		d.v.Receive(a[i].frame())
		d.v.Receive(b[i].frame())
	}
	// In between, one that goes its own way.
	lone := udpFrame(false, guestMAC, peerMAC, make([]byte, 700))
	d.v.Receive(lone)
	d.wantInterrupts(0, "before the first frame is whole")
	// What the frames went beyond is written back: two descriptors of each.
	if n := d.v.Stats().RXHeld; n != 3 {
		t.Errorf("%d descriptors are held, want 3", n)
	}
	c.Advance(coalescingInterval)
	got := d.frames()
	if len(got) != 3 {
		t.Fatalf("%d frames arrive, want 3", len(got))
	}
	for i, want := range [][]byte{together(a), together(b), lone} {
		if !bytes.Equal(got[i].data, want) {
			t.Errorf("frame %d is %.200x, want %.200x", i, got[i].data, want)
		}
	}
}

// One interrupt tells of what all queues of a vector have put together: after
// it nothing is left for another.
func TestCoalescingQueuesShareAnInterrupt(t *testing.T) {
	d, c := newCoalescing(t, rsc16, 1<<srrctlDescShift, 1024)
	d.v.Write(ixgbevf.VFRSCCTL(1), rsc16)
	d.v.Write(ixgbevf.VFPSRTYPE, 1<<psrtypeRQPL)
	d.v.Write(ixgbevf.VTIVAR(0), 0x80*0x010101)
	d.v.Write(ixgbevf.VTEIAC, 1)
	d.v.Write(ixgbevf.VTEIAM, 1)
	heads := func() (n int) {
		for q := range 2 {
			if d.v.Read(ixgbevf.VFRDH(q)) > uint32(1-q) { // the first frame came to queue 0
				n++
			}
		}
		return n
	}
	for port := range uint16(16) {
		for _, s := range stream(port, 100, 100) {
			d.v.Receive(s.frame())
		}
	}
	if n := heads(); n != 0 {
		t.Fatalf("%d queues give something back before the interval ends", n)
	}
	c.Advance(coalescingInterval)
	if n := heads(); n != 2 {
		t.Fatalf("%d queues have received something, want both", n)
	}
	d.wantInterrupts(1, "at the end of the interval")
	if cause := d.v.Read(ixgbevf.VTEICR); cause != 0 {
		t.Errorf("causes %#x are left", cause)
	}
}

// Without an interval that runs, or a vector, every segment is one frame: none
// waits for what may never come.
func TestCoalescingNeedsAnInterval(t *testing.T) {
	for name, setup := range map[string]func(*driver, *ManualClock){
		"no vector":   func(d *driver, _ *ManualClock) { d.v.Write(ixgbevf.VTIVAR(0), 0) },
		"no interval": func(d *driver, _ *ManualClock) { d.v.Write(ixgbevf.VTEITR(0), 0) },
		"masked": func(d *driver, c *ManualClock) {
			d.v.Write(ixgbevf.VTEIMC, 1)
			c.Advance(coalescingInterval)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, c := newCoalescing(t, rsc16, 1<<srrctlDescShift, 2048)
			setup(d, c)
			for _, s := range stream(1, 300, 300) {
				d.v.Receive(s.frame())
				if got := d.frames(); len(got) != 1 || got[0].segments != 1 {
					t.Fatalf("got %+v", got)
				}
			}
		})
	}
}

// A queue that is turned off gives back what it was putting together; a reset
// does not touch memory any more.
func TestCoalescingStops(t *testing.T) {
	for _, reset := range []bool{false, true} {
		d, c := newCoalescing(t, rsc16, 1<<srrctlDescShift, 1024)
		segments := stream(1, 900, 900)
		for _, s := range segments {
			d.v.Receive(s.frame())
		}
		if reset {
			d.v.FLR()
		} else {
			d.v.Write(ixgbevf.VFRXDCTL(0), 0)
		}
		before := bytes.Clone(d.mem.data)
		c.Advance(time.Second)
		if !bytes.Equal(before, d.mem.data) {
			t.Errorf("reset %v: memory changes after the queue is off", reset)
		}
		var desc [descriptorSize]byte
		_ = d.mem.ReadAt(rxRing+16*uint64(d.rxNext[0]+1), desc[:])
		if done := le.Uint32(desc[8:])&(rxDD|rxEOP) == rxDD|rxEOP; done == reset {
			t.Errorf("reset %v: the last descriptor is written back: %v", reset, done)
		}
		if !reset {
			if got := d.frames(); len(got) != 1 || !bytes.Equal(got[0].data, together(segments)) {
				t.Errorf("got %+v", got)
			}
		}
	}
}

// Segments beyond the last descriptor do not take those that come before with
// them.
func TestCoalescingWithoutDescriptors(t *testing.T) {
	d, c := newCoalescing(t, rsc16, 1<<srrctlDescShift, 1024)
	d.v.Write(ixgbevf.VFRDT(0), uint32(d.rxNext[0]+2))
	segments := stream(1, 900, 900, 900)
	for _, s := range segments {
		d.v.Receive(s.frame())
	}
	d.rxTail[0] = d.rxNext[0] + 2
	c.Advance(coalescingInterval)
	if got := d.frames(); len(got) != 1 || !bytes.Equal(got[0].data, together(segments[:2])) {
		t.Fatalf("got %+v", got)
	}
	if n := d.v.Stats().RXNoDescriptor; n != 1 {
		t.Errorf("%d frames dropped, want 1", n)
	}
}

// Memory that is not there for a while tears nothing.
func TestCoalescingUnmapped(t *testing.T) {
	d, c := newCoalescing(t, rsc16, split, 1024)
	segments := stream(1, 900, 900, 900)
	d.v.Receive(segments[0].frame())
	d.mem.setUnmapped(true)
	d.v.Receive(segments[1].frame())
	d.mem.setUnmapped(false)
	d.v.Receive(segments[2].frame())
	c.Advance(coalescingInterval)
	if got := d.frames(); len(got) != 1 || !bytes.Equal(got[0].data, together(segments)) {
		t.Fatalf("got %+v", got)
	}
	d.v.Receive(segments[0].frame())
	d.mem.setUnmapped(true)
	c.Advance(coalescingInterval)
	d.mem.setUnmapped(false)
	eventually(t, func() bool { return d.v.Stats().RXHeld == 0 })
	if got := d.frames(); len(got) != 1 || !bytes.Equal(got[0].data, segments[0].frame()) {
		t.Fatalf("got %+v", got)
	}
}
