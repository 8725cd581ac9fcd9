package model

import (
	"bytes"
	"fmt"
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
)

func TestTransmitWrapsAround(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	for i := range 5 * ringSize {
		f := frame(peerMAC, guestMAC, 60+i*11)
		chunk := len(f)
		if i%3 == 0 {
			chunk = len(f)/3 + 1
		}
		last := d.txTail[i%2]
		d.data(i%2, f, chunk, 0, 0)
		d.doorbell(i % 2)
		if got := d.sent(); !bytes.Equal(got, f) {
			t.Fatalf("frame %d: got %x, want %x", i, got, f)
		}
		d.drained(i % 2)
		for at := last; at != d.txTail[i%2]; at = (at + 1) % ringSize {
			var desc [16]byte
			_ = d.mem.ReadAt(txRing+queueStep*uint64(i%2)+16*uint64(at), desc[:])
			eop := le.Uint32(desc[8:])&txEOP != 0
			if done := le.Uint32(desc[12:]) == txDD; done != eop {
				t.Fatalf("frame %d, descriptor %d: DD %v, RS %v", i, at, done, eop)
			}
		}
	}
	if n := <-d.irqs; n != 0 {
		t.Errorf("vector %d, want 0", n)
	}
}

func TestTransmitLegacy(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	f := tcpFrame(false, peerMAC, guestMAC, []byte("legacy"))
	want := tagged(bytes.Clone(f), 5)
	// The checksum field holds the pseudo header's sum, as drivers leave it.
	be.PutUint16(f[50:], uint16(sum(0, f[26:34]))+protoTCP+uint16(len(f)-34))
	_ = d.mem.WriteAt(txBuffers, f)
	d.post(0, txBuffers, 20, 34<<8)
	d.post(0, txBuffers+20, uint32(len(f)-20)|50<<16|txEOP|txIC|txRS|txVLE, 34<<8|5<<16)
	d.doorbell(0)
	if got := d.sent(); !bytes.Equal(got[:len(want)], want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
	d.drained(0)
	var desc [32]byte
	_ = d.mem.ReadAt(txRing, desc[:])
	if desc[12] != 0 || desc[28] != txDD || desc[30] != 5 {
		t.Errorf("write-back: %x", desc)
	}
}

func TestHeadWriteBack(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Write(ixgbevf.VFTDWBAL(0), headWB|ixgbevf.TDWBALEnable)
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	d.drained(0)
	var head [4]byte
	_ = d.mem.ReadAt(headWB, head[:])
	var desc [16]byte
	_ = d.mem.ReadAt(txRing, desc[:])
	if le.Uint32(head[:]) != 2 || le.Uint32(desc[12:])&txDD != 0 {
		t.Errorf("head %x, descriptor %x; want head 2 and no DD", head, desc)
	}
	d.reset()
	if got := d.v.Read(ixgbevf.VFTDWBAL(0)); got != 0 {
		t.Errorf("VFTDWBAL = %#x after RESET, want 0", got)
	}
}

// seed leaves in a checksum field what drivers leave: the pseudo header's
// sum, with the L4 length or, for segmentation, without.
func seed(f []byte, segmented bool) headers {
	h := parse(f)
	field := h.l4 + 16
	if h.proto == protoUDP {
		field = h.l4 + 6
	}
	s := h.pseudo(f)
	if segmented {
		s += 0xffff - uint32(h.end-h.l4)
	}
	be.PutUint16(f[field:], sum(s, nil))
	return h
}

func offloads(h headers, l4Len, mss int) txContext {
	c := txContext{macLen: h.ip, ipLen: h.l4 - h.ip, l4Len: l4Len, mss: mss, ipv4: !h.v6, l4: l4TCP}
	if h.proto == protoUDP {
		c.l4 = l4UDP
	}
	return c
}

func TestChecksumOffload(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, payload := range []string{"thirty octets of some payload.", "and one more: thirty-one octets"} {
			for name, want := range map[string][]byte{
				"tcp": tcpFrame(v6, peerMAC, guestMAC, []byte(payload)),
				"udp": udpFrame(v6, peerMAC, guestMAC, []byte(payload)),
			} {
				t.Run(fmt.Sprintf("%s %v %d", name, v6, len(payload)), func(t *testing.T) {
					d := newDriver(t, nil)
					d.up()
					f := bytes.Clone(want)
					h := seed(f, false)
					options := uint32(txTXSM)
					if !v6 {
						be.PutUint16(f[24:], 0)
						options |= txIXSM
					}
					// Through slot 1, with another context in slot 0.
					d.context(0, offloads(h, 20, 0), 1)
					d.context(0, txContext{tag: 1, macLen: 99, ipLen: 77}, 0)
					d.data(0, f, 30, 0, options|txIDX)
					d.doorbell(0)
					if got := d.sent(); !bytes.Equal(got, want) {
						t.Errorf("got  %x\nwant %x", got, want)
					}
				})
			}
		}
	}
}

