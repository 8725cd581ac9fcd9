package host

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/host/journal"
)

// fakeNode is a node with a fabricated sysfs, whose kernel binds and unbinds
// drivers as it is told, and whose PFs' settings are kept in memory.
type fakeNode struct {
	t    *testing.T
	root string
	pfs  map[string]*link // by interface name
	// Knobs.
	refuse     map[string]error // settings that the PF's driver refuses
	unbindable bool             // vfio-pci does not bind
	used       map[string]bool  // VFs that a process has open
	useError   error            // what keeps one from telling that
	openError  error
	calls      []string
	sent       [][]byte
}

const (
	pf0, vf0, vf1 = "0000:01:00.0", "0000:01:10.0", "0000:01:10.2"
	macA, macB    = "52:54:00:00:00:0a", "52:54:00:00:00:0b"
)

func newFakeNode(t *testing.T) *fakeNode {
	n := &fakeNode{t: t, root: t.TempDir(), refuse: map[string]error{}, used: map[string]bool{}, pfs: map[string]*link{
		"eth0": {name: "eth0", mac: "52:54:00:ff:00:00", mtu: 1500, up: true, vfs: []journal.Settings{
			{MAC: noMAC, SpoofCheck: true}, {MAC: macB, VLAN: 7, QoS: 3, Proto: 0x8100, Trust: true, MaxRate: 100, LinkState: 1}}},
	}}
	n.mkdir("bus/pci/drivers/vfio-pci")
	n.mkdir("bus/pci/drivers/igbvf")
	n.mkdir("bus/pci/drivers/igb")
	n.attr("bus/pci/drivers_probe", "")
	n.function(pf0, "8086", "10c9", "igb", -1)
	n.mkdir("bus/pci/devices/" + pf0 + "/net/eth0")
	n.attr("bus/pci/devices/"+pf0+"/sriov_totalvfs", "8")
	n.function("0000:02:00.0", "8086", "1234", "", -1) // no SR-IOV
	n.setVFs(2)
	return n
}

func (n *fakeNode) path(p string) string { return filepath.Join(n.root, p) }

func (n *fakeNode) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *fakeNode) mkdir(p string) { n.must(os.MkdirAll(n.path(p), 0o755)) }

func (n *fakeNode) attr(p, value string) { n.must(os.WriteFile(n.path(p), []byte(value+"\n"), 0o644)) }

func (n *fakeNode) function(address, vendor, device, driver string, group int) {
	d := "bus/pci/devices/" + address
	n.mkdir(d)
	n.attr(d+"/vendor", "0x"+vendor)
	n.attr(d+"/device", "0x"+device)
	n.attr(d+"/class", "0x020000")
	n.attr(d+"/driver_override", "(null)")
	n.attr(d+"/numa_node", "-1")
	n.bound(address, driver)
	if group >= 0 {
		g := fmt.Sprintf("kernel/iommu_groups/%d", group)
		n.mkdir(g + "/devices")
		n.must(os.Symlink(n.path(d), n.path(g+"/devices/"+address)))
		n.must(os.Symlink(n.path(g), n.path(d+"/iommu_group")))
	}
}

// bound puts the driver link where it belongs; no driver is the empty one.
func (n *fakeNode) bound(address, driver string) {
	link := n.path("bus/pci/devices/" + address + "/driver")
	if err := os.Remove(link); err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	if driver != "" {
		n.must(os.Symlink(n.path("bus/pci/drivers/"+driver), link))
	}
}

// setVFs makes as many VFs as anew, bound to igbvf.
func (n *fakeNode) setVFs(count int) {
	for i, a := range []string{vf0, vf1} {
		n.must(os.RemoveAll(n.path("bus/pci/devices/" + a)))
		n.must(os.RemoveAll(n.path(fmt.Sprintf("kernel/iommu_groups/%d", 20+i))))
		virtfn := n.path(fmt.Sprintf("bus/pci/devices/%s/virtfn%d", pf0, i))
		n.must(os.RemoveAll(virtfn))
		if i >= count {
			continue
		}
		n.function(a, "8086", "10ca", "igbvf", 20+i)
		n.must(os.Symlink(n.path("bus/pci/devices/"+a), virtfn))
		n.must(os.Symlink(n.path("bus/pci/devices/"+pf0), n.path("bus/pci/devices/"+a+"/physfn")))
	}
	n.attr("bus/pci/devices/"+pf0+"/sriov_numvfs", fmt.Sprint(count))
}

