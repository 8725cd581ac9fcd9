// Package authority is the certificate authority of the channel between
// agents: it makes a CA, judges a node's request, and signs its certificate.
// Where all that is kept is the caller's business. Its values are immutable and
// safe for concurrent use.
package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/agent/spiffe"
)

const (
	// skew is how far a node's clock may be behind.
	skew = 5 * time.Minute
	// maxPEM bounds what is parsed, in bytes.
	maxPEM = 64 << 10
)

// Authority is a CA with its key.
type Authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// New makes a CA that is valid from now for lifetime, and returns it as PEM.
func New(now time.Time, lifetime time.Duration) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("key of the authority: %w", err)
	}
	n, err := serial()
	if err != nil {
		return nil, nil, err
	}
	t := &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: "compsc agents"},
		NotBefore: now.Add(-skew), NotAfter: now.Add(lifetime),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, k.Public(), k)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate of the authority: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, nil, fmt.Errorf("key of the authority: %w", err)
	}
	return certs.Encode(der), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

// Parse reads a CA and its key from PEM; of several certificates the first
// counts. It refuses what cannot sign.
func Parse(cert, key []byte) (*Authority, error) {
	list, err := certs.Parse(cert)
	if err != nil {
		return nil, fmt.Errorf("certificate of the authority: %w", err)
	}
	c := list[0]
	if !c.BasicConstraintsValid || !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("certificate of %q may not sign certificates: it must be that of an authority", c.Subject)
	}
	if len(key) > maxPEM {
		return nil, fmt.Errorf("key of the authority: it has %d bytes, at most %d", len(key), maxPEM)
	}
	block, _ := pem.Decode(key)
	if block == nil {
		return nil, errors.New("key of the authority: it is not PEM")
	}
	k, err := parseKey(block)
	if err != nil {
		return nil, fmt.Errorf("key of the authority: %w", err)
	}
	if p, ok := k.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !p.Equal(c.PublicKey) {
		return nil, fmt.Errorf("key of the authority: it is not that of the certificate of %q", c.Subject)
	}
	return &Authority{cert: c, key: k}, nil
}

// parseKey reads the forms in which cert-manager and openssl write keys.
func parseKey(b *pem.Block) (crypto.Signer, error) {
	var k any
	var err error
	switch b.Type {
	case "PRIVATE KEY":
		k, err = x509.ParsePKCS8PrivateKey(b.Bytes)
	case "EC PRIVATE KEY":
		k, err = x509.ParseECPrivateKey(b.Bytes)
	case "RSA PRIVATE KEY":
		k, err = x509.ParsePKCS1PrivateKey(b.Bytes)
	default:
		return nil, fmt.Errorf("its PEM block is %q, want a private key", b.Type)
	}
	if err != nil {
		return nil, err
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", k)
	}
	return s, nil
}

// Certificate returns the CA's own certificate.
func (a *Authority) Certificate() *x509.Certificate { return a.cert }

// Sign returns, as PEM, the certificate that a request of the node's agent asks
// for, valid from now for lifetime, but not for longer than the CA. Of the
// request only the key is used.
func (a *Authority) Sign(r *x509.CertificateRequest, node string, now time.Time, lifetime time.Duration) ([]byte, error) {
	end := now.Add(lifetime)
	if end.After(a.cert.NotAfter) {
		end = a.cert.NotAfter
	}
	if !end.After(now) {
		return nil, fmt.Errorf("the authority %q ended at %s", a.cert.Subject, a.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	n, err := serial()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: n, Subject: pkix.Name{CommonName: "compsc-agent"}, URIs: []*url.URL{spiffe.NodeURI(node)},
		NotBefore: now.Add(-skew), NotAfter: end, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, r.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("certificate of node %s: %w", node, err)
	}
	return certs.Encode(der), nil
}

// ParseRequest reads a PEM certificate request and refuses one that is not
// signed by its key, or names anything but the node's agent.
func ParseRequest(text []byte, node string) (*x509.CertificateRequest, error) {
	if len(text) > maxPEM {
		return nil, fmt.Errorf("the request has %d bytes, at most %d", len(text), maxPEM)
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("the request is not one PEM block of type CERTIFICATE REQUEST")
	}
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the request is not signed by its own key: %w", err)
	}
	if k, ok := r.PublicKey.(*ecdsa.PublicKey); !ok || k.Curve != elliptic.P256() {
		return nil, fmt.Errorf("the request's key is a %s, want ECDSA on P-256", r.PublicKeyAlgorithm)
	}
	if n := len(r.DNSNames) + len(r.IPAddresses) + len(r.EmailAddresses); n > 0 {
		return nil, fmt.Errorf("the request has %d names that are not URIs", n)
	}
	got, err := spiffe.NodeOfRequest(r)
	if err != nil {
		return nil, err
	}
	if got != node {
		return nil, fmt.Errorf("the request is for the agent of node %s, and comes from node %s", got, node)
	}
	return r, nil
}

func serial() (*big.Int, error) {
	// RFC 5280, 4.1.2.2: positive, at most 20 octets.
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}
