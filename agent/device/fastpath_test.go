package device

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/compsc"
	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/vfiouser"
)

// fastIface is an interface whose VF has the fast path, with what QEMU is.
func fastIface(t *testing.T, k *kernelModel) (*iface, *vfiouser.Client) {
	t.Helper()
	k.bar = ramFile(t, barAt+ixgbevf.BARSize)
	t.Cleanup(func() { k.bar.Close() })
	i := vfioIface(t, k)
	i.vf.handoff.FastPath = true
	if err := i.vf.checkFastPath(); err != nil {
		t.Fatal(err)
	}
	i.config = newPCIConfig(i.vf.device.vendor, i.vf.device.device, k.Vectors())
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- i.server.Serve(ctx) }()
	client, err := vfiouser.Dial(t.Context(), i.p.path(VFSocket(i.cfg.Slot)), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return i, client
}

// QEMU is given the pages with the rings, and reaches all else as ever.
func TestFastPathIsMapped(t *testing.T) {
	k := newKernelModel(t)
	_, client := fastIface(t, k)
	m, err := client.RegionMap(t.Context(), vfiouser.RegionBAR0)
	if err != nil || m == nil {
		t.Fatalf("nothing of BAR0 can be mapped: %v", err)
	}
	defer m.File.Close()
	if diff := cmp.Diff([]vfiouser.Area{{Offset: 0x1000, Size: 0x1000}, {Offset: 0x2000, Size: 0x1000}}, m.Areas); diff != "" {
		t.Error(diff)
	}
	mem, err := m.Map(m.Areas[1])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	le.PutUint32(mem[ixgbevf.VFTDT(0)&0xfff:], 77)
	var b [4]byte
	if _, err := k.bar.ReadAt(b[:], barAt+int64(ixgbevf.VFTDT(0))); err != nil || le.Uint32(b[:]) != 77 {
		t.Errorf("the doorbell has %d (%v)", le.Uint32(b[:]), err)
	}
	for _, region := range []uint32{vfiouser.RegionBAR3, vfiouser.RegionConfig} {
		if m, err := client.RegionMap(t.Context(), region); m != nil || err != nil {
			t.Errorf("region %d can be mapped: %v, %v", region, m, err)
		}
	}
	if err := client.RegionWrite(t.Context(), vfiouser.RegionBAR0, ixgbevf.VTEIMS, le.AppendUint32(nil, 5)); err != nil {
		t.Fatal(err)
	}
	if got := k.VF.Read(ixgbevf.VTEIMS); got != 5 {
		t.Errorf("the device has interrupt mask %#x", got)
	}
}