// set is the kernel taking an attribute.
func (n *fakeNode) set(path, value string) error {
	n.calls = append(n.calls, strings.TrimPrefix(path, n.root+"/bus/pci/")+"="+strings.TrimSpace(value))
	switch filepath.Base(path) {
	case "unbind":
		n.bound(value, "")
		return nil
	case "drivers_probe":
		driver, err := n.host().sys.override(value)
		n.must(err)
		if driver == "" {
			driver = "igbvf"
		}
		if driver == vfioPCI && n.unbindable {
			return nil
		}
		n.bound(value, driver)
		return nil
	}
	return os.WriteFile(path, []byte(value), 0o644)
}

// host is an agent's view of the node; the journal is the node's.
func (n *fakeNode) host() *SRIOV {
	h, err := NewSRIOV(SRIOVOptions{Sysfs: n.root, Journal: filepath.Join(n.root, "journal"), Families: map[string]string{"8086:10ca": "igbvf"}})
	n.must(err)
	h.sys.set, h.links, h.boot = n.set, n, "this boot"
	h.inUse = func(v VF, _ sysfs) (bool, error) { return n.used[v.Address], n.useError }
	h.open = func(v VF, _ sysfs) (string, []*os.File, error) {
		if n.openError != nil {
			return "", nil, n.openError
		}
		f, err := os.Open(os.DevNull)
		return "group", []*os.File{f}, err
	}
	return h
}

func (n *fakeNode) get(pf string) (link, error) {
	l, ok := n.pfs[pf]
	if !ok {
		return link{}, unix.ENODEV
	}
	out := *l
	out.vfs = slices.Clone(l.vfs)
	return out, nil
}

func (n *fakeNode) change(what, pf string, vf int, do func(*journal.Settings)) error {
	n.calls = append(n.calls, fmt.Sprintf("%s vf %d %s", pf, vf, what))
	if err := n.refuse[what]; err != nil {
		return err
	}
	do(&n.pfs[pf].vfs[vf])
	return nil
}

func (n *fakeNode) setMAC(pf string, vf int, mac net.HardwareAddr) error {
	return n.change("mac", pf, vf, func(s *journal.Settings) { s.MAC = mac.String() })
}

func (n *fakeNode) setVLAN(pf string, vf, vlan, qos, proto int) error {
	return n.change("vlan", pf, vf, func(s *journal.Settings) { s.VLAN, s.QoS, s.Proto = vlan, qos, proto })
}

func (n *fakeNode) setSpoofCheck(pf string, vf int, on bool) error {
	return n.change("spoofchk", pf, vf, func(s *journal.Settings) { s.SpoofCheck = on })
}

func (n *fakeNode) setTrust(pf string, vf int, on bool) error {
	return n.change("trust", pf, vf, func(s *journal.Settings) { s.Trust = on })
}

func (n *fakeNode) setRate(pf string, vf, min, max int) error {
	return n.change("rate", pf, vf, func(s *journal.Settings) { s.MinRate, s.MaxRate = min, max })
}

func (n *fakeNode) setLinkState(pf string, vf int, state uint32) error {
	return n.change("state", pf, vf, func(s *journal.Settings) { s.LinkState = state })
}

func (n *fakeNode) driver(string) (string, string, string, error) { return "igb", "6.12", "3.30", nil }

func (n *fakeNode) send(_ string, frame []byte) error {
	n.sent = append(n.sent, frame)
	return nil
}

// picture is all that a VF has that Prepare may change.
func (n *fakeNode) picture(address string, index int) string {
	s := n.host().sys
	driver, err := s.link(s.device(address, "driver"))
	n.must(err)
	override, err := s.override(address)
	n.must(err)
	return fmt.Sprintf("driver %q override %q %+v", driver, override, n.pfs["eth0"].vfs[index])
}

