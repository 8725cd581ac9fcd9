//go:build e2esriov

package tests

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/driver"
)

// What the guest asks of the PF for itself, besides its address.
var (
	furtherMAC = net.HardwareAddr{0x52, 0x54, 0, 0xaa, 0, 0x11}
	listedMAC  = net.HardwareAddr{0x01, 0, 0x5e, 0x7f, 0x12, 0x34}
	otherMAC   = net.HardwareAddr{0x52, 0x54, 0, 0xaa, 0, 0x12}
	// otherGroup is a multicast address that nobody asked for.
	otherGroup = net.HardwareAddr{0x01, 0, 0x5e, 0x7f, 0x43, 0x21}
)

const (
	listedVLAN, otherVLAN = 77, 78
	// maxFrame is what the guest lets the PF pass, with the checksum.
	maxFrame = 600
	// impatience bounds the wait for frames that may well not come.
	impatience = 2 * time.Second
)

// hash is what an igb PF has of a multicast address.
func hash(a net.HardwareAddr) uint32 { return (uint32(a[4])>>4 | uint32(a[5])<<4) & 0xfff }

// address is the two words of an address in a message.
func address(a net.HardwareAddr) (low, high uint32) {
	return binary.LittleEndian.Uint32(a), uint32(binary.LittleEndian.Uint16(a[4:]))
}

// with is a message with further words about an address.
func with(word uint32, a net.HardwareAddr) []uint32 {
	low, high := address(a)
	return []uint32{word, low, high}
}

// ask sends the PF a message in the guest's place, and returns the reply.
func (r *rig) ask(words ...uint32) (reply [3]uint32) {
	r.Helper()
	bus, seen := r.guest.Bus, uint32(0)
	wait := func(what string, bits uint32, before func()) {
		r.Helper()
		deadline, tick := time.After(r.guest.Patience), time.NewTicker(100*time.Microsecond)
		defer tick.Stop()
		for {
			before()
			if seen |= bus.Read(igbvf.V2PMAILBOX); seen&bits == bits {
				return
			}
			select {
			case <-tick.C:
			case <-deadline:
				r.Fatalf("message %#x: no %s", words[0], what)
			}
		}
	}
	lock := func() { seen = 0; bus.Write(igbvf.V2PMAILBOX, igbvf.MailboxVFU) }
	wait("mailbox", igbvf.MailboxVFU, lock)
	for i, word := range words {
		bus.Write(igbvf.VMBMEM+4*uint32(i), word)
	}
	seen = 0
	bus.Write(igbvf.V2PMAILBOX, igbvf.MailboxREQ)
	wait("reply", igbvf.MailboxPFACK|igbvf.MailboxPFSTS, func() {})
	wait("mailbox", igbvf.MailboxVFU, lock)
	for i := range reply {
		reply[i] = bus.Read(igbvf.VMBMEM + 4*uint32(i))
	}
	bus.Write(igbvf.V2PMAILBOX, igbvf.MailboxACK)
	return reply
}

// granted has the PF grant a message.
func (r *rig) granted(words ...uint32) {
	r.Helper()
	if reply := r.ask(words...); reply[0]&igbvf.MsgACK == 0 {
		r.Fatalf("message %#x: the PF replies %#x", words, reply)
	}
}

// reset has the guest reset its VF and complete that with the PF.
func (r *rig) reset() (reply [3]uint32) {
	r.Helper()
	r.guest.Bus.Write(igbvf.CTRL, igbvf.CtrlRST)
	return r.ask(igbvf.MsgReset)
}

// configure has the guest use all of the dialect.
func (r *rig) configure() {
	r.Helper()
	r.granted(igbvf.MsgSetMulticast|1<<igbvf.MsgInfoShift, hash(listedMAC))
	r.granted(with(igbvf.MsgSetMAC|igbvf.MACFilterAdd<<igbvf.MsgInfoShift, furtherMAC)...)
	r.granted(igbvf.MsgSetVLAN|1<<igbvf.MsgInfoShift, 0)
	r.granted(igbvf.MsgSetVLAN|1<<igbvf.MsgInfoShift, listedVLAN)
	r.granted(igbvf.MsgSetLPE, maxFrame)
}

