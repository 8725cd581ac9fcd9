package agent

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/api/v1alpha1"
)

func TestAuthorize(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	ok := &peerpb.Migration{Namespace: ns, Name: "m", Uid: "m-uid"}
	tests := []struct {
		name   string
		at     *labNode
		caller string
		method peer.Method
		m      *peerpb.Migration
		code   codes.Code
	}{
		{"source prepares", s.to, "a", peer.MethodPrepare, ok, codes.OK},
		{"source delivers", s.to, "a", peer.MethodDeliver, ok, codes.OK},
		{"source withdraws", s.to, "a", peer.MethodWithdraw, ok, codes.OK},
		{"target commits", s.from, "b", peer.MethodCommit, ok, codes.OK},
		{"stranger prepares", s.to, "c", peer.MethodPrepare, ok, codes.PermissionDenied},
		{"target prepares at itself", s.to, "b", peer.MethodPrepare, ok, codes.PermissionDenied},
		{"source commits at itself", s.from, "a", peer.MethodCommit, ok, codes.PermissionDenied},
		{"target prepares at source", s.from, "b", peer.MethodPrepare, ok, codes.PermissionDenied},
		{"source commits at target", s.to, "a", peer.MethodCommit, ok, codes.PermissionDenied},
		{"other UID", s.to, "a", peer.MethodPrepare, &peerpb.Migration{Namespace: ns, Name: "m", Uid: "old"}, codes.PermissionDenied},
		{"unknown", s.to, "a", peer.MethodPrepare, &peerpb.Migration{Namespace: ns, Name: "x", Uid: "m-uid"}, codes.PermissionDenied},
	}
	check := func(t *testing.T) {
		for _, tt := range tests {
			if got := status.Code(tt.at.agent.Authorize(t.Context(), tt.caller, tt.method, tt.m)); got != tt.code {
				t.Errorf("%s: %v, want %v", tt.name, got, tt.code)
			}
		}
	}
	check(t)
	s.status(func(m *vfMigration) { setTrue(m, v1alpha1.ConditionSucceeded, "done") })
	for i := range tests {
		if tests[i].code == codes.OK && tests[i].method != peer.MethodWithdraw {
			tests[i].code = codes.FailedPrecondition
		}
	}
	check(t)
}

// TestPeerTooNew: an agent that speaks other versions gets a verdict that says
// so, and no device process is asked for one.
func TestPeerTooNew(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	s.to.kill()
	s.to.agent.devices = newDevices(s.to.podsDir)
	s.dst.set(func() { clear(s.dst.calls) })
	for newest, want := range map[uint32]string{1: "", 3: v1alpha1.ReasonVersionMismatch} {
		r, err := (&service{agent: s.to.agent}).Prepare(t.Context(), &peerpb.PrepareRequest{
			Migration: &peerpb.Migration{Namespace: ns, Name: "m", Uid: "m-uid"}, Protocols: &controlpb.Protocols{Oldest: newest, Newest: newest}})
		if err != nil || r.GetReason() != want || r.GetAccepted() != (want == "") {
			t.Errorf("to a peer of version %d: %v, %v", newest, r, err)
		}
	}
	s.dst.mu.Lock()
	defer s.dst.mu.Unlock()
	if n := s.dst.calls["PrepareTarget"]; n != 1 {
		t.Errorf("the device process was asked %d times, want once, for the peer of version 1", n)
	}
}

// TestDeliveredTwice: a source that was restarted delivers once more, when the
// target may have used the state already.
func TestDeliveredTwice(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	deliver := func() (*peerpb.DeliverReply, error) {
		return (&service{agent: s.to.agent}).Deliver(t.Context(), &peerpb.DeliverRequest{
			Migration: &peerpb.Migration{Namespace: ns, Name: "m", Uid: "m-uid"}, States: []*controlpb.InterfaceState{{Name: interfaceName}}})
	}
	// What follows is asked of an agent that does nothing else.
	s.to.kill()
	s.to.agent.devices = newDevices(s.to.podsDir)
	for _, phase := range []controlpb.Phase{controlpb.Phase_PHASE_TARGET_PREPARED, controlpb.Phase_PHASE_TARGET_LOADED,
		controlpb.Phase_PHASE_TARGET_HELD, controlpb.Phase_PHASE_TARGET_ACTIVE, controlpb.Phase_PHASE_RUNNING} {
		s.dst.set(func() { s.dst.phase = phase })
		if r, err := deliver(); err != nil || !r.GetAccepted() {
			t.Errorf("in %s: %v, %v", phase, r, err)
		}
	}
	s.dst.set(func() { s.dst.phase = controlpb.Phase_PHASE_CANCELLED })
	if r, err := deliver(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("to a cancelled target: %v, %v", r, err)
	}
}

// TestRestartedPastTheCommit: a source's agent that comes back after the VFs
// were given up needs nobody to know that they were captured.
func TestRestartedPastTheCommit(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	s.from.kill()
	s.to.kill()
	s.src.set(func() { s.src.phase, s.src.released = controlpb.Phase_PHASE_RELINQUISHED, true })
	s.from.start()
	s.expect(v1alpha1.ConditionCaptured, metav1.ConditionTrue, v1alpha1.ConditionCaptured)
}
