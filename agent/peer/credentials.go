// Package peer is the channel between the agents of two nodes: gRPC over
// mutual TLS 1.3. Each side proves that it is the agent of a node, and every
// call is checked against the VFMigration that it names.
//
// Package spiffe says how a certificate names its node.
package peer

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"compsc.io/compsc/agent/spiffe"
)

// maxPEM bounds each of the files.
const maxPEM = 1 << 20

var (
	// ErrNoCertificate: the other side of a connection showed no certificate.
	ErrNoCertificate = errors.New("the peer sent no certificate")
	// ErrNoCredentials: this side has nothing to prove its node with, or to judge
	// the other side by.
	ErrNoCredentials = errors.New("this node has no certificate")
)

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
	// refused, if set, is told of connections that fail for a certificate.
	refused func(address string, why error)

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

// AwaitCredentials is NewCredentials for files that need not be there yet: until
// they are, every connection fails.
func AwaitCredentials(node string, files Files) *Credentials {
	return &Credentials{node: node, files: files}
}

// OnRefused has f called, from any goroutine, for each connection, and each call
// on one that is open, that this side refuses because the peer at the address does
// not prove its node, or because there is nothing to prove the own node with. It
// must be called before the credentials are used, and f must not block for long.
func (c *Credentials) OnRefused(f func(address string, why error)) { c.refused = f }

// refuse tells of a refusal, and returns its reason.
func (c *Credentials) refuse(address string, why error) error {
	if c.refused != nil {
		c.refused(address, why)
	}
	return why
}

// Check returns nil if there is a certificate that is valid at the time, and
// else why there is none.
func (c *Credentials) Check(now time.Time) error {
	pair, _, err := c.current()
	if err != nil {
		return err
	}
	if now.Before(pair.Leaf.NotBefore) || now.After(pair.Leaf.NotAfter) {
		return fmt.Errorf("TLS certificate %s is valid from %s to %s only", c.files.Cert,
			pair.Leaf.NotBefore.UTC().Format(time.RFC3339), pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
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
	node, err := spiffe.NodeOf(pair.Leaf)
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
		return "", ErrNoCertificate
	}
	_, roots, err := c.current()
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNoCredentials, err)
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
	return spiffe.NodeOf(certs[0])
}

// own returns the certificate to prove the own node with, to the peer at the
// address.
func (c *Credentials) own(address string) (*tls.Certificate, error) {
	pair, _, err := c.current()
	if err != nil {
		return nil, c.refuse(address, fmt.Errorf("%w: %w", ErrNoCredentials, err))
	}
	return pair, nil
}

func (c *Credentials) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			return c.serverConfigFor(hello.Conn.RemoteAddr().String()), nil
		},
	}
}

// serverConfigFor is for one connection from the address.
func (c *Credentials) serverConfigFor(address string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// Verification is ours, against the authorities of the moment; it
		// refuses those without a certificate too.
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.own(address) },
		VerifyConnection: func(s tls.ConnectionState) error {
			if _, err := c.verify(s.PeerCertificates, x509.ExtKeyUsageClientAuth); err != nil {
				return c.refuse(address, err)
			}
			return nil
		},
	}
}

// clientConfig is for connections to the agent of one node at the address.
func (c *Credentials) clientConfig(node, address string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The peer's name is its node, not its host name: VerifyConnection
		// does all that is skipped here.
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.own(address) },
		VerifyConnection: func(s tls.ConnectionState) error {
			got, err := c.verify(s.PeerCertificates, x509.ExtKeyUsageServerAuth)
			if err != nil {
				return c.refuse(address, err)
			}
			if got != node {
				return c.refuse(address, fmt.Errorf("the peer is the agent of node %s, not of %s", got, node))
			}
			return nil
		},
	}
}
