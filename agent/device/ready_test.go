package device

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func TestReady(t *testing.T) {
	dir := t.TempDir()
	if err := Ready(t.Context(), dir); err == nil || !strings.Contains(err.Error(), ControlSocket) {
		t.Errorf("without a device process: %v", err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, ControlSocket))
	if err != nil {
		t.Fatal(err)
	}
	s, h := grpc.NewServer(), health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	if err := Ready(t.Context(), dir); err == nil {
		t.Error("ready without its service")
	}
	h.SetServingStatus(ReadyService, healthpb.HealthCheckResponse_NOT_SERVING)
	if err := Ready(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "NOT_SERVING") {
		t.Errorf("not prepared: %v", err)
	}
	h.SetServingStatus(ReadyService, healthpb.HealthCheckResponse_SERVING)
	if err := Ready(t.Context(), dir); err != nil {
		t.Error(err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Ready(over, dir); err == nil {
		t.Error("ready after the caller gave up")
	}
}
