package harness

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/traffic"
)

const (
	guestMemory = 192 // MiB
	guestCores  = 2   // two queue pairs
	bootTimeout = 3 * time.Minute
	callTimeout = 20 * time.Second
)

// VM is a VM under load, with its traffic.
type VM struct {
	*traffic.Guest
	h    *Harness
	name string
}

// Health is what a guest tells of its driver.
type Health = traffic.Health

// newVM is the VM of a VMI whose guest has the address.
func (h *Harness) newVM(name string, ip netip.Addr) *VM {
	vm := &VM{h: h, name: name}
	vm.Guest = &traffic.Guest{Lab: h.Lab, IP: ip, Call: func(ctx context.Context, do func(context.Context, *proto.Client) error) error {
		return vm.withGuest(ctx, callTimeout, do)
	}}
	return vm
}

// Boot starts the VM and waits until its driver has a link.
func (h *Harness) Boot(ctx context.Context) (*VM, error) { return h.BootVM(ctx, VMI, MAC, 0) }

// BootVM starts one more VM, which has the n-th guest's address, and waits
// until its driver has a link.
func (h *Harness) BootVM(ctx context.Context, name, mac string, n int) (*VM, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	ip := h.Lab.GuestAddress(n)
	if err := h.createVM(ctx, name, mac, ip, guestMemory, guestCores, false); err != nil {
		return nil, err
	}
	vm := h.newVM(name, ip.Addr())
	return vm, vm.withGuest(ctx, bootTimeout, func(ctx context.Context, c *proto.Client) error {
		for {
			// Until the guest has opened its port it echoes.
			_, err := c.WaitUp(ctx, 1)
			if err == nil || ctx.Err() != nil {
				return err
			}
		}
	})
}

// Node is where the VM runs.
func (vm *VM) Node(ctx context.Context) (string, error) { return vm.h.nodeOf(ctx, vm.key()) }

func (vm *VM) key() client.ObjectKey { return client.ObjectKey{Namespace: Namespace, Name: vm.name} }

// NewMigration is a VFMigration of the VM to the node.
func (vm *VM) NewMigration(name, node string) *v1alpha1.VFMigration {
	m := NewMigration(name, node)
	m.Spec.VMIName = vm.name
	return m
}

// withGuest speaks to the guest where it runs now.
func (vm *VM) withGuest(ctx context.Context, bound time.Duration, do func(context.Context, *proto.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	path, err := vm.h.StandIn.AgentSocket(ctx, vm.key())
	if err != nil {
		return err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("guest: %w", err)
	}
	c := proto.NewClient(conn)
	defer c.Close()
	return do(ctx, c)
}
