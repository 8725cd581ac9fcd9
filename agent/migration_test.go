package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"sigs.k8s.io/controller-runtime/pkg/client"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

const (
	vfA = "0000:03:10.0"
	vfB = "0000:03:10.2"
)

// scene is a VM that runs on node a and is to move to node b.
type scene struct {
	*migration
	from, to   *labNode
	src, dst   *fakeDevice
	stopSrc    func()
	stopDst    func()
	sPod, tPod *corev1.Pod
}

func (s *scene) lease(n *labNode, vf string) string {
	h, _ := s.lab.lease(n.name, vf)
	return h
}

// boot starts both agents and the VM on node a.
func boot(t *testing.T) *scene { return bootWith(t, nil) }

// bootWith is boot of a VMI with these annotations.
func bootWith(t *testing.T, annotations map[string]string) *scene {
	t.Helper()
	t.Parallel()
	l := newLab(t)
	s := &scene{from: l.nodes["a"], to: l.nodes["b"], migration: &migration{lab: l}}
	s.watchAnswers()
	s.from.start()
	s.to.start()
	l.vmi(annotations)
	s.sPod = l.pod("launcher-source", "a", vfA, "")
	s.src, s.stopSrc = startDevice(t, s.from.podsDir, s.sPod.UID)
	eventually(t, "the VM's VF is attached", func() bool { return s.src.is(pb.Phase_PHASE_RUNNING) })
	return s
}

// watchAnswers fails the test when two VFs answer to the VM's MAC.
func (s *scene) watchAnswers() {
	var mu sync.Mutex
	on := map[string]bool{}
	for _, n := range []*labNode{s.from, s.to} {
		n.host.told = func(address string, answers bool) {
			mu.Lock()
			defer mu.Unlock()
			delete(on, n.name+" "+address)
			if answers {
				on[n.name+" "+address] = true
			}
			if len(on) > 1 {
				s.t.Errorf("more than one VF answers to the VM's MAC: %v", on)
			}
		}
	}
}

// begin creates the target pod with its device process, and the migration.
func (s *scene) begin() {
	s.t.Helper()
	s.tPod = s.pod("launcher-target", "b", vfB, "vmim-uid")
	s.dst, s.stopDst = startDevice(s.t, s.to.podsDir, s.tPod.UID)
	s.migration = s.migrate("m", s.sPod, s.tPod)
}

// switchOver is QEMU's part from the VM's stop to its run, on either side.
func (s *scene) switchOver() {
	s.t.Helper()
	// KubeVirt begins only once the target's sidecar is ready.
	eventually(s.t, "the target is prepared", func() bool { return s.dst.is(pb.Phase_PHASE_TARGET_PREPARED) })
	eventually(s.t, "the VM stops under a prepared gate", s.src.vmStops)
	eventually(s.t, "QEMU is let go on", func() bool {
		s.src.mu.Lock()
		defer s.src.mu.Unlock()
		return s.src.released || s.src.vetoed != ""
	})
	if s.src.is(pb.Phase_PHASE_RUNNING) {
		return // vetoed: QEMU resumes the VM
	}
	if !s.dst.vmWantsToStart() {
		s.t.Fatal("QEMU was let go on, but the target does not hold its start")
	}
	eventually(s.t, "the held start is decided", func() bool {
		return s.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) || s.dst.is(pb.Phase_PHASE_CANCELLED)
	})
	if s.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) {
		s.oneOwner()
		s.dst.set(func() { s.dst.phase = pb.Phase_PHASE_RUNNING })
	}
}

// oneOwner checks that at most one device process may use the VM's VFs.
func (s *scene) oneOwner() {
	s.t.Helper()
	if s.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) && !s.src.is(pb.Phase_PHASE_RELINQUISHED) {
		s.t.Error("the target's VF is active and the source has not given its own up")
	}
}

