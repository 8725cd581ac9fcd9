package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/agent/spiffe"
)

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

type certOption func(*x509.Certificate)

func expired(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
func noUsage(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }
func uris(u ...string) certOption {
	return func(c *x509.Certificate) {
		c.URIs = nil
		for _, s := range u {
			p, err := url.Parse(s)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, p)
		}
	}
}

// issue writes a certificate of node into dir, trusting the given authority.
func (a authority) issue(t *testing.T, dir, node string, trusts authority, opts ...certOption) Files {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<60))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: node}, URIs: []*url.URL{spiffe.NodeURI(node)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	for _, o := range opts {
		o(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	f := Files{Cert: filepath.Join(dir, node+".crt"), Key: filepath.Join(dir, node+".key"), CA: filepath.Join(dir, node+".ca")}
	writePEM(t, f.Cert, "CERTIFICATE", der)
	writePEM(t, f.Key, "EC PRIVATE KEY", keyDER)
	writePEM(t, f.CA, "CERTIFICATE", trusts.cert.Raw)
	return f
}

// writePEM replaces the file as a whole, as the kubelet does.
func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	tmp := path + ".new"
	if err := os.WriteFile(tmp, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, path); err != nil {
		t.Fatal(err)
	}
}

func credentialsOf(t *testing.T, node string, f Files) *Credentials {
	t.Helper()
	c, err := NewCredentials(node, f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type service struct {
	peerpb.UnimplementedPeerServer
	panics bool
}

func (s service) Prepare(_ context.Context, r *peerpb.PrepareRequest) (*peerpb.PrepareReply, error) {
	if s.panics {
		panic("as told")
	}
	return &peerpb.PrepareReply{Accepted: true, Message: r.GetInterfaces()[0].GetName()}, nil
}

func (service) Commit(context.Context, *peerpb.CommitRequest) (*peerpb.CommitReply, error) {
	return &peerpb.CommitReply{}, nil
}

// recorder allows everything but what its error says.
type recorder struct {
	mu    sync.Mutex
	calls []string
	err   error
}

func (r *recorder) Authorize(_ context.Context, caller string, m Method, mig *peerpb.Migration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, caller+" "+string(m)+" "+mig.GetUid())
	return r.err
}

func serve(t *testing.T, creds *Credentials, auth Authorizer, impl peerpb.PeerServer) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer(impl, auth, creds, slog.New(slog.DiscardHandler)).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return l.Addr().String()
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var migration = &peerpb.Migration{Namespace: "ns", Name: "m", Uid: "u"}

func prepare() *peerpb.PrepareRequest {
	return &peerpb.PrepareRequest{Migration: migration, Interfaces: []*controlpb.SourceInterface{{Name: "blue"}}}
}

func connect(t *testing.T, c *Client, node, address string) *Conn {
	t.Helper()
	conn, err := c.Connect(node, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

func TestCall(t *testing.T) {
	ca, dir := newAuthority(t), t.TempDir()
	auth := &recorder{}
	addr := serve(t, credentialsOf(t, "b", ca.issue(t, dir, "b", ca)), auth, service{})
	client := NewClient(credentialsOf(t, "a", ca.issue(t, dir, "a", ca)))
	c := connect(t, client, "b", addr)
	if err := c.WaitReady(bounded(t)); err != nil {
		t.Fatal(err)
	}
	r, err := c.Prepare(bounded(t), prepare())
	if err != nil || !r.GetAccepted() || r.GetMessage() != "blue" {
		t.Fatalf("Prepare: %v, %v", r, err)
	}
	if _, err := c.Commit(bounded(t), &peerpb.CommitRequest{Migration: migration}); err != nil {
		t.Fatal(err)
	}
	if len(auth.calls) != 2 || auth.calls[0] != "a Prepare u" || auth.calls[1] != "a Commit u" {
		t.Errorf("authorised calls: %q", auth.calls)
	}
}

func TestConnectionsAreShared(t *testing.T) {
	ca, dir := newAuthority(t), t.TempDir()
	addr := serve(t, credentialsOf(t, "b", ca.issue(t, dir, "b", ca)), &recorder{}, service{})
	client := NewClient(credentialsOf(t, "a", ca.issue(t, dir, "a", ca)))
	one, two := connect(t, client, "b", addr), connect(t, client, "b", addr)
	if one.shared != two.shared {
		t.Error("two connections to one agent")
	}
	one.Close()
	one.Close()
	if err := two.WaitReady(bounded(t)); err != nil {
		t.Errorf("closing one share closed the other: %v", err)
	}
	two.Close()
	if err := two.WaitReady(bounded(t)); err == nil {
		t.Error("the last share did not close the connection")
	}
	if len(client.conns) != 0 {
		t.Error("a closed connection is kept")
	}
	if _, err := client.Connect("b", ""); err == nil {
		t.Error("connected to no address")
	}
}

func TestRefusals(t *testing.T) {
	ca, foreign := newAuthority(t), newAuthority(t)
	tests := []struct {
		name           string
		server, client func(t *testing.T, dir string) Files
		expect         string
		auth           error
		request        *peerpb.PrepareRequest
		code           codes.Code
		message        string
	}{
		{name: "client of a foreign CA", client: func(t *testing.T, d string) Files { return foreign.issue(t, d, "a", ca) },
			code: codes.Unavailable},
		{name: "expired client", client: func(t *testing.T, d string) Files { return ca.issue(t, d, "a", ca, expired) },
			code: codes.Unavailable},
		{name: "client certificate for something else", client: func(t *testing.T, d string) Files { return ca.issue(t, d, "a", ca, noUsage) },
			code: codes.Unavailable},
		{name: "server of a foreign CA", server: func(t *testing.T, d string) Files { return foreign.issue(t, d, "b", ca) },
			code: codes.Unavailable, message: "unknown authority"},
		{name: "expired server", server: func(t *testing.T, d string) Files { return ca.issue(t, d, "b", ca, expired) },
			code: codes.Unavailable, message: "expired"},
		{name: "server certificate for something else", server: func(t *testing.T, d string) Files { return ca.issue(t, d, "b", ca, noUsage) },
			code: codes.Unavailable, message: "incompatible key usage"},
		{name: "server is another node", expect: "c", code: codes.Unavailable, message: "the peer is the agent of node b, not of c"},
		{name: "not authorised", auth: errors.New("node a is not the source"), code: codes.PermissionDenied, message: "node a is not the source"},
		{name: "authoriser's own code", auth: status.Error(codes.FailedPrecondition, "late"), code: codes.FailedPrecondition, message: "late"},
		{name: "no migration named", request: &peerpb.PrepareRequest{}, code: codes.InvalidArgument},
		{name: "message too large", request: &peerpb.PrepareRequest{Migration: migration, Interfaces: []*controlpb.SourceInterface{{PciConfig: make([]byte, MaxMessage)}}},
			code: codes.ResourceExhausted},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			server, client := ca.issue(t, dir, "b", ca), ca.issue(t, dir, "a", ca)
			if tt.server != nil {
				server = tt.server(t, dir)
			}
			if tt.client != nil {
				client = tt.client(t, dir)
			}
			addr := serve(t, credentialsOf(t, "b", server), &recorder{err: tt.auth}, service{})
			if tt.expect == "" {
				tt.expect = "b"
			}
			if tt.request == nil {
				tt.request = prepare()
			}
			c := connect(t, NewClient(credentialsOf(t, "a", client)), tt.expect, addr)
			_, err := c.Prepare(bounded(t), tt.request)
			if status.Code(err) != tt.code || !strings.Contains(status.Convert(err).Message(), tt.message) {
				t.Errorf("got %v, want %v with %q", err, tt.code, tt.message)
			}
		})
	}
}

func TestPlainClientsAreRefused(t *testing.T) {
	ca, dir := newAuthority(t), t.TempDir()
	addr := serve(t, credentialsOf(t, "b", ca.issue(t, dir, "b", ca)), &recorder{}, service{})
	pair, _, err := credentialsOf(t, "a", ca.issue(t, dir, "a", ca)).current()
	if err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]*tls.Config{
		"no certificate": {InsecureSkipVerify: true, NextProtos: []string{"h2"}},
		"TLS 1.2":        {InsecureSkipVerify: true, NextProtos: []string{"h2"}, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*pair}},
	} {
		d := tls.Dialer{Config: cfg}
		conn, err := d.DialContext(bounded(t), "tcp", addr)
		if err != nil {
			continue // refused in the handshake
		}
		// With TLS 1.3 the client learns of the refusal when it reads.
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		_, err = conn.Read(make([]byte, 1))
		var op *net.OpError
		if !errors.As(err, &op) || op.Op != "remote error" {
			t.Errorf("%s: %v, want a TLS alert", name, err)
		}
		conn.Close()
	}
}