// frame is one that a card sends, and whether the guest is to get it.
type frame struct {
	name    string
	to      net.HardwareAddr
	vlan    uint16
	size    int
	arrives bool
}

// frames shows all that configure asked for.
var frames = []frame{
	{"to the guest's address", guestMAC, 0, 0, true},
	{"to its further address", furtherMAC, 0, 0, true},
	{"to another address", otherMAC, 0, 0, false},
	{"to its group", listedMAC, 0, 0, true},
	{"to another group", otherGroup, 0, 0, false},
	{"in its VLAN", guestMAC, listedVLAN, 0, true},
	{"in another VLAN", guestMAC, otherVLAN, 0, false},
	{"as long as can be", guestMAC, 0, maxFrame - 4, true},
	{"that is too long", guestMAC, 0, maxFrame, false},
}

// from is the card's network interface as a sender.
type from struct {
	fd  int
	mac net.HardwareAddr
}

func (r *rig) listen(pf card.PF) from {
	r.Helper()
	link, err := pf.Link()
	r.must(err)
	fd, err := pf.Listen()
	r.must(err)
	r.Cleanup(func() { unix.Close(fd) })
	return from{fd, link.Attrs().HardwareAddr}
}

func (f from) send(fr frame) error {
	b := driver.Frame(fr.to, f.mac, fr.name)
	if fr.vlan != 0 {
		b = slices.Insert(b, 12, 0x81, 0, byte(fr.vlan>>8), byte(fr.vlan))
	}
	b = append(b, make([]byte, max(0, fr.size-len(b)))...)
	_, err := unix.Write(f.fd, b)
	return err
}

// delivers looks whether the guest gets just the frames that it is to get of a
// card. A frame in a VLAN is seen only without its tag, which the PF strips.
func (r *rig) delivers(pf card.PF, list []frame) error {
	r.Helper()
	sender := r.listen(pf)
	for i, f := range list {
		marker := frame{name: fmt.Sprint("after ", i), to: guestMAC}
		if err := errors.Join(sender.send(f), sender.send(marker)); err != nil {
			return err
		}
		var got []string
		for last := ""; last != marker.name; got = append(got, last) {
			var err error
			if last, err = r.guest.Receive(); err != nil {
				return fmt.Errorf("a frame %s, from %s: %w", f.name, pf.Name, err)
			}
		}
		if arrived := slices.Contains(got, f.name); arrived != f.arrives {
			return fmt.Errorf("a frame %s, from %s, arrived: %v", f.name, pf.Name, arrived)
		}
	}
	return nil
}

// forgetful is the family with records that lack a part.
type forgetful struct {
	family.Family
	change func(family.Log) family.Log
}

func (f forgetful) NewLog() family.Log { return f.change(f.Family.NewLog()) }

func (f forgetful) RestoreLog(b []byte) (family.Log, error) {
	l, err := f.Family.RestoreLog(b)
	if err != nil {
		return nil, err
	}
	return f.change(l), nil
}

// lacks is a record whose replay lacks a message.
type lacks struct {
	family.Log
	message int
}

func (l lacks) Replay() []family.Message {
	list := l.Log.Replay()
	return slices.Delete(list, min(l.message, len(list)), min(l.message+1, len(list)))
}

// keeps is a record that has the PF release nothing.
type keeps struct{ family.Log }

func (keeps) Release() []family.Message { return nil }

// carry moves the guest to another VF, and returns how many messages that took
// and whether the guest gets just the frames of the list that it is to get,
// from both cards.
func (r *rig) carry(to card.VF, f family.Family, list []frame) (messages int, err error) {
	r.Helper()
	r.must(r.source.Quiesce(r.Context()))
	state, err := r.source.Capture(r.Context())
	r.must(err)
	r.must(r.source.Scrub(r.Context()))
	target := plugAs(r.T, to, r.mem, f)
	_, err = target.Probe(r.Context())
	r.must(err)
	report, err := target.Restore(r.Context(), state)
	if err != nil {
		return 0, err
	}
	defer func() { r.must(target.Scrub(r.Context())) }()
	r.guest.Bus = target
	return report.ReplayedOperations, errors.Join(r.delivers(cards[0], list), r.delivers(cards[1], list))
}