func (s *scene) succeed() {
	s.t.Helper()
	s.expect(v1alpha1.ConditionVerified, metav1.ConditionTrue, v1alpha1.ConditionVerified)
	for _, typ := range []string{v1alpha1.ConditionTargetPinned, v1alpha1.ConditionPrepared, v1alpha1.ConditionCaptured, v1alpha1.ConditionRestored} {
		s.expect(typ, metav1.ConditionTrue, typ)
	}
	s.oneOwner()
	if s.from.host.answersTo(vfA) || !s.to.host.answersTo(vfB) {
		s.t.Errorf("the source's VF answers: %v, the target's: %v", s.from.host.answersTo(vfA), s.to.host.answersTo(vfB))
	}
	s.status(func(m *vfMigration) { setTrue(m, v1alpha1.ConditionSucceeded, "done") })
	if meta.FindStatusCondition(s.get().Status.Conditions, v1alpha1.ConditionRolledBack) != nil {
		s.t.Error("a migration that went well was rolled back")
	}
}

// rolledBack does the manager's part of an undoing, and checks the outcome.
func (s *scene) rolledBack(reason string) {
	s.t.Helper()
	if s.get().Status.Failure == nil {
		s.fail(reason, "see the conditions")
	}
	s.expect(v1alpha1.ConditionRolledBack, metav1.ConditionTrue, v1alpha1.ConditionRolledBack)
	s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonReleased)
	if !s.src.is(pb.Phase_PHASE_RUNNING) {
		s.t.Errorf("the source's device process is in %s", s.src.phase)
	}
	eventually(s.t, "the target's VF is free", func() bool { return s.lease(s.to, vfB) == "" && !s.to.host.has(vfB) })
	if s.dst != nil && s.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) {
		s.t.Error("the target's VF is active")
	}
	if !s.from.host.answersTo(vfA) || s.to.host.answersTo(vfB) {
		s.t.Errorf("the source's VF answers: %v, the target's: %v", s.from.host.answersTo(vfA), s.to.host.answersTo(vfB))
	}
	if h := s.lease(s.from, vfA); !strings.HasSuffix(h, string(s.sPod.UID)) {
		s.t.Errorf("the source's VF is leased to %q", h)
	}
}

func TestMigration(t *testing.T) {
	s := boot(t)
	s.begin()
	s.switchOver()
	s.succeed()

	m := s.get()
	if len(m.Status.Devices) != 1 {
		t.Fatalf("devices %+v", m.Status.Devices)
	}
	d := m.Status.Devices[0]
	want := v1alpha1.DeviceStatus{Interface: interfaceName,
		Source:     &v1alpha1.VFReference{PF: "pf0", VF: vfA, MAC: mac, Epoch: 1},
		Target:     &v1alpha1.VFReference{PF: "pf0", VF: vfB, MAC: mac, Epoch: 1},
		StateBytes: 1234, PagesMarked: 7, ReplayedOperations: 5, HeadsStrategy: "write"}
	if *d.Source != *want.Source || *d.Target != *want.Target {
		t.Errorf("VFs %+v, %+v", *d.Source, *d.Target)
	}
	d.Source, d.Target, want.Source, want.Target = nil, nil, nil, nil
	if d != want {
		t.Errorf("device %+v, want %+v", d, want)
	}
	if m.Status.Downtime == nil || m.Status.Downtime.VMStopped.Duration != 30*time.Millisecond || m.Status.Downtime.DeviceStopped.Duration != 20*time.Millisecond ||
		m.Status.Downtime.LinkGap == nil || m.Status.Downtime.LinkGap.Duration != 25*time.Millisecond {
		t.Errorf("downtime %+v", m.Status.Downtime)
	}
	var steps []string
	for _, st := range m.Status.Steps {
		steps = append(steps, st.Name)
	}
	for _, name := range []string{"source/quiesce", "source/mark", "source/deliver", "target/restore", "target/commit"} {
		if !strings.Contains(strings.Join(steps, " "), name) {
			t.Errorf("no step %s in %v", name, steps)
		}
	}
	if s.dst.states[0].Epoch != 1 || len(s.dst.states[0].State) != 1234 {
		t.Errorf("state delivered: epoch %d, %d bytes", s.dst.states[0].Epoch, len(s.dst.states[0].State))
	}
	if h := s.dst.handoffs[interfaceName]; h.Role != handoff.RoleTarget || h.MAC != mac || h.VF != vfB || h.Slot != kubevirt.FirstSlot || h.Of != 1 {
		t.Errorf("handoff %+v", h)
	}

	s.to.host.mu.Lock()
	announced := s.to.host.announced
	s.to.host.mu.Unlock()
	// Again, if the status could not be written at once.
	if diff := cmp.Diff([]string{vfB + " here"}, slices.Compact(announced)); diff != "" {
		t.Errorf("announced (-want +got):\n%s", diff)
	}

	// The source pod ends: its VF is free, the target's is not.
	s.stopSrc()
	s.status(func(*vfMigration) {})
	s.sPod.Status.Phase = corev1.PodSucceeded
	if err := s.client.Status().Update(t.Context(), s.sPod); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the source's VF is free", func() bool { return s.lease(s.from, vfA) == "" && !s.from.host.has(vfA) })
	if h := s.lease(s.to, vfB); !strings.HasSuffix(h, string(s.tPod.UID)) {
		t.Errorf("the target's VF is leased to %q", h)
	}
}