func TestSRIOVInventory(t *testing.T) {
	n := newFakeNode(t)
	got, err := n.host().Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []PF{{Name: "eth0", Backend: BackendVFIO, Address: pf0, Driver: "igb", DriverVersion: "6.12", Firmware: "3.30", TotalVFs: 8, NUMANode: -1, VFs: []VF{
		{Address: vf0, DeviceID: "8086:10ca", Family: "igbvf", Index: 0, Driver: "igbvf", IOMMUGroup: 20},
		{Address: vf1, DeviceID: "8086:10ca", Family: "igbvf", Index: 1, Driver: "igbvf", IOMMUGroup: 21},
	}}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("inventory (-want +got):\n%s", d)
	}
	h := n.host()
	h.only = []string{"eth1"}
	if got, err := h.Inventory(t.Context()); err != nil || len(got) > 0 {
		t.Errorf("PFs that are not served: %v (%v)", got, err)
	}
	h = n.host()
	h.families = map[string]string{"8086:10ed": "ixgbevf"}
	if got, err := h.Inventory(t.Context()); err != nil || len(got) > 0 {
		t.Errorf("VFs of an unknown family: %v (%v)", got, err)
	}
}

func TestSRIOVObstacles(t *testing.T) {
	n := newFakeNode(t)
	n.must(os.Remove(n.path("bus/pci/devices/" + vf0 + "/iommu_group")))
	n.must(os.Symlink(n.path("bus/pci/devices/"+pf0), n.path("kernel/iommu_groups/21/devices/"+pf0)))
	pfs, err := n.host().Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"turn the IOMMU on", "shares IOMMU group 21 with " + pf0} {
		if got := pfs[0].VFs[i].Obstacle; !strings.Contains(got, want) {
			t.Errorf("VF %d: %q, want %q in it", i, got, want)
		}
		_, err := n.host().Prepare(t.Context(), Request{Address: pfs[0].VFs[i].Address})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("VF %d was prepared with %v", i, err)
		}
	}
	// A bridge in the group is no endpoint.
	n.attr("bus/pci/devices/"+pf0+"/class", "0x060400")
	if pfs, err = n.host().Inventory(t.Context()); err != nil || pfs[0].VFs[1].Obstacle != "" {
		t.Errorf("obstacle %q (%v)", pfs[0].VFs[1].Obstacle, err)
	}
}

// Whatever way a VF was, Release, by the same agent or the next, puts it back
// that way.
func TestSRIOVPrepareAndRelease(t *testing.T) {
	for _, c := range []struct {
		address string
		index   int
		request Request
		want    journal.Settings
	}{
		{vf0, 0, Request{MAC: macA}, journal.Settings{MAC: macA, SpoofCheck: true}},
		{vf0, 0, Request{MAC: macA, VLAN: 42}, journal.Settings{MAC: macA, VLAN: 42, SpoofCheck: true}},
		{vf1, 1, Request{MAC: macA}, journal.Settings{MAC: macA, VLAN: 7, QoS: 3, Proto: 0x8100, Trust: true, MaxRate: 100, LinkState: 1}},
		{vf1, 1, Request{}, journal.Settings{MAC: macB, VLAN: 7, QoS: 3, Proto: 0x8100, Trust: true, MaxRate: 100, LinkState: 1}},
	} {
		for _, driver := range []string{"igbvf", "", vfioPCI} {
			n := newFakeNode(t)
			n.bound(c.address, driver)
			before := n.picture(c.address, c.index)
			c.request.Address = c.address
			p, err := n.host().Prepare(t.Context(), c.request)
			if err != nil {
				t.Fatal(err)
			}
			if p.PF != "eth0" || p.VF.Address != c.address || p.API != "group" || len(p.Files) != 1 || p.VLAN != c.want.VLAN || p.Trust != c.want.Trust {
				t.Errorf("prepared %+v", p)
			}
			p.Close()
			if got := n.pfs["eth0"].vfs[c.index]; got != c.want {
				t.Errorf("settings %+v, want %+v", got, c.want)
			}
			if d, err := n.host().sys.link(n.path("bus/pci/devices/" + c.address + "/driver")); err != nil || d != vfioPCI {
				t.Errorf("driver %q (%v)", d, err)
			}
			if held, err := n.host().Held(t.Context()); err != nil || !slices.Equal(held, []string{c.address}) {
				t.Errorf("held: %v (%v)", held, err)
			}
			// Once more, which must not take what is now for what was.
			if p, err = n.host().Prepare(t.Context(), c.request); err != nil {
				t.Fatal(err)
			}
			p.Close()
			for range 2 {
				n.must(n.host().Release(t.Context(), c.address))
			}
			if after := n.picture(c.address, c.index); after != before {
				t.Errorf("%s\nwas %s\nis  %s", c.address, before, after)
			}
			if held, err := n.host().Held(t.Context()); err != nil || len(held) > 0 {
				t.Errorf("held: %v (%v)", held, err)
			}
		}
	}
}

