package standin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/types"
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

// Register reads a dword in BAR0 of the VMI's VF, the only one of its kind that
// the VM has, where the VM runs now: through QEMU, as its guest would.
func (s *StandIn) Register(ctx context.Context, key client.ObjectKey, vendor, device uint16, offset uint32) (uint32, error) {
	_, d, err := s.running(ctx, key)
	if err != nil {
		return 0, err
	}
	var buses []struct {
		Devices []struct {
			ID      struct{ Vendor, Device uint16 }
			Regions []struct {
				BAR     int
				Address int64
			}
		}
	}
	if err := d.monitor.run(ctx, "query-pci", nil, &buses); err != nil {
		return 0, err
	}
	for _, b := range buses {
		for _, f := range b.Devices {
			if f.ID.Vendor != vendor || f.ID.Device != device {
				continue
			}
			for _, r := range f.Regions {
				if r.BAR == 0 && r.Address > 0 {
					return d.monitor.dword(ctx, uint64(r.Address)+uint64(offset))
				}
			}
			return 0, fmt.Errorf("BAR0 of the VM's %04x:%04x has no address", vendor, device)
		}
	}
	return 0, fmt.Errorf("VMI %s has no %04x:%04x", key.Name, vendor, device)
}

// dword reads what is at a guest-physical address.
func (m *monitor) dword(ctx context.Context, addr uint64) (value uint32, err error) {
	var out string
	args := map[string]string{"command-line": fmt.Sprintf("xp /1xw %#x", addr)}
	if err := m.run(ctx, "human-monitor-command", args, &out); err != nil {
		return 0, err
	}
	_, text, _ := strings.Cut(strings.TrimSpace(out), ": ")
	if _, err := fmt.Sscanf(text, "0x%x", &value); err != nil {
		return 0, fmt.Errorf("QEMU's xp says %q: %w", out, err)
	}
	return value, nil
}

// QEMUPID is the process of the VMI's VM, where it runs now.
func (s *StandIn) QEMUPID(ctx context.Context, key client.ObjectKey) (int, error) {
	_, d, err := s.running(ctx, key)
	if err != nil {
		return 0, err
	}
	return d.compute.pid()
}

// Consoles is the end, at most n bytes each, of what firmware and guests
// printed on the first serial port, of all VMs that are known.
func (s *StandIn) Consoles(n int) (map[string]string, error) {
	s.mu.Lock()
	logs := map[string]string{}
	for _, p := range s.pods {
		logs[p.name] = p.compute.console(p)
	}
	s.mu.Unlock()
	out := map[string]string{}
	var errs []error
	for name, file := range logs {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		out[name] = string(b[max(0, len(b)-n):])
	}
	return out, errors.Join(errs...)
}

// GateConnections is how many connections a pod's device process has at its
// gate.
func (s *StandIn) GateConnections(pod types.UID) (int, error) {
	p := s.podOf(pod)
	if p == nil {
		return 0, fmt.Errorf("no pod %s runs", pod)
	}
	proc := fmt.Sprintf("/proc/%d", p.currentSidecar().PID())
	fds, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		return 0, err
	}
	own := map[string]bool{}
	for _, fd := range fds {
		// It may have been closed meanwhile.
		link, _ := os.Readlink(filepath.Join(proc, "fd", fd.Name()))
		if inode, ok := strings.CutPrefix(link, "socket:["); ok {
			own[strings.TrimSuffix(inode, "]")] = true
		}
	}
	table, err := os.ReadFile(filepath.Join(proc, "net/unix"))
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(string(table)) {
		// Num, RefCount, Protocol, Flags, Type, St, Inode, Path (proc(5)); 03 is
		// connected, and an accepted socket has the path that the listening one was
		// made with.
		f := strings.Fields(line)
		if len(f) == 8 && f[5] == "03" && own[f[6]] && filepath.Base(f[7]) == "new-gate.sock" {
			n++
		}
	}
	return n, nil
}