// TestAgentKilled kills an agent at each call to its device process, before
// the call is done and after, and starts it again.
func TestAgentKilled(t *testing.T) {
	type point struct {
		side, method string
		after        bool
	}
	var points []point
	for side, methods := range map[string][]string{
		"source": {"PrepareSource", "AwaitCapture", "ReleaseSource", "Relinquish"},
		"target": {"PrepareTarget", "AcceptState", "AwaitStart", "Activate", "AwaitRunning"},
	} {
		for _, m := range methods {
			points = append(points, point{side, m, false}, point{side, m, true})
		}
	}
	for _, p := range points {
		t.Run(fmt.Sprintf("%s/%s/after=%v", p.side, p.method, p.after), func(t *testing.T) {
			s := boot(t)
			node, dev := s.from, s.src
			// The target's device process must exist to be hooked, the
			// migration comes after.
			s.tPod = s.pod("launcher-target", "b", vfB, "vmim-uid")
			s.dst, s.stopDst = startDevice(t, s.to.podsDir, s.tPod.UID)
			if p.side == "target" {
				node, dev = s.to, s.dst
			}
			var hit atomic.Bool
			killed := make(chan struct{})
			hook := func(method string) error {
				if method != p.method || !hit.CompareAndSwap(false, true) {
					return nil
				}
				node.restart()
				close(killed)
				return status.Error(codes.Canceled, "the caller is dead")
			}
			dev.mu.Lock()
			if p.after {
				dev.after = hook
			} else {
				dev.before = hook
			}
			dev.mu.Unlock()
			s.migration = s.migrate("m", s.sPod, s.tPod)
			s.switchOver()
			s.succeed()
			select {
			case <-killed:
			case <-time.After(waitLimit):
				t.Fatal("the agent was not killed")
			}
			if dev.handed != 1 {
				t.Errorf("%d handoffs took effect, want 1", dev.handed)
			}
		})
	}
}

func TestRestartsBetweenSteps(t *testing.T) {
	s := boot(t)
	both := func() { s.from.restart(); s.to.restart() }
	both()
	s.begin()
	s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionTrue, v1alpha1.ConditionTargetPinned)
	both()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	both()
	s.from.kill()
	eventually(t, "the VM stops", s.src.vmStops)
	s.from.start()
	s.expect(v1alpha1.ConditionCaptured, metav1.ConditionTrue, v1alpha1.ConditionCaptured)
	s.to.kill()
	if !s.dst.vmWantsToStart() {
		t.Fatal("the target does not hold its start")
	}
	s.to.start()
	s.expect(v1alpha1.ConditionRestored, metav1.ConditionTrue, v1alpha1.ConditionRestored)
	both()
	s.oneOwner()
	s.dst.set(func() { s.dst.phase = pb.Phase_PHASE_RUNNING })
	s.succeed()
	if s.src.handed != 1 || s.dst.handed != 1 || s.from.host.total != 1 || s.to.host.total != 1 {
		t.Errorf("restarts had things done again: handoffs %d, %d, preparations %d, %d", s.src.handed, s.dst.handed, s.from.host.total, s.to.host.total)
	}
}

