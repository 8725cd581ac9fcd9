package agent

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
