package device

import (
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/e2e/nbd"
)

const uid = "11111111-2222-3333-4444-555555555555"

// pair is a migration's two sides; the test plays both agents.
type pair struct {
	*testing.T
	src, dst *node
	epochs   []*pb.InterfaceEpoch
}

// newPair boots a guest on the source, with traffic, and starts a target.
func newPair(t *testing.T, change func(*Options, *handoff.Handoff)) *pair {
	t.Helper()
	return newPairOf(t, nil, change)
}

// newPairOf is newPair with a source that is changed, too.
func newPairOf(t *testing.T, source, change func(*Options, *handoff.Handoff)) *pair {
	t.Helper()
	p := &pair{T: t, src: startNode(t, handoff.RolePrimary, 3, source)}
	p.src.wantPhase(pb.Phase_PHASE_RUNNING)
	p.src.startQEMU("running")
	p.src.boot()
	want := p.src.transmit(0)
	if got := p.src.recv(); !bytes.Equal(got, want) {
		t.Fatalf("on the wire: %x, want %x", got, want)
	}
	p.src.send(frame(guestMAC, "02:00:00:00:00:01", 0xa0))
	p.src.received(0)
	p.dst = startNode(t, handoff.RoleTarget, 8, change)
	p.dst.wantPhase(pb.Phase_PHASE_TARGET_SILENT)
	return p
}

func (p *pair) prepare() *pb.PrepareTargetReply {
	p.Helper()
	hold := durationpb.New(2 * time.Second)
	s, err := p.src.ctl.PrepareSource(p.Context(), &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: hold})
	p.src.must(err)
	d, err := p.dst.ctl.PrepareTarget(p.Context(), &pb.PrepareTargetRequest{MigrationUid: uid, Interfaces: s.Interfaces, HoldTimeout: hold})
	p.dst.must(err)
	p.epochs = d.Epochs
	return d
}

// precopy is what happens until QEMU stops the VM on the source.
func (p *pair) precopy() {
	p.Helper()
	if d := p.prepare(); !d.Accepted {
		p.Fatalf("target refuses: %s: %s", d.Reason, d.Message)
	}
	p.dst.startQEMU("inmigrate")
	p.src.mon.event("MIGRATION", "active")
	eventually(p.T, "armed QEMU", func() bool { return p.dst.config(cfgMSIX, 4)>>16 == 0x8002 })
	eventually(p.T, "migration noticed", func() bool { return p.src.log.has("active") })
}

func (p *pair) capture() *pb.AwaitCaptureReply {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), testTime)
	defer cancel()
	c, err := p.src.ctl.AwaitCapture(ctx, &pb.AwaitCaptureRequest{MigrationUid: uid, Epochs: p.epochs})
	p.src.must(err)
	return c
}

func (p *pair) deliver(c *pb.AwaitCaptureReply) *pb.AcceptStateReply {
	p.Helper()
	a, err := p.dst.ctl.AcceptState(p.Context(), &pb.AcceptStateRequest{
		MigrationUid: uid, States: c.States, VmStoppedFor: c.VmStoppedFor, DeviceStoppedFor: c.DeviceStoppedFor,
	})
	p.dst.must(err)
	return a
}

// copyRAM is QEMU's migration of memory.
func (p *pair) copyRAM() {
	copy(p.dst.ram, p.src.ram)
}

func TestMigration(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Options, *handoff.Handoff)
		heads  string
	}{
		"heads can be written": {nil, "write-verify"},
		"receive heads cannot be written": {func(_ *Options, h *handoff.Handoff) { h.Model.ReadOnlyRXHead = true },
			"rx=shadow-ring,tx=write-verify"},
		"transmit heads cannot be written": {func(_ *Options, h *handoff.Handoff) { h.Model.ReadOnlyTXHead = true },
			"rx=write-verify,tx=dummy-advance"},
	} {
		t.Run(name, func(t *testing.T) { testMigration(t, c.change, c.heads) })
	}
}

