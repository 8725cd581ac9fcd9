package model

import (
	"net"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"

	"github.com/google/go-cmp/cmp"
)

func TestReset(t *testing.T) {
	for _, tc := range []struct {
		name  string
		admin net.HardwareAddr
		mo    uint32
		want  [4]uint32
	}{
		{"admin MAC", guestMAC, 2, [4]uint32{ixgbevf.MsgReset | ixgbevf.MsgACK, 0x10005452, 0x01ed, 2}},
		{"no admin MAC", nil, 0, [4]uint32{ixgbevf.MsgReset | ixgbevf.MsgNACK, 0, 0, 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, func(c *Config) { c.AdminMAC, c.MulticastFilterType = tc.admin, tc.mo })
			for w := uint32(1); w < 4; w++ {
				d.v.Write(ixgbevf.VFMBMEM+4*w, 0)
			}
			if got := d.reset(); got != tc.want {
				t.Errorf("reply %#x, want %#x", got, tc.want)
			}
			if got := d.v.Read(ixgbevf.VFMAILBOX) & ixgbevf.MailboxReadClear; got != 0 {
				t.Errorf("read-clear bits %#x are still there", got)
			}
		})
	}
}

func TestNothingWithoutClearToSend(t *testing.T) {
	d := newDriver(t, nil)
	if r := d.message(ixgbevf.MsgSetVLAN|1<<16, 5); r[0] != ixgbevf.MsgSetVLAN|1<<16|ixgbevf.MsgNACK {
		t.Errorf("reply %#x, want NACK without CTS", r[0])
	}
	d.queues()
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	d.v.Receive(frame(net.HardwareAddr{255, 255, 255, 255, 255, 255}, peerMAC, 100))
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	if d.receive(0) != nil {
		t.Error("received before RESET")
	}
	// The doorbell was heard, but nothing goes out until the PF says so.
	d.mustIdle(0)
	if s := d.v.Stats(); s.RXDisabled != 2 || s.Transmitted != 0 {
		t.Errorf("stats %+v", s)
	}
	d.message(ixgbevf.MsgReset)
	d.sent()
}

func TestSilentWithQueuesOff(t *testing.T) {
	d := newDriver(t, nil)
	d.reset()
	d.setupTX(0)
	d.v.Write(ixgbevf.VFTXDCTL(0), 0)
	d.transmit(0, frame(peerMAC, guestMAC, 100))
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	d.mustIdle(0)
	if s := d.v.Stats(); s.Transmitted != 0 || s.Received != 0 || s.RXDisabled != 1 {
		t.Errorf("stats %+v", s)
	}
}