func TestRefusedBeforehand(t *testing.T) {
	tests := []struct {
		name      string
		set       func(*scene)
		condition string
		reason    string
		message   string
	}{
		{"another port VLAN", func(s *scene) {
			s.from.host.set(host.Settings{VLAN: 7, SpoofCheck: true, Trust: true})
			s.to.host.set(host.Settings{SpoofCheck: true})
		}, v1alpha1.ConditionPrepared, v1alpha1.ReasonIncompatible,
			"node b refuses: the PF of interface blue's VF has set port VLAN 7, here 0, trust on, here off; have the network's definition"},
		{"incompatible", func(s *scene) { s.dst.set(func() { s.dst.refuse = "mailbox API 1.5 is unknown here" }) },
			v1alpha1.ConditionPrepared, v1alpha1.ReasonIncompatible, "mailbox API 1.5 is unknown here"},
		{"source device too new", func(s *scene) { s.src.set(func() { s.src.protocols = &pb.Protocols{Oldest: 2, Newest: 3} }) },
			v1alpha1.ConditionPrepared, v1alpha1.ReasonVersionMismatch,
			"the device process of pod launcher-source speaks version 2 to 3 of CompSC's protocol, the agent of node a version 1"},
		{"target device too new", func(s *scene) { s.dst.set(func() { s.dst.protocols = &pb.Protocols{Oldest: 2, Newest: 2} }) },
			v1alpha1.ConditionPrepared, v1alpha1.ReasonVersionMismatch,
			"node b refuses: the device process of pod launcher-target speaks version 2 of CompSC's protocol, the agent of node b version 1"},
		{"peer down", func(s *scene) { s.to.kill() },
			v1alpha1.ConditionPrepared, v1alpha1.ReasonPeerUnavailable, "the agent of node b"},
		{"source device missing", func(s *scene) { s.stopSrc() },
			v1alpha1.ConditionPrepared, v1alpha1.ReasonDeviceUnavailable, "launcher-source"},
		{"target device missing", func(s *scene) { s.stopDst() },
			v1alpha1.ConditionPrepared, v1alpha1.ReasonPeerUnavailable, "the device process there"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := boot(t)
			s.from.kill() // so that the fault is there before the source acts
			s.begin()
			s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionTrue, v1alpha1.ConditionTargetPinned)
			tt.set(s)
			s.from.start()
			c := s.expect(tt.condition, metav1.ConditionFalse, tt.reason)
			if !strings.Contains(c.Message, tt.message) {
				t.Errorf("message %q does not contain %q", c.Message, tt.message)
			}
			if s.dst.is(pb.Phase_PHASE_TARGET_PREPARED) {
				t.Error("the target is prepared, and its pod ready")
			}
		})
	}
}

func TestPinFails(t *testing.T) {
	tests := []struct {
		name    string
		set     func(*scene)
		message string
	}{
		{"VF held by another living pod", func(s *scene) {
			other := s.pod("launcher-other", "b", vfB, "vmim-other")
			if _, err := s.to.agent.acquire(s.t.Context(), vfB, holderOf(other)); err != nil {
				s.t.Fatal(err)
			}
			// Nor does it matter that nobody has renewed the lease for long: the
			// agent, which does that, may be away while the VM runs.
			l := &coordinationv1.Lease{}
			s.api(s.client.Get(s.t.Context(), client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: vfLeaseName("b", vfB)}, l))
			long := metav1.NewMicroTime(time.Now().Add(-100 * vfLeaseDuration))
			l.Spec.RenewTime = &long
			s.api(s.client.Update(s.t.Context(), l))
		}, "is leased to pod default/launcher-other/launcher-other-uid"},
		{"host refuses", func(s *scene) { s.to.host.err = errors.New("MAC 52:54:00:00:00:0a is in use by VF 0000:03:10.0") }, "is in use by VF 0000:03:10.0"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := boot(t)
			tt.set(s)
			s.begin()
			c := s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonPinFailed)
			if !strings.Contains(c.Message, tt.message) {
				t.Errorf("message %q does not contain %q", c.Message, tt.message)
			}
			if s.dst.handed != 0 {
				t.Error("a VF was handed over")
			}
			holder := s.lease(s.to, vfB)
			s.fail(v1alpha1.ReasonPinFailed, c.Message)
			s.expect(v1alpha1.ConditionRolledBack, metav1.ConditionTrue, v1alpha1.ConditionRolledBack)
			s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonReleased)
			if strings.Contains(holder, "launcher-other") != (s.lease(s.to, vfB) == holder) {
				t.Errorf("the VF was leased to %q, then to %q", holder, s.lease(s.to, vfB))
			}
		})
	}
}