func testMigration(t *testing.T, change func(*Options, *handoff.Handoff), heads string) {
	p := newPair(t, change)
	p.precopy()

	// While pre-copy runs, the guest goes on.
	p.src.transmit(1)
	p.src.recv()
	in := frame(guestMAC, "02:00:00:00:00:01", 0xa1)
	p.src.send(in)
	p.src.received(1)
	packets := p.src.rd(ixgbevf.VFGPRC)

	flush := nbd.Held(p.src.gate.Flush)
	c := p.capture()
	if again := p.capture(); !bytes.Equal(again.States[0].State, c.States[0].State) {
		t.Error("a repeated AwaitCapture answers otherwise")
	}
	if a := p.deliver(c); !a.Accepted {
		t.Fatalf("state refused: %s: %s", a.Reason, a.Message)
	}
	// A frame that comes while the VF is stopped is lost, and changes nothing.
	p.src.send(frame(guestMAC, "02:00:00:00:00:01", 0xa2))
	select {
	case e := <-flush:
		t.Fatalf("the flush was answered (errno %d) before it was released", e)
	default:
	}
	if _, err := p.src.ctl.Relinquish(t.Context(), &pb.RelinquishRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Relinquish while QEMU is held: %v, want FAILED_PRECONDITION", err)
	}
	r, err := p.src.ctl.ReleaseSource(t.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid})
	p.src.must(err)
	if e := <-flush; e != 0 {
		t.Fatalf("the flush failed with errno %d", e)
	}
	// Exactly the pages written since the preparation: two write-backs in
	// the rings, one receive buffer.
	want := []uint64{txRing, rxRing, rxBuf + 4096}
	table, marked := p.src.seen()
	if !slices.Equal(marked, want) || r.Pages[0].PagesMarked != uint64(len(want)) {
		t.Errorf("marked %#x (reported %d), want %#x", marked, r.Pages[0].PagesMarked, want)
	}
	if e := p.src.gate.Flush(); e != 0 {
		t.Errorf("QEMU's second flush of the same stop failed with errno %d", e)
	}

	p.copyRAM()
	start := nbd.Held(p.dst.gate.Read)
	_, err = p.dst.ctl.AwaitStart(t.Context(), &pb.AwaitStartRequest{MigrationUid: uid})
	p.dst.must(err)
	if !p.dst.wireSilent() {
		t.Error("the target's VF sent something before it was activated")
	}
	_, err = p.src.ctl.Relinquish(t.Context(), &pb.RelinquishRequest{MigrationUid: uid})
	p.src.must(err)
	a, err := p.dst.ctl.Activate(t.Context(), &pb.ActivateRequest{MigrationUid: uid})
	p.dst.must(err)
	if e := <-start; e != 0 {
		t.Fatalf("QEMU's start failed with errno %d", e)
	}
	if a.Interfaces[0].ReplayedOperations == 0 || a.Interfaces[0].HeadsStrategy != heads {
		t.Errorf("restore report %v, want some operations and heads by %s", a.Interfaces[0], heads)
	}
	if got := p.dst.config(cfgBAR3, 4); got != tableAddr|0xc {
		t.Errorf("BAR3 on the target = %#x, want %#x", got, tableAddr|0xc)
	}
	if got, _ := p.dst.seen(); got != table {
		t.Errorf("MSI-X table on the target = %x, want %x", got, table)
	}
	mac, err := net.ParseMAC(guestMAC)
	p.dst.must(err)
	if got := p.dst.recv(); !bytes.Equal(got, announcement(mac)) {
		t.Errorf("first on the target's wire: %x, want the announcement of the MAC", got)
	}
	p.dst.interrupts()
	p.dst.mon.event("RESUME", "")
	p.dst.wantPhase(pb.Phase_PHASE_RUNNING)
	eventually(t, "interrupt on every vector", func() bool { f := p.dst.interrupts(); return f[0] || f[1] || f[2] })

	running := make(chan *pb.AwaitRunningReply, 1)
	go func() {
		r, err := p.dst.ctl.AwaitRunning(t.Context(), &pb.AwaitRunningRequest{MigrationUid: uid})
		if err != nil {
			t.Error(err)
		}
		running <- r
	}()
	// The guest goes on where it was: next slots, counters continuous.
	if got := p.dst.rd(ixgbevf.VFGPRC); got != packets {
		t.Errorf("VFGPRC = %d after the move, was %d", got, packets)
	}
	wantFrame := p.dst.transmit(2)
	if got := p.dst.recv(); !bytes.Equal(got, wantFrame) {
		t.Errorf("sent on the target: %x, want %x", got, wantFrame)
	}
	in = frame(guestMAC, "02:00:00:00:00:01", 0xa3)
	p.dst.send(in)
	if got := p.dst.received(2); !bytes.Equal(got, in) {
		t.Errorf("received on the target: %x, want %x", got, in)
	}
	rr := <-running
	if rr.GetVmStopped().AsDuration() < rr.GetDeviceStopped().AsDuration()/2 || rr.GetVmStopped().AsDuration() <= 0 {
		t.Errorf("VM stopped %v, device stopped %v", rr.GetVmStopped().AsDuration(), rr.GetDeviceStopped().AsDuration())
	}
	if gap, stopped := rr.GetLinkGap().AsDuration(), rr.GetDeviceStopped().AsDuration(); rr.GetLinkGap() == nil || gap < stopped || gap > stopped+frameWait {
		t.Errorf("no frame passed for %v, with the device stopped for %v", rr.GetLinkGap(), stopped)
	}
	// The source is out of it for good.
	if _, err := p.src.ctl.CancelSource(t.Context(), &pb.CancelSourceRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("CancelSource after the point of no return: %v, want FAILED_PRECONDITION", err)
	}
	if _, err := p.dst.ctl.CancelTarget(t.Context(), &pb.CancelTargetRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("CancelTarget of a running VM: %v, want FAILED_PRECONDITION", err)
	}
}

