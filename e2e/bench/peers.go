package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"time"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/e2e/pki"
)

// peers are two agents' ends of the channel between nodes: gRPC with mutual TLS
// on the loopback interface.
type peers struct {
	conn   *peer.Conn
	inbox  *inbox
	cancel context.CancelFunc
	served chan error
}

// inbox is what of a target's agent takes states.
type inbox struct {
	peerpb.UnimplementedPeerServer
	state []byte
}

// Deliver keeps the state. One call is under way at a time.
func (i *inbox) Deliver(_ context.Context, r *peerpb.DeliverRequest) (*peerpb.DeliverReply, error) {
	i.state = r.GetStates()[0].GetState()
	return &peerpb.DeliverReply{Accepted: true}, nil
}

// anyone lets every agent call.
type anyone struct{}

func (anyone) Authorize(context.Context, string, peer.Method, *peerpb.Migration) error { return nil }

func connectPeers(ctx context.Context, dir string) (*peers, error) {
	authority, err := pki.New()
	if err != nil {
		return nil, err
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	credentials := func(node string) (*peer.Credentials, error) {
		f, err := authority.Issue(filepath.Join(dir, node), node, loopback)
		if err != nil {
			return nil, err
		}
		return peer.NewCredentials(node, peer.Files{Cert: f.Cert, Key: f.Key, CA: f.CA})
	}
	source, err := credentials("source")
	if err != nil {
		return nil, err
	}
	target, err := credentials("target")
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", netip.AddrPortFrom(loopback, 0).String())
	if err != nil {
		return nil, err
	}
	p := &peers{inbox: &inbox{}, served: make(chan error, 1)}
	ctx, p.cancel = context.WithCancel(ctx)
	server := peer.NewServer(p.inbox, anyone{}, target, slog.New(slog.DiscardHandler))
	go func() { p.served <- server.Serve(ctx, l) }()
	if p.conn, err = peer.NewClient(source).Connect("target", l.Addr().String()); err != nil {
		p.cancel()
		<-p.served
		return nil, err
	}
	ready, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := p.conn.WaitReady(ready); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// deliver sends a state and returns it as it arrived, once the answer is there.
func (p *peers) deliver(ctx context.Context, state []byte) ([]byte, error) {
	reply, err := p.conn.Deliver(ctx, &peerpb.DeliverRequest{
		Migration: &peerpb.Migration{Namespace: "default", Name: "bench", Uid: "7f0f3c52-6a3b-4a5e-9e0e-1d9f8c1b2a3d"},
		States:    []*controlpb.InterfaceState{{Name: interfaceName, State: state, Epoch: 1}},
	})
	if err != nil {
		return nil, err
	}
	if !reply.GetAccepted() {
		return nil, fmt.Errorf("not accepted: %s", reply.GetMessage())
	}
	return p.inbox.state, nil
}

func (p *peers) close() {
	p.conn.Close()
	p.cancel()
	<-p.served
}
