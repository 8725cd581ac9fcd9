package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/api/v1alpha1"
)

const (
	// refusalPeriod is how often the same refusal is told.
	refusalPeriod = time.Minute
	// maxRefusals bounds how many are remembered: others make them.
	maxRefusals = 256
)

// refusals remembers which connections were refused, so that a peer that tries
// again and again is told of once in a while.
type refusals struct {
	mu   sync.Mutex
	told map[string]time.Time
}

// tell says whether this refusal is to be told now.
func (r *refusals) tell(what string, now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if last, ok := r.told[what]; ok && now.Sub(last) < refusalPeriod {
		return false
	}
	if r.told == nil || len(r.told) >= maxRefusals {
		r.told = map[string]time.Time{}
	}
	r.told[what] = now
	return true
}

// peerRefused tells that the peer at the address did not prove its node.
func (a *agent) peerRefused(address string, why error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	reason := refusalReason(why)
	if !a.refused.tell(host+" "+reason, time.Now()) {
		return
	}
	a.log.Warn("connection of an agent refused", "peer", address, "reason", why)
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.call)
	defer cancel()
	a.warn(ctx, reason, "Authenticate", "the connection with "+address+" is refused: "+why.Error())
}

// refusalReason is the event's reason. Events with the same reason become one
// series, which keeps the words of the first; so there is one for each fault.
func refusalReason(why error) string {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.Is(why, peer.ErrNoCredentials):
		return v1alpha1.ReasonCertificateUnavailable
	case errors.Is(why, peer.ErrNoCertificate):
		return v1alpha1.EventPeerCertificateMissing
	case errors.As(why, &invalid) && invalid.Reason == x509.Expired:
		return v1alpha1.EventPeerCertificateExpired
	case errors.As(why, &unknown):
		return v1alpha1.EventPeerCertificateUntrusted
	}
	return v1alpha1.EventPeerRefused
}

// vfNode names the node's VFNode in what an agent says of other objects: by it
// the API server knows whose word that is.
func (a *agent) vfNode() *v1alpha1.VFNode {
	return &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: a.node}}
}

// warn makes an event of the node's VFNode.
func (a *agent) warn(ctx context.Context, reason, action, note string) {
	n := a.vfNode()
	// Without its UID the event is found by its name only.
	if err := a.client.Get(ctx, client.ObjectKey{Name: a.node}, n); err != nil {
		n = a.vfNode()
	}
	a.events.Eventf(n, nil, corev1.EventTypeWarning, reason, action, "%s", cut(note, maxNote))
}

// maxNote bounds an event's note, which the API limits to 1 kB.
const maxNote = 1024