func TestWaitsForTheTargetsDeviceProcess(t *testing.T) {
	s := boot(t)
	s.tPod = s.pod("launcher-target", "b", vfB, "vmim-uid")
	s.migration = s.migrate("m", s.sPod, s.tPod)
	eventually(t, "the condition tells what is waited for", func() bool {
		c := meta.FindStatusCondition(s.get().Status.Conditions, v1alpha1.ConditionTargetPinned)
		return c != nil && c.Status == metav1.ConditionUnknown && strings.Contains(c.Message, "the device process of pod default/launcher-target is not there yet")
	})
	s.dst, s.stopDst = startDevice(t, s.to.podsDir, s.tPod.UID)
	s.switchOver()
	s.succeed()
}

func TestStateRejected(t *testing.T) {
	s := boot(t)
	s.begin()
	s.dst.set(func() { s.dst.reject = "checksum does not match" })
	s.switchOver()
	c := s.expect(v1alpha1.ConditionCaptured, metav1.ConditionFalse, v1alpha1.ReasonStateRejected)
	if !strings.Contains(c.Message, "checksum does not match") {
		t.Errorf("message %q", c.Message)
	}
	if !strings.Contains(s.src.vetoed, "checksum does not match") || s.src.released {
		t.Errorf("the stop was not vetoed: %q", s.src.vetoed)
	}
	s.rolledBack(v1alpha1.ReasonStateRejected)
}

func TestPeerDownAtTheSwitchover(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	s.status(func(m *vfMigration) {}) // the source's worker has read its bounds by now
	s.to.kill()
	s.switchOver()
	s.expect(v1alpha1.ConditionCaptured, metav1.ConditionFalse, v1alpha1.ReasonPeerUnavailable)
	if s.src.vetoed == "" {
		t.Error("the stop was not vetoed")
	}
	s.to.start()
	s.rolledBack(v1alpha1.ReasonPeerUnavailable)
}

func TestSourceDownAtTheCommit(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	eventually(t, "the VM stops", s.src.vmStops)
	s.expect(v1alpha1.ConditionCaptured, metav1.ConditionTrue, v1alpha1.ConditionCaptured)
	s.from.kill()
	if !s.dst.vmWantsToStart() {
		t.Fatal("the target does not hold its start")
	}
	s.expect(v1alpha1.ConditionRestored, metav1.ConditionFalse, v1alpha1.ReasonPeerUnavailable)
	if s.dst.count("Activate") != 0 {
		t.Error("the target activated without the source's consent")
	}
	s.from.start()
	s.rolledBack(v1alpha1.ReasonPeerUnavailable)
}

func TestRestoreFails(t *testing.T) {
	s := boot(t)
	s.begin()
	s.dst.set(func() { s.dst.activateError = status.Error(codes.Aborted, "VFRDH reads 0 after 17 was written") })
	s.switchOver()
	c := s.expect(v1alpha1.ConditionRestored, metav1.ConditionFalse, v1alpha1.ReasonRestoreFailed)
	if !strings.Contains(c.Message, "VFRDH reads 0 after 17 was written") {
		t.Errorf("message %q", c.Message)
	}
	if !s.src.is(pb.Phase_PHASE_RELINQUISHED) {
		t.Errorf("source in %s", s.src.phase)
	}
	s.rolledBack(v1alpha1.ReasonRestoreFailed)
}

// A PF that does not do as it is told about the VM's MAC: the VM stays, or
// comes back, and its MAC with it.
func TestMACStays(t *testing.T) {
	for _, side := range []string{"source", "target"} {
		t.Run(side, func(t *testing.T) {
			s := boot(t)
			s.begin()
			s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
			at := map[string]*labNode{"source": s.from, "target": s.to}[side].host
			set := func(err error) {
				at.mu.Lock()
				defer at.mu.Unlock()
				at.answerError = err
			}
			set(errors.New("the PF says no"))
			s.switchOver()
			reason := map[string]string{"source": v1alpha1.ReasonPeerUnavailable, "target": v1alpha1.ReasonRestoreFailed}[side]
			c := s.expect(v1alpha1.ConditionRestored, metav1.ConditionFalse, reason)
			if !strings.Contains(c.Message, "the PF says no") {
				t.Errorf("message %q", c.Message)
			}
			if s.dst.count("Activate") != 0 {
				t.Error("the target's VFs were enabled")
			}
			set(nil)
			s.rolledBack(reason)
		})
	}
}

