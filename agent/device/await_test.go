package device

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
)

// handOver passes one more VF to the process.
func (n *node) handOver(h handoff.Handoff) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { unix.Close(fds[0]) })
	theirs := os.NewFile(uintptr(fds[1]), "wire")
	defer theirs.Close()
	return handoff.Send(n.t.Context(), filepath.Join(n.dir, HandoffSocket), h, []*os.File{theirs})
}

// nothingYet checks that Await waits, and what it says when nobody comes.
func (n *node) nothingYet(want string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 50*time.Millisecond)
	defer cancel()
	if got, err := n.proc.Await(ctx); err == nil || !strings.Contains(err.Error(), want) {
		n.t.Errorf("Await: %v, %v, want an error with %q", got, err, want)
	}
}

// TestInterfacesComeWithTheirVFs: the process learns from the agent which
// interfaces there are, and QEMU may start once all are there.
func TestInterfacesComeWithTheirVFs(t *testing.T) {
	n := startNode(t, handoff.RolePrimary, 1, func(_ *Options, h *handoff.Handoff) { h.Of = 2 })
	n.nothingYet("only 1 of 2 VFs")
	first := handoff.Handoff{Interface: "net1", Slot: 5, Of: 2, VF: "0000:03:10.0", PF: "pf0", Family: "ixgbevf", DeviceID: "8086:10ed",
		Backend: handoff.BackendModel, MAC: guestMAC, Epoch: 1, Role: handoff.RolePrimary}
	second := first
	second.Interface, second.Slot, second.VF, second.MAC = "net2", 6, "0000:03:10.2", "52:54:00:00:00:02"
	if _, err := os.Stat(filepath.Join(n.dir, VFSocket(6))); err == nil {
		t.Error("a socket without a VF")
	}
	for name, c := range map[string]struct {
		change func(*handoff.Handoff)
		want   string
	}{
		"no name":         {func(h *handoff.Handoff) { h.Interface = "" }, "must not be empty"},
		"slot 0":          {func(h *handoff.Handoff) { h.Slot = 0 }, "between 1 and 31"},
		"slot 32":         {func(h *handoff.Handoff) { h.Slot = 32 }, "between 1 and 31"},
		"of none":         {func(h *handoff.Handoff) { h.Of = 0 }, "between 1 and 31"},
		"same slot":       {func(h *handoff.Handoff) { h.Slot = 5 }, "PCI slot 0x5 is interface net1's"},
		"of another many": {func(h *handoff.Handoff) { h.Of = 3 }, "one of 3, but net1 is one of 2"},
		"other role":      {func(h *handoff.Handoff) { h.Role = handoff.RoleTarget }, "handed over as ROLE_TARGET, the others as ROLE_PRIMARY"},
		"unknown device":  {func(h *handoff.Handoff) { h.DeviceID = "8086:ffff" }, "8086:ffff"},
		"moved":           {func(h *handoff.Handoff) { *h = first; h.Slot = 7 }, "has VF 0000:03:10.0 at epoch 1 already"},
	} {
		t.Run(name, func(t *testing.T) {
			h := second
			c.change(&h)
			if err := n.handOver(h); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
	n.nothingYet("only 1 of 2 VFs")
	for range 2 { // what is attached may be handed over again
		if err := n.handOver(second); err != nil {
			t.Fatal(err)
		}
	}
	got, err := n.proc.Await(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := []Attached{{"net1", 5, "0000:03:10.0", guestMAC}, {"net2", 6, "0000:03:10.2", "52:54:00:00:00:02"}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if _, err := os.Stat(filepath.Join(n.dir, VFSocket(6))); err != nil {
		t.Error(err)
	}
	third := second
	third.Interface, third.Slot = "net3", 7
	if err := n.handOver(third); err == nil || !strings.Contains(err.Error(), "has all of its 2 interfaces already") {
		t.Errorf("a third interface of two: %v", err)
	}
}

// TestTargetAwaitsItsVerdict: on the target, QEMU may start only once the
// source's VFs were judged, and never again after a cancellation.
func TestTargetAwaitsItsVerdict(t *testing.T) {
	p := newPair(t, nil)
	s, err := p.src.ctl.PrepareSource(t.Context(), &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: durationpb.New(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	if i := s.Interfaces[0]; i.Slot != 5 || i.Socket != "/vm/vf05.sock" {
		t.Errorf("the source says slot %#x, socket %s", i.Slot, i.Socket)
	}
	p.dst.nothingYet("the source's were not judged yet")
	for name, change := range map[string]func(*pb.SourceInterface){
		"another slot":   func(i *pb.SourceInterface) { i.Slot = 6 },
		"another socket": func(i *pb.SourceInterface) { i.Socket = "/elsewhere/vf05.sock" },
	} {
		changed := proto.Clone(s.Interfaces[0]).(*pb.SourceInterface)
		change(changed)
		r, err := p.dst.ctl.PrepareTarget(t.Context(), &pb.PrepareTargetRequest{MigrationUid: uid, Interfaces: []*pb.SourceInterface{changed}, HoldTimeout: durationpb.New(time.Second)})
		if err != nil || r.Accepted || r.Reason != "Incompatible" || !strings.Contains(r.Message, "restart the VM") {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	p.dst.nothingYet("the source's were not judged yet")
	if r, err := p.dst.ctl.PrepareTarget(t.Context(), &pb.PrepareTargetRequest{MigrationUid: uid, Interfaces: s.Interfaces, HoldTimeout: durationpb.New(time.Second)}); err != nil || !r.Accepted {
		t.Fatal(r, err)
	}
	if _, err := p.dst.proc.Await(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := p.dst.ctl.CancelTarget(t.Context(), &pb.CancelTargetRequest{MigrationUid: uid}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.dst.proc.Await(t.Context()); err == nil || !strings.Contains(err.Error(), "cancelled") {
		t.Errorf("after a cancellation: %v", err)
	}
}
