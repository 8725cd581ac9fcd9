// Package pki makes certificate authorities and certificates: those that the
// agents of a lab authenticate each other with, which in production
// cert-manager or the cluster's own authority makes, and those of the control
// plane of a lab with real nodes.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// validity is longer than any run of the demonstration or of the tests.
const validity = 24 * time.Hour

// Authority issues certificates. It is safe for concurrent use.
type Authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Files are the paths of a certificate, its key, and the authority's
// certificate, all PEM.
type Files struct{ Cert, Key, CA string }

// New makes an authority, valid for a day.
func New() (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "compsc lab"},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(validity),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &Authority{cert: cert, key: key}, nil
}

// Issue writes into dir the certificate of the node's agent: server and
// client, with the node's SPIFFE identity spiffe://compsc.io/node/NAME. The
// files have the names of a TLS secret's keys: tls.crt, tls.key and ca.crt.
func (a *Authority) Issue(dir, node string, ip netip.Addr) (Files, error) {
	return a.Certify(dir, "tls", &x509.Certificate{
		Subject:     pkix.Name{CommonName: "compsc-agent " + node},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        []*url.URL{{Scheme: "spiffe", Host: "compsc.io", Path: "/node/" + node}},
		DNSNames:    []string{node},
		IPAddresses: []net.IP{ip.AsSlice()},
	})
}

// Certify writes into dir a certificate made from the template, its key and
// the authority's certificate, as name.crt, name.key and ca.crt. Of the
// template it uses the subject, the alternative names and the extended usage.
func (a *Authority) Certify(dir, name string, template *x509.Certificate) (Files, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Files{}, err
	}
	t := *template
	if t.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return Files{}, err
	}
	t.NotBefore, t.NotAfter, t.KeyUsage = a.cert.NotBefore, a.cert.NotAfter, x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, &t, a.cert, key.Public(), a.key)
	if err != nil {
		return Files{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Files{}, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Files{}, err
	}
	f := Files{
		Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key"), CA: filepath.Join(dir, "ca.crt"),
	}
	for path, block := range map[string]*pem.Block{
		f.Cert: {Type: "CERTIFICATE", Bytes: der},
		f.Key:  {Type: "PRIVATE KEY", Bytes: keyDER},
		f.CA:   {Type: "CERTIFICATE", Bytes: a.cert.Raw},
	} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			return Files{}, fmt.Errorf("certificate of %s: %w", t.Subject.CommonName, err)
		}
	}
	return f, nil
}
