package host

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestParseModelPF(t *testing.T) {
	got, err := ParseModelPF("name=pf0,vfs=2,bridge=br0,mtu=1500,rx-head-writable=false,tx-head-writable=true,multicast-filter-type=2,trust=true")
	if err != nil {
		t.Fatal(err)
	}
	want := ModelPF{Name: "pf0", VFs: 2, Bridge: "br0", MTU: 1500, Traits: ModelTraits{ReadOnlyRXHead: true, MulticastFilterType: 2, Trust: true}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got, err = ParseModelPF("name=pf0,vfs=63,bridge=br0"); err != nil || got.MTU != 9000 || got.Traits != (ModelTraits{}) {
		t.Errorf("defaults: %+v, %v", got, err)
	}
	for in, want := range map[string]string{
		"":                                  "is not name=value",
		"name=pf0":                          "vfs is missing",
		"name=pf0,vfs=1":                    "bridge is missing",
		"name=a,vfs=1,bridge=b,":            "is not name=value",
		"name=a,name=b":                     "name is set twice",
		"name=a,vfs=x,bridge=b":             "vfs: ",
		"name=a,vfs=0,bridge=b":             "0 VFs, want 1 to 63",
		"name=a,vfs=64,bridge=b":            "64 VFs, want 1 to 63",
		"name=a b,vfs=1,bridge=b":           "model PF name",
		"name=thirteenchars,vfs=1,bridge=b": "model PF name",
		"name=a,vfs=1,bridge=../b":          "is no interface name",
		"name=a,vfs=1,bridge=b,mtu=9999":    "mtu 9999",
		"name=a,vfs=1,bridge=b,multicast-filter-type=4":  "multicast-filter-type: ",
		"name=a,vfs=1,bridge=b,rx-head-writable=perhaps": "rx-head-writable: ",
		"name=a,vfs=1,bridge=b,color=blue":               "color: no such setting",
	} {
		if _, err := ParseModelPF(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseModelPF(%q) = %v, want an error containing %q", in, err, want)
		}
	}
}

func TestInventory(t *testing.T) {
	m, err := NewModel(ModelPF{Name: "pf0", VFs: 5, Bridge: "b", MTU: 9000}, ModelPF{Name: "pf1", VFs: 1, Bridge: "b", MTU: 9000},
		ModelPF{Name: "pf2", VFs: 1, Bridge: "b", MTU: 9000})
	if err != nil {
		t.Fatal(err)
	}
	got, err := m.Inventory(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var addrs []string
	for _, p := range got {
		for _, v := range p.VFs {
			addrs = append(addrs, p.Name+" "+v.Address+" "+v.DeviceID+" "+v.Family+" "+p.Backend)
		}
	}
	const kind = " 8086:10ed ixgbevf model"
	want := []string{"pf0 0000:03:10.0" + kind, "pf0 0000:03:10.2" + kind, "pf0 0000:03:10.4" + kind, "pf0 0000:03:10.6" + kind,
		"pf0 0000:03:11.0" + kind, "pf1 0000:03:10.1" + kind, "pf2 0000:04:10.0" + kind}
	if d := cmp.Diff(want, addrs); d != "" {
		t.Error(d)
	}
	if _, err := NewModel(ModelPF{Name: "a", VFs: 1, Bridge: "b", MTU: 9000}, ModelPF{Name: "a", VFs: 1, Bridge: "b", MTU: 9000}); err == nil {
		t.Error("two PFs of one name accepted")
	}
}

// inNamespace runs the rest of the test on a thread with an empty network
// namespace, which ends with the thread.
func inNamespace(t *testing.T) {
	t.Helper()
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("a network namespace of its own (needs root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}); err != nil {
		t.Fatal(err)
	}
}

func newModel(t *testing.T) *Model {
	t.Helper()
	m, err := NewModel(ModelPF{Name: "pf0", VFs: 3, Bridge: "br0", MTU: 9000, Traits: ModelTraits{ReadOnlyRXHead: true}})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestPrepareAndRelease(t *testing.T) {
	inNamespace(t)
	m := newModel(t)
	r := Request{Address: "0000:03:10.2", MAC: "52:54:00:00:00:0A"}
	p, err := m.Prepare(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.PF != "pf0" || p.VF.DeviceID != "8086:10ed" || p.Backend != BackendModel || !p.Model.ReadOnlyRXHead || len(p.Files) != 1 {
		t.Errorf("prepared %+v", p)
	}
	link, err := netlink.LinkByName("pf0v1")
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := netlink.LinkByName("br0")
	if err != nil {
		t.Fatal(err)
	}
	a := link.Attrs()
	if a.MasterIndex != bridge.Attrs().Index || a.MTU != 9000 || a.Flags&net.FlagUp == 0 || a.HardwareAddr.String() == "52:54:00:00:00:0a" {
		t.Errorf("tap device: %+v", a)
	}

	// The queue carries frames: what the bridge sends reaches the file.
	if err := netlink.LinkSetUp(bridge); err != nil {
		t.Fatal(err)
	}
	expectFrame(t, p.Files[0], a.Index)

	// While the queue is open the VF cannot be prepared a second time.
	if again, err := m.Prepare(t.Context(), r); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a second queue of one VF: %v, %v", again, err)
	}
	p.Close()
	// The tap device outlives its queue, and another process takes it up.
	m = newModel(t)
	p2, err := m.Prepare(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	defer p2.Close()
	if again, err := netlink.LinkByName("pf0v1"); err != nil || again.Attrs().Index != a.Index {
		t.Errorf("the tap device was made anew: %v", err)
	}

	for range 2 {
		if err := m.Release(t.Context(), r.Address); err != nil {
			t.Fatal(err)
		}
		if _, err := netlink.LinkByName("pf0v1"); !errors.As(err, new(netlink.LinkNotFoundError)) {
			t.Errorf("after Release the tap device is there: %v", err)
		}
	}
}

// expectFrame sends a frame out of the interface and reads it from the queue.
func expectFrame(t *testing.T, queue *os.File, ifindex int) {
	t.Helper()
	const ethLocalExperimental = 0x88b5
	s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	frame := append([]byte{0x52, 0x54, 0, 0, 0, 0x0a, 2, 0, 0, 0, 0, 1, ethLocalExperimental >> 8, ethLocalExperimental & 0xff}, make([]byte, 50)...)
	if err := unix.Sendto(s, frame, 0, &unix.SockaddrLinklayer{Ifindex: ifindex}); err != nil {
		t.Fatal(err)
	}
	if err := queue.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	// The kernel sends frames of its own, such as IGMP's, at its own time.
	buf := make([]byte, 10000)
	for {
		n, err := queue.Read(buf)
		if err != nil {
			t.Fatalf("no frame: %v", err)
		}
		if n >= 14 && buf[12] == ethLocalExperimental>>8 && buf[13] == ethLocalExperimental&0xff {
			if d := cmp.Diff(frame, buf[:n]); d != "" {
				t.Error(d)
			}
			return
		}
	}
}

func TestPrepareRefuses(t *testing.T) {
	inNamespace(t)
	m := newModel(t)
	first, err := m.Prepare(t.Context(), Request{Address: "0000:03:10.0", MAC: "52:54:00:00:00:0a"})
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	for name, tt := range map[string]struct {
		r    Request
		want string
	}{
		"unknown VF":    {Request{Address: "0000:09:10.0"}, "this node has no VF 0000:09:10.0"},
		"bad VLAN":      {Request{Address: "0000:03:10.2", VLAN: 4095}, "VLAN 4095"},
		"duplicate MAC": {Request{Address: "0000:03:10.2", MAC: "52:54:00:00:00:0A"}, "MAC 52:54:00:00:00:0a is in use by VF 0000:03:10.0"},
	} {
		if _, err := m.Prepare(t.Context(), tt.r); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error containing %q", name, err, tt.want)
		}
	}
	// The scan reads the node, not this process's memory.
	if _, err := newModel(t).Prepare(t.Context(), Request{Address: "0000:03:10.2", MAC: "52:54:00:00:00:0a"}); err == nil {
		t.Error("another process took the same MAC")
	}
	// Released, the MAC is free.
	first.Close()
	if err := m.Release(context.Background(), "0000:03:10.0"); err != nil {
		t.Fatal(err)
	}
	p, err := m.Prepare(t.Context(), Request{Address: "0000:03:10.2", MAC: "52:54:00:00:00:0a"})
	if err != nil {
		t.Fatal(err)
	}
	p.Close()

	// No bridge.
	nobridge, err := NewModel(ModelPF{Name: "pf9", VFs: 1, Bridge: "none", MTU: 9000})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nobridge.Prepare(t.Context(), Request{Address: "0000:03:10.0"}); err == nil || !strings.Contains(err.Error(), "bridge none of PF pf9") {
		t.Errorf("missing bridge: %v", err)
	}
	// A device of somebody else's is not removed.
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "pf0v2"}}); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(t.Context(), "0000:03:10.4"); err == nil || !strings.Contains(err.Error(), "not a tap device") {
		t.Errorf("Release of a foreign device: %v", err)
	}
}

func FuzzParseModelPF(f *testing.F) {
	f.Add("name=pf0,vfs=2,bridge=br0,rx-head-writable=false")
	f.Add("name=,vfs=-1")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseModelPF(s)
		if err != nil {
			return
		}
		if _, err := NewModel(p); err != nil {
			t.Fatalf("parsed %q, which is no PF: %v", s, err)
		}
	})
}
