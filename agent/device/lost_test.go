package device

import (
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/e2e/nbd"
)

// A VF that the kernel asks for is closed at once, with all that the process
// has of it, and the guest goes on without.
func TestVFIOIsGivenUp(t *testing.T) {
	k := newKernelModel(t)
	i := vfioIface(t, k)
	if err := i.vf.silicon.(*vfioVF).listen(func() { i.p.wanted(i) }); err != nil {
		t.Fatal(err)
	}
	if err := mapRAM(t, i, 0, 0x10000); err != nil {
		t.Fatal(err)
	}
	read := func(off uint32) uint32 {
		var b [4]byte
		if err := i.RegionRead(0, uint64(off), b[:]); err != nil {
			t.Fatal(err)
		}
		return le.Uint32(b[:])
	}
	if read(ixgbevf.VFLINKS) == 0 {
		t.Fatal("the link is down before")
	}
	for range 2 { // the kernel repeats itself
		one := [8]byte{1}
		if _, err := unix.Write(k.request, one[:]); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the reason told", func() bool {
		var why string
		i.p.get(func() { why = i.p.lastError })
		return strings.Contains(why, "took VF 0000:01:10.0 away")
	})
	if n := strings.Count(strings.Join(k.order, " "), "close"); n != 1 {
		t.Errorf("the VF was closed %d times: %v", n, k.order)
	}
	if got := read(ixgbevf.VFLINKS); got != 0 {
		t.Errorf("the link is %#x, want down", got)
	}
	// What comes later finds nothing to do.
	if err := i.Reset(); err != nil {
		t.Error(err)
	}
	if err := mapRAM(t, i, 0x100000, 0x10000); err != nil {
		t.Error(err)
	}
	i.Disconnected(nil)
	if n := len(i.memory.Ranges()); n != 0 {
		t.Errorf("%d ranges of the guest's memory are left", n)
	}
}

// lose takes a node's VF away, as the kernel does.
func (n *node) lose() {
	n.t.Helper()
	i := n.proc.p.interfaces()[0]
	n.proc.p.wanted(i)
	st, err := n.ctl.Status(n.t.Context(), &pb.StatusRequest{})
	n.must(err)
	if !strings.Contains(st.LastError, "took VF") || !st.Interfaces[0].Lost {
		n.t.Errorf("the status tells %+v", st)
	}
	if n.client != nil && n.rd(ixgbevf.VFLINKS) != 0 {
		n.t.Error("the guest's link is up")
	}
}

// A VF that goes in any step of a migration: the VM goes on, or starts, with
// its link down, and never with the VF of both sides.
func TestVFIsLost(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		p := newPair(t, nil)
		p.src.lose()
		_, err := p.src.ctl.PrepareSource(t.Context(), &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: durationpb.New(testTime)})
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "was taken away") {
			t.Errorf("prepared with %v", err)
		}
	})
	t.Run("of the prepared source", func(t *testing.T) {
		p := newPair(t, nil)
		p.precopy()
		p.src.lose()
		if e := p.src.gate.Flush(); e == 0 {
			t.Error("the switchover was not vetoed")
		}
		p.src.wantPhase(pb.Phase_PHASE_RUNNING)
	})
	t.Run("of the captured source", func(t *testing.T) {
		p := newPair(t, nil)
		p.precopy()
		flushed := nbd.Held(p.src.gate.Flush)
		p.capture()
		p.src.lose()
		_, err := p.src.ctl.ReleaseSource(t.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid, Veto: true, Reason: "test"})
		p.src.must(err)
		if e := <-flushed; e == 0 {
			t.Error("the switchover was not vetoed")
		}
		p.src.wantPhase(pb.Phase_PHASE_RUNNING)
	})
	t.Run("of the silent target", func(t *testing.T) {
		p := newPair(t, nil)
		p.dst.lose()
		p.dst.wantPhase(pb.Phase_PHASE_CANCELLED)
	})
	hold := func(t *testing.T) (*pair, <-chan syscall.Errno) {
		p := newPair(t, nil)
		p.precopy()
		flushed := nbd.Held(p.src.gate.Flush)
		if a := p.deliver(p.capture()); !a.Accepted {
			t.Fatal(a.Message)
		}
		_, err := p.src.ctl.ReleaseSource(t.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid})
		p.src.must(err)
		if e := <-flushed; e != 0 {
			t.Fatalf("errno %d", e)
		}
		start := nbd.Held(p.dst.gate.Read)
		p.dst.wantPhase(pb.Phase_PHASE_TARGET_HELD)
		return p, start
	}
	t.Run("of the target that is active", func(t *testing.T) {
		p, start := hold(t)
		_, err := p.dst.ctl.Activate(t.Context(), &pb.ActivateRequest{MigrationUid: uid})
		p.dst.must(err)
		p.dst.lose()
		if e := <-start; e != 0 {
			t.Fatalf("errno %d", e)
		}
		p.dst.mon.event("RESUME", "")
		p.dst.wantPhase(pb.Phase_PHASE_RUNNING)
		_, err = p.dst.ctl.AwaitRunning(t.Context(), &pb.AwaitRunningRequest{MigrationUid: uid})
		if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "took VF") {
			t.Errorf("it is told to run with its VF: %v", err)
		}
	})
	t.Run("of the target that holds the start", func(t *testing.T) {
		p, start := hold(t)
		p.dst.lose()
		if e := <-start; e == 0 {
			t.Error("the VM starts without its VF")
		}
		_, err := p.dst.ctl.Activate(t.Context(), &pb.ActivateRequest{MigrationUid: uid})
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("activated with %v", err)
		}
	})
}
