package device

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// readyTimeout bounds Ready; a kubelet's probe has a second by default.
const readyTimeout = 800 * time.Millisecond

// Ready asks the device process whose sockets are in dir, and returns nil when
// it serves ReadyService. The error says what it is not ready for, or that it
// does not answer.
func Ready(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	path := filepath.Join(dir, ControlSocket)
	conn, err := grpc.NewClient("passthrough:///device",
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(), grpc.WithAuthority("localhost"),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	r, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: ReadyService})
	if err != nil {
		return fmt.Errorf("device process at %s: %w", path, err)
	}
	if s := r.GetStatus(); s != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("device process at %s: %s", path, s)
	}
	return nil
}
