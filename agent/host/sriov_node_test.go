//go:build e2esriov

package host

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/host/journal"
	"compsc.io/compsc/agent/vfio"
	"compsc.io/compsc/e2e/sriov/card"
)

// These run on a machine with real PFs: two 82576, on one wire.

const nodeVFs = 3

// nodePF and otherPF are the network interfaces of the cards, which kernels
// name differently.
var nodePF, otherPF string

// realNode makes VFs and returns the node with a journal of its own.
func realNode(t *testing.T) *SRIOV {
	t.Helper()
	cards, err := card.List()
	if err != nil || len(cards) != 2 {
		t.Fatalf("cards %v (%v)", cards, err)
	}
	nodePF, otherPF = cards[0].Name, cards[1].Name
	h, err := NewSRIOV(SRIOVOptions{Journal: filepath.Join(t.TempDir(), "journal"), Families: map[string]string{"8086:10ca": "igbvf"}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName(nodePF)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	// A driver that finds a VF without a MAC gives it one, which is no setting
	// of the administrator's.
	if err := os.WriteFile(filepath.Join("/sys/class/net", nodePF, "device/sriov_drivers_autoprobe"), []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	setVFs(t, 0)
	setVFs(t, nodeVFs)
	return h
}

// waitForLink waits until the PF has a link.
func waitForLink(t *testing.T) {
	t.Helper()
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ListExisting: true}); err != nil {
		t.Fatal(err)
	}
	late := time.After(30 * time.Second)
	for {
		select {
		case u := <-updates:
			if a := u.Attrs(); a.Name == nodePF && a.OperState == netlink.OperUp {
				return
			}
		case <-late:
			t.Fatalf("%s has no link", nodePF)
		}
	}
}

func setVFs(t *testing.T, n int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("/sys/class/net", nodePF, "device/sriov_numvfs"), []byte(fmt.Sprint(n)), 0); err != nil {
		t.Fatal(err)
	}
}

// look is all of a VF that Prepare may change.
func look(t *testing.T, h *SRIOV, v VF) string {
	t.Helper()
	l, err := h.links.get(nodePF)
	if err != nil {
		t.Fatal(err)
	}
	driver, err := h.sys.link(h.sys.device(v.Address, "driver"))
	if err != nil {
		t.Fatal(err)
	}
	override, err := h.sys.override(v.Address)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("driver %q override %q %+v", driver, override, l.vfs[v.Index])
}

func vfsOf(t *testing.T, h *SRIOV) []VF {
	t.Helper()
	pfs, err := h.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pfs {
		if p.Name == nodePF {
			if p.Driver != "igb" || p.DriverVersion == "" || len(p.VFs) != nodeVFs {
				t.Fatalf("PF %+v", p)
			}
			return p.VFs
		}
	}
	t.Fatalf("no PF %s among %v", nodePF, pfs)
	return nil
}

func TestNodePrepareAndRelease(t *testing.T) {
	h := realNode(t)
	vfs := vfsOf(t, h)
	// Settings of the administrator's own, of all kinds that igb has.
	own := journal.Settings{MAC: "52:54:00:00:00:77", VLAN: 12, QoS: 5, Proto: 0x8100, SpoofCheck: false, Trust: true, MaxRate: 300}
	// The rate is of the link's speed, which is known once it is up.
	waitForLink(t)
	// igb has no link state of a VF, nor a least rate: what it refuses is told.
	l, err := h.links.get(nodePF)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*journal.Settings){
		"link state": func(s *journal.Settings) { s.LinkState = 1 },
		"rate":       func(s *journal.Settings) { s.MinRate = 5 },
	} {
		want := l.vfs[0]
		change(&want)
		if err := apply(h.links, nodePF, 0, l.vfs[0], want); err == nil || !strings.Contains(err.Error(), "PF "+nodePF+", VF 0, "+what) {
			t.Errorf("igb's refusal of a %s: %v", what, err)
		}
	}
	for i, s := range []journal.Settings{{MAC: noMAC, Proto: 0x8100, SpoofCheck: true}, own} {
		v := vfs[i]
		if i > 0 {
			if err := h.sys.bind(t.Context(), v.Address, "igbvf", ""); err != nil {
				t.Fatal(err)
			}
		}
		l, err := h.links.get(nodePF)
		if err != nil {
			t.Fatal(err)
		}
		if err := apply(h.links, nodePF, v.Index, l.vfs[v.Index], s); err != nil {
			t.Fatal(err)
		}
		before := look(t, h, v)
		if want := fmt.Sprintf("%+v", s); !strings.Contains(before, want) {
			t.Errorf("the PF has %s, want %s", before, want)
		}
		p, err := h.Prepare(t.Context(), Request{Address: v.Address, MAC: "52:54:00:00:00:88"})
		if err != nil {
			t.Fatal(err)
		}
		if api, err := card.API(); err != nil || p.API != string(api) {
			t.Errorf("opened by interface %s, want %s (%v)", p.API, api, err)
		}
		d, err := vfio.Use(vfio.API(p.API), p.Files)
		if err != nil {
			t.Fatal(err)
		}
		var id [4]byte
		if err := d.ReadConfig(0, id[:]); err != nil || hex.EncodeToString(id[:]) != "8680ca10" {
			t.Errorf("vendor and device % x (%v)", id, err)
		}
		// STATUS: link up and full duplex.
		if got := d.Read(8); got == 1<<32-1 || d.Vectors() != 3 || d.BARSize() != 16<<10 {
			t.Errorf("STATUS %#x, %d vectors, BAR0 of %d bytes", got, d.Vectors(), d.BARSize())
		}
		if _, err := h.Prepare(t.Context(), Request{Address: vfs[2].Address, MAC: "52:54:00:00:00:88"}); err == nil || !strings.Contains(err.Error(), "in use by VF") {
			t.Errorf("the MAC was given twice: %v", err)
		}
		if _, err := h.Prepare(t.Context(), Request{Address: v.Address, MAC: "52:54:00:00:00:88"}); !errors.Is(err, vfio.ErrBusy) {
			t.Errorf("prepared while in use: %v", err)
		}
		if damage, err := h.Damage(t.Context()); err != nil || len(damage) > 0 {
			t.Errorf("damage %q (%v)", damage, err)
		}
		if is, err := h.Settings(t.Context(), v.Address); err != nil || len(Differences(s, *is)) > 0 {
			t.Errorf("in use, the VF has %+v (%v), want %+v but for the MAC", is, err, s)
		}
		// Released under the process that uses it: the driver follows later.
		begin := time.Now()
		if err := h.Release(t.Context(), v.Address); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("a release under a process took %v", took)
		}
		if now := look(t, h, v); !strings.Contains(now, `driver "vfio-pci"`) || !strings.Contains(now, s.MAC) {
			t.Errorf("released under a process: %s", now)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if err := h.Settle(t.Context()); err != nil {
			t.Fatal(err)
		}
		if after := look(t, h, v); after != before {
			t.Errorf("VF %s\nwas %s\nis  %s", v.Address, before, after)
		}
	}
}

