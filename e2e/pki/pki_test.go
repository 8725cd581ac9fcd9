package pki

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// TestMutual: two nodes authenticate each other, and each learns the other's
// identity from its certificate.
func TestMutual(t *testing.T) {
	ca, err := New()
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("127.0.0.1")
	server := config(t, ca, "a", ip)
	client := config(t, ca, "b", ip)
	client.ServerName = "127.0.0.1"

	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	got := make(chan string, 1)
	go func() {
		defer close(got)
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		tc := c.(*tls.Conn)
		if err := tc.HandshakeContext(t.Context()); err != nil {
			return
		}
		got <- tc.ConnectionState().PeerCertificates[0].URIs[0].String()
	}()
	d := &tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: client}
	c, err := d.DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read: %v", err)
	}
	if id := <-got; id != "spiffe://compsc.io/node/b" {
		t.Errorf("client's identity %q", id)
	}
	if id := c.(*tls.Conn).ConnectionState().PeerCertificates[0].URIs[0].String(); id != "spiffe://compsc.io/node/a" {
		t.Errorf("server's identity %q", id)
	}
}

func config(t *testing.T, ca *Authority, node string, ip netip.Addr) *tls.Config {
	t.Helper()
	f, err := ca.Issue(t.TempDir(), node, ip)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	b, err := os.ReadFile(f.CA)
	if err != nil || !pool.AppendCertsFromPEM(b) {
		t.Fatalf("authority: %v", err)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: pool, ClientCAs: pool,
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
	}
}
