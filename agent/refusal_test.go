package agent

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/events"

	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/api/v1alpha1"
)

// TestRefusals: the same is told once in a while, whatever else happens, and
// what is remembered is bounded.
func TestRefusals(t *testing.T) {
	var r refusals
	now := time.Now()
	tell := func(what string, after time.Duration, want bool) {
		t.Helper()
		if got := r.tell(what, now.Add(after)); got != want {
			t.Errorf("%s after %s: told: %v, want %v", what, after, got, want)
		}
	}
	tell("a", 0, true)
	tell("a", refusalPeriod-1, false)
	tell("b", refusalPeriod-1, true)
	tell("a", refusalPeriod, true)
	tell("b", refusalPeriod, false)
	for i := range 10 * maxRefusals {
		r.tell(fmt.Sprint(i), now)
		if len(r.told) > maxRefusals {
			t.Fatalf("%d are remembered, at most %d should be", len(r.told), maxRefusals)
		}
	}
}

// TestPeerRefused: each fault of a certificate has its own event, from each
// address once in a while, whatever the port.
func TestPeerRefused(t *testing.T) {
	l := newLab(t)
	recorder := events.NewFakeRecorder(10)
	a := &agent{node: "a", client: l.client, events: recorder, log: slog.New(slog.NewTextHandler(testWriter{t}, nil)), limits: defaultLimits}
	expired := fmt.Errorf("certificate of the peer: %w", x509.CertificateInvalidError{Reason: x509.Expired})
	for _, test := range []struct {
		address string
		why     error
		reason  string // empty: not told
	}{
		{"192.0.2.1:1", expired, v1alpha1.EventPeerCertificateExpired},
		{"192.0.2.1:2", expired, ""},
		{"192.0.2.2:1", expired, v1alpha1.EventPeerCertificateExpired},
		{"192.0.2.1:1", fmt.Errorf("x: %w", x509.UnknownAuthorityError{}), v1alpha1.EventPeerCertificateUntrusted},
		{"192.0.2.1:1", peer.ErrNoCertificate, v1alpha1.EventPeerCertificateMissing},
		{"192.0.2.1:1", fmt.Errorf("%w: gone", peer.ErrNoCredentials), v1alpha1.ReasonCertificateUnavailable},
		{"192.0.2.1:1", x509.CertificateInvalidError{Reason: x509.NotAuthorizedToSign}, v1alpha1.EventPeerRefused},
		{"192.0.2.1:1", errors.New("the peer is the agent of node b"), ""},
		{"no port", errors.New("the peer is the agent of node b"), v1alpha1.EventPeerRefused},
		{"[2001:db8::1]:3", errors.New(strings.Repeat("long", maxNote)), v1alpha1.EventPeerRefused},
	} {
		a.peerRefused(test.address, test.why)
		got := ""
		select {
		case got = <-recorder.Events:
		default:
		}
		if test.reason == "" {
			if got != "" {
				t.Errorf("%s, %v: told again: %s", test.address, test.why, got)
			}
			continue
		}
		want := "Warning " + test.reason + " the connection with " + test.address + " is refused: " + test.why.Error()
		if got == "" || !strings.HasPrefix(want, strings.TrimSuffix(got, "...")) || len(got) < min(len(want), maxNote) || len(got) > maxNote+100 {
			t.Errorf("%s: the event is %q, want %q", test.address, got, want)
		}
	}
}

// TestRefusedConnections: both sides of a connection tell of what the other one
// does not prove.
func TestRefusedConnections(t *testing.T) {
	l := newLab(t)
	l.nodes["a"].start()
	recorder, ok := l.nodes["a"].agent.events.(*events.FakeRecorder)
	if !ok {
		t.Fatal("the agent's events are not kept")
	}
	conn, err := tls.Dial("tcp", l.nodes["a"].address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err == nil {
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(waitLimit)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); err == nil {
			t.Error("a connection without a certificate gets an answer")
		}
	}
	select {
	case e := <-recorder.Events:
		if !strings.Contains(e, v1alpha1.EventPeerCertificateMissing) {
			t.Errorf("the event is %q", e)
		}
	case <-time.After(waitLimit):
		t.Error("no event of a connection without a certificate")
	}

	// Node b's agent takes node a for node c.
	creds, err := peer.NewCredentials("b", l.nodes["b"].files)
	if err != nil {
		t.Fatal(err)
	}
	refused := make(chan error, 10)
	creds.OnRefused(func(_ string, why error) { refused <- why })
	c, err := peer.NewClient(creds).Connect("c", l.nodes["a"].address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	ready := make(chan error, 1)
	go func() { ready <- c.WaitReady(ctx) }()
	select {
	case why := <-refused:
		if !strings.Contains(why.Error(), "the agent of node a, not of c") {
			t.Errorf("refused because %v", why)
		}
	case <-time.After(waitLimit):
		t.Error("the client does not tell")
	}
	cancel()
	if err := <-ready; err == nil {
		t.Error("node a is taken for node c")
	}
}