// A preparation that fails at any step leaves the VF as it was.
func TestSRIOVFailedPreparation(t *testing.T) {
	for name, spoil := range map[string]func(*fakeNode){
		"no vfio-pci":      func(n *fakeNode) { n.unbindable = true },
		"MAC refused":      func(n *fakeNode) { n.refuse["mac"] = unix.EPERM },
		"VLAN refused":     func(n *fakeNode) { n.refuse["vlan"] = unix.EOPNOTSUPP },
		"cannot be opened": func(n *fakeNode) { n.openError = unix.EBUSY },
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			before := n.picture(vf0, 0)
			spoil(n)
			_, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA, VLAN: 5})
			if err == nil || !strings.Contains(err.Error(), vf0) {
				t.Errorf("prepared with %v", err)
			}
			if after := n.picture(vf0, 0); after != before {
				t.Errorf("was %s\nis  %s", before, after)
			}
			if held, err := n.host().Held(t.Context()); err != nil || len(held) > 0 {
				t.Errorf("held: %v (%v)", held, err)
			}
		})
	}
}

func TestSRIOVRefuses(t *testing.T) {
	n := newFakeNode(t)
	for _, c := range []struct {
		r    Request
		want string
	}{
		{Request{Address: vf0, MAC: macB}, "in use by VF 1 of PF eth0"},
		{Request{Address: vf0, MAC: strings.ToUpper(macB)}, "in use by VF 1 of PF eth0"},
		{Request{Address: vf0, MAC: "52:54:00:ff:00:00"}, "is that of its PF eth0"},
		{Request{Address: vf0, MAC: "x"}, "invalid MAC"},
		{Request{Address: vf0, VLAN: 4095}, "want 0 to 4094"},
		{Request{Address: "0000:01:10.4"}, "no VF"},
		{Request{Address: pf0}, "no VF"},
		{Request{Address: "../../x"}, "want a PCI address"},
	} {
		_, err := n.host().Prepare(t.Context(), c.r)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q in it", c.r, err, c.want)
		}
	}
	n.pfs["eth0"].up = false
	if _, err := n.host().Prepare(t.Context(), Request{Address: vf0}); err == nil || !strings.Contains(err.Error(), "ip link set eth0 up") {
		t.Errorf("with its PF down: %v", err)
	}
	if len(n.calls) > 0 {
		t.Errorf("something was touched: %v", n.calls)
	}
}

// VFs that went, or came back as others, are not touched, and it is told.
func TestSRIOVReconfigured(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*fakeNode)
		want   string
	}{
		"nothing":     {func(*fakeNode) {}, ""},
		"VFs removed": {func(n *fakeNode) { n.setVFs(0) }, "was removed"},
		"VFs made anew": {func(n *fakeNode) {
			n.mkdir("keep")
			n.must(os.Rename(n.path("bus/pci/devices/"+vf0), n.path("keep/x")))
			n.setVFs(2)
		}, "another is in its place"},
		"fewer VFs":      {func(n *fakeNode) { n.attr("bus/pci/devices/"+pf0+"/sriov_numvfs", "1") }, "had 2 VFs when it was prepared, and has 1"},
		"another driver": {func(n *fakeNode) { n.bound(vf0, "igbvf") }, `is bound to "igbvf"`},
		"another MAC":    {func(n *fakeNode) { n.pfs["eth0"].vfs[0].MAC = macB }, "has MAC " + macB},
		"PF down":        {func(n *fakeNode) { n.pfs["eth0"].up = false }, "eth0 is down"},
		"PF unbound":     {func(n *fakeNode) { n.must(os.RemoveAll(n.path("bus/pci/devices/" + pf0 + "/net"))) }, "has no network interface"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNode(t)
			p, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA})
			n.must(err)
			p.Close()
			c.change(n)
			got, err := n.host().Damage(t.Context())
			n.must(err)
			if c.want == "" && len(got) > 0 || c.want != "" && (len(got) == 0 || got[0].VF != vf0 || !strings.Contains(got[0].What, c.want)) {
				t.Errorf("damage %q, want %q in it", got, c.want)
			}
			if name != "VFs removed" && name != "VFs made anew" {
				return
			}
			n.calls = nil
			n.must(n.host().Release(t.Context(), vf0))
			if len(n.calls) > 0 {
				t.Errorf("a VF was touched that compsc never prepared: %v", n.calls)
			}
			if held, err := n.host().Held(t.Context()); err != nil || len(held) > 0 {
				t.Errorf("held: %v (%v)", held, err)
			}
		})
	}
}