func TestPanicEndsItsCallOnly(t *testing.T) {
	ca, dir := newAuthority(t), t.TempDir()
	addr := serve(t, credentialsOf(t, "b", ca.issue(t, dir, "b", ca)), &recorder{}, service{panics: true})
	c := connect(t, NewClient(credentialsOf(t, "a", ca.issue(t, dir, "a", ca))), "b", addr)
	if _, err := c.Prepare(bounded(t), prepare()); status.Code(err) != codes.Internal {
		t.Errorf("Prepare: %v", err)
	}
	if _, err := c.Commit(bounded(t), &peerpb.CommitRequest{Migration: migration}); err != nil {
		t.Errorf("Commit after a panic: %v", err)
	}
}

func TestFilesAreReadAgain(t *testing.T) {
	oldCA, newCA, dir := newAuthority(t), newAuthority(t), t.TempDir()
	serverFiles := oldCA.issue(t, dir, "b", oldCA)
	server := credentialsOf(t, "b", serverFiles)
	addr := serve(t, server, &recorder{}, service{})
	clientFiles := oldCA.issue(t, dir, "a", oldCA)
	clientCreds := credentialsOf(t, "a", clientFiles)
	open := connect(t, NewClient(clientCreds), "b", addr)
	if _, err := open.Prepare(bounded(t), prepare()); err != nil {
		t.Fatal(err)
	}

	// The server moves to another authority: an open connection of the old
	// one ends at its next call.
	newCA.issue(t, dir, "b", newCA)
	if _, err := open.Prepare(bounded(t), prepare()); status.Code(err) != codes.Unauthenticated {
		t.Errorf("call under the old authority: %v", err)
	}
	newCA.issue(t, dir, "a", newCA)
	fresh := connect(t, NewClient(clientCreds), "b", addr)
	if _, err := fresh.Prepare(bounded(t), prepare()); err != nil {
		t.Errorf("call under the new authority: %v", err)
	}

	// Broken files leave what was there, and are told.
	if err := os.WriteFile(serverFiles.Key, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := fresh.Prepare(bounded(t), prepare()); err != nil {
		t.Errorf("call with a broken key file: %v", err)
	}
	if err := server.Err(); err == nil || !strings.Contains(err.Error(), "TLS certificate") {
		t.Errorf("Err = %v", err)
	}
}

// TestTrustLostIsTold: a caller whose certificate ends, or loses its authority,
// while its connection is open is told of as one that connects with it.
func TestTrustLostIsTold(t *testing.T) {
	for name, tt := range map[string]struct {
		client certOption
		lose   func(t *testing.T, dir string)
		want   func(error) bool
	}{
		"it expires": {
			// Certificates count in seconds.
			client: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second) },
			lose:   func(*testing.T, string) {},
			want: func(err error) bool {
				var invalid x509.CertificateInvalidError
				return errors.As(err, &invalid) && invalid.Reason == x509.Expired
			},
		},
		"its authority is dropped": {
			client: func(*x509.Certificate) {},
			lose: func(t *testing.T, dir string) {
				other := newAuthority(t)
				other.issue(t, dir, "b", other)
			},
			want: func(err error) bool {
				var unknown x509.UnknownAuthorityError
				return errors.As(err, &unknown)
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ca, dir := newAuthority(t), t.TempDir()
			server := credentialsOf(t, "b", ca.issue(t, dir, "b", ca))
			type refusal struct {
				address string
				why     error
			}
			refused := make(chan refusal, 1)
			server.OnRefused(func(address string, why error) {
				select {
				case refused <- refusal{address, why}:
				default:
				}
			})
			auth := &recorder{}
			addr := serve(t, server, auth, service{})
			c := connect(t, NewClient(credentialsOf(t, "a", ca.issue(t, dir, "a", ca, tt.client))), "b", addr)
			if _, err := c.Prepare(bounded(t), prepare()); err != nil {
				t.Fatal(err)
			}
			tt.lose(t, dir)
			ctx := bounded(t)
			var err error
			for err == nil && ctx.Err() == nil {
				_, err = c.Prepare(ctx, prepare())
			}
			if status.Code(err) != codes.Unauthenticated {
				t.Errorf("the call ended with %v", err)
			}
			select {
			case got := <-refused:
				host, _, err := net.SplitHostPort(got.address)
				if err != nil || host != "127.0.0.1" || !tt.want(got.why) {
					t.Errorf("told of %q (%v): %v", got.address, err, got.why)
				}
			default:
				t.Error("nobody was told")
			}
		})
	}
}

