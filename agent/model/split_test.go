package model

import (
	"bytes"
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Values of VFSRRCTL for header buffers of 64 and 128 bytes.
const (
	split       = descSplit<<srrctlDescShift | 1<<srrctlHeaderShift
	always      = descSplitAlways<<srrctlDescShift | 1<<srrctlHeaderShift
	always128   = descSplitAlways<<srrctlDescShift | 2<<srrctlHeaderShift
	allSplits   = psrtypeTCP | psrtypeUDP | psrtypeIPv4 | psrtypeIPv6 | psrtypeL2
	tcp4, tcp6  = ethHeader + ipv4Header + tcpHeader, ethHeader + ipv6Header + tcpHeader
	udp4, plain = ethHeader + ipv4Header + udpHeader, ethHeader
)

// TestHeaderSplit has each row of the datasheet's table of header split.
func TestHeaderSplit(t *testing.T) {
	payload := make([]byte, 700)
	for i := range payload {
		payload[i] = byte(i + i>>8)
	}
	tcp := tcpFrame(false, guestMAC, peerMAC, payload)
	tcpV6 := tcpFrame(true, guestMAC, peerMAC, payload)
	udp := udpFrame(false, guestMAC, peerMAC, payload)
	short := udpFrame(false, guestMAC, peerMAC, payload[:20])
	raw := frame(guestMAC, peerMAC, 700)
	fragment := bytes.Clone(udp)
	be.PutUint16(fragment[ethHeader+6:], 0x2000)
	tall := bytes.Clone(tcp) // with 40 bytes of TCP options
	tall[ethHeader+ipv4Header+12] = 15 << 4
	for _, tc := range []struct {
		name   string
		srrctl uint32
		kinds  uint32
		frame  []byte
		// header is how much of the frame is in the header buffer; length, sph
		// and hbo are what the descriptor says.
		header, length int
		sph, hbo       bool
	}{
		{"split TCP", split, allSplits, tcp, tcp4, tcp4, true, false},
		{"split TCP over IPv6 does not fit", split, allSplits, tcpV6, 0, tcp6, true, true},
		{"split UDP", split, allSplits, udp, udp4, udp4, true, false},
		{"split after IP, TCP not asked for", split, allSplits &^ psrtypeTCP, tcp, 34, 34, true, false},
		{"split after IP, UDP not asked for", split, psrtypeIPv4 | psrtypeTCP, udp, 34, 34, true, false},
		{"split after IPv6", split, psrtypeIPv6, tcpV6, 54, 54, true, false},
		{"IPv6 not asked for", split, psrtypeIPv4 | psrtypeL2, tcpV6, plain, plain, true, false},
		{"split after Ethernet", split, allSplits, raw, plain, plain, true, false},
		{"a fragment is split after IP", split, allSplits, fragment, 34, 34, true, false},
		{"TCP options belong to the header", split, allSplits, tall, 0, tcp4 + 40, true, true},
		{"nothing asked for", split, 0, tcp, 0, 0, false, false},
		{"header not found", split, psrtypeTCP, raw, 0, 0, false, false},
		{"always: all of it fits", always, allSplits, short, 62, 62, false, false},
		{"always: header fits", always, allSplits, tcp, tcp4, tcp4, true, false},
		{"always: header does not fit", always, allSplits, tcpV6, 64, tcp6, true, true},
		{"always: header not found", always, psrtypeTCP, raw, 64, 64, false, false},
		{"always: a larger buffer", always128, allSplits, tcpV6, tcp6, tcp6, true, false},
		{"one buffer", 1<<srrctlDescShift | 1<<srrctlHeaderShift, allSplits, tcp, 0, 0, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, nil)
			d.srrctl = tc.srrctl
			d.up()
			d.v.Write(ixgbevf.VFPSRTYPE, tc.kinds)
			d.v.Receive(tc.frame)
			var desc [descriptorSize]byte
			_ = d.mem.ReadAt(rxRing, desc[:])
			info, status := le.Uint32(desc[0:]), le.Uint32(desc[8:])
			if status&(rxDD|rxEOP) != rxDD|rxEOP {
				t.Fatalf("status %#x: not received", status)
			}
			if got := int(info >> rxHeaderShift & maxHeader); got != tc.length {
				t.Errorf("HDR_LEN %d, want %d", got, tc.length)
			}
			if got := info&rxSPH != 0; got != tc.sph {
				t.Errorf("SPH %v, want %v", got, tc.sph)
			}
			if got := status&rxHBO != 0; got != tc.hbo {
				t.Errorf("HBO %v, want %v", got, tc.hbo)
			}
			if got := int(le.Uint16(desc[12:])); got != len(tc.frame)-tc.header {
				t.Errorf("PKT_LEN %d, want %d", got, len(tc.frame)-tc.header)
			}
			header, rest := make([]byte, tc.header), make([]byte, len(tc.frame)-tc.header)
			_ = d.mem.ReadAt(headerBuffer(0, 0), header)
			_ = d.mem.ReadAt(rxBuffer(0, 0), rest)
			if got := append(header, rest...); !bytes.Equal(got, tc.frame) {
				t.Errorf("the buffers have % x\nwant % x", got, tc.frame)
			}
			// Nothing goes behind the header: the next bytes are untouched.
			behind := make([]byte, 1)
			if _ = d.mem.ReadAt(headerBuffer(0, 0)+uint64(tc.header), behind); behind[0] != 0 {
				t.Errorf("byte %d of the header buffer was written", tc.header)
			}
		})
	}
}

// Frames longer than one packet buffer have their header in the first
// descriptor only, and VLAN tags that are stripped do not count.
func TestHeaderSplitChained(t *testing.T) {
	payload := make([]byte, 1400)
	for i := range payload {
		payload[i] = byte(7*i + i>>8)
	}
	for _, vid := range []int{-1, 9} {
		d := newDriver(t, nil)
		d.srrctl, d.rxBufLen = split, 1024
		d.up()
		d.must(ixgbevf.MsgSetVLAN|1<<16, 9)
		d.v.Write(ixgbevf.VFPSRTYPE, allSplits)
		want := tcpFrame(false, guestMAC, peerMAC, payload)
		sent := want
		if vid >= 0 {
			sent = tagged(want, uint16(vid))
		}
		for range 2 * ringSize {
			d.v.Receive(sent)
			var desc [2 * descriptorSize]byte
			i := d.rxNext[0]
			_ = d.mem.ReadAt(rxRing+16*uint64(i), desc[:descriptorSize])
			_ = d.mem.ReadAt(rxRing+16*uint64((i+1)%ringSize), desc[descriptorSize:])
			if n := le.Uint32(desc[0:]) >> rxHeaderShift & maxHeader; n != tcp4 {
				t.Fatalf("VLAN %d: HDR_LEN %d, want %d", vid, n, tcp4)
			}
			if info := le.Uint32(desc[descriptorSize:]); info>>rxHeaderShift != 0 {
				t.Fatalf("VLAN %d: the second descriptor tells of a header: %#x", vid, info)
			}
			g := d.receive(0)
			if g == nil || g.descriptors != 2 || !bytes.Equal(g.data, want) {
				t.Fatalf("VLAN %d: received %+v", vid, g)
			}
		}
	}
}