// A VM whose VF was taken away has nothing to go back to, and that is told.
func TestSourceHasLostItsVF(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	s.src.set(func() { s.src.lost = true })
	s.fail(v1alpha1.ReasonMigrationFailed, "see the conditions")
	c := s.expect(v1alpha1.ConditionRolledBack, metav1.ConditionFalse, v1alpha1.ReasonDeviceUnavailable)
	if !strings.Contains(c.Message, "VF "+vfA+" was taken away on node a") {
		t.Errorf("message %q", c.Message)
	}
}

// A target that was withdrawn answers no more, though its VF cannot be
// released yet.
func TestWithdrawnTargetAnswersNoMore(t *testing.T) {
	s := boot(t)
	s.begin()
	s.dst.set(func() { s.dst.activateError = status.Error(codes.Aborted, "no") })
	release := func(err error) {
		s.to.host.mu.Lock()
		defer s.to.host.mu.Unlock()
		s.to.host.releaseError = err
	}
	release(errors.New("busy"))
	s.switchOver()
	s.fail(v1alpha1.ReasonRestoreFailed, "see the conditions")
	s.expect(v1alpha1.ConditionRolledBack, metav1.ConditionTrue, v1alpha1.ConditionRolledBack)
	release(nil)
	s.rolledBack(v1alpha1.ReasonRestoreFailed)
}

func TestAPIServerAway(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	s.lab.api(errAPIDown)
	defer s.lab.api(nil)
	// The cache has the migration, which here is the same as the API server:
	// so only the part that needs neither is seen without.
	eventually(t, "the VM stops", s.src.vmStops)
	eventually(t, "the stop is decided", func() bool {
		s.src.mu.Lock()
		defer s.src.mu.Unlock()
		return s.src.released || s.src.vetoed != ""
	})
	s.lab.api(nil)
	if s.src.vetoed == "" {
		t.Error("the target accepted a state for a migration that it could not look up")
	}
	s.expect(v1alpha1.ConditionCaptured, metav1.ConditionFalse, v1alpha1.ReasonPeerUnavailable)
	s.rolledBack(v1alpha1.ReasonPeerUnavailable)
}

func TestTargetIsLostWhileItsAgentIsAway(t *testing.T) {
	s := boot(t)
	s.begin()
	s.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
	s.to.kill()
	s.stopDst()
	s.to.start()
	c := s.expect(v1alpha1.ConditionRestored, metav1.ConditionFalse, v1alpha1.ReasonDeviceUnavailable)
	if !strings.Contains(c.Message, "pod launcher-target on the target node b") {
		t.Errorf("message %q", c.Message)
	}
	s.rolledBack(v1alpha1.ReasonMigrationFailed)
}

func TestOrphanIsCleared(t *testing.T) {
	s := boot(t)
	s.src.set(func() { s.src.phase, s.src.uid = pb.Phase_PHASE_SOURCE_PREPARED, "long gone" })
	s.begin()
	s.switchOver()
	s.succeed()
}

// TestOthersPreparationStands: only what no VFMigration wants is cleared.
func TestOthersPreparationStands(t *testing.T) {
	s := boot(t)
	s.create(&vfMigration{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "other", UID: "other-uid"}, Spec: v1alpha1.VFMigrationSpec{VMIName: "vm"}})
	s.src.set(func() { s.src.phase, s.src.uid = pb.Phase_PHASE_SOURCE_PREPARED, "other-uid" })
	s.begin()
	c := s.expect(v1alpha1.ConditionPrepared, metav1.ConditionFalse, v1alpha1.ReasonDeviceUnavailable)
	if !strings.Contains(c.Message, "prepared for VFMigration other") || !s.src.is(pb.Phase_PHASE_SOURCE_PREPARED) {
		t.Errorf("message %q, phase %s", c.Message, s.src.phase)
	}
}