// guestOn starts a guest on a VF that uses all of the dialect.
func guestOn(t *testing.T, vf card.VF, f family.Family) *rig {
	t.Helper()
	r := &rig{T: t, mem: newRAM(t)}
	r.source = plugAs(t, vf, r.mem, f)
	r.guest = driver.New(r.source, r.mem, base)
	r.must(r.guest.Start(guestMAC))
	r.configure()
	if err := r.delivers(cards[0], frames); err != nil {
		t.Fatalf("before the move: %v", err)
	}
	return r
}

// TestReplay: what a guest asked of its PF, the PF of another card does too,
// and the card that it left does no longer. Each message of the replay is
// seen to be needed by the frames that arrive, or do not, without it.
func TestReplay(t *testing.T) {
	messages := 0
	t.Run("whole", func(t *testing.T) {
		var err error
		if messages, err = guestOn(t, vfs[0][0], igbvf.New()).carry(vfs[1][0], igbvf.New(), frames); err != nil {
			t.Fatal(err)
		}
	})
	for i := range messages {
		t.Run(fmt.Sprint("without message ", i), func(t *testing.T) {
			name := ""
			f := forgetful{igbvf.New(), func(l family.Log) family.Log {
				if list := l.Replay(); i < len(list) {
					name = fmt.Sprintf("%s %x", list[i].Name, list[i].Words)
				}
				return lacks{l, i}
			}}
			r := guestOn(t, vfs[0][0], igbvf.New())
			r.guest.Patience = impatience
			_, err := r.carry(vfs[1][0], f, frames)
			t.Logf("%s: %v", name, err)
			// VLAN 0 is there without being asked for, and a VF that was
			// probed has nothing to clear.
			needed := name != "SET_VLAN [10004 0]" && !strings.Contains(name, "clear")
			if (err != nil) != needed {
				t.Errorf("%s: the guest sees %v", name, err)
			}
		})
	}
}

