package model

import (
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// An X540's queue bounds the length of packets; an 82599's does not have the
// bits. Only with the latter a jumbo PF keeps its VF from receiving.
func TestPacketLength(t *testing.T) {
	for device, want := range map[uint16]struct{ bounded, silent bool }{
		0: {false, true}, ixgbevf.DeviceID: {false, true}, ixgbevf.DeviceIDX540: {true, false}, 0x1234: {false, true},
	} {
		d := newDriver(t, func(c *Config) { c.DeviceID = device })
		d.up()
		ctl := d.v.Read(ixgbevf.VFRXDCTL(0))
		d.v.Write(ixgbevf.VFRXDCTL(0), ctl|ixgbevf.RXDCTLLengthEnable|200)
		d.v.Receive(frame(guestMAC, peerMAC, 196)) // and 4 of FCS
		d.v.Receive(frame(guestMAC, peerMAC, 197))
		d.v.Receive(tagged(frame(guestMAC, peerMAC, 196), 0))
		if got := d.v.Stats().Received; (got == 2) != want.bounded {
			t.Errorf("device %#x received %d of 3 frames, bounded should be %v", device, got, want.bounded)
		}
		jumbo := newDriver(t, func(c *Config) { c.DeviceID, c.PFMaxFrame = device, 9014 })
		jumbo.reset()
		if on := jumbo.v.Stats().PF.ReceiveEnabled; on == want.silent {
			t.Errorf("device %#x receives under a jumbo PF: %v", device, on)
		}
	}
}

// An X550's VF spreads frames by its own key and table.
func TestOwnRSS(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.DeviceID = ixgbevf.DeviceIDX550 })
	d.up()
	f := tcpFrame(false, guestMAC, peerMAC, nil)
	queueOf := func() int {
		t.Helper()
		before := [2]uint32{d.v.Read(ixgbevf.VFRDH(0)), d.v.Read(ixgbevf.VFRDH(1))}
		d.v.Receive(f)
		for q, head := range before {
			if d.v.Read(ixgbevf.VFRDH(q)) != head {
				return q
			}
		}
		t.Fatal("the frame was not received")
		return 0
	}
	for n := range ixgbevf.RSSKeyWords {
		d.v.Write(ixgbevf.VFRSSRK(n), le.Uint32(rssKey[4*n:]))
	}
	hash, _ := parse(f).rss(f, &rssKey, pfHashes)
	entry := hash % 64
	for n := range ixgbevf.RSSTableWords {
		d.v.Write(ixgbevf.VFRETA(n), 0)
	}
	d.v.Write(ixgbevf.VFRETA(int(entry/4)), 1<<(8*(entry%4)))
	if q := queueOf(); q != 0 {
		t.Errorf("queue %d before RSS is on", q)
	}
	d.v.Write(ixgbevf.VFMRQC, ixgbevf.MRQCEnable|hashIPv4|hashTCPv6)
	if q := queueOf(); q != 0 {
		t.Errorf("queue %d, want 0 while ports are not hashed", q)
	}
	d.v.Write(ixgbevf.VFMRQC, ixgbevf.MRQCEnable|pfHashes)
	if q := queueOf(); q != 1 {
		t.Errorf("queue %d, want 1 as the table says", q)
	}
	d.v.Write(ixgbevf.VFRSSRK(0), 0) // another hash: another entry
	if q := queueOf(); q != 0 {
		t.Errorf("queue %d, want 0 under another key", q)
	}
	plain := newDriver(t, nil)
	plain.v.Write(ixgbevf.VFMRQC, ixgbevf.MRQCEnable)
	if got := plain.v.Read(ixgbevf.VFMRQC); got != 0 {
		t.Errorf("an 82599 has VFMRQC: %#x", got)
	}
}

func TestLoop(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.Loopback = true })
	d.up()
	if err := d.v.Loop(frame(guestMAC, peerMAC, 60)); err != nil {
		t.Fatal(err)
	}
	if got := d.v.Stats().Received; got != 1 {
		t.Errorf("received %d frames, want 1", got)
	}
	if err := newDriver(t, nil).v.Loop(frame(guestMAC, peerMAC, 60)); err == nil {
		t.Error("looped although the PF does not")
	}
}

func TestScratch(t *testing.T) {
	const at = 1 << 40
	guest := &testMemory{data: make([]byte, 64)}
	s := NewScratch(at, 32)
	mem := s.Over(guest)
	for _, tc := range []struct {
		addr uint64
		n    int
		ok   bool
	}{
		{0, 64, true}, {0, 65, false}, {at, 32, true}, {at + 31, 1, true}, {at + 31, 2, false}, {at - 1, 2, false},
		{at + 32, 1, false}, {^uint64(0), 8, false},
	} {
		p := make([]byte, tc.n)
		for i := range p {
			p[i] = byte(i + 1)
		}
		got := make([]byte, tc.n)
		if err := mem.WriteAt(tc.addr, p); (err == nil) != tc.ok {
			t.Errorf("write of %d bytes at %#x: %v", tc.n, tc.addr, err)
		}
		if err := mem.ReadAt(tc.addr, got); (err == nil) != tc.ok || tc.ok && string(got) != string(p) {
			t.Errorf("read of %d bytes at %#x: %v, %x", tc.n, tc.addr, err, got)
		}
	}
	if guest.data[31] != 32 {
		t.Error("the guest's memory is not where it was")
	}
	if err := s.WriteAt(at+30, make([]byte, 3)); err == nil {
		t.Error("wrote beyond the scratch memory")
	}
}
