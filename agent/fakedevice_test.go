package agent

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"k8s.io/apimachinery/pkg/types"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/kubevirt"
)

// fakeDevice is a device process without VFs: it has the real one's sockets,
// phases and answers.
type fakeDevice struct {
	pb.UnimplementedDeviceServer
	// before and after, if set, are called around each call; an error of
	// before is the call's answer, one of after replaces it.
	before, after func(method string) error
	protocols     *pb.Protocols
	// refuse and reject are the target's objections.
	refuse, reject string
	// activateError fails the restore.
	activateError error

	mu       sync.Mutex
	changed  chan struct{}
	handoffs map[string]handoff.Handoff
	handed   int // handoffs that took effect
	role     pb.Role
	phase    pb.Phase
	uid      string
	released bool
	lost     bool   // the node took its VFs
	fixed    string // why its VFs cannot be moved
	vetoed   string // why the stop was vetoed
	ended    string
	states   []*pb.InterfaceState
	sent     []*pb.InterfaceEpoch
	calls    map[string]int
}

const interfaceName = "blue"

// startDevice runs a device process for a pod until the test ends, or stop is
// called.
func startDevice(t *testing.T, podsDir string, pod types.UID) (*fakeDevice, func()) {
	t.Helper()
	d := &fakeDevice{changed: make(chan struct{}), handoffs: map[string]handoff.Handoff{}, phase: pb.Phase_PHASE_UNATTACHED, calls: map[string]int{}}
	dir := kubevirt.DeviceDir(podsDir, pod, 1)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	listen := func(name string) *net.UnixListener {
		// The path is too long for an address, as it is on a node.
		f, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join("/proc/self/fd", itoa(f.Fd()), name), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false) // what a killed process leaves behind
		return l
	}
	control, hand := listen(controlSocket), listen(handoffSocket)
	s := grpc.NewServer(grpc.UnaryInterceptor(d.intercept))
	pb.RegisterDeviceServer(s, d)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = s.Serve(control) })
	wg.Go(func() { _ = handoff.Serve(ctx, hand, slog.New(slog.DiscardHandler), d.take) })
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			s.Stop()
			wg.Wait()
		})
	}
	t.Cleanup(stop)
	return d, stop
}

func (d *fakeDevice) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	method := filepath.Base(info.FullMethod)
	d.mu.Lock()
	d.calls[method]++
	before, after := d.before, d.after
	d.mu.Unlock()
	if before != nil {
		if err := before(method); err != nil {
			return nil, err
		}
	}
	reply, err := h(ctx, req)
	if after != nil {
		if aerr := after(method); aerr != nil {
			return nil, aerr
		}
	}
	return reply, err
}

func (d *fakeDevice) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
	close(d.changed)
	d.changed = make(chan struct{})
}

