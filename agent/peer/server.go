package peer

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"compsc.io/compsc/agent/peer/peerpb"
)

const (
	// MaxMessage bounds a message of the channel, in bytes. A VF's state has
	// a few KiB, a VM eight VFs at most.
	MaxMessage = 1 << 20
	// keepaliveTime is how long a connection is silent before its client
	// asks whether the peer is there, keepaliveTimeout how long it waits.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 3 * time.Second
	// maxStreams bounds the calls under way on one connection.
	maxStreams = 64
	// callTimeout bounds a call whose caller set no deadline.
	callTimeout = 30 * time.Second
)

// Method is a call of the peer service.
type Method string

// Methods.
const (
	MethodPrepare  Method = "Prepare"
	MethodDeliver  Method = "Deliver"
	MethodCommit   Method = "Commit"
	MethodWithdraw Method = "Withdraw"
)

var methods = map[string]Method{
	peerpb.Peer_Prepare_FullMethodName:  MethodPrepare,
	peerpb.Peer_Deliver_FullMethodName:  MethodDeliver,
	peerpb.Peer_Commit_FullMethodName:   MethodCommit,
	peerpb.Peer_Withdraw_FullMethodName: MethodWithdraw,
}

// FromTarget tells whether the target calls the source with this method; all
// others go the other way.
func (m Method) FromTarget() bool { return m == MethodCommit }

// Authorizer decides about calls. It must be safe for concurrent use.
type Authorizer interface {
	// Authorize returns nil when the agent of node caller may call this
	// method here for this migration. An error with a gRPC status code goes
	// to the caller as it is, any other as PermissionDenied.
	Authorize(ctx context.Context, caller string, method Method, migration *peerpb.Migration) error
}

// Server serves the agents of other nodes.
type Server struct {
	grpc  *grpc.Server
	creds *Credentials
	auth  Authorizer
	log   *slog.Logger
}

// NewServer returns a server that answers with impl what auth allows. A
// handler's context carries the caller's deadline, or one of 30 s.
func NewServer(impl peerpb.PeerServer, auth Authorizer, creds *Credentials, log *slog.Logger) *Server {
	s := &Server{creds: creds, auth: auth, log: log}
	s.grpc = grpc.NewServer(
		grpc.Creds(credentials.NewTLS(creds.serverConfig())),
		grpc.UnaryInterceptor(s.intercept),
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(10*time.Second),
		grpc.MaxHeaderListSize(16<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: 10 * time.Minute, Time: time.Minute, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
	)
	peerpb.RegisterPeerServer(s.grpc, impl)
	return s
}

// Serve accepts connections on l until ctx ends, then closes l, lets calls
// under way finish for at most 5 s, and returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		kill := time.AfterFunc(5*time.Second, s.grpc.Stop)
		defer kill.Stop()
		s.grpc.GracefulStop()
	})
	err := s.grpc.Serve(l)
	if stop() {
		s.grpc.Stop()
		return fmt.Errorf("peer server: %w", err)
	}
	<-stopped
	return nil
}

// intercept verifies the caller anew at each call, so that a certificate that
// expired, or whose authority is no longer trusted, ends with the connection
// still open.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (reply any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a peer call", "method", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	method, ok := methods[info.FullMethod]
	named, isNamed := req.(interface{ GetMigration() *peerpb.Migration })
	if !ok || !isNamed {
		return nil, status.Errorf(codes.Unimplemented, "no method %s", info.FullMethod)
	}
	caller, err := s.caller(ctx)
	if err != nil {
		// Told as a refused connection is: the caller only sees that it failed.
		return nil, status.Error(codes.Unauthenticated, s.creds.refuse(addressOf(ctx), err).Error())
	}
	m := named.GetMigration()
	if m.GetNamespace() == "" || m.GetName() == "" || m.GetUid() == "" {
		return nil, status.Error(codes.InvalidArgument, "the request names no migration")
	}
	if _, has := ctx.Deadline(); !has {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	if err := s.auth.Authorize(ctx, caller, method, m); err != nil {
		s.log.Warn("peer call refused", "caller", caller, "method", method, "migration", m.GetNamespace()+"/"+m.GetName(), "error", err)
		if _, has := status.FromError(err); has {
			return nil, err
		}
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	return handler(ctx, req)
}

// addressOf is where the call comes from.
func addressOf(ctx context.Context) string {
	if p, ok := grpcpeer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return "an unknown address"
}

func (s *Server) caller(ctx context.Context) (string, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return "", fmt.Errorf("the caller is unknown")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return "", fmt.Errorf("the caller did not use TLS")
	}
	return s.creds.verify(info.State.PeerCertificates, x509.ExtKeyUsageClientAuth)
}