func TestCredentialsAreChecked(t *testing.T) {
	ca := newAuthority(t)
	for name, tt := range map[string]struct {
		opts []certOption
		want string
	}{
		"another node's":   {[]certOption{uris("spiffe://compsc.io/node/b")}, "is that of node b, this is a"},
		"no URI":           {[]certOption{uris()}, "has 0 URI names"},
		"two URIs":         {[]certOption{uris("spiffe://compsc.io/node/a", "spiffe://compsc.io/node/b")}, "has 2 URI names"},
		"other domain":     {[]certOption{uris("spiffe://example.org/node/a")}, "is not of the form"},
		"other scheme":     {[]certOption{uris("https://compsc.io/node/a")}, "is not of the form"},
		"query":            {[]certOption{uris("spiffe://compsc.io/node/a?b")}, "is not of the form"},
		"deeper path":      {[]certOption{uris("spiffe://compsc.io/node/a/b")}, "is not of the form"},
		"no node":          {[]certOption{uris("spiffe://compsc.io/node/")}, "is not of the form"},
		"service account":  {[]certOption{uris("spiffe://compsc.io/ns/x/sa/y")}, "is not of the form"},
		"user information": {[]certOption{uris("spiffe://u@compsc.io/node/a")}, "is not of the form"},
	} {
		if _, err := NewCredentials("a", ca.issue(t, t.TempDir(), "a", ca, tt.opts...)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want an error containing %q", name, err, tt.want)
		}
	}
	f := ca.issue(t, t.TempDir(), "a", ca)
	f.CA = f.Key
	if _, err := NewCredentials("a", f); err == nil || !strings.Contains(err.Error(), "holds no certificate") {
		t.Errorf("CA file without certificate: %v", err)
	}
	f.CA = f.Key + ".none"
	if _, err := NewCredentials("a", f); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing CA file: %v", err)
	}
}

func TestMethodsAreComplete(t *testing.T) {
	sd := peerpb.File_agent_peer_peerpb_peer_proto.Services().ByName("Peer")
	for i := range sd.Methods().Len() {
		m := sd.Methods().Get(i)
		if methods["/"+string(sd.FullName())+"/"+string(m.Name())] != Method(m.Name()) {
			t.Errorf("method %s is not authorised by name", m.Name())
		}
		if m.Input().Fields().ByName("migration") == nil {
			t.Errorf("the request of %s names no migration", m.Name())
		}
	}
}
