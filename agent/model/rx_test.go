package model

import (
	"bytes"
	"net"
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
)

func TestReceiveFormats(t *testing.T) {
	for _, tc := range []struct {
		name   string
		legacy bool
		buffer uint32
		size   int
		want   int // descriptors
	}{
		{"advanced", false, 2048, 1514, 1},
		{"legacy", true, 2048, 1514, 1},
		{"advanced chained", false, 1024, 1514, 2},
		{"legacy chained", true, 1024, 1514, 2},
		{"exactly two buffers", false, 2048, 4096, 2},
		{"jumbo", false, 2048, 9014, 5},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, func(c *Config) { c.PFMaxFrame = 9014 })
			d.legacy, d.rxBufLen = tc.legacy, tc.buffer
			d.up()
			d.must(ixgbevf.MsgSetLPE, 9018)
			// Three laps around the ring, so that frames span its end.
			for i := range 3 * ringSize {
				f := frame(guestMAC, peerMAC, tc.size-i%7)
				d.v.Receive(f)
				g := d.receive(0)
				if g == nil {
					t.Fatalf("frame %d not received", i)
				}
				if !bytes.Equal(g.data, f) {
					t.Fatalf("frame %d differs", i)
				}
				if i%7 == 0 && g.descriptors != tc.want {
					t.Fatalf("frame %d took %d descriptors, want %d", i, g.descriptors, tc.want)
				}
			}
			if head := d.v.Read(ixgbevf.VFRDH(0)); int(head) != d.rxNext[0] {
				t.Errorf("VFRDH = %d, driver is at %d", head, d.rxNext[0])
			}
		})
	}
}

func TestReceiveInterrupt(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	if n := <-d.irqs; n != 0 {
		t.Fatalf("vector %d, want 0", n)
	}
	// The vector masked itself; further frames wait for the unmasking.
	if m := d.v.Read(ixgbevf.VTEIMS); m != 6 {
		t.Fatalf("VTEIMS = %#x, want 6", m)
	}
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	if n := len(d.irqs); n != 0 {
		t.Fatalf("%d interrupts while masked", n)
	}
	d.v.Write(ixgbevf.VTEIMS, 1)
	if n := len(d.irqs); n != 1 {
		t.Fatalf("%d interrupts after unmasking, want 1", n)
	}
}

func TestReceiveWaitsForDescriptors(t *testing.T) {
	for _, drop := range []bool{false, true} {
		d := newDriver(t, func(c *Config) { c.ForceDropEnable, c.PacketBuffer = drop, 8*100 })
		d.up()
		for range ringSize - 1 + 10 {
			d.v.Receive(frame(guestMAC, peerMAC, 100))
		}
		n := 0
		for d.receive(0) != nil { // the refill of each lets a waiting frame in
			n++
		}
		want := ringSize - 1
		if !drop {
			want += 8 // what the packet buffer holds
		}
		if n != want {
			t.Errorf("drop-enable %v: %d frames, want %d", drop, n, want)
		}
		if got := d.v.Stats().RXNoDescriptor; got != uint64(ringSize-1+10-want) {
			t.Errorf("drop-enable %v: %d dropped, want %d", drop, got, ringSize-1+10-want)
		}
	}
}

// What waited for descriptors is lost with the queue, and its room is free.
func TestDisableEmptiesThePacketBuffer(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.ForceDropEnable, c.PacketBuffer = false, 200 })
	d.up()
	for round := range uint64(2) {
		for range ringSize + 1 {
			d.v.Receive(frame(guestMAC, peerMAC, 100))
		}
		if got := d.v.Stats(); got.Received != (round+1)*(ringSize-1) || got.RXNoDescriptor != round*2 {
			t.Fatalf("round %d: received %d, lost %d", round, got.Received, got.RXNoDescriptor)
		}
		d.setupRX(0)
	}
}

func TestDropEnableOfTheQueue(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.ForceDropEnable = false })
	d.up()
	d.v.Write(ixgbevf.VFSRRCTL(0), d.v.Read(ixgbevf.VFSRRCTL(0))|srrctlDropEn)
	for range ringSize {
		d.v.Receive(frame(guestMAC, peerMAC, 100))
	}
	if got := d.v.Stats().RXNoDescriptor; got != 1 {
		t.Errorf("%d dropped, want 1", got)
	}
}

