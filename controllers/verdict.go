package controllers

import (
	"context"
	"errors"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// Verdict is what a preflight comes to.
type Verdict struct {
	// Accepted tells whether the manager would accept the migration now.
	Accepted bool `json:"accepted"`
	// Reason why not, one of the documented reasons; empty if accepted.
	Reason string `json:"reason,omitempty"`
	// Message says what stands in the way and what to do, or what is left to
	// the target's verdict; may be empty if accepted.
	Message string `json:"message,omitempty"`
	// SourceNode is where the VM runs; empty if not accepted, or not yet.
	SourceNode string `json:"sourceNode,omitempty"`
}

// Preflight judges a VFMigration that need not exist, as the manager would if
// it were created now, and changes nothing. It reads by c, whose rights must
// suffice for what the manager reads; systemNamespace is that of the agents'
// leases. An error means that it could not be found out.
func Preflight(ctx context.Context, c client.Reader, k clock.PassiveClock, systemNamespace string, m *v1alpha1.VFMigration) (Verdict, error) {
	r := &VFMigrationReconciler{Live: c, Clock: k, Namespace: systemNamespace}
	if m.CreationTimestamp.IsZero() {
		m = m.DeepCopy() // others are older
		m.CreationTimestamp = metav1.NewTime(k.Now())
	}
	source, open, err := r.preflight(ctx, m)
	if wait := (*notYet)(nil); errors.As(err, &wait) {
		return Verdict{Accepted: true, Message: "It would wait: " + wait.message}, nil
	}
	if no := (*refusal)(nil); errors.As(err, &no) {
		return Verdict{Reason: no.reason, Message: no.message}, nil
	}
	if err != nil {
		return Verdict{}, err
	}
	return Verdict{Accepted: true, Message: open, SourceNode: source.NodeName}, nil
}
