package authority

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/agent/spiffe"
)

var now = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

func newAuthority(t *testing.T, lifetime time.Duration) (a *Authority, cert, key []byte) {
	t.Helper()
	cert, key, err := New(now, lifetime)
	if err != nil {
		t.Fatal(err)
	}
	if a, err = Parse(cert, key); err != nil {
		t.Fatal(err)
	}
	return a, cert, key
}

// request is one for the node, as the template is changed.
func request(t *testing.T, node string, key any, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	if key == nil {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		key = k
	}
	r := &x509.CertificateRequest{URIs: []*url.URL{spiffe.NodeURI(node)}}
	if change != nil {
		change(r)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, r, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func TestSign(t *testing.T) {
	a, cert, _ := newAuthority(t, 48*time.Hour)
	r, err := ParseRequest(request(t, "n1", nil, nil), "n1")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		lifetime, want time.Duration
	}{{time.Hour, time.Hour}, {1000 * time.Hour, 48 * time.Hour}} {
		text, err := a.Sign(r, "n1", now, test.lifetime)
		if err != nil {
			t.Fatal(err)
		}
		got, err := certs.Parse(text)
		if err != nil || len(got) != 1 {
			t.Fatal(got, err)
		}
		if !got[0].NotAfter.Equal(now.Add(test.want)) {
			t.Errorf("lifetime %s: it ends at %s", test.lifetime, got[0].NotAfter)
		}
		if node, err := spiffe.NodeOf(got[0]); node != "n1" || err != nil {
			t.Errorf("its node is %q: %v", node, err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(cert)
		for _, u := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			if _, err := got[0].Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{u}}); err != nil {
				t.Errorf("usage %d: %v", u, err)
			}
		}
		if got[0].IsCA {
			t.Error("a node's certificate is an authority's")
		}
	}
	if _, err := a.Sign(r, "n1", now.Add(49*time.Hour), time.Hour); err == nil || !strings.Contains(err.Error(), "ended at") {
		t.Errorf("an authority that ended signs: %v", err)
	}
}

func TestBadRequests(t *testing.T) {
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := request(t, "n1", nil, nil)
	forged, _ := pem.Decode(good)
	forged.Bytes[len(forged.Bytes)-1] ^= 1
	for name, test := range map[string]struct {
		text []byte
		says string
	}{
		"nothing":           {nil, "not one PEM block"},
		"a certificate":     {certs.Encode([]byte{1}), "not one PEM block"},
		"two":               {append(bytes.Clone(good), good...), "not one PEM block"},
		"too long":          {append(bytes.Clone(good), make([]byte, maxPEM)...), "at most"},
		"not ASN.1":         {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte{1, 2}}), "asn1"},
		"forged":            {pem.EncodeToMemory(forged), "not signed by its own key"},
		"another curve":     {request(t, "n1", p384, nil), "want ECDSA on P-256"},
		"another algorithm": {request(t, "n1", ed, nil), "want ECDSA on P-256"},
		"another node":      {request(t, "n2", nil, nil), "for the agent of node n2, and comes from node n1"},
		"no name":           {request(t, "n1", nil, func(r *x509.CertificateRequest) { r.URIs = nil }), "0 URI names"},
		"two names":         {request(t, "n1", nil, func(r *x509.CertificateRequest) { r.URIs = append(r.URIs, r.URIs[0]) }), "2 URI names"},
		"a host name":       {request(t, "n1", nil, func(r *x509.CertificateRequest) { r.DNSNames = []string{"n1"} }), "1 names that are not URIs"},
		"an address":        {request(t, "n1", nil, func(r *x509.CertificateRequest) { r.IPAddresses = []net.IP{{1, 2, 3, 4}} }), "1 names that are not URIs"},
		"a path below":      {request(t, "n1/x", nil, nil), "not of the form"},
	} {
		if _, err := ParseRequest(test.text, "n1"); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q", name, err, test.says)
		}
	}
}

func TestBadAuthorities(t *testing.T) {
	a, cert, key := newAuthority(t, time.Hour)
	_, otherCert, otherKey := newAuthority(t, time.Hour)
	r, err := ParseRequest(request(t, "n1", nil, nil), "n1")
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := a.Sign(r, "n1", now, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		cert, key []byte
		says      string
	}{
		"no certificate":   {nil, key, "no certificate"},
		"no PEM":           {[]byte("x"), key, "not a sequence of PEM certificates"},
		"a key as well":    {append(bytes.Clone(cert), key...), key, "not a sequence of PEM certificates"},
		"no key":           {cert, nil, "not PEM"},
		"a long key":       {cert, make([]byte, maxPEM+1), "at most"},
		"another's key":    {cert, otherKey, "not that of the certificate"},
		"another's cert":   {otherCert, key, "not that of the certificate"},
		"a node's":         {leaf, key, "may not sign"},
		"something else":   {cert, cert, "want a private key"},
		"a key of nothing": {cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{0}}), "asn1"},
	} {
		if _, err := Parse(test.cert, test.key); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %q", name, err, test.says)
		}
	}
}

// FuzzParseRequest: whoever may create a CertificateSigningRequest writes it.
func FuzzParseRequest(f *testing.F) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{spiffe.NodeURI("n1")}}, k)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := ParseRequest(text, "n1")
		if err != nil {
			return
		}
		if node, err := spiffe.NodeOfRequest(r); err != nil || node != "n1" {
			t.Errorf("a request of node %q was taken: %v", node, err)
		}
	})
}