// move takes the VM to the target, where it runs then.
func (p *pair) move() {
	p.Helper()
	p.precopy()
	flush := nbd.Held(p.src.gate.Flush)
	if a := p.deliver(p.capture()); !a.Accepted {
		p.Fatalf("state refused: %s: %s", a.Reason, a.Message)
	}
	_, err := p.src.ctl.ReleaseSource(p.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid})
	p.src.must(err)
	<-flush
	p.copyRAM()
	start := nbd.Held(p.dst.gate.Read)
	_, err = p.dst.ctl.AwaitStart(p.Context(), &pb.AwaitStartRequest{MigrationUid: uid})
	p.dst.must(err)
	_, err = p.src.ctl.Relinquish(p.Context(), &pb.RelinquishRequest{MigrationUid: uid})
	p.src.must(err)
	_, err = p.dst.ctl.Activate(p.Context(), &pb.ActivateRequest{MigrationUid: uid})
	p.dst.must(err)
	<-start
	p.dst.mon.event("RESUME", "")
	p.dst.wantPhase(pb.Phase_PHASE_RUNNING)
}

// TestIdleAfterMove: of a VM that neither sends nor receives nobody can say how
// long it could not have.
func TestIdleAfterMove(t *testing.T) {
	p := newPair(t, nil)
	p.move()
	p.dst.rd(ixgbevf.VFLINKS) // the driver looks at its device, no more
	r, err := p.dst.ctl.AwaitRunning(t.Context(), &pb.AwaitRunningRequest{MigrationUid: uid})
	p.dst.must(err)
	if r.GetLinkGap() != nil || r.GetDeviceStopped().AsDuration() <= 0 {
		t.Errorf("a gap of %v although no frame passed, with the device stopped for %v", r.GetLinkGap().AsDuration(), r.GetDeviceStopped().AsDuration())
	}
}

// goesOn checks that the guest's traffic works on the source, without a reset.
func (p *pair) goesOn(slot int, resets uint64) {
	p.Helper()
	want := p.src.transmit(slot)
	if got := p.src.recv(); !bytes.Equal(got, want) {
		p.Errorf("sent on the source: %x, want %x", got, want)
	}
	in := frame(guestMAC, "02:00:00:00:00:01", byte(0xb0+slot))
	p.src.send(in)
	if got := p.src.received(slot); !bytes.Equal(got, in) {
		p.Errorf("received on the source: %x, want %x", got, in)
	}
	s, err := p.src.ctl.Status(p.Context(), &pb.StatusRequest{})
	p.src.must(err)
	if s.Phase != pb.Phase_PHASE_RUNNING || s.Interfaces[0].GuestResets != resets {
		p.Errorf("source in %v after %d resets, want running after %d", s.Phase, s.Interfaces[0].GuestResets, resets)
	}
}