func TestReceiveFilters(t *testing.T) {
	other := net.HardwareAddr{2, 0, 0, 0, 0, 9}
	group := net.HardwareAddr{1, 0, 0x5e, 0x12, 0xa5, 0x7b}
	broadcast := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	low, high := macWords(other)
	to := func(dst net.HardwareAddr) []byte { return frame(dst, peerMAC, 80) }
	for _, tc := range []struct {
		name  string
		setup func(d *driver)
		frame []byte
		want  bool
	}{
		{"own MAC", nil, to(guestMAC), true},
		{"other MAC", nil, to(other), false},
		{"runt", nil, to(guestMAC)[:13], false},
		{"broadcast", nil, to(broadcast), true},
		{"broadcast in mode none", func(d *driver) {
			d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastMulti)
			d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastNone)
		}, to(broadcast), false},
		{"macvlan", func(d *driver) {
			d.v.SetTrust(true)
			d.up()
			d.must(ixgbevf.MsgSetMACVLAN|1<<16, low, high)
		}, to(other), true},
		{"macvlans cleared", func(d *driver) {
			d.v.SetTrust(true)
			d.up()
			d.must(ixgbevf.MsgSetMACVLAN|1<<16, low, high)
			d.must(ixgbevf.MsgSetMACVLAN, 0, 0)
		}, to(other), false},
		{"group not asked for", nil, to(group), false},
		{"group, by hash", func(d *driver) {
			d.must(ixgbevf.MsgSetMulticast|2<<16, 0x123|0x7ba<<16)
		}, to(group), true},
		{"group, list replaced", func(d *driver) {
			d.must(ixgbevf.MsgSetMulticast|2<<16, 0x123|0x7ba<<16)
			d.must(ixgbevf.MsgSetMulticast|1<<16, 0x123)
		}, to(group), false},
		{"all multicast, untrusted", func(d *driver) {
			if r := d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastAllMulti); r[1] != ixgbevf.XcastMulti {
				d.t.Errorf("granted mode %d, want %d", r[1], ixgbevf.XcastMulti)
			}
		}, to(group), false},
		{"all multicast, trusted", func(d *driver) {
			d.v.SetTrust(true)
			d.up()
			d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastAllMulti)
		}, to(group), true},
		{"VLAN not asked for", nil, tagged(to(guestMAC), 100), false},
		{"VLAN", func(d *driver) { d.must(ixgbevf.MsgSetVLAN|1<<16, 100) }, tagged(to(guestMAC), 100), true},
		{"VLAN removed", func(d *driver) {
			d.must(ixgbevf.MsgSetVLAN|1<<16, 100)
			d.must(ixgbevf.MsgSetVLAN, 100)
		}, tagged(to(guestMAC), 100), false},
		{"priority tag", nil, tagged(to(guestMAC), 5<<13), true},
		{"untagged in port VLAN", func(d *driver) { mustAdmin(d.t, d.v.SetVLAN(7)) }, to(guestMAC), false},
		{"port VLAN", func(d *driver) { mustAdmin(d.t, d.v.SetVLAN(7)) }, tagged(to(guestMAC), 7), true},
		{"largest", nil, frame(guestMAC, peerMAC, 1514), true},
		{"too large", nil, frame(guestMAC, peerMAC, 1515), false},
		{"largest with a tag", func(d *driver) { d.must(ixgbevf.MsgSetVLAN|1<<16, 9) },
			tagged(frame(guestMAC, peerMAC, 1514), 9), true},
		{"after a bare reset", func(d *driver) { d.v.FLR() }, to(guestMAC), false},
		{"after trust was taken", func(d *driver) {
			d.v.SetTrust(true)
			d.refused(ixgbevf.MsgSetVLAN|1<<16, 9)
		}, to(guestMAC), true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, nil)
			d.up()
			if tc.setup != nil {
				tc.setup(d)
			}
			d.v.Receive(tc.frame)
			if got := d.receive(0) != nil; got != tc.want {
				t.Errorf("received: %v, want %v", got, tc.want)
			}
		})
	}
}

func mustAdmin(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestMulticastHash(t *testing.T) {
	// Bits 47:36, 46:35, 45:34 and 43:32 of the address 01:00:5e:12:a5:7b.
	for mo, want := range []uint16{0x7ba, 0xf74, 0xee9, 0xba5} {
		got := multicastHash(uint32(mo), macAddr{1, 0, 0x5e, 0x12, 0xa5, 0x7b})
		if got != want {
			t.Errorf("MO %d: %#x, want %#x", mo, got, want)
		}
	}
}

func TestVLANStripping(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.must(ixgbevf.MsgSetVLAN|1<<16, 100)
	f := frame(guestMAC, peerMAC, 80)
	d.v.Receive(tagged(f, 3<<13|100))
	g := d.receive(0)
	if g == nil || !bytes.Equal(g.data, f) || g.status&rxVP == 0 || g.tag != 3<<13|100 {
		t.Errorf("stripped: got %+v", g)
	}
	d.v.Write(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
	d.v.Receive(tagged(f, 100))
	g = d.receive(0)
	if g == nil || !bytes.Equal(g.data, tagged(f, 100)) || g.status&rxVP != 0 || g.tag != 0 {
		t.Errorf("not stripped: got %+v", g)
	}
}

func TestReceiveChecksums(t *testing.T) {
	spoil := func(f []byte, at int) []byte {
		f[at] ^= 0x40
		return f
	}
	tcp4 := func() []byte { return tcpFrame(false, guestMAC, peerMAC, []byte("payload")) }
	noSum := udpFrame(false, guestMAC, peerMAC, []byte("payload"))
	noSum[40], noSum[41] = 0, 0
	fragment := tcp4()
	fragment[20] |= 0x20 // more fragments
	be.PutUint16(fragment[24:], 0)
	be.PutUint16(fragment[24:], ^sum(0, fragment[14:34]))
	const good4, l4 = rxIPCS | rxL4CS, rxL4CS
	for _, tc := range []struct {
		name         string
		frame        []byte
		status, info uint32
	}{
		{"TCP", tcp4(), good4, typeIPv4 | typeTCP},
		{"TCP in VLAN", tagged(tcp4(), 0), good4 | rxVP, typeIPv4 | typeTCP},
		{"bad TCP", spoil(tcp4(), 55), good4 | rxL4E, typeIPv4 | typeTCP},
		{"bad IP", spoil(tcp4(), 22), good4 | rxIPE, typeIPv4 | typeTCP},
		{"TCP over IPv6", tcpFrame(true, guestMAC, peerMAC, []byte("abc")), l4, typeIPv6 | typeTCP},
		{"UDP", udpFrame(false, guestMAC, peerMAC, []byte("abcd")), good4 | rxUDPCS, typeIPv4 | typeUDP},
		{"bad UDP over IPv6", spoil(udpFrame(true, guestMAC, peerMAC, []byte("abcd")), 63), l4 | rxUDPCS | rxL4E, typeIPv6 | typeUDP},
		{"UDP without", noSum, rxIPCS, typeIPv4 | typeUDP},
		{"fragment", fragment, rxIPCS, typeIPv4},
		{"not IP", frame(guestMAC, peerMAC, 100), 0, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, nil)
			d.up()
			d.v.Receive(tc.frame)
			g := d.receive(0)
			if g == nil {
				t.Fatal("not received")
			}
			if want := tc.status | rxDD | rxEOP; g.status != want {
				t.Errorf("status %#x, want %#x", g.status, want)
			}
			if g.info != tc.info {
				t.Errorf("info %#x, want %#x", g.info, tc.info)
			}
		})
	}
}