// What another boot wrote is about VFs that are no more.
func TestSRIOVAfterReboot(t *testing.T) {
	n := newFakeNode(t)
	p, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA})
	n.must(err)
	p.Close()
	n.calls = nil
	h := n.host()
	h.boot = "the next boot"
	n.must(h.Release(t.Context(), vf0))
	if len(n.calls) > 0 {
		t.Errorf("touched: %v", n.calls)
	}
}

// A release that fails is made good by the next one.
func TestSRIOVReleaseIsTriedAgain(t *testing.T) {
	n := newFakeNode(t)
	before := n.picture(vf0, 0)
	p, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA, VLAN: 9})
	n.must(err)
	p.Close()
	n.refuse["mac"] = unix.EIO
	if err := n.host().Release(t.Context(), vf0); !errors.Is(err, unix.EIO) {
		t.Errorf("released with %v", err)
	}
	if held, err := n.host().Held(t.Context()); err != nil || len(held) != 1 {
		t.Errorf("held: %v (%v)", held, err)
	}
	clear(n.refuse)
	n.must(n.host().Release(t.Context(), vf0))
	if after := n.picture(vf0, 0); after != before {
		t.Errorf("was %s\nis  %s", before, after)
	}
}

func TestSRIOVAnnounce(t *testing.T) {
	n := newFakeNode(t)
	frame := append(slices.Repeat([]byte{0xff}, 6), 0x52, 0x54, 0, 0, 0, 10, 0x80, 0x35, 1, 2, 3)
	for _, a := range []string{vf0, vf1} {
		n.must(n.host().Announce(t.Context(), a, frame))
	}
	want := [][]byte{frame, slices.Concat(frame[:12], []byte{0x81, 0, 0x60, 7}, frame[12:])}
	if d := cmp.Diff(want, n.sent); d != "" {
		t.Errorf("sent (-want +got):\n%s", d)
	}
	// It waits for no VF that is being bound meanwhile.
	h := n.host()
	h.mu.Lock()
	defer h.mu.Unlock()
	done := make(chan error, 1)
	go func() { done <- h.Announce(t.Context(), vf0, frame) }()
	select {
	case err := <-done:
		n.must(err)
	case <-time.After(10 * time.Second):
		t.Error("an announcement waits for a VF that is being bound")
	}
	if n.host().Announce(t.Context(), vf0, frame[:13]) == nil || n.host().Announce(t.Context(), pf0, frame) == nil {
		t.Error("announced what is no frame, or no VF")
	}
}

