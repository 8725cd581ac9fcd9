package standin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
)

// running is the pod in which the VMI's VM runs now, and the VM.
func (s *StandIn) running(ctx context.Context, key client.ObjectKey) (*pod, *domain, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := s.client.Get(ctx, key, v); err != nil {
		return nil, nil, err
	}
	p, err := s.activePod(v)
	if err != nil {
		return nil, nil, err
	}
	d := p.activeDomain()
	if d == nil {
		return nil, nil, fmt.Errorf("VMI %s has no running VM", v.Name)
	}
	return p, d, nil
}

// DeviceStatus asks the device process of the VMI's VM, where it runs now.
func (s *StandIn) DeviceStatus(ctx context.Context, key client.ObjectKey) (*controlpb.StatusReply, error) {
	p, _, err := s.running(ctx, key)
	if err != nil {
		return nil, err
	}
	conn, err := dialDevice(p.deviceDir())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	r, err := controlpb.NewDeviceClient(conn).Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("device process of pod %s: %w", p.name, err)
	}
	return r, nil
}

// QEMUPID is the process of the VMI's VM, where it runs now.
func (s *StandIn) QEMUPID(ctx context.Context, key client.ObjectKey) (int, error) {
	_, d, err := s.running(ctx, key)
	if err != nil {
		return 0, err
	}
	return d.proc.PID(), nil
}

// Consoles is the end, at most n bytes each, of what firmware and guests
// printed on the first serial port, of all VMs that are known.
func (s *StandIn) Consoles(n int) (map[string]string, error) {
	s.mu.Lock()
	dirs := map[string]string{}
	for _, p := range s.pods {
		dirs[p.name] = p.dir
	}
	s.mu.Unlock()
	out := map[string]string{}
	var errs []error
	for name, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "domain", "console.log"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		out[name] = string(b[max(0, len(b)-n):])
	}
	return out, errors.Join(errs...)
}
