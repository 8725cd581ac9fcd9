package device

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/protocol"
)

// listen creates a socket that only the owner may connect to, in place of one
// that an earlier process may have left. It appears at once in its final form:
// who finds it is let in, and need not try again. The kernel goes on calling it
// "new-" and its name (/proc/net/unix).
func listen(dir, name string) (*net.UnixListener, error) {
	path, temporary := filepath.Join(dir, name), filepath.Join(dir, "new-"+name)
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("stale socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // what an ended process leaves refuses connections
	if err = os.Chmod(temporary, 0o600); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), l.Close())
	}
	return l, nil
}

// serveControl serves the control and health services until ctx ends.
func (p *process) serveControl(ctx context.Context, l net.Listener) error {
	s := grpc.NewServer(grpc.MaxRecvMsgSize(4 << 20))
	pb.RegisterDeviceServer(s, p)
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	go p.reportHealth(ctx, h)
	defer context.AfterFunc(ctx, s.Stop)()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("control socket: %w", err)
	}
	return nil
}

// reportHealth keeps the health service at what the phase says.
func (p *process) reportHealth(ctx context.Context, h *health.Server) {
	last := pb.Phase(-1)
	for {
		err := p.await(ctx, func() (bool, error) {
			changed := p.phase != last
			last = p.phase
			return changed, nil
		})
		if err != nil {
			return
		}
		s := healthpb.HealthCheckResponse_SERVING
		switch last {
		case pb.Phase_PHASE_UNATTACHED, pb.Phase_PHASE_TARGET_SILENT, pb.Phase_PHASE_CANCELLED:
			s = healthpb.HealthCheckResponse_NOT_SERVING
		}
		h.SetServingStatus(ReadyService, s)
	}
}

// Status implements the control service.
func (p *process) Status(context.Context, *pb.StatusRequest) (*pb.StatusReply, error) {
	r := &pb.StatusReply{Protocols: &pb.Protocols{Oldest: protocol.Oldest, Newest: protocol.Newest}}
	p.get(func() {
		r.Role, r.Phase, r.MigrationUid, r.LastError = p.role, p.phase, p.uid, p.lastError
	})
	r.QemuConnected = len(p.interfaces()) > 0
	for _, i := range p.interfaces() {
		s := &pb.InterfaceStatus{Name: i.cfg.Name}
		if vf := i.get(); vf != nil {
			s.Vf, s.Mac, s.Epoch = vf.handoff.VF, vf.handoff.MAC, vf.handoff.Epoch
			s.GuestResets, s.Lost = vf.engine.GuestResets(), i.lost.Load()
			s.FastPath, s.Immovable = vf.handoff.FastPath, vf.immovable()
		}
		r.Interfaces = append(r.Interfaces, s)
		r.QemuConnected = r.QemuConnected && i.server.Connected()
	}
	return r, nil
}

// rpcError gives a context's end its gRPC code.
func rpcError(err error) error {
	switch {
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	}
	return err
}

func step(name string, since time.Time) *pb.Step {
	return &pb.Step{Name: name, Took: durationpb.New(time.Since(since))}
}