// TestUndoneMigrationIsCancelled: QEMU is told to give up a migration that was
// undone while it copied, once it can be told so. One that gets to its end all
// the same is vetoed; one that comes later is none of its business.
func TestUndoneMigrationIsCancelled(t *testing.T) {
	cancel := func(p *pair) {
		_, err := p.src.ctl.CancelSource(p.Context(), &pb.CancelSourceRequest{MigrationUid: uid, Reason: "test"})
		p.src.must(err)
	}
	for name, way := range map[string]func(*pair){
		"while it copies": func(p *pair) {
			p.precopy()
			cancel(p)
		},
		"while it is set up": func(p *pair) {
			p.prepare()
			p.src.mon.event("MIGRATION", "setup")
			eventually(p.T, "the event to be heard", func() bool { return p.src.log.has("setup") })
			cancel(p)
			if n := p.src.mon.did("migrate_cancel"); n != 0 {
				p.Errorf("QEMU was told to cancel within the set-up")
			}
			p.src.mon.event("MIGRATION", "active")
		},
		"before it begins": func(p *pair) {
			p.prepare()
			cancel(p)
			p.src.mon.event("MIGRATION", "active")
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, nil)
			way(p)
			eventually(t, "QEMU to be told", func() bool { return p.src.mon.did("migrate_cancel") == 1 })
			if e := <-nbd.Held(p.src.gate.Flush); e != syscall.EIO {
				t.Errorf("its end was answered with errno %d, want EIO", e)
			}
			for _, status := range []string{"cancelled", "active", "device"} {
				p.src.mon.event("MIGRATION", status)
			}
			eventually(t, "the events to be heard", func() bool { return p.src.log.has("device") })
			if e := <-nbd.Held(p.src.gate.Flush); e != syscall.EIO {
				t.Errorf("the end of one that nobody prepared was answered with errno %d, want EIO", e)
			}
			if n := p.src.mon.did("migrate_cancel"); n != 1 {
				t.Errorf("QEMU was told %d times", n)
			}
		})
	}
}

func TestWaysBack(t *testing.T) {
	captured := func(p *pair) (<-chan syscall.Errno, *pb.AwaitCaptureReply) {
		p.precopy()
		f := nbd.Held(p.src.gate.Flush)
		return f, p.capture()
	}
	failed := func(p *pair, c <-chan syscall.Errno) {
		p.Helper()
		if e := <-c; e != syscall.EIO {
			p.Errorf("QEMU's request ended with errno %d, want EIO", e)
		}
	}
	released := func(p *pair) *pb.AwaitCaptureReply {
		f, c := captured(p)
		if a := p.deliver(c); !a.Accepted {
			p.Fatalf("state refused: %s", a.Message)
		}
		_, err := p.src.ctl.ReleaseSource(p.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid})
		p.src.must(err)
		if e := <-f; e != 0 {
			p.Fatalf("the flush failed with errno %d", e)
		}
		return c
	}
	cancelSource := func(p *pair, reclaim bool) {
		p.Helper()
		_, err := p.src.ctl.CancelSource(p.Context(), &pb.CancelSourceRequest{MigrationUid: uid, Reason: "test", Reclaim: reclaim})
		p.src.must(err)
	}
	cancelTarget := func(p *pair) {
		p.Helper()
		_, err := p.dst.ctl.CancelTarget(p.Context(), &pb.CancelTargetRequest{MigrationUid: uid, Reason: "test"})
		p.dst.must(err)
	}
	for name, way := range map[string]func(*pair){
		"cancelled when prepared": func(p *pair) {
			p.prepare()
			cancelSource(p, false)
			cancelTarget(p)
		},
		"vetoed by the source's agent": func(p *pair) {
			f, _ := captured(p)
			_, err := p.src.ctl.ReleaseSource(p.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid, Veto: true, Reason: "test"})
			p.src.must(err)
			failed(p, f)
		},
		"cancelled while held": func(p *pair) {
			f, _ := captured(p)
			cancelSource(p, false)
			failed(p, f)
		},
		"nobody releases the source gate": func(p *pair) {
			f, _ := captured(p)
			failed(p, f)
			if _, err := p.src.ctl.Relinquish(p.Context(), &pb.RelinquishRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
				p.Errorf("Relinquish after the hold expired: %v", err)
			}
		},
		"migration fails after the release": func(p *pair) {
			released(p)
			p.src.mon.event("RESUME", "")
			p.src.wantPhase(pb.Phase_PHASE_RUNNING)
			if _, err := p.src.ctl.Relinquish(p.Context(), &pb.RelinquishRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
				p.Errorf("Relinquish after the VM resumed: %v", err)
			}
		},
		"the guest runs before QEMU's event": func(p *pair) {
			released(p)
			p.src.rd(ixgbevf.VFSTATUS)
		},
		"nobody activates the target": func(p *pair) {
			released(p)
			failed(p, nbd.Held(p.dst.gate.Read))
			p.dst.wantPhase(pb.Phase_PHASE_CANCELLED)
			if _, err := p.dst.ctl.Activate(p.Context(), &pb.ActivateRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
				p.Errorf("Activate after the hold expired: %v", err)
			}
			p.src.mon.event("RESUME", "")
		},
		"target withdrawn after the source relinquished": func(p *pair) {
			released(p)
			start := nbd.Held(p.dst.gate.Read)
			_, err := p.dst.ctl.AwaitStart(p.Context(), &pb.AwaitStartRequest{MigrationUid: uid})
			p.dst.must(err)
			_, err = p.src.ctl.Relinquish(p.Context(), &pb.RelinquishRequest{MigrationUid: uid})
			p.src.must(err)
			cancelTarget(p)
			failed(p, start)
			p.src.mon.event("RESUME", "")
			if _, err := p.src.ctl.CancelSource(p.Context(), &pb.CancelSourceRequest{MigrationUid: uid}); status.Code(err) != codes.FailedPrecondition {
				p.Errorf("CancelSource without a word of the target: %v", err)
			}
			cancelSource(p, true)
		},
		"QEMU of the target ends while held": func(p *pair) {
			released(p)
			start := nbd.Held(p.dst.gate.Read)
			_, err := p.dst.ctl.AwaitStart(p.Context(), &pb.AwaitStartRequest{MigrationUid: uid})
			p.dst.must(err)
			p.dst.client.Close()
			failed(p, start)
			p.dst.wantPhase(pb.Phase_PHASE_CANCELLED)
			p.src.mon.event("RESUME", "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, nil)
			s, err := p.src.ctl.Status(t.Context(), &pb.StatusRequest{})
			p.src.must(err)
			way(p)
			p.src.wantPhase(pb.Phase_PHASE_RUNNING)
			p.src.mon.event("MIGRATION", "failed")
			p.goesOn(1, s.Interfaces[0].GuestResets)
			if !p.dst.wireSilent() {
				t.Error("the target's VF sent something")
			}
		})
	}
}

func TestStateIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Options, *handoff.Handoff)
		spoil  func(*pair, *pb.AwaitCaptureReply)
		want   string
	}{
		"corrupted on the target": {
			change: func(o *Options, _ *handoff.Handoff) { o.Faults.TamperState = func(b []byte) { b[len(b)/2] ^= 1 } },
			want:   "checksum",
		},
		"of another epoch": {
			spoil: func(p *pair, _ *pb.AwaitCaptureReply) { p.epochs[0].Epoch-- },
			want:  "epoch 7",
		},
		"of no interface": {
			spoil: func(_ *pair, c *pb.AwaitCaptureReply) { c.States[0].Name = "net2" },
			want:  "net2",
		},
		"missing": {
			spoil: func(_ *pair, c *pb.AwaitCaptureReply) { c.States = nil },
			want:  "0 states for 1 interfaces",
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, c.change)
			p.precopy()
			f := nbd.Held(p.src.gate.Flush)
			reply := p.capture()
			if c.spoil != nil {
				c.spoil(p, reply)
				if strings.Contains(c.want, "epoch") {
					reply = p.capture()
				}
			}
			a := p.deliver(reply)
			if a.Accepted || a.Reason != "StateRejected" || !strings.Contains(a.Message, c.want) {
				t.Errorf("reply %v, want StateRejected with %q", a, c.want)
			}
			_, err := p.src.ctl.ReleaseSource(t.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid, Veto: true, Reason: a.Message})
			p.src.must(err)
			<-f
			p.src.wantPhase(pb.Phase_PHASE_RUNNING)
		})
	}
}