// TestRelease: a VF that its guest has left would keep the guest's frames from
// it, for a reset leaves address filters in the PF.
func TestRelease(t *testing.T) {
	t.Run("left out", func(t *testing.T) {
		f := forgetful{igbvf.New(), func(l family.Log) family.Log { return keeps{l} }}
		r := guestOn(t, vfs[0][0], f)
		r.guest.Patience = impatience
		_, err := r.carry(vfs[1][0], igbvf.New(), frames)
		t.Logf("without a release: %v", err)
		if err == nil {
			t.Error("the source's card lets go of the guest's frames by itself: Release has no use")
		}
	})
	// The next user of the source frees what the last one left.
	t.Run("probe", func(t *testing.T) {
		if _, err := plug(t, vfs[0][0], newRAM(t)).Probe(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestPF: what package igbvf says about the PF.
func TestPF(t *testing.T) {
	r := guestOn(t, vfs[0][0], igbvf.New())
	defer func() { r.must(r.source.Scrub(r.Context())) }()
	const clearFilters = igbvf.MsgSetMAC | igbvf.MACFilterClear<<igbvf.MsgInfoShift

	if reply := r.ask(with(clearFilters, make(net.HardwareAddr, 6))...); reply[0]&igbvf.MsgNACK == 0 {
		t.Errorf("the PF clears filters although the address with that is 0: %#x", reply)
	}
	const all = igbvf.PromiscUnicast | igbvf.PromiscMulticast
	if reply := r.ask(igbvf.MsgSetPromisc | all<<igbvf.MsgInfoShift); reply[0]&(igbvf.MsgNACK|igbvf.MsgCTS) != igbvf.MsgNACK|igbvf.MsgCTS {
		t.Errorf("the PF replies %#x to a request for all packets", reply)
	}
	// A reset takes all but further addresses and the largest frame.
	if reply := r.reset(); reply[0] != igbvf.MsgReset|igbvf.MsgNACK {
		t.Errorf("the PF has an address for the VF after a reset: %#x", reply)
	}
	r.must(r.guest.Start(guestMAC))
	after := []frame{frames[0], frames[1], {"to its group", listedMAC, 0, 0, false}, {"in its VLAN", guestMAC, listedVLAN, 0, false},
		frames[len(frames)-2], frames[len(frames)-1]}
	if err := r.delivers(cards[0], after); err != nil {
		t.Errorf("after a reset: %v", err)
	}
	// What the administrator set, the guest may not, though it be the same.
	link, err := cards[0].Link()
	r.must(err)
	r.must(netlink.LinkSetVfHardwareAddr(link, vfs[0][0].Number, guestMAC))
	low, high := address(guestMAC)
	if reply := r.reset(); reply != [3]uint32{igbvf.MsgReset | igbvf.MsgACK, low, high} {
		t.Errorf("reply to RESET with an address set by the administrator: %#x", reply)
	}
	if reply := r.ask(with(igbvf.MsgSetMAC, guestMAC)...); reply[0]&igbvf.MsgNACK == 0 {
		t.Errorf("the guest may set its address: %#x", reply)
	}
	r.must(netlink.LinkSetVfHardwareAddr(link, vfs[0][0].Number, make(net.HardwareAddr, 6)))
}

// TestReplayAdministratorsAddress: a VF whose address the administrator has
// set already takes a guest over.
func TestReplayAdministratorsAddress(t *testing.T) {
	link, err := cards[1].Link()
	if err != nil {
		t.Fatal(err)
	}
	setMAC := func(mac net.HardwareAddr) {
		if err := netlink.LinkSetVfHardwareAddr(link, vfs[1][0].Number, mac); err != nil {
			t.Fatal(err)
		}
	}
	setMAC(guestMAC)
	defer setMAC(make(net.HardwareAddr, 6))
	r := guestOn(t, vfs[0][0], igbvf.New())
	r.granted(with(igbvf.MsgSetMAC|igbvf.MACFilterClear<<igbvf.MsgInfoShift, guestMAC)...)
	// With such an address the PF grants no further ones.
	list := slices.DeleteFunc(slices.Clone(frames), func(f frame) bool { return bytes.Equal(f.to, furtherMAC) })
	if _, err := r.carry(vfs[1][0], igbvf.New(), list); err != nil {
		t.Error(err)
	}
}

// TestRegisters: the VF takes and shows what the table says, as far as QEMU's
// igb has it.
func TestRegisters(t *testing.T) {
	vf := plug(t, vfs[0][0], newRAM(t))
	defer func() {
		if err := vf.Scrub(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	if err := vf.Scrub(t.Context()); err != nil {
		t.Fatal(err)
	}
	// What QEMU's igb does not have, and what does not only affect this VF.
	values := map[uint32]uint32{igbvf.PSRTYPE: 0, igbvf.DCARXCTRL(0): 0, igbvf.DCARXCTRL(1): 0, igbvf.IVAR0: 0x8081, igbvf.IVARMisc: 0x82}
	for _, r := range igbvf.New().Registers() {
		if r.Class != family.Copy && r.Class != family.Derive || r.Access != family.RW {
			continue
		}
		value, special := values[r.Offset]
		if !special {
			value = r.Mask &^ (r.Modifier | igbvf.QueueEnable | igbvf.QueueFlush)
			if r.Name[:1] != "R" && r.Name[:1] != "T" {
				value = r.Mask &^ r.Modifier
			}
		}
		vf.device.Write(r.Offset, value|r.Modifier)
		if got := vf.device.Read(r.Offset); got != value {
			t.Errorf("%s takes %#x as %#x", r.Name, value, got)
		}
	}
	for _, c := range igbvf.New().Counters() {
		before := vf.device.Read(c.Low)
		vf.device.Write(c.Low, ^before)
		if got := vf.device.Read(c.Low); got != before && !c.ReadClears {
			t.Errorf("%s is %d after a write, and was %d", c.Name, got, before)
		}
	}
}