// A kernel that does not come back from a write holds nobody up for ever.
func TestSRIOVWriteIsBounded(t *testing.T) {
	n := newFakeNode(t)
	h := n.host()
	release := make(chan struct{})
	var began atomic.Int32
	h.sys.set = func(path, value string) error {
		if filepath.Base(path) == "unbind" {
			began.Add(1)
			<-release
			n.bound(value, "")
			return nil
		}
		return setAttribute(path, value)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 3 {
		if err := h.sys.bind(ctx, vf0, vfioPCI, vfioPCI); !errors.Is(err, context.Canceled) {
			t.Errorf("bound with %v", err)
		}
	}
	// Nor does trying again leave one more behind each time, and who waits for
	// what was begun before finds it done.
	h.sys.set = func(path, value string) error {
		if filepath.Base(path) == "unbind" {
			began.Add(1)
		}
		return n.set(path, value)
	}
	go close(release)
	n.must(h.sys.bind(t.Context(), vf0, vfioPCI, vfioPCI))
	if got := began.Load(); got != 1 {
		t.Errorf("the kernel was told %d times to unbind the VF", got)
	}
}

// An entry of the journal that cannot be read costs that VF alone.
func TestSRIOVDamagedJournal(t *testing.T) {
	n := newFakeNode(t)
	for _, a := range []string{vf0, vf1} {
		p, err := n.host().Prepare(t.Context(), Request{Address: a})
		n.must(err)
		p.Close()
	}
	n.must(os.WriteFile(filepath.Join(n.root, "journal", vf0+".json"), []byte("{"), 0o600))
	held, err := n.host().Held(t.Context())
	if !slices.Equal(held, []string{vf1}) || err == nil || !strings.Contains(err.Error(), vf0+".json") {
		t.Errorf("held %v (%v), want %s, and an error that names the other's file", held, err, vf1)
	}
	damage, err := n.host().Damage(t.Context())
	if err != nil || len(damage) != 1 || damage[0].VF != vf0 || !strings.Contains(damage[0].What, "put the VF back by hand") {
		t.Errorf("damage %q (%v)", damage, err)
	}
	n.must(n.host().Release(t.Context(), vf1))
	if err := n.host().Release(t.Context(), vf0); err == nil {
		t.Error("a VF was released whose original settings nobody knows")
	}
}

// A container that began before iommufd was loaded gets its device node.
func TestSRIOVMakesIOMMU(t *testing.T) {
	n := newFakeNode(t)
	at := n.path("dev-iommu")
	var made []string
	ensure := func() error {
		return n.host().sys.makeIOMMU(at, func(path string, mode uint32, dev int) error {
			made = append(made, fmt.Sprintf("%s %#o %d:%d", filepath.Base(path), mode, unix.Major(uint64(dev)), unix.Minor(uint64(dev))))
			return os.WriteFile(path, nil, 0o600)
		})
	}
	n.must(ensure()) // no iommufd in this kernel
	n.mkdir("class/misc/iommu")
	n.attr("class/misc/iommu/dev", "x")
	if err := ensure(); err == nil || len(made) > 0 {
		t.Errorf("made %q of no device numbers (%v)", made, err)
	}
	n.attr("class/misc/iommu/dev", "10:125")
	n.must(ensure())
	n.must(ensure())
	if want := []string{"dev-iommu 020600 10:125"}; !slices.Equal(made, want) {
		t.Errorf("made %q, want %q", made, want)
	}
}

// A VM does not move between VFs whose administrator treats them differently;
// its MAC moves with it.
func TestSRIOVDifferences(t *testing.T) {
	n := newFakeNode(t)
	from, err := n.host().Settings(t.Context(), vf1)
	n.must(err)
	if list := Differences(*from, *from); len(list) > 0 {
		t.Errorf("a VF differs from itself: %q", list)
	}
	for want, change := range map[string]func(*journal.Settings){
		"":                          func(s *journal.Settings) { s.MAC, s.Proto = macA, 0 },
		"port VLAN 7, here 8":       func(s *journal.Settings) { s.VLAN = 8 },
		"port VLAN 7, here 0":       func(s *journal.Settings) { s.VLAN, s.Proto = 0, 0 },
		"port VLAN's QoS 3, here 0": func(s *journal.Settings) { s.QoS = 0 },
		"port VLAN's protocol 0x8100, here 0x88a8": func(s *journal.Settings) { s.Proto = 0x88a8 },
		"spoof check off, here on":                 func(s *journal.Settings) { s.SpoofCheck = true },
		"trust on, here off":                       func(s *journal.Settings) { s.Trust = false },
		"least rate in Mbit/s 0, here 5":           func(s *journal.Settings) { s.MinRate = 5 },
		"greatest rate in Mbit/s 100, here 0":      func(s *journal.Settings) { s.MaxRate = 0 },
		"link state enable, here disable":          func(s *journal.Settings) { s.LinkState = 2 },
	} {
		n := newFakeNode(t)
		change(&n.pfs["eth0"].vfs[1])
		to, err := n.host().Settings(t.Context(), vf1)
		n.must(err)
		if got := strings.Join(Differences(*from, *to), "; "); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if _, err := n.host().Settings(t.Context(), pf0); err == nil {
		t.Error("settings of what is no VF")
	}
}

// A kernel with iommufd, but without device cdevs, shows a VFIO device without a
// number.
func TestCdev(t *testing.T) {
	n := newFakeNode(t)
	s := n.host().sys
	want := func(name string) {
		t.Helper()
		if got, err := s.cdev(vf0); err != nil || got != name {
			t.Errorf("cdev %q, want %q (%v)", got, name, err)
		}
	}
	want("") // no vfio-pci
	device := "bus/pci/devices/" + vf0 + "/vfio-dev/vfio3"
	n.mkdir(device)
	want("")
	n.attr(device+"/dev", "511:3")
	want("vfio3")
}
