//go:build e2enested

package nested

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/stream"
	"compsc.io/compsc/e2e/traffic"
)

const (
	uid = "11111111-2222-3333-4444-555555555555"
	// hold bounds the gates.
	hold = 10 * time.Second
	// rate is what the stream sends each way, in bytes per second; flow is
	// how many bytes each way prove that it is alive.
	rate, flow = 128 << 10, 64 << 10
	// migrationAddress is where the target's QEMU listens.
	migrationAddress = "tcp:127.0.0.1:49152"
)

// health asks the guest, whose one interface is the VF.
func (p *pod) health() (h traffic.Health) {
	p.Helper()
	p.guest(guestTimeout, func(ctx context.Context, c *proto.Client) (err error) {
		h, err = traffic.Ask(ctx, c)
		return err
	})
	return h
}

// TestNested moves a guest under traffic from a VF of one card to a VF of the
// other.
func TestNested(t *testing.T) {
	r := newRig(t)
	pfs := r.makeVFs()
	before := r.settings(pfs)

	source := r.startPod("source", handoff.RolePrimary, pfs[0].VFs[0].Address, 1)
	source.startQEMU(false)
	source.guest(bootTimeout, func(ctx context.Context, c *proto.Client) error {
		for {
			// Until the guest has opened its port it echoes.
			if _, err := c.WaitUp(ctx, 1); err == nil || ctx.Err() != nil {
				return err
			}
		}
	})
	source.guest(guestTimeout, func(ctx context.Context, c *proto.Client) error {
		info, err := c.Info(ctx)
		if i := info.Interfaces; err != nil || len(i) != 1 || i[0].Driver != family || i[0].MAC != guestMAC {
			return fmt.Errorf("the guest's interfaces are %+v (%v), want one with driver %s and MAC %s", i, err, family, guestMAC)
		}
		return nil
	})
	ping, s := r.load()
	r.flow(s)
	was := source.health()

	target := r.startPod("target", handoff.RoleTarget, pfs[1].VFs[0].Address, 2)
	r.migrate(source, target)
	r.flow(s)
	r.must(ping.Await(r.ctx, 5))
	here, err := s.Stop(r.ctx)
	r.must(err)
	is := target.health()
	if err := is.Undisturbed(was); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"rx_packets", "tx_packets", "rx_bytes", "tx_bytes"} {
		if is.Stats.Driver[name] <= was.Stats.Driver[name] {
			t.Errorf("counter %s was %d before the move and is %d with more traffic", name, was.Stats.Driver[name], is.Stats.Driver[name])
		}
	}
	if is.Interrupts() <= was.Interrupts() {
		t.Errorf("interrupts were %v before the move and are %v", was.Stats.Interrupts, is.Stats.Interrupts)
	}
	target.guest(guestTimeout, func(ctx context.Context, c *proto.Client) error { return traffic.CheckIntact(ctx, c, here) })
	target.end()
	r.restored(pfs, before)
}

// load starts pings and a stream to the guest.
func (r *rig) load() (*traffic.Pinger, *stream.Stream) {
	r.Helper()
	ip := r.lab.GuestIP().Addr()
	ping, err := traffic.Ping(r.lab, ip)
	r.must(err)
	r.Cleanup(func() { ping.Close() })
	r.must(ping.Await(r.ctx, 3))
	var conn net.Conn
	r.must(r.lab.Hub.Do(func() (err error) {
		conn, err = (&net.Dialer{Timeout: callTimeout}).DialContext(r.ctx, "tcp", net.JoinHostPort(ip.String(), fmt.Sprint(stream.Port)))
		return err
	}))
	return ping, stream.Run(context.WithoutCancel(r.ctx), conn, 4711, rate)
}

// flow waits until data has come through, both ways.
func (r *rig) flow(s *stream.Stream) {
	r.Helper()
	from := s.Stats()
	r.until("the stream to flow", func() bool {
		now := s.Stats()
		if now.Error != "" {
			r.Fatalf("the stream broke: %+v", now)
		}
		return now.Sent >= from.Sent+flow && now.Received >= from.Received+flow
	})
}

