//go:build e2echart

package chart

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers/authority"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/wait"
)

// trusted returns the authorities that the agents are told to trust.
func (w *world) trusted(t *testing.T, ctx context.Context) []*x509.Certificate {
	t.Helper()
	m := &corev1.ConfigMap{}
	check(t, w.h.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: v1alpha1.TrustConfigMap}, m))
	parsed, err := certs.Parse([]byte(m.Data[v1alpha1.TrustKey]))
	check(t, err)
	return parsed
}

// used returns the certificate that the node's agent proves itself with.
func (w *world) used(t *testing.T, node string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(w.files(node).Cert)
	check(t, err)
	block, _ := pem.Decode(b)
	c, err := x509.ParseCertificate(block.Bytes)
	check(t, err)
	return c
}

// rotation: the authority is lost in the middle of a migration, a new one is
// made, and all certificates with it; the migration goes on.
func (w *world) rotation(t *testing.T) {
	ctx := within(t, 3*time.Minute)
	m, release := w.held(t, ctx)
	before := w.trusted(t, ctx)
	nodes := []string{harness.NodeA, harness.NodeB}
	old := map[string]*x509.Certificate{}
	for _, n := range nodes {
		old[n] = w.used(t, n)
	}
	check(t, w.h.Client().Delete(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: v1alpha1.AuthoritySecret}}))
	check(t, wait.Until(ctx, "new certificates of both nodes", func(context.Context) (bool, error) {
		trusted := w.trusted(t, ctx)
		for _, n := range nodes {
			c := w.used(t, n)
			if c.Equal(old[n]) || c.CheckSignatureFrom(trusted[0]) != nil {
				return false, nil
			}
		}
		return true, nil
	}))
	after := w.trusted(t, ctx)
	if len(after) != 2 || !after[1].Equal(before[0]) || after[0].Equal(before[0]) {
		t.Errorf("%d authorities are trusted, want the new one and the old one", len(after))
	}
	for _, n := range nodes {
		// The first certificate of the new authority is made when the agents
		// have known it for a while.
		if c := w.used(t, n); c.NotBefore.Before(after[0].NotBefore.Add(overlap - time.Second)) {
			t.Errorf("node %s's certificate is of %s, its authority of %s", n, c.NotBefore, after[0].NotBefore)
		}
	}
	release()
	w.moved(t, ctx, m)
	w.migrates(t)
}

// badCertificates: who does not prove its node is refused, and the agent says
// so in its log and in an event.
func (w *world) badCertificates(t *testing.T) {
	ctx := within(t, time.Minute)
	address := w.h.Lab.Nodes[harness.NodeB].IP.String() + ":9443"
	s := &corev1.Secret{}
	check(t, w.h.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: v1alpha1.AuthoritySecret}, s))
	own, err := authority.Parse(s.Data["tls.crt"], s.Data["tls.key"])
	check(t, err)
	cert, key, err := authority.New(time.Now(), time.Hour)
	check(t, err)
	foreign, err := authority.Parse(cert, key)
	check(t, err)

	call := func(by *authority.Authority, at time.Time) error {
		text, key := requestAndKey(t, harness.NodeA)
		r, err := authority.ParseRequest(text, harness.NodeA)
		check(t, err)
		signed, err := by.Sign(r, harness.NodeA, at, time.Hour)
		check(t, err)
		creds, err := peer.NewCredentials(harness.NodeA, w.writeFiles(t, signed, key))
		check(t, err)
		conn, err := peer.NewClient(creds).Connect(harness.NodeB, address)
		check(t, err)
		defer conn.Close()
		// With TLS 1.3 the client may think it is connected before it is refused.
		_, err = conn.Prepare(ctx, &peerpb.PrepareRequest{Migration: &peerpb.Migration{Namespace: "n", Name: "m", Uid: "u"}})
		for status.Code(err) == codes.Unavailable && ctx.Err() == nil && strings.Contains(err.Error(), "connecting") {
			_, err = conn.Prepare(ctx, &peerpb.PrepareRequest{Migration: &peerpb.Migration{Namespace: "n", Name: "m", Uid: "u"}})
		}
		return err
	}
	missing := func() error {
		d := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}
		conn, err := d.DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close()
		check(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		_, err = conn.Read(make([]byte, 1))
		return err
	}
	for what, test := range map[string]struct {
		call   func() error
		reason string
		says   string
	}{
		"expired": {func() error { return call(own, time.Now().Add(-2*time.Hour)) }, v1alpha1.EventPeerCertificateExpired, "certificate has expired"},
		"foreign": {func() error { return call(foreign, time.Now()) }, v1alpha1.EventPeerCertificateUntrusted, "signed by unknown authority"},
		"missing": {missing, v1alpha1.EventPeerCertificateMissing, "the peer sent no certificate"},
	} {
		err := test.call()
		if err == nil || status.Code(err) == codes.PermissionDenied {
			t.Errorf("%s: got as far as %v", what, err)
		}
		check(t, wait.Until(ctx, what+": a line in the log of node b's agent", func(context.Context) (bool, error) {
			for line := range bytes.Lines([]byte(w.h.Agent(harness.NodeB).Tail(1 << 20))) {
				if bytes.Contains(line, []byte("connection of an agent refused")) && bytes.Contains(line, []byte(test.says)) {
					return true, nil
				}
			}
			return false, nil
		}))
		check(t, wait.Until(ctx, what+": an event of VFNode b", func(ctx context.Context) (bool, error) {
			list := &eventsv1.EventList{}
			if err := w.h.Client().List(ctx, list); err != nil {
				return false, err
			}
			for _, e := range list.Items {
				if e.Regarding.Kind == "VFNode" && e.Regarding.Name == harness.NodeB && e.Type == corev1.EventTypeWarning &&
					e.Reason == test.reason && strings.Contains(e.Note, test.says) {
					return true, nil
				}
			}
			return false, nil
		}))
	}
	// A good one is not refused, so that the others were for their faults.
	if err := call(own, time.Now()); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a good certificate: got %v, want that the migration is unknown", err)
	}
}