func TestTargetRefusesBeforehand(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Options, *handoff.Handoff)
		reason string
	}{
		"other multicast filter": {func(_ *Options, h *handoff.Handoff) { h.Model.MulticastFilterType = 2 }, "MulticastFilterTypeMismatch"},
		"other MAC":              {func(_ *Options, h *handoff.Handoff) { h.MAC = "52:54:00:00:00:02" }, "Incompatible"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, c.change)
			if d := p.prepare(); d.Accepted || d.Reason != c.reason || d.Message == "" {
				t.Errorf("verdict %v, want %s with a message", d, c.reason)
			}
			p.dst.wantPhase(pb.Phase_PHASE_TARGET_SILENT)
		})
	}
}

func TestUnpreparedMigrationIsVetoed(t *testing.T) {
	p := newPair(t, nil)
	if e := p.src.gate.Flush(); e != 0 {
		t.Errorf("a flush without a migration failed with errno %d: a pause would fail", e)
	}
	p.src.mon.event("MIGRATION", "active")
	eventually(t, "veto", func() bool { return p.src.gate.Flush() == syscall.EIO })
	p.src.mon.event("MIGRATION", "failed")
	eventually(t, "passing flush", func() bool { return p.src.gate.Flush() == 0 })
	p.goesOn(1, 1)
}

func TestStartWithoutStateIsRefused(t *testing.T) {
	p := newPair(t, nil)
	p.precopy()
	if e := p.dst.gate.Read(); e != syscall.EIO {
		t.Errorf("QEMU may start without its VFs' state: errno %d, want EIO", e)
	}
}

func TestCallsOutOfOrderAreRefused(t *testing.T) {
	n := startNode(t, handoff.RolePrimary, 1, nil)
	n.wantPhase(pb.Phase_PHASE_RUNNING)
	ctx := t.Context()
	hold := durationpb.New(time.Second)
	for name, c := range map[string]struct {
		call func() error
		want codes.Code
	}{
		"PrepareSource without QEMU": {func() error {
			_, err := n.ctl.PrepareSource(ctx, &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: hold})
			return err
		}, codes.Unavailable},
		"PrepareSource without UID": {func() error {
			_, err := n.ctl.PrepareSource(ctx, &pb.PrepareSourceRequest{HoldTimeout: hold})
			return err
		}, codes.InvalidArgument},
		"PrepareSource held too long": {func() error {
			_, err := n.ctl.PrepareSource(ctx, &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: durationpb.New(time.Hour)})
			return err
		}, codes.InvalidArgument},
		"AwaitCapture": {func() error {
			_, err := n.ctl.AwaitCapture(ctx, &pb.AwaitCaptureRequest{MigrationUid: uid})
			return err
		}, codes.FailedPrecondition},
		"ReleaseSource": {func() error {
			_, err := n.ctl.ReleaseSource(ctx, &pb.ReleaseSourceRequest{MigrationUid: uid})
			return err
		}, codes.FailedPrecondition},
		"Relinquish": {func() error { _, err := n.ctl.Relinquish(ctx, &pb.RelinquishRequest{MigrationUid: uid}); return err }, codes.FailedPrecondition},
		"PrepareTarget on a primary": {func() error {
			_, err := n.ctl.PrepareTarget(ctx, &pb.PrepareTargetRequest{MigrationUid: uid, HoldTimeout: hold})
			return err
		}, codes.FailedPrecondition},
		"AwaitStart": {func() error { _, err := n.ctl.AwaitStart(ctx, &pb.AwaitStartRequest{MigrationUid: uid}); return err }, codes.FailedPrecondition},
		"Activate":   {func() error { _, err := n.ctl.Activate(ctx, &pb.ActivateRequest{MigrationUid: uid}); return err }, codes.FailedPrecondition},
		"AwaitRunning": {func() error {
			_, err := n.ctl.AwaitRunning(ctx, &pb.AwaitRunningRequest{MigrationUid: uid})
			return err
		}, codes.FailedPrecondition},
		"CancelTarget of a primary": {func() error {
			_, err := n.ctl.CancelTarget(ctx, &pb.CancelTargetRequest{MigrationUid: uid})
			return err
		}, codes.FailedPrecondition},
		"CancelSource never prepared": {func() error {
			_, err := n.ctl.CancelSource(ctx, &pb.CancelSourceRequest{MigrationUid: uid})
			return err
		}, codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.call(); status.Code(err) != c.want {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

func TestOptionsAreChecked(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{dir + "/none", file} {
		if _, err := New(Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("directory %s: error %v", dir, err)
		}
	}
}