func TestSegmentation(t *testing.T) {
	payload := make([]byte, 64000)
	for i := range payload {
		payload[i] = byte(i*13 + i>>8)
	}
	for _, v6 := range []bool{false, true} {
		for _, size := range []int{len(payload), 1448 * 3, 1449, 1448, 100} {
			t.Run(fmt.Sprintf("v6 %v, %d", v6, size), func(t *testing.T) {
				d := newDriver(t, nil)
				d.up()
				whole := tcpFrame(v6, peerMAC, guestMAC, payload[:size])
				h := parse(whole)
				first := be.Uint32(whole[h.l4+4:])
				f := bytes.Clone(whole)
				seed(f, true)
				options := uint32(txTXSM)
				if v6 {
					be.PutUint16(f[h.ip+4:], 0)
				} else {
					be.PutUint16(f[h.ip+2:], 0)
					be.PutUint16(f[h.ip+10:], 0xffff) // as Linux leaves it
					options |= txIXSM
				}
				c := offloads(h, tcpHeader, 1448)
				c.tag = 42
				d.context(0, c, 0)
				d.data(0, f, 8192, txTSE|txVLE, options)
				d.doorbell(0)

				var back []byte
				n := (size + 1447) / 1448
				for i := range n {
					s := d.sent()
					sh := parse(s)
					if !sh.tagged || sh.tag != 42 {
						t.Fatalf("segment %d: no tag 42", i)
					}
					want := uint32(rxL4CS)
					if !v6 {
						want |= rxIPCS
						if id := be.Uint16(s[sh.ip+4:]); id != uint16(0xffff+i) {
							t.Errorf("segment %d: IP id %#x", i, id)
						}
					}
					if got := sh.verify(s); got != want || sh.l4 == 0 {
						t.Fatalf("segment %d: checksums %#x, want %#x", i, got, want)
					}
					if seq := be.Uint32(s[sh.l4+4:]); seq != first+uint32(len(back)) {
						t.Errorf("segment %d: sequence %#x", i, seq)
					}
					flags := byte(0x10)
					if i == 0 {
						flags |= tcpCWR
					}
					if i == n-1 {
						flags |= tcpFIN | tcpPSH
					}
					if got := s[sh.l4+13]; got != flags {
						t.Errorf("segment %d: flags %#x, want %#x", i, got, flags)
					}
					back = append(back, s[sh.l4+tcpHeader:sh.end]...)
				}
				if !bytes.Equal(back, payload[:size]) {
					t.Error("payload differs")
				}
				d.drained(0)
				if got := d.v.Read(ixgbevf.VFGPTC); got != uint32(n) {
					t.Errorf("VFGPTC = %d, want %d", got, n)
				}
			})
		}
	}
}

func TestSegmentationUDP(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	f := udpFrame(false, peerMAC, guestMAC, bytes.Repeat([]byte("0123456789"), 30))
	h := seed(f, true)
	be.PutUint16(f[h.ip+10:], 0)
	d.context(0, offloads(h, udpHeader, 128), 0)
	d.data(0, f, len(f), txTSE, txTXSM|txIXSM)
	d.doorbell(0)
	for _, n := range []int{128, 128, 44} {
		s := d.sent()
		sh := parse(s)
		if got := sh.verify(s); got != rxIPCS|rxL4CS|rxUDPCS {
			t.Errorf("checksums %#x", got)
		}
		if got := int(be.Uint16(s[sh.l4+4:])); got != udpHeader+n || sh.end-sh.l4 != got {
			t.Errorf("UDP length %d in %d, want %d", got, sh.end-sh.l4, udpHeader+n)
		}
	}
}

func TestTransmitVLAN(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	f := frame(peerMAC, guestMAC, 100)
	d.context(0, txContext{tag: 3<<13 | 100}, 0)
	d.data(0, f, 100, txVLE, 0)
	d.doorbell(0)
	if got := d.sent(); !bytes.Equal(got, tagged(f, 3<<13|100)) {
		t.Errorf("VLE: %x", got)
	}
	mustAdmin(t, d.v.SetVLAN(7))
	d.transmit(0, f)
	if got := d.sent(); !bytes.Equal(got, tagged(f, 7)) {
		t.Errorf("port VLAN: %x", got)
	}
}