// Without being asked for, nothing is given away.
func TestCompletePathIsTheDefault(t *testing.T) {
	k := newKernelModel(t)
	i, client := fastIface(t, k)
	client.Close()
	eventually(t, "the end of the session", func() bool { return !i.server.Connected() })
	i.vf.handoff.FastPath = false
	client, err := vfiouser.Dial(t.Context(), i.p.path(VFSocket(i.cfg.Slot)), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if m, err := client.RegionMap(t.Context(), vfiouser.RegionBAR0); m != nil || err != nil {
		t.Errorf("BAR0 can be mapped: %v, %v", m, err)
	}
}

func TestFastPathThatCannotBeIsRefused(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	i.vf.handoff.FastPath = true
	if err := i.vf.checkFastPath(); err == nil || !strings.Contains(err.Error(), "take the interface out of the VMI's annotation") {
		t.Errorf("BAR0 cannot be mapped, and the fast path is %v", err)
	}
	wire, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	i.vf = nil
	err = i.attach(handoff.Handoff{Interface: "net1", Slot: 5, Of: 1, VF: "0000:03:10.0", DeviceID: "8086:10ed",
		Backend: handoff.BackendModel, FastPath: true}, []*os.File{wire})
	if err == nil || !strings.Contains(err.Error(), "interface net1: it cannot have the fast path") || i.attached() {
		t.Errorf("a model is attached with the fast path: %v", err)
	}
}

// Which pages such a VF wrote is told by the IOMMU, or it is not known.
func TestFastPathPages(t *testing.T) {
	k := newKernelModel(t)
	i, _ := fastIface(t, k)
	if err := mapRAM(t, i, 0, 0x100000); err != nil {
		t.Fatal(err)
	}
	if err := i.track(); err != nil {
		t.Fatal(err)
	}
	if pages, err := i.written(); err == nil || !strings.Contains(err.Error(), "the IOMMU of its node does not record") {
		t.Errorf("written are %#x, %v", pages, err)
	}
	i.untrack()
	k.dirty = map[uint64]bool{}
	if err := errors.Join(i.track(), k.WriteAt(0x3000, []byte("frame"))); err != nil {
		t.Fatal(err)
	}
	if pages, err := i.written(); err != nil || !slices.Equal(pages, []uint64{0x3000}) {
		t.Errorf("written are %#x, %v", pages, err)
	}
}

// QEMU keeps the VF open, so that closing it does not reset it.
func TestFastPathIsResetWhenGivenUp(t *testing.T) {
	k := newKernelModel(t)
	i, _ := fastIface(t, k)
	if _, ok := i.giveUp(); !ok {
		t.Fatal("not given up")
	}
	if reset, closed := slices.Index(k.order, "reset"), slices.Index(k.order, "close"); reset < 0 || closed < reset {
		t.Errorf("done was %q, want a reset before the close", k.order)
	}
}

// told is a silicon of which is said whether it tells its writes.
type told struct {
	silicon
	tells bool
}

func (s told) TellsWrites() bool { return s.tells }

func fast(tells bool) func(*attachedVF) {
	return func(vf *attachedVF) {
		vf.handoff.FastPath = true
		vf.silicon = told{vf.silicon, tells}
	}
}

func (n *node) change(f func(*attachedVF)) {
	i := n.proc.p.iface("net1")
	i.mu.Lock()
	defer i.mu.Unlock()
	f(i.vf)
}

// A VF with the fast path moves to one with it, and only if it is known what
// it wrote; who asks is told beforehand.
func TestFastPathVerdict(t *testing.T) {
	slow := func(*attachedVF) {}
	for name, c := range map[string]struct {
		source, target  func(*attachedVF)
		reason, message string
	}{
		"known writes":        {fast(true), fast(true), "", ""},
		"unknown writes":      {fast(false), fast(true), compsc.ReasonNotMigratable, "does not record what memory it writes"},
		"slow target":         {fast(true), slow, "Incompatible", "fast path on, the target pod was given one with it off"},
		"slow source":         {slow, fast(true), "Incompatible", "fast path off, the target pod was given one with it on"},
		"target cannot go on": {fast(true), fast(false), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, nil)
			p.src.change(c.source)
			p.dst.change(c.target)
			st, err := p.src.ctl.Status(t.Context(), &pb.StatusRequest{})
			p.src.must(err)
			vf := st.Interfaces[0]
			if immovable := c.reason == compsc.ReasonNotMigratable; (vf.Immovable != "") != immovable || vf.FastPath != (name != "slow source") {
				t.Errorf("the source's status says %v", vf)
			}
			if d := p.prepare(); d.Accepted != (c.reason == "") || d.Reason != c.reason || !strings.Contains(d.Message, c.message) {
				t.Errorf("verdict %v, want %q with %q", d, c.reason, c.message)
			}
		})
	}
}

// A guest that only rings its doorbells is seen to use its VF, and one that
// does nothing is not.
func TestFastPathDriverIsSeen(t *testing.T) {
	k := newKernelModel(t)
	i, client := fastIface(t, k)
	i.vf.engine = compsc.New(i.vf.device.family, i.vf.silicon, compsc.Options{Direct: true})
	for name, use := range map[string]func(){
		"a doorbell": func() { k.VF.Write(ixgbevf.VFRDT(0), k.VF.Read(ixgbevf.VFRDT(0))+1) },
		"a trapped access": func() {
			if err := client.RegionRead(t.Context(), vfiouser.RegionBAR0, ixgbevf.VFLINKS, make([]byte, 4)); err != nil {
				t.Error(err)
			}
		},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		i.watchDriver()
		ended := make(chan error, 1)
		go func() { ended <- i.watchDoorbells(ctx) }()
		select {
		case <-ended:
			t.Fatalf("before %s the guest is taken to use its VF: %v", name, i.driverSeen.Load())
		case <-time.After(5 * doorbellLook):
		}
		use()
		select {
		case err := <-ended:
			if err != nil || !i.driverSeen.Load() {
				t.Errorf("%s: %v, seen: %v", name, err, i.driverSeen.Load())
			}
		case <-time.After(testTime):
			t.Fatalf("%s is not seen", name)
		}
	}
	// It ends with the process.
	ctx, cancel := context.WithCancel(t.Context())
	i.watchDriver()
	cancel()
	if err := i.watchDoorbells(ctx); err != nil || i.driverSeen.Load() {
		t.Errorf("it ended with %v, seen: %v", err, i.driverSeen.Load())
	}
}
