package device

import (
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/e2e/nbd"
)

// TestPFRefusesLate: what the target's PF granted in the rehearsal it refuses in
// the activation, because its other VFs have taken its filters meanwhile. The
// target is silent then, and the source goes on without a reset.
func TestPFRefusesLate(t *testing.T) {
	p := newPair(t, func(o *Options, _ *handoff.Handoff) { o.Faults.TakeFilters = true })
	p.src.mailbox(ixgbevf.MsgSetVLAN|1<<ixgbevf.MsgInfoShift, 77)
	before, err := p.src.ctl.Status(t.Context(), &pb.StatusRequest{})
	p.src.must(err)
	p.precopy() // with the rehearsal
	flush := nbd.Held(p.src.gate.Flush)
	if a := p.deliver(p.capture()); !a.Accepted {
		t.Fatalf("state refused: %s: %s", a.Reason, a.Message)
	}
	_, err = p.src.ctl.ReleaseSource(t.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid})
	p.src.must(err)
	if e := <-flush; e != 0 {
		t.Fatalf("the flush failed with errno %d", e)
	}
	p.copyRAM()
	start := nbd.Held(p.dst.gate.Read)
	_, err = p.dst.ctl.AwaitStart(t.Context(), &pb.AwaitStartRequest{MigrationUid: uid})
	p.dst.must(err)
	_, err = p.src.ctl.Relinquish(t.Context(), &pb.RelinquishRequest{MigrationUid: uid})
	p.src.must(err)
	if _, err := p.dst.ctl.Activate(t.Context(), &pb.ActivateRequest{MigrationUid: uid}); status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "SET_VLAN") {
		t.Errorf("activated with %v, want a refusal that names SET_VLAN", err)
	}
	if e := <-start; e != syscall.EIO {
		t.Errorf("QEMU's start ended with errno %d, want EIO", e)
	}
	p.dst.wantPhase(pb.Phase_PHASE_CANCELLED)
	p.src.mon.event("RESUME", "")
	_, err = p.src.ctl.CancelSource(t.Context(), &pb.CancelSourceRequest{MigrationUid: uid, Reason: "refused", Reclaim: true})
	p.src.must(err)
	p.src.wantPhase(pb.Phase_PHASE_RUNNING)
	p.src.mon.event("MIGRATION", "failed")
	p.goesOn(1, before.Interfaces[0].GuestResets)
	if !p.dst.wireSilent() {
		t.Error("the target's VF sent something")
	}
}
