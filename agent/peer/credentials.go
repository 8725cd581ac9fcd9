// Package peer is the channel between the agents of two nodes: gRPC over
// mutual TLS 1.3. Each side proves that it is the agent of a node, and every
// call is checked against the VFMigration that it names.
//
// A node's identity is the one URI name of its certificate,
// spiffe://compsc.io/node/<node name>. Host names play no part: addresses of
// agents are read from VFNodes and prove nothing.
package peer

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	trustDomain = "compsc.io"
	nodePath    = "/node/"
	// maxPEM bounds each of the files.
	maxPEM = 1 << 20
)

// NodeURI returns the URI that the certificate of the node's agent must carry
// as its only URI name.
func NodeURI(node string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: nodePath + node}
}

// NodeOf returns the node whose agent the certificate belongs to. It does not
// verify the certificate.
func NodeOf(cert *x509.Certificate) (string, error) {
	if len(cert.URIs) != 1 {
		return "", fmt.Errorf("certificate of %q has %d URI names, want one: %s", cert.Subject, len(cert.URIs), "spiffe://compsc.io/node/<node name>")
	}
	u := cert.URIs[0]
	node, ok := strings.CutPrefix(u.Path, nodePath)
	if !ok || node == "" || strings.Contains(node, "/") || u.String() != NodeURI(node).String() {
		return "", fmt.Errorf("certificate name %q is not of the form spiffe://compsc.io/node/<node name>", u)
	}
	return node, nil
}

// Files name the PEM files that an agent proves itself with.
type Files struct {
	// Cert is the certificate chain of the node, Key its private key.
	Cert, Key string
	// CA holds the certificates of the authorities that sign nodes' certificates.
	CA string
}

// Credentials are a node's certificate and the authorities it trusts, read
// from files and read again when they change. Safe for concurrent use.
type Credentials struct {
	node  string
	files Files

	mu      sync.Mutex
	stamp   [3]stamp
	pair    *tls.Certificate
	roots   *x509.CertPool
	lastErr error
}

// stamp tells whether a file changed; secrets mounted by the kubelet change
// by a new inode.
type stamp struct {
	info os.FileInfo
}

func (s stamp) same(o stamp) bool {
	return s.info != nil && o.info != nil && os.SameFile(s.info, o.info) &&
		s.info.ModTime().Equal(o.info.ModTime()) && s.info.Size() == o.info.Size()
}

// NewCredentials reads the files. The certificate must be that of node.
func NewCredentials(node string, files Files) (*Credentials, error) {
	c := &Credentials{node: node, files: files}
	if _, _, err := c.current(); err != nil {
		return nil, err
	}
	return c, nil
}

// current returns what the files hold. Files that became unreadable, or are
// caught half-way through a change, leave what they held before.
func (c *Credentials) current() (*tls.Certificate, *x509.CertPool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var now [3]stamp
	for i, path := range []string{c.files.Cert, c.files.Key, c.files.CA} {
		if info, err := os.Stat(path); err == nil {
			now[i].info = info
		}
	}
	if c.pair != nil && now[0].same(c.stamp[0]) && now[1].same(c.stamp[1]) && now[2].same(c.stamp[2]) {
		return c.pair, c.roots, nil
	}
	pair, roots, err := c.load()
	if err != nil {
		c.lastErr = err
		if c.pair == nil {
			return nil, nil, err
		}
		return c.pair, c.roots, nil
	}
	c.pair, c.roots, c.stamp, c.lastErr = pair, roots, now, nil
	return pair, roots, nil
}

// Err returns why the files' present content is not in use, nil if it is.
func (c *Credentials) Err() error {
	if _, _, err := c.current(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lastErr
}

func (c *Credentials) load() (*tls.Certificate, *x509.CertPool, error) {
	cert, err := readPEM(c.files.Cert)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate: %w", err)
	}
	key, err := readPEM(c.files.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS key: %w", err)
	}
	ca, err := readPEM(c.files.CA)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS CA: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate %s with key %s: %w", c.files.Cert, c.files.Key, err)
	}
	node, err := NodeOf(pair.Leaf)
	if err != nil {
		return nil, nil, fmt.Errorf("TLS certificate %s: %w", c.files.Cert, err)
	}
	if node != c.node {
		return nil, nil, fmt.Errorf("TLS certificate %s is that of node %s, this is %s", c.files.Cert, node, c.node)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(bytes.TrimSpace(ca)) {
		return nil, nil, fmt.Errorf("TLS CA %s holds no certificate", c.files.CA)
	}
	return &pair, roots, nil
}

func readPEM(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxPEM {
		return nil, fmt.Errorf("%s has %d bytes, at most %d", path, info.Size(), maxPEM)
	}
	return os.ReadFile(path)
}

// verify checks a peer's certificates against the authorities trusted now and
// returns its node.
func (c *Credentials) verify(certs []*x509.Certificate, usage x509.ExtKeyUsage) (string, error) {
	if len(certs) == 0 {
		return "", errors.New("the peer sent no certificate")
	}
	_, roots, err := c.current()
	if err != nil {
		return "", err
	}
	intermediates := x509.NewCertPool()
	for _, i := range certs[1:] {
		intermediates.AddCert(i)
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: time.Now(), KeyUsages: []x509.ExtKeyUsage{usage},
	}); err != nil {
		return "", fmt.Errorf("certificate of the peer: %w", err)
	}
	return NodeOf(certs[0])
}

func (c *Credentials) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Verification is ours, against the authorities of the moment.
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			pair, _, err := c.current()
			return pair, err
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			_, err := c.verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth)
			return err
		},
	}
}

// clientConfig is for connections to the agent of one node.
func (c *Credentials) clientConfig(node string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The peer's name is its node, not its host name: VerifyConnection
		// does all that is skipped here.
		InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, _, err := c.current()
			return pair, err
		},
		VerifyConnection: func(s tls.ConnectionState) error {
			got, err := c.verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth)
			if err != nil {
				return err
			}
			if got != node {
				return fmt.Errorf("the peer is the agent of node %s, not of %s", got, node)
			}
			return nil
		},
	}
}
