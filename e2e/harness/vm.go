package harness

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/stream"
	"compsc.io/compsc/e2e/traffic"
)

const (
	guestMemory = 192 // MiB
	guestCores  = 2   // two queue pairs
	bootTimeout = 3 * time.Minute
	callTimeout = 20 * time.Second
	// flowTimeout bounds the wait for traffic to flow after a stop: a sender
	// whose segments were lost tries again when as much time has passed as
	// since the first loss (RFC 6298, 5.5), whatever arrives from the other end.
	flowTimeout = time.Minute
	// streamRate is in bytes per second, each way.
	streamRate = 2 << 20
	// flow is how many bytes each way prove that the stream is alive.
	flow = 256 << 10
)

// VM is a VM under load, with its traffic.
type VM struct {
	h    *Harness
	name string
	ip   netip.Addr

	Pinger *traffic.Pinger
	Stream *stream.Stream
	// before are the resets and losses of link that the guest had seen when
	// its traffic began.
	before Health
}

// Health is what a guest tells of its driver.
type Health struct {
	// Resets counts messages of the driver about resets, hangs and links.
	Resets uint64
	// Lines are the last of these messages.
	Lines []string
	// CarrierDowns counts losses of the link.
	CarrierDowns uint64
	// Stats are the interface's counters.
	Stats proto.Stats
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
	vm := &VM{h: h, name: name, ip: ip.Addr()}
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

// Guest calls do with a client of the guest.
func (vm *VM) Guest(ctx context.Context, do func(context.Context, *proto.Client) error) error {
	return vm.withGuest(ctx, callTimeout, do)
}

// Health asks the guest.
func (vm *VM) Health(ctx context.Context) (Health, error) {
	var x Health
	err := vm.Guest(ctx, func(ctx context.Context, c *proto.Client) error {
		r, err := c.Resets(ctx)
		if err != nil {
			return err
		}
		x.Resets, x.Lines = r.Count, r.Lines
		info, err := c.Info(ctx)
		if err != nil {
			return err
		}
		stats, err := c.Stats(ctx)
		if err != nil {
			return err
		}
		if len(info.Interfaces) != 1 || len(stats) != 1 {
			return fmt.Errorf("the guest has %d interfaces, want 1", len(info.Interfaces))
		}
		x.CarrierDowns, x.Stats = info.Interfaces[0].CarrierDowns, stats[0]
		return nil
	})
	return x, err
}

// StartTraffic begins a ping and a checked stream, and waits until both flow.
func (vm *VM) StartTraffic(ctx context.Context) (err error) {
	if vm.before, err = vm.Health(ctx); err != nil {
		return err
	}
	if vm.Pinger, err = traffic.Ping(vm.h.Lab, vm.ip); err != nil {
		return err
	}
	if vm.Stream, err = traffic.OpenStream(context.WithoutCancel(ctx), vm.h.Lab, vm.ip, uint64(time.Now().UnixNano()), streamRate); err != nil {
		return err
	}
	return vm.AwaitFlow(ctx)
}

// Rebase takes what the guest's driver went through up to now for the test's
// own doing: CheckUndisturbed looks at what comes after.
func (vm *VM) Rebase(ctx context.Context) (err error) {
	vm.before, err = vm.Health(ctx)
	return err
}

// AwaitFlow waits until pings are answered and the stream moves on: the
// guest's VF works in both directions.
func (vm *VM) AwaitFlow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, flowTimeout)
	defer cancel()
	if err := vm.Pinger.Await(ctx, 10); err != nil {
		return err
	}
	if err := traffic.AwaitProgress(ctx, vm.Stream, flow); err != nil {
		return err
	}
	return vm.awaitGuestProgress(ctx)
}

// awaitGuestProgress waits until the guest has received more of the stream,
// which is the first that it was asked for.
func (vm *VM) awaitGuestProgress(ctx context.Context) error {
	var from uint64
	first := true
	return Until(ctx, "the stream to the guest to move on", func(ctx context.Context) (bool, error) {
		streams, err := vm.guestStreams(ctx)
		if err != nil {
			return false, err
		}
		if len(streams) == 0 {
			return false, errors.New("the guest has no stream")
		}
		if first {
			from, first = streams[0].Received, false
		}
		return streams[0].Received >= from+flow, nil
	})
}

// StopTraffic ends the ping and the stream, and tells whether every byte
// that either end received was the right one.
func (vm *VM) StopTraffic(ctx context.Context) (stream.Stats, error) {
	// The end of a stream comes behind what was lost of it.
	if err := vm.AwaitFlow(ctx); err != nil {
		return vm.Stream.Stats(), errors.Join(err, vm.Pinger.Close())
	}
	stop, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	st, err := vm.Stream.Stop(stop)
	if err != nil {
		err = fmt.Errorf("%w; the hub's end: %+v", err, st)
	}
	guest, gerr := vm.guestStreams(ctx)
	if err != nil {
		err = fmt.Errorf("%w; the guest's ends: %+v", err, guest)
	}
	return st, errors.Join(err, gerr, vm.Pinger.Close())
}

// guestStreams returns the guest's ends of the streams, with an error if one
// of them received a wrong byte.
func (vm *VM) guestStreams(ctx context.Context) (streams []proto.Stream, err error) {
	err = vm.Guest(ctx, func(ctx context.Context, c *proto.Client) (err error) {
		if streams, err = c.Streams(ctx); err != nil {
			return err
		}
		for _, s := range streams {
			if !s.Intact {
				return fmt.Errorf("the guest received a wrong byte from %s at offset %d", s.Peer, s.FirstBad)
			}
		}
		return nil
	})
	return streams, err
}

// CheckUndisturbed fails if the driver was reset, the link went, or the
// stream broke since the traffic began, or if they do not flow now.
func (vm *VM) CheckUndisturbed(ctx context.Context) (Health, error) {
	if err := vm.AwaitFlow(ctx); err != nil {
		return Health{}, err
	}
	now, err := vm.Health(ctx)
	if err != nil {
		return now, err
	}
	if n := now.Resets - vm.before.Resets; n != 0 {
		return now, fmt.Errorf("the guest's driver was reset %d times: %q", n, now.Lines)
	}
	if n := now.CarrierDowns - vm.before.CarrierDowns; n != 0 {
		return now, fmt.Errorf("the guest's link went down %d times", n)
	}
	return now, nil
}