// await blocks until done, called under the lock, says so.
func (d *fakeDevice) await(ctx context.Context, done func() (bool, error)) error {
	for {
		d.mu.Lock()
		ok, err := done()
		ch := d.changed
		d.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

func (d *fakeDevice) is(p pb.Phase) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.phase == p
}

func (d *fakeDevice) count(method string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[method]
}

func (d *fakeDevice) take(h handoff.Handoff, files []*os.File) error {
	handoff.CloseAll(files)
	d.set(func() {
		if old, ok := d.handoffs[h.Interface]; ok && old == h {
			return
		}
		d.handed++
		d.handoffs[h.Interface] = h
		d.role, d.phase = pb.Role_ROLE_PRIMARY, pb.Phase_PHASE_RUNNING
		if h.Role == handoff.RoleTarget {
			d.role, d.phase = pb.Role_ROLE_TARGET, pb.Phase_PHASE_TARGET_SILENT
		}
	})
	return nil
}

func (d *fakeDevice) refusal(uid string) error {
	return status.Errorf(codes.FailedPrecondition, "migration %s is not under way here: %s, migration %s", uid, d.phase, d.uid)
}

func (d *fakeDevice) Status(context.Context, *pb.StatusRequest) (*pb.StatusReply, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &pb.StatusReply{Role: d.role, Phase: d.phase, MigrationUid: d.uid, QemuConnected: true, Protocols: d.protocols}
	for n, h := range d.handoffs {
		r.Interfaces = append(r.Interfaces, &pb.InterfaceStatus{Name: n, Vf: h.VF, Mac: h.MAC, Epoch: h.Epoch, Lost: d.lost, FastPath: h.FastPath, Immovable: d.fixed})
	}
	return r, nil
}

func (d *fakeDevice) PrepareSource(_ context.Context, r *pb.PrepareSourceRequest) (reply *pb.PrepareSourceReply, err error) {
	d.set(func() {
		if d.phase != pb.Phase_PHASE_RUNNING && (d.phase != pb.Phase_PHASE_SOURCE_PREPARED || d.uid != r.MigrationUid) {
			err = d.refusal(r.MigrationUid)
			return
		}
		d.phase, d.uid, d.released, d.vetoed, d.ended = pb.Phase_PHASE_SOURCE_PREPARED, r.MigrationUid, false, "", ""
		reply = &pb.PrepareSourceReply{Interfaces: []*pb.SourceInterface{{Name: interfaceName, Family: "ixgbevf"}}}
	})
	return reply, err
}

// vmStops is QEMU's stop of the VM: the VFs are captured if a migration is
// prepared. It reports whether they were.
func (d *fakeDevice) vmStops() (captured bool) {
	d.set(func() {
		if captured = d.phase == pb.Phase_PHASE_SOURCE_PREPARED; captured {
			d.phase = pb.Phase_PHASE_CAPTURED
		}
	})
	return captured
}

func (d *fakeDevice) AwaitCapture(ctx context.Context, r *pb.AwaitCaptureRequest) (*pb.AwaitCaptureReply, error) {
	err := d.await(ctx, func() (bool, error) {
		switch {
		case d.uid != r.MigrationUid:
			return false, d.refusal(r.MigrationUid)
		case d.ended != "":
			return false, status.Error(codes.Aborted, d.ended)
		}
		d.sent = r.Epochs
		return d.phase == pb.Phase_PHASE_CAPTURED || d.phase == pb.Phase_PHASE_RELINQUISHED, nil
	})
	if err != nil {
		return nil, err
	}
	return &pb.AwaitCaptureReply{
		States:       []*pb.InterfaceState{{Name: interfaceName, State: make([]byte, 1234), Epoch: r.Epochs[0].Epoch}},
		Steps:        []*pb.Step{{Name: "source/quiesce", Took: durationpb.New(time.Millisecond)}},
		VmStoppedFor: durationpb.New(2 * time.Millisecond), DeviceStoppedFor: durationpb.New(time.Millisecond)}, nil
}

func (d *fakeDevice) ReleaseSource(_ context.Context, r *pb.ReleaseSourceRequest) (reply *pb.ReleaseSourceReply, err error) {
	d.set(func() {
		switch {
		case d.uid != r.MigrationUid || d.phase != pb.Phase_PHASE_CAPTURED && d.phase != pb.Phase_PHASE_RELINQUISHED:
			err = d.refusal(r.MigrationUid)
		case r.Veto && d.phase == pb.Phase_PHASE_RELINQUISHED:
		case r.Veto:
			d.phase, d.vetoed, d.ended = pb.Phase_PHASE_RUNNING, r.Reason, "vetoed: "+r.Reason
		default:
			d.released = true
		}
		reply = &pb.ReleaseSourceReply{Pages: []*pb.InterfacePages{{Name: interfaceName, PagesMarked: 7}},
			Steps: []*pb.Step{{Name: "source/mark", Took: durationpb.New(time.Millisecond)}}}
	})
	return reply, err
}

func (d *fakeDevice) Relinquish(_ context.Context, r *pb.RelinquishRequest) (_ *pb.RelinquishReply, err error) {
	d.set(func() {
		switch {
		case d.uid == r.MigrationUid && d.phase == pb.Phase_PHASE_RELINQUISHED:
		case d.uid == r.MigrationUid && d.phase == pb.Phase_PHASE_CAPTURED && d.released:
			d.phase = pb.Phase_PHASE_RELINQUISHED
		default:
			err = d.refusal(r.MigrationUid)
		}
	})
	return &pb.RelinquishReply{}, err
}

func (d *fakeDevice) CancelSource(_ context.Context, r *pb.CancelSourceRequest) (_ *pb.CancelSourceReply, err error) {
	d.set(func() {
		if d.uid != r.MigrationUid {
			return
		}
		switch d.phase {
		case pb.Phase_PHASE_RELINQUISHED:
			if !r.Reclaim {
				err = status.Error(codes.FailedPrecondition, "relinquished")
				return
			}
			fallthrough
		case pb.Phase_PHASE_SOURCE_PREPARED, pb.Phase_PHASE_CAPTURED:
			d.phase, d.ended = pb.Phase_PHASE_RUNNING, "cancelled: "+r.Reason
		}
	})
	return &pb.CancelSourceReply{}, err
}

func (d *fakeDevice) PrepareTarget(_ context.Context, r *pb.PrepareTargetRequest) (reply *pb.PrepareTargetReply, err error) {
	d.set(func() {
		switch {
		case d.refuse != "":
			reply = &pb.PrepareTargetReply{Reason: "MailboxAPI", Message: d.refuse}
			return
		case d.phase == pb.Phase_PHASE_TARGET_PREPARED && d.uid == r.MigrationUid:
		case d.phase == pb.Phase_PHASE_TARGET_SILENT:
			d.phase, d.uid = pb.Phase_PHASE_TARGET_PREPARED, r.MigrationUid
		default:
			err = d.refusal(r.MigrationUid)
			return
		}
		reply = &pb.PrepareTargetReply{Accepted: true, Epochs: []*pb.InterfaceEpoch{{Name: interfaceName, Epoch: d.handoffs[interfaceName].Epoch}}}
	})
	return reply, err
}

func (d *fakeDevice) AcceptState(_ context.Context, r *pb.AcceptStateRequest) (reply *pb.AcceptStateReply, err error) {
	d.set(func() {
		switch {
		case d.uid != r.MigrationUid:
			err = d.refusal(r.MigrationUid)
		case d.reject != "":
			reply = &pb.AcceptStateReply{Reason: "StateRejected", Message: d.reject}
		case d.phase == pb.Phase_PHASE_TARGET_PREPARED:
			d.phase, d.states = pb.Phase_PHASE_TARGET_LOADED, r.States
			fallthrough
		case d.phase == pb.Phase_PHASE_TARGET_LOADED:
			reply = &pb.AcceptStateReply{Accepted: true}
		default:
			err = d.refusal(r.MigrationUid)
		}
	})
	return reply, err
}

// vmWantsToStart is QEMU's read of the gate. It reports whether QEMU is held.
func (d *fakeDevice) vmWantsToStart() (held bool) {
	d.set(func() {
		if held = d.phase == pb.Phase_PHASE_TARGET_LOADED; held {
			d.phase = pb.Phase_PHASE_TARGET_HELD
		}
	})
	return held
}

func (d *fakeDevice) AwaitStart(ctx context.Context, r *pb.AwaitStartRequest) (*pb.AwaitStartReply, error) {
	err := d.await(ctx, func() (bool, error) {
		switch {
		case d.uid != r.MigrationUid:
			return false, d.refusal(r.MigrationUid)
		case d.phase == pb.Phase_PHASE_CANCELLED:
			return false, status.Error(codes.Aborted, d.ended)
		}
		return d.phase != pb.Phase_PHASE_TARGET_PREPARED && d.phase != pb.Phase_PHASE_TARGET_LOADED, nil
	})
	return &pb.AwaitStartReply{}, err
}

func (d *fakeDevice) Activate(_ context.Context, r *pb.ActivateRequest) (reply *pb.ActivateReply, err error) {
	d.set(func() {
		switch {
		case d.uid != r.MigrationUid:
			err = d.refusal(r.MigrationUid)
			return
		case d.phase == pb.Phase_PHASE_TARGET_HELD && d.activateError != nil:
			d.phase, d.ended, err = pb.Phase_PHASE_CANCELLED, "restore failed", d.activateError
			return
		case d.phase == pb.Phase_PHASE_TARGET_HELD:
			d.phase = pb.Phase_PHASE_TARGET_ACTIVE
		case d.phase != pb.Phase_PHASE_TARGET_ACTIVE && d.phase != pb.Phase_PHASE_RUNNING:
			err = d.refusal(r.MigrationUid)
			return
		}
		reply = &pb.ActivateReply{Interfaces: []*pb.InterfaceRestore{{Name: interfaceName, ReplayedOperations: 5, HeadsStrategy: "write", Announcement: []byte("here")}},
			Steps: []*pb.Step{{Name: "target/restore", Took: durationpb.New(time.Millisecond)}}}
	})
	return reply, err
}

func (d *fakeDevice) AwaitRunning(ctx context.Context, r *pb.AwaitRunningRequest) (*pb.AwaitRunningReply, error) {
	err := d.await(ctx, func() (bool, error) {
		if d.uid != r.MigrationUid || d.phase == pb.Phase_PHASE_CANCELLED {
			return false, d.refusal(r.MigrationUid)
		}
		return d.phase == pb.Phase_PHASE_RUNNING, nil
	})
	return &pb.AwaitRunningReply{VmStopped: durationpb.New(30 * time.Millisecond), DeviceStopped: durationpb.New(20 * time.Millisecond),
		LinkGap: durationpb.New(25 * time.Millisecond)}, err
}

func (d *fakeDevice) CancelTarget(_ context.Context, r *pb.CancelTargetRequest) (_ *pb.CancelTargetReply, err error) {
	d.set(func() {
		switch d.phase {
		case pb.Phase_PHASE_RUNNING, pb.Phase_PHASE_TARGET_ACTIVE, pb.Phase_PHASE_SOURCE_PREPARED, pb.Phase_PHASE_CAPTURED, pb.Phase_PHASE_RELINQUISHED:
			err = status.Error(codes.FailedPrecondition, "the VM runs here")
		default:
			d.phase, d.ended = pb.Phase_PHASE_CANCELLED, "cancelled: "+r.Reason
		}
	})
	return &pb.CancelTargetReply{}, err
}