func TestMessages(t *testing.T) {
	low, high := macWords(net.HardwareAddr{2, 0, 0, 0, 0, 9})
	ownLow, ownHigh := macWords(guestMAC)
	api := func(code uint32) []uint32 { return []uint32{ixgbevf.MsgAPINegotiate, code} }
	for _, tc := range []struct {
		name   string
		change func(*Config)
		before [][]uint32
		send   []uint32
		ok     bool
		reply  []uint32 // words from 1 on, when it matters
	}{
		{"API 1.4", nil, nil, api(ixgbevf.API14), true, nil},
		{"API 1.5", nil, nil, api(ixgbevf.API15), false, nil},
		{"API 2.0", nil, nil, api(ixgbevf.API20), false, nil},
		{"API that this PF lacks", func(c *Config) { c.APIs = []uint32{ixgbevf.API10, ixgbevf.API13} }, nil, api(ixgbevf.API14), false, nil},
		{"queues under 1.0", nil, nil, []uint32{ixgbevf.MsgGetQueues}, false, nil},
		{"queues", nil, [][]uint32{api(ixgbevf.API11)}, []uint32{ixgbevf.MsgGetQueues}, true, []uint32{2, 2, 0, 0}},
		{"own MAC", nil, nil, []uint32{ixgbevf.MsgSetMAC, ownLow, ownHigh}, true, nil},
		{"other MAC than the admin's", nil, nil, []uint32{ixgbevf.MsgSetMAC, low, high}, false, nil},
		{"any MAC without an admin's", func(c *Config) { c.AdminMAC = nil }, nil, []uint32{ixgbevf.MsgSetMAC, low, high}, true, nil},
		{"group MAC", func(c *Config) { c.AdminMAC = nil }, nil, []uint32{ixgbevf.MsgSetMAC, 1, 0}, false, nil},
		{"macvlan under an admin MAC", nil, nil, []uint32{ixgbevf.MsgSetMACVLAN | 1<<16, low, high}, false, nil},
		{"clear macvlans under an admin MAC", nil, nil, []uint32{ixgbevf.MsgSetMACVLAN, 0, 0}, true, nil},
		{"macvlan, no filter free", func(c *Config) { c.AdminMAC, c.MACVLANs = nil, 0 }, nil, []uint32{ixgbevf.MsgSetMACVLAN | 1<<16, low, high}, false, nil},
		{"VLAN", nil, nil, []uint32{ixgbevf.MsgSetVLAN | 1<<16, 5}, true, nil},
		{"VLAN, table full", func(c *Config) { c.VLANs = 1 }, nil, []uint32{ixgbevf.MsgSetVLAN | 1<<16, 5}, false, nil},
		{"remove VLAN 0", nil, nil, []uint32{ixgbevf.MsgSetVLAN, 0}, true, nil},
		{"standard frames", nil, nil, []uint32{ixgbevf.MsgSetLPE, 1518}, true, nil},
		{"jumbo frames, PF without", nil, [][]uint32{api(ixgbevf.API14)}, []uint32{ixgbevf.MsgSetLPE, 9018}, false, nil},
		{"jumbo frames under 1.0", func(c *Config) { c.PFMaxFrame = 9014 }, nil, []uint32{ixgbevf.MsgSetLPE, 9018}, false, nil},
		{"jumbo frames", func(c *Config) { c.PFMaxFrame = 9014 }, [][]uint32{api(ixgbevf.API11)}, []uint32{ixgbevf.MsgSetLPE, 9018}, true, nil},
		{"frames beyond jumbo", func(c *Config) { c.PFMaxFrame = 9014 }, [][]uint32{api(ixgbevf.API11)}, []uint32{ixgbevf.MsgSetLPE, 9729}, false, nil},
		{"xcast under 1.1", nil, [][]uint32{api(ixgbevf.API11)}, []uint32{ixgbevf.MsgUpdateXcastMode, 1}, false, nil},
		{"xcast clamped", nil, [][]uint32{api(ixgbevf.API13)}, []uint32{ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastPromisc}, true, []uint32{ixgbevf.XcastMulti}},
		{"promiscuous under 1.2", nil, [][]uint32{api(ixgbevf.API12)}, []uint32{ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastPromisc}, false, nil},
		{"RETA", nil, [][]uint32{api(ixgbevf.API14)}, []uint32{ixgbevf.MsgGetRETA}, false, nil},
		{"RSS key", nil, [][]uint32{api(ixgbevf.API14)}, []uint32{ixgbevf.MsgGetRSSKey}, false, nil},
		{"IPsec", nil, [][]uint32{api(ixgbevf.API14)}, []uint32{ixgbevf.MsgIPsecAdd}, false, nil},
		{"IPsec without trust", func(c *Config) { c.Associations = 2 }, [][]uint32{api(ixgbevf.API14)}, []uint32{ixgbevf.MsgIPsecAdd}, false, nil},
		{"link state", nil, [][]uint32{api(ixgbevf.API12)}, []uint32{ixgbevf.MsgGetLinkState}, true, []uint32{1}},
		{"PF link state", nil, [][]uint32{api(ixgbevf.API16)}, []uint32{ixgbevf.MsgGetPFLinkState}, false, nil},
		{"features", func(c *Config) { c.Features = ixgbevf.FeatureIPsec }, [][]uint32{api(ixgbevf.API17)}, []uint32{ixgbevf.MsgFeaturesNegotiate, 3}, true, []uint32{1}},
		{"features under 1.6", nil, [][]uint32{api(ixgbevf.API16)}, []uint32{ixgbevf.MsgFeaturesNegotiate, 3}, false, nil},
		{"unknown", nil, nil, []uint32{0x77}, false, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDriver(t, tc.change)
			d.reset()
			for _, m := range tc.before {
				d.must(m...)
			}
			if !tc.ok {
				d.refused(tc.send...)
				return
			}
			r := d.must(tc.send...)
			if got := r[1 : 1+len(tc.reply)]; len(tc.reply) > 0 && !cmp.Equal(got, tc.reply) {
				t.Errorf("reply %#x, want %#x", got, tc.reply)
			}
		})
	}
}

