//go:build e2edrivers

package drivers

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/stream"
	"compsc.io/compsc/e2e/wait"
)

// rig is a guest under traffic, and what it is to be like.
type rig struct {
	t     *testing.T
	ctx   context.Context // of the scenario
	h     *harness.Harness
	vm    *harness.VM
	trunk *trunk
	cores uint32
	want  *want

	streams []*checked
	hops    int
	token   uint64
}

// checked is a further stream.
type checked struct {
	name, peer string
	*stream.Stream
}

// boot starts a guest and its traffic.
func boot(t *testing.T, ctx context.Context, h *harness.Harness, k *trunk, cores uint32, trusted bool) *rig {
	t.Helper()
	progress(t, "a guest boots")
	check(t, h.CreateVM(ctx, harness.VMI, harness.MAC, memory, cores, false))
	vm, err := h.Attach(ctx, harness.VMI, h.Lab.GuestIP().Addr())
	check(t, err)
	r := &rig{t: t, ctx: ctx, h: h, vm: vm, trunk: k, cores: cores, token: rand.Uint64() >> 1}
	check(t, vm.StartTraffic(ctx))
	r.guest(ctx, func(ctx context.Context, c *proto.Client) error {
		info, err := c.Info(ctx)
		if err == nil {
			i := info.Interfaces[0]
			progress(t, "%s %s, kernel %s", i.Driver, i.PCI, info.Kernel)
			if i.Driver != "ixgbevf" {
				err = fmt.Errorf("the driver is %s", i.Driver)
			}
		}
		return err
	})
	r.want = newWant(trusted, r.settings(ctx))
	return r
}

// guest speaks to the guest and fails the test if that fails.
func (r *rig) guest(ctx context.Context, do func(context.Context, *proto.Client) error) {
	r.t.Helper()
	check(r.t, r.vm.Call(ctx, do))
}

// act has the guest do something.
func (r *rig) act(ctx context.Context, action proto.Action) {
	r.t.Helper()
	if err := r.vm.Call(ctx, func(ctx context.Context, c *proto.Client) error { return c.Run(ctx, action) }); err != nil {
		r.t.Fatalf("%+v: %v", action, err)
	}
}

func (r *rig) settings(ctx context.Context) (s proto.Settings) {
	r.t.Helper()
	r.guest(ctx, func(ctx context.Context, c *proto.Client) (err error) {
		s, err = c.Settings(ctx)
		return err
	})
	return s
}

// do tells what the guest is about to do.
func (r *rig) do(_ context.Context, format string, args ...any) { progress(r.t, format, args...) }

// openStream adds a checked stream to the address, on which packets have up
// to mtu bytes.
func (r *rig) openStream(ctx context.Context, name string, to netip.Addr, mtu int) {
	r.t.Helper()
	s, peer, err := openStream(ctx, r.h.Lab, to, mtu)
	check(r.t, err)
	r.streams = append(r.streams, &checked{name, peer, s})
	check(r.t, r.flow(ctx))
}

// closeStreams ends all streams but the one from the start, and fails unless
// every byte was right.
func (r *rig) closeStreams(ctx context.Context) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	for _, s := range r.streams {
		if st, err := s.Stop(ctx); err != nil || !st.Intact {
			r.t.Fatalf("%s stream: %+v: %v", s.name, st, err)
		}
	}
	r.streams = nil
}

// flow waits until each of the streams has moved on in both directions.
func (r *rig) flow(ctx context.Context) error {
	const enough = 64 << 10
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if err := r.vm.AwaitFlow(ctx); err != nil {
		return err
	}
	first := map[string]uint64{}
	for _, s := range r.streams {
		from := s.Stats().Received
		if err := wait.Until(ctx, "the "+s.name+" stream to move on", func(ctx context.Context) (bool, error) {
			st := s.Stats()
			if !st.Intact || st.Error != "" {
				return false, fmt.Errorf("it broke: %+v", st)
			}
			var there []proto.Stream
			if err := r.vm.Call(ctx, func(ctx context.Context, c *proto.Client) (err error) {
				there, err = c.Streams(ctx)
				return err
			}); err != nil {
				return false, err
			}
			i := slices.IndexFunc(there, func(p proto.Stream) bool { return p.Peer == s.peer })
			if i < 0 {
				return false, nil // not accepted yet
			}
			if !there[i].Intact || there[i].Error != "" {
				return false, fmt.Errorf("it broke in the guest: %+v", there[i])
			}
			if _, ok := first[s.peer]; !ok {
				first[s.peer] = there[i].Received
			}
			return st.Received >= from+enough && there[i].Received >= first[s.peer]+enough, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// stop ends the traffic.
func (r *rig) stop(ctx context.Context) {
	r.t.Helper()
	r.closeStreams(ctx)
	if st, err := r.vm.StopTraffic(ctx); err != nil || !st.Intact {
		r.t.Fatalf("the stream from the start: %+v: %v", st, err)
	}
}