// An agent that died: the next one has only the journal.
func TestNodeJournalOutlivesTheAgent(t *testing.T) {
	h := realNode(t)
	v := vfsOf(t, h)[0]
	before := look(t, h, v)
	p, err := h.Prepare(t.Context(), Request{Address: v.Address, MAC: "52:54:00:00:00:99", VLAN: 33})
	if err != nil {
		t.Fatal(err)
	}
	p.Close() // with it went the descriptors
	next := &SRIOV{sys: h.sys, families: h.families, journal: h.journal, links: rtnetlink{}, open: openVFIO, inUse: inUse, boot: h.boot}
	held, err := next.Held(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{v.Address}, held); d != "" {
		t.Errorf("held (-want +got):\n%s", d)
	}
	if err := next.Release(t.Context(), v.Address); err != nil {
		t.Fatal(err)
	}
	if after := look(t, h, v); after != before {
		t.Errorf("was %s\nis  %s", before, after)
	}
}

// VFs that are taken away while one is in use.
func TestNodeReconfigured(t *testing.T) {
	h := realNode(t)
	v := vfsOf(t, h)[1]
	p, err := h.Prepare(t.Context(), Request{Address: v.Address, MAC: "52:54:00:00:00:aa"})
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	setVFs(t, 0)
	damage, err := h.Damage(t.Context())
	if err != nil || len(damage) != 1 || !strings.Contains(damage[0].What, "was removed") {
		t.Errorf("damage %q (%v)", damage, err)
	}
	setVFs(t, nodeVFs)
	damage, err = h.Damage(t.Context())
	if err != nil || len(damage) != 1 || !strings.Contains(damage[0].What, "another is in its place") {
		t.Errorf("damage %q (%v)", damage, err)
	}
	before := look(t, h, v)
	if err := h.Release(t.Context(), v.Address); err != nil {
		t.Fatal(err)
	}
	if after := look(t, h, v); after != before {
		t.Errorf("a VF that was never prepared\nwas %s\nis  %s", before, after)
	}
	if damage, err = h.Damage(t.Context()); err != nil || len(damage) > 0 {
		t.Errorf("damage %q (%v)", damage, err)
	}
}

// What is announced by one PF reaches the other.
func TestNodeAnnounce(t *testing.T) {
	h := realNode(t)
	v := vfsOf(t, h)[2]
	other, err := netlink.LinkByName(otherPF)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(other); err != nil {
		t.Fatal(err)
	}
	const proto = 0x8035
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto>>8|proto&0xff<<8)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto>>8 | proto&0xff<<8, Ifindex: other.Attrs().Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 60)
	copy(frame, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 0xbb, proto >> 8, proto & 0xff})
	got := make([]byte, 2048)
	for range 20 { // links take a moment to come up
		if err := h.Announce(t.Context(), v.Address, frame); err != nil {
			t.Fatal(err)
		}
		n, _, err := unix.Recvfrom(fd, got, 0)
		if err == nil {
			if d := cmp.Diff(frame, got[:n]); d != "" {
				t.Errorf("frame (-want +got):\n%s", d)
			}
			return
		}
	}
	t.Error("no frame arrived at the other PF")
}