func TestJumboPFKeepsReceiveOff(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.PFMaxFrame = 9014 })
	d.up()
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	d.must(ixgbevf.MsgSetLPE, 1518)
	d.v.Receive(frame(guestMAC, peerMAC, 100))
	if s := d.v.Stats(); s.RXDisabled != 1 || s.Received != 1 {
		t.Errorf("disabled %d, received %d; want 1, 1", s.RXDisabled, s.Received)
	}
}

// What a reset takes from the PF, and what it leaves.
func TestResetWipesPF(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.AdminMAC = nil })
	d.up()
	low, high := macWords(peerMAC)
	d.must(ixgbevf.MsgSetMACVLAN|1<<16, low, high)
	d.must(ixgbevf.MsgSetVLAN|1<<16, 5)
	d.must(ixgbevf.MsgSetMulticast|1<<16, 0x123)
	d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastMulti)
	before := PFState{
		ClearToSend: true, ReceiveEnabled: true, TransmitEnabled: true,
		API: ixgbevf.API14, MAC: guestMAC, MACVLANs: []net.HardwareAddr{peerMAC}, VLANs: []uint16{0, 5},
		Multicast: []uint16{0x123}, XcastMode: ixgbevf.XcastMulti,
		Broadcast: true, MulticastHash: true, Untagged: true, MaxFrame: 1518,
	}
	if diff := cmp.Diff(before, d.v.Stats().PF); diff != "" {
		t.Fatalf("set up (-want +got):\n%s", diff)
	}
	d.v.FLR()
	bare := PFState{
		VLANs: []uint16{0}, XcastMode: ixgbevf.XcastMulti,
		Broadcast: true, MulticastHash: true, Untagged: true, MaxFrame: 1518,
	}
	if diff := cmp.Diff(bare, d.v.Stats().PF); diff != "" {
		t.Errorf("after FLR (-want +got):\n%s", diff)
	}
	d.reset()
	after := bare
	after.ClearToSend, after.ReceiveEnabled, after.TransmitEnabled, after.MAC = true, true, true, guestMAC
	if diff := cmp.Diff(after, d.v.Stats().PF); diff != "" {
		t.Errorf("after RESET (-want +got):\n%s", diff)
	}
}

func TestXcastModeRemembered(t *testing.T) {
	group := net.HardwareAddr{1, 0, 0x5e, 1, 2, 3}
	d := newDriver(t, func(c *Config) { c.FilterModesClearedByReset = true })
	d.v.SetTrust(true)
	d.up()
	d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastAllMulti)
	d.up()
	d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastAllMulti) // remembered: no effect
	d.v.Receive(frame(group, peerMAC, 100))
	d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastMulti)
	d.must(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastAllMulti)
	d.v.Receive(frame(group, peerMAC, 100))
	if s := d.v.Stats(); s.RXFiltered != 1 || s.Received != 1 {
		t.Errorf("filtered %d, received %d; want 1, 1", s.RXFiltered, s.Received)
	}
}

func TestTrustPings(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	d.v.Read(ixgbevf.VTEICR)
	d.v.Write(ixgbevf.VTEIMS, 7)
	for len(d.irqs) > 0 {
		<-d.irqs
	}
	d.v.SetTrust(true)
	if n := <-d.irqs; n != 2 {
		t.Errorf("vector %d, want 2", n)
	}
	d.waitMailbox(ixgbevf.MailboxPFSTS)
	if got := d.v.Read(ixgbevf.VFMBMEM); got != ixgbevf.MsgPFControl {
		t.Errorf("message %#x, want the ping without CTS", got)
	}
	d.refused(ixgbevf.MsgSetVLAN|1<<16, 5)
	d.v.SetTrust(true) // no change, no revocation
	d.up()
	d.must(ixgbevf.MsgSetVLAN|1<<16, 5)
}