// migrate moves the VM. What it does of libvirt is in the order of libvirt,
// what it does of the agents in the order of theirs.
func (r *rig) migrate(source, target *pod) {
	r.Helper()
	bound := durationpb.New(hold)
	s := call(source, source.ctl.PrepareSource, &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: bound})
	d := call(target, target.ctl.PrepareTarget, &pb.PrepareTargetRequest{MigrationUid: uid, Interfaces: s.Interfaces, HoldTimeout: bound})
	if !d.Accepted {
		r.Fatalf("the target refuses: %s: %s", d.Reason, d.Message)
	}
	target.startQEMU(true)
	target.capabilities("events", "return-path", "late-block-activate")
	target.qmp("migrate-incoming", map[string]any{"uri": migrationAddress})
	source.capabilities("events", "return-path", "pause-before-switchover")
	source.qmp("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 40, "downtime-limit": 300})
	source.qmp("migrate", map[string]any{"uri": migrationAddress})

	agents := make(chan error, 1)
	go func() { agents <- r.switchOver(source, target, d.Epochs) }()
	if got := source.await("MIGRATION:pre-switchover", "MIGRATION:failed"); got == "MIGRATION:failed" {
		r.Fatal("QEMU could not migrate")
	}
	source.qmp("migrate-continue", map[string]any{"state": "pre-switchover"})
	for _, p := range []*pod{source, target} {
		if got := p.await("MIGRATION:completed", "MIGRATION:failed"); got == "MIGRATION:failed" {
			r.Fatalf("the migration failed at the %s", p.name)
		}
	}
	// Held by the gate until the target's VF has the state, which may take
	// longer than a command's answer may: RESUME tells that it was let go.
	start := make(chan error, 1)
	go func() { start <- target.monitor.Run(r.ctx, "cont", nil, nil) }()
	target.await("RESUME")
	r.must(<-start)
	r.must(<-agents)
	source.end()
}

// switchOver is what the agents do from the VM's stop to its start.
func (r *rig) switchOver(source, target *pod, epochs []*pb.InterfaceEpoch) error {
	ctx, cancel := context.WithTimeout(r.ctx, bootTimeout)
	defer cancel()
	c, err := source.ctl.AwaitCapture(ctx, &pb.AwaitCaptureRequest{MigrationUid: uid, Epochs: epochs})
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	a, err := target.ctl.AcceptState(ctx, &pb.AcceptStateRequest{
		MigrationUid: uid, States: c.States, VmStoppedFor: c.VmStoppedFor, DeviceStoppedFor: c.DeviceStoppedFor})
	if err != nil || !a.Accepted {
		return fmt.Errorf("state: %v: %w", a, err)
	}
	released, err := source.ctl.ReleaseSource(ctx, &pb.ReleaseSourceRequest{MigrationUid: uid})
	if err != nil {
		return fmt.Errorf("release: %w", err)
	}
	if _, err := target.ctl.AwaitStart(ctx, &pb.AwaitStartRequest{MigrationUid: uid}); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	if _, err := source.ctl.Relinquish(ctx, &pb.RelinquishRequest{MigrationUid: uid}); err != nil {
		return fmt.Errorf("relinquish: %w", err)
	}
	if err := r.host.Answer(ctx, source.vf, false); err != nil {
		return err
	}
	if err := r.host.Answer(ctx, target.vf, true); err != nil {
		return err
	}
	active, err := target.ctl.Activate(ctx, &pb.ActivateRequest{MigrationUid: uid})
	if err != nil {
		return fmt.Errorf("activate: %w", err)
	}
	for _, i := range active.Interfaces {
		if err := r.host.Announce(ctx, target.vf, i.Announcement); err != nil {
			return err
		}
	}
	running, err := target.ctl.AwaitRunning(ctx, &pb.AwaitRunningRequest{MigrationUid: uid})
	if err != nil {
		return fmt.Errorf("run: %w", err)
	}
	r.Logf("%d pages written by the device; restored: %v; VM stopped for %v, VF for %v", released.Pages[0].PagesMarked,
		active.Interfaces[0], running.VmStopped.AsDuration(), running.DeviceStopped.AsDuration())
	if released.Pages[0].PagesMarked == 0 || active.Interfaces[0].ReplayedOperations == 0 {
		return fmt.Errorf("no page was marked, or nothing replayed: %v, %v", released, active)
	}
	return nil
}
