package peer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"compsc.io/compsc/agent/peer/peerpb"
)

// Client holds one connection to each agent that somebody wants to talk to.
// Safe for concurrent use.
type Client struct {
	creds *Credentials

	mu    sync.Mutex
	conns map[key]*shared
}

type key struct{ node, address string }

type shared struct {
	conn  *grpc.ClientConn
	users int
	stop  context.CancelFunc
}

// NewClient returns a client that proves itself with creds.
func NewClient(creds *Credentials) *Client {
	return &Client{creds: creds, conns: map[key]*shared{}}
}

// Conn is somebody's share of the connection to one agent. Calls fail at once
// with code Unavailable while the agent cannot be reached; the connection is
// built up again in the background as long as anybody holds it.
type Conn struct {
	peerpb.PeerClient
	shared *shared
	once   sync.Once
	close  func()
}

// Connect returns a connection to the agent of node at address, host:port,
// and begins to build it up; it does not wait. The caller closes it.
func (c *Client) Connect(node, address string) (*Conn, error) {
	if node == "" || address == "" {
		return nil, errors.New("the peer's node or address is not known")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	k := key{node, address}
	s := c.conns[k]
	if s == nil {
		conn, err := grpc.NewClient("passthrough:///"+address,
			grpc.WithTransportCredentials(credentials.NewTLS(c.creds.clientConfig(node, address))),
			// No environment of the process decides where states go.
			grpc.WithNoProxy(),
			grpc.WithDisableServiceConfig(),
			// A connection that is held is kept up, so that the switchover
			// need not wait for a handshake.
			grpc.WithIdleTimeout(0),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
			grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 2 * time.Second, Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second}}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
		)
		if err != nil {
			return nil, fmt.Errorf("agent of node %s at %s: %w", node, address, err)
		}
		ctx, stop := context.WithCancel(context.Background())
		s = &shared{conn: conn, stop: stop}
		go keepUp(ctx, conn)
		c.conns[k] = s
	}
	s.users++
	return &Conn{PeerClient: peerpb.NewPeerClient(s.conn), shared: s, close: func() { c.release(k, s) }}, nil
}

// keepUp connects again whenever the connection was lost.
func keepUp(ctx context.Context, conn *grpc.ClientConn) {
	for {
		state := conn.GetState()
		if state == connectivity.Idle {
			conn.Connect()
		}
		if !conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// WaitReady waits until the peer's agent is connected and has proven its
// node, at most until ctx ends.
func (c *Conn) WaitReady(ctx context.Context) error {
	for {
		state := c.shared.conn.GetState()
		if state == connectivity.Ready {
			return nil
		}
		if state == connectivity.Shutdown {
			return errors.New("the connection was closed")
		}
		if !c.shared.conn.WaitForStateChange(ctx, state) {
			return fmt.Errorf("not connected: %w", ctx.Err())
		}
	}
}

// Close gives this share up; the last one closes the connection. It may be
// called more than once.
func (c *Conn) Close() { c.once.Do(c.close) }

func (c *Client) release(k key, s *shared) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.users--; s.users > 0 {
		return
	}
	delete(c.conns, k)
	s.stop()
	s.conn.Close()
}