func TestTransmitDropped(t *testing.T) {
	own := frame(peerMAC, guestMAC, 100)
	for _, tc := range []struct {
		name    string
		post    func(d *driver)
		spoofed uint64
		bad     uint64
	}{
		{"spoofed", func(d *driver) { d.data(0, frame(guestMAC, peerMAC, 100), 100, 0, 0) }, 1, 0},
		{"runt", func(d *driver) { d.data(0, own[:13], 13, 0, 0) }, 0, 1},
		{"too large", func(d *driver) { d.data(0, frame(peerMAC, guestMAC, maxTXFrame+1), 8000, 0, 0) }, 0, 1},
		{"unknown type", func(d *driver) { d.post(0, txBuffers, txDEXT|7<<txTypeShift|txEOP|100, 0) }, 0, 1},
		{"segments of nothing", func(d *driver) {
			d.context(0, txContext{macLen: 14, ipLen: 20, l4Len: 20, ipv4: true, l4: l4TCP}, 0)
			d.data(0, own, 100, txTSE, 0)
		}, 0, 1},
		{"checksum outside", func(d *driver) {
			d.context(0, txContext{macLen: 14, ipLen: 80, ipv4: true, l4: l4TCP}, 0)
			d.data(0, own, 100, 0, txTXSM)
		}, 0, 1},
		{"endless packet", func(d *driver) {
			for range 5 {
				d.post(0, txBuffers, txDEXT|typeData<<txTypeShift|0xffff, 0)
			}
			d.post(0, txBuffers, txDEXT|typeData<<txTypeShift|txEOP|10, 0)
		}, 0, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, nil)
			d.up()
			tc.post(d)
			d.doorbell(0)
			d.drained(0)
			d.transmit(0, own) // and goes on after that
			if got := d.sent(); !bytes.Equal(got, own) {
				t.Errorf("got %x", got)
			}
			s := d.v.Stats()
			if s.TXSpoofed != tc.spoofed || s.TXMalformed != tc.bad {
				t.Errorf("spoofed %d, malformed %d; want %d, %d", s.TXSpoofed, s.TXMalformed, tc.spoofed, tc.bad)
			}
		})
	}
}

func TestTransmitUnmapped(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	f := frame(peerMAC, guestMAC, 100)
	d.data(0, f, 100, 0, 0)
	d.mem.setUnmapped(true)
	d.doorbell(0)
	eventually(t, func() bool { return d.v.Stats().Unmapped > 0 })
	d.mem.setUnmapped(false) // no doorbell: the device tries again by itself
	if got := d.sent(); !bytes.Equal(got, f) {
		t.Errorf("got %x", got)
	}
}

// Context descriptors alone advance the head and send nothing.
func TestContextsAlone(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	for i := range ringSize - 2 {
		d.context(0, txContext{mss: i}, uint32(i%2))
	}
	d.doorbell(0)
	d.drained(0)
	if s := d.v.Stats(); s.Transmitted != 0 || s.TXMalformed != 0 {
		t.Errorf("transmitted %d, malformed %d", s.Transmitted, s.TXMalformed)
	}
}

func TestDisableWaitsForTheWire(t *testing.T) {
	d := newDriver(t, nil)
	d.wire.hold, d.wire.begun = make(chan struct{}), make(chan struct{}, 16)
	d.up()
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	<-d.wire.begun
	d.v.Write(ixgbevf.VFTXDCTL(0), 0)
	d.v.Write(ixgbevf.VFTXDCTL(1), 0)
	if d.v.Read(ixgbevf.VFTXDCTL(0))&ixgbevf.QueueEnable == 0 {
		t.Error("queue reads as disabled while a frame is on its way out")
	}
	if d.v.Read(ixgbevf.VFTXDCTL(1))&ixgbevf.QueueEnable != 0 {
		t.Error("idle queue does not disable")
	}
	close(d.wire.hold)
	eventually(t, func() bool { return d.v.Read(ixgbevf.VFTXDCTL(0))&ixgbevf.QueueEnable == 0 })
	if head := d.v.Read(ixgbevf.VFTDH(0)); head != 1 {
		t.Errorf("VFTDH = %d, want 1", head)
	}
	d.sent()
}