// The vectors are those of RFC 1071 and of a widely quoted IPv4 header.
func TestSum(t *testing.T) {
	for _, tc := range []struct {
		b    []byte
		want uint16
	}{
		{[]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0xddf2},
		{[]byte{0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7}, 0xffff},
		{[]byte{0x12}, 0x1200},
	} {
		if got := sum(0, tc.b); got != tc.want {
			t.Errorf("sum(% x) = %#x, want %#x", tc.b, got, tc.want)
		}
	}
}

// The vectors are Microsoft's, from "Verifying the RSS Hash Calculation".
func TestRSS(t *testing.T) {
	f := tcpFrame(false, guestMAC, peerMAC, nil)
	copy(f[26:], []byte{66, 9, 149, 187, 161, 142, 100, 80})
	be.PutUint16(f[34:], 2794)
	be.PutUint16(f[36:], 1766)
	be.PutUint16(f[24:], 0)
	be.PutUint16(f[24:], ^sum(0, f[14:34]))
	h := parse(f)
	if hash, kind := h.rss(f, &rssKey, pfHashes); hash != 0x51ccc178 || kind != rssTCPv4 {
		t.Errorf("TCP: hash %#x type %d, want 0x51ccc178 type %d", hash, kind, rssTCPv4)
	}
	h.proto = 0
	if hash, kind := h.rss(f, &rssKey, pfHashes); hash != 0x323e8fc2 || kind != rssIPv4 {
		t.Errorf("IP: hash %#x type %d, want 0x323e8fc2 type %d", hash, kind, rssIPv4)
	}
	h.proto = protoUDP
	if hash, kind := h.rss(f, &rssKey, pfHashes|hashUDPv4); hash != 0x51ccc178 || kind != rssUDPv4 {
		t.Errorf("UDP: hash %#x type %d, want that of TCP, type %d", hash, kind, rssUDPv4)
	}
	if hash, kind := h.rss(f, &rssKey, hashTCPv4|hashUDPv6|hashIPv6); hash != 0 || kind != 0 {
		t.Errorf("nothing to hash: hash %#x type %d", hash, kind)
	}

	d := newDriver(t, nil)
	d.up()
	d.v.Write(ixgbevf.VFPSRTYPE, 1<<psrtypeRQPL)
	count := [2]int{}
	for port := range uint16(64) {
		f := tcpFrame(false, guestMAC, peerMAC, nil)
		be.PutUint16(f[34:], 1000+port)
		d.v.Receive(f)
		for q := range 2 {
			if g := d.receive(q); g != nil {
				count[q]++
				if g.info&0xf != rssTCPv4 || int(g.hash&(retaEntries-1))%2 != q {
					t.Errorf("queue %d: info %#x hash %#x", q, g.info, g.hash)
				}
			}
		}
	}
	if count[0]+count[1] != 64 || count[0] < 16 || count[1] < 16 {
		t.Errorf("spread %v of 64 flows", count)
	}
}

func TestReceiveUnmapped(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.mem.setUnmapped(true)
	f := frame(guestMAC, peerMAC, 100)
	d.v.Receive(f)
	if d.v.Read(ixgbevf.VFRDH(0)) != 0 {
		t.Fatal("descriptor consumed without memory")
	}
	d.mem.setUnmapped(false)
	var g *got
	eventually(t, func() bool { g = d.receive(0); return g != nil })
	if !bytes.Equal(g.data, f) {
		t.Error("frame differs")
	}
}
