package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/wait"
)

// Attach speaks to the Linux guest of a VM that was not made by Boot, once its
// driver has a link. The VM has one VF, and ip is its address.
func (h *Harness) Attach(ctx context.Context, name string, ip netip.Addr) (*VM, error) {
	vm := h.newVM(name, ip)
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	var last error
	err := wait.Until(ctx, "the guest of VMI "+name+" to have a link", func(ctx context.Context) (bool, error) {
		// Until the guest has opened its port it echoes.
		last = vm.Call(ctx, func(ctx context.Context, c *proto.Client) error {
			_, err := c.WaitUp(ctx, 1)
			return err
		})
		return last == nil, nil
	})
	if err != nil {
		return nil, errors.Join(err, last)
	}
	return vm, nil
}

// RAMHolds tells whether the RAM of the VMI's VM holds the bytes, in one
// piece. The VM may run.
func (h *Harness) RAMHolds(ctx context.Context, name string, want []byte) (bool, error) {
	pid, err := h.StandIn.QEMUPID(ctx, client.ObjectKey{Namespace: Namespace, Name: name})
	if err != nil {
		return false, err
	}
	f, err := openRAM(pid)
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	ram, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, fmt.Errorf("RAM of process %d: %w", pid, err)
	}
	return bytes.Contains(ram, want), unix.Munmap(ram)
}