func TestPFLatency(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.PFLatency = 20 * time.Millisecond })
	d.v.Write(ixgbevf.VFMBMEM, ixgbevf.MsgReset)
	d.v.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if got := d.v.Read(ixgbevf.VFMAILBOX); got&(ixgbevf.MailboxPFACK|ixgbevf.MailboxPFSTS) != 0 {
		t.Errorf("VFMAILBOX = %#x at once", got)
	}
	d.waitMailbox(ixgbevf.MailboxPFSTS)
	// A reset forgets a message that the PF has not answered.
	d.v.Write(ixgbevf.VFMBMEM, ixgbevf.MsgReset)
	d.v.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	d.v.FLR()
	d.up()
	if got := d.v.Stats().Messages; got != 4 {
		t.Errorf("%d messages answered, want 4", got)
	}
}

func TestAdminErrors(t *testing.T) {
	d := newDriver(t, nil)
	for _, mac := range []net.HardwareAddr{nil, {1, 2, 3}, {1, 0, 0, 0, 0, 1}} {
		if d.v.SetAdminMAC(mac) == nil {
			t.Errorf("MAC %s accepted", mac)
		}
	}
	if d.v.SetVLAN(4095) == nil {
		t.Error("VLAN 4095 accepted")
	}
	mustAdmin(t, d.v.SetAdminMAC(make(net.HardwareAddr, 6)))
	if r := d.reset(); r[0] != ixgbevf.MsgReset|ixgbevf.MsgNACK {
		t.Errorf("RESET: reply %#x after the admin MAC was taken back", r[0])
	}
}

// A trusted VF's security associations get handles by direction, up to as many
// as the PF takes, and a reset drops them.
func TestAssociations(t *testing.T) {
	d := newDriver(t, func(c *Config) { c.Associations = 3 })
	d.v.SetTrust(true)
	d.reset()
	add := func(direction, want uint32) {
		t.Helper()
		if got := d.must(ixgbevf.MsgIPsecAdd, 0x1234, direction)[1]; got != want {
			t.Errorf("handle %d, want %d", got, want)
		}
	}
	add(1, 0)
	add(1, 1)
	add(2, 1024)
	d.refused(ixgbevf.MsgIPsecAdd, 0x1234, 1)
	d.must(ixgbevf.MsgIPsecDel, 0)
	d.must(ixgbevf.MsgIPsecDel, 0)
	if got := d.v.Stats().PF.Associations; got != 2 {
		t.Errorf("%d associations, want 2", got)
	}
	add(1, 0)
	d.reset()
	if got := d.v.Stats().PF.Associations; got != 0 {
		t.Errorf("%d associations after a reset", got)
	}
}

// What the PF does by itself shows in the mailbox, and in what passes.
func TestPFByItself(t *testing.T) {
	d := newDriver(t, nil)
	d.up()
	told := func(cts uint32) {
		t.Helper()
		if d.v.Read(ixgbevf.VFMAILBOX)&ixgbevf.MailboxPFSTS == 0 || d.v.Read(ixgbevf.VFMBMEM) != ixgbevf.MsgPFControl|cts {
			t.Errorf("the VF was told %#x", d.v.Read(ixgbevf.VFMBMEM))
		}
	}
	received := func(want uint64) {
		t.Helper()
		d.v.Receive(frame(guestMAC, peerMAC, 60))
		if got := d.v.Stats().Received; got != want {
			t.Errorf("received %d frames, want %d", got, want)
		}
	}
	d.v.Ping()
	told(ixgbevf.MsgCTS)
	received(1)
	d.v.SetLink(false)
	told(ixgbevf.MsgCTS)
	if d.v.Read(ixgbevf.VFLINKS)&ixgbevf.LinksUp != 0 {
		t.Error("the link is up")
	}
	received(1)
	d.v.SetLink(true)
	told(ixgbevf.MsgCTS)
	received(2)
	d.v.ResetPF()
	told(0)
	received(2)
	d.refused(ixgbevf.MsgSetVLAN|1<<16, 5)
}
