package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/agent/kubevirt/nodehook/hookpb"
	"compsc.io/compsc/api/v1alpha1"
)

// serveHooks serves the node's hooks and returns how virt-handler calls them:
// it connects anew for each call.
func (n *labNode) serveHooks() func(point nodehook.Point, change ...func(*virtv1.VirtualMachineInstance)) error {
	t := n.lab.t
	t.Helper()
	path := filepath.Join(t.TempDir(), "compsc.sock")
	n.listenForHooks(path)
	return func(point nodehook.Point, change ...func(*virtv1.VirtualMachineInstance)) error {
		t.Helper()
		vmi := &virtv1.VirtualMachineInstance{}
		if err := n.lab.client.Get(context.Background(), client.ObjectKey{Namespace: ns, Name: "vm"}, vmi); err != nil && !errors.Is(err, errAPIDown) {
			t.Fatal(err)
		}
		vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "vmim-uid"}
		for _, f := range change {
			f(vmi)
		}
		text, err := json.Marshal(vmi)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		call, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_, err = hookpb.NewNodeHookServiceClient(conn).ExecuteNodeHook(call, &hookpb.ExecuteNodeHookRequest{
			HookPoint: string(point), Vmi: text, NodeContext: &hookpb.NodeContext{NodeName: n.name}})
		return err
	}
}

// listenForHooks serves the node's hooks at a socket, until the returned
// function is called, at the test's end at the latest.
func (n *labNode) listenForHooks(path string) (stop func()) {
	t := n.lab.t
	t.Helper()
	l, err := nodehook.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- nodehook.NewServer(n.name, lateAgent{n}, n.agent.log).Serve(ctx, l) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

// lateAgent is the node's agent of the moment: it may be restarted.
type lateAgent struct{ n *labNode }

func (l lateAgent) NodeHook(ctx context.Context, c *nodehook.Call) error {
	l.n.mu.Lock()
	a := l.n.agent
	l.n.mu.Unlock()
	return a.NodeHook(ctx, c)
}

// expectHook checks a hook's answer: its code and part of its text.
func expectHook(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || err != nil && !strings.Contains(err.Error(), text) {
		t.Fatalf("the hook answers %v, want %s with %q", err, code, text)
	}
}

// goesOn repeats a call as virt-handler does, until it is answered well.
func goesOn(t *testing.T, what string, call func() error) {
	t.Helper()
	eventually(t, what, func() bool {
		err := call()
		if code := status.Code(err); err != nil && code != codes.Unavailable {
			t.Fatalf("%s: %v", what, err)
		}
		return err == nil
	})
}

// follow makes m the VFMigration of KubeVirt's migration vmim-uid.
func (s *scene) follow() {
	s.t.Helper()
	s.status(func(m *vfMigration) {
		m.Status.MigrationRef = &v1alpha1.MigrationReference{Name: "vmim", UID: "vmim-uid"}
	})
}

// TestHooksInOrder calls the hooks in virt-handler's order, each before its
// time has come and once more afterwards, and restarts the agent in between.
func TestHooksInOrder(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &scene{from: l.nodes["a"], to: l.nodes["b"], migration: &migration{lab: l}}
	s.from.start()
	s.to.start()
	atSource, atTarget := s.from.serveHooks(), s.to.serveHooks()
	l.vmi(nil)
	expectHook(t, atSource(nodehook.PreVMStart), codes.Unavailable, "VMI vm has no pod on node a")
	s.sPod = l.pod("launcher-source", "a", vfA, "")
	expectHook(t, atSource(nodehook.PreVMStart), codes.Unavailable, "launcher-source")
	s.src, s.stopSrc = startDevice(t, s.from.podsDir, s.sPod.UID)
	goesOn(t, "the VM starts", func() error { return atSource(nodehook.PreVMStart) })
	if !s.src.is(pb.Phase_PHASE_RUNNING) {
		t.Error("the VM starts without its VFs")
	}
	expectHook(t, atSource(nodehook.PostVMStart), codes.OK, "")

	expectHook(t, atTarget(nodehook.PreMigrationTarget), codes.Unavailable, "has no VFMigration")
	s.begin()
	expectHook(t, atTarget(nodehook.PreMigrationTarget), codes.Unavailable, "has no VFMigration")
	s.follow()
	goesOn(t, "the target is prepared", func() error { return atTarget(nodehook.PreMigrationTarget) })
	if s.dst.is(pb.Phase_PHASE_TARGET_SILENT) {
		t.Error("KubeVirt prepares a target that CompSC has not")
	}
	s.to.restart()
	goesOn(t, "the same, after a restart of the target's agent", func() error { return atTarget(nodehook.PreMigrationTarget) })
	goesOn(t, "the source may send", func() error { return atSource(nodehook.PreMigrationSource) })
	if !s.src.is(pb.Phase_PHASE_SOURCE_PREPARED) {
		t.Error("KubeVirt migrates under a gate that is not armed")
	}
	s.from.restart()
	goesOn(t, "the same, after a restart of the source's agent", func() error { return atSource(nodehook.PreMigrationSource) })
	if n := s.src.count("PrepareSource"); n > 3 {
		t.Errorf("%d preparations", n)
	}
	s.switchOver()
	expectHook(t, atSource(nodehook.PreMigrationSource), codes.OK, "")
	expectHook(t, atTarget(nodehook.PostMigrationTarget), codes.OK, "")
	expectHook(t, atTarget(nodehook.PostMigrationTarget), codes.OK, "")
	s.succeed()
	expectHook(t, atTarget(nodehook.PostMigrationTarget), codes.OK, "")
	for _, p := range []nodehook.Point{nodehook.PreVMStop, nodehook.PostVMStop} {
		expectHook(t, atTarget(p), codes.OK, "")
	}
}

// TestHooksRefuse has reasons for a migration not to go on, and checks that
// nothing has been asked of the source's device process.
func TestHooksRefuse(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(*scene)
		change  func(*virtv1.VirtualMachineInstance)
		code    codes.Code
		text    string
	}{
		"no VFMigration": {func(s *scene) {}, nil, codes.Unavailable, "has no VFMigration; see that the compsc manager runs"},
		"another's":      {func(s *scene) { s.made("other", func(*vfMigration) {}) }, nil, codes.Unavailable, "has no VFMigration"},
		"not accepted":   {func(s *scene) { s.made("vmim-uid", func(*vfMigration) {}) }, nil, codes.Unavailable, "waits to be accepted"},
		"adopted, not accepted": {func(s *scene) {
			s.create(&vfMigration{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "m", UID: "m-uid"}, Spec: v1alpha1.VFMigrationSpec{
				VMIName: "vm", MigrationRef: &v1alpha1.MigrationReference{Name: "vmim", UID: "vmim-uid"}}})
		}, nil, codes.Unavailable, "waits to be accepted"},
		"being undone": {func(s *scene) {
			s.made("vmim-uid", func(m *vfMigration) {
				m.Status.Failure = &v1alpha1.VFMigrationFailure{Reason: v1alpha1.ReasonAborted, Message: "spec.abort was set", Time: metav1.Now()}
			})
		}, nil, codes.FailedPrecondition, "is being undone: Aborted: spec.abort was set"},
		"over": {func(s *scene) {
			s.made("vmim-uid", func(m *vfMigration) { setFalse(m, v1alpha1.ConditionSucceeded, v1alpha1.ReasonTimeout, "late") })
		}, nil, codes.FailedPrecondition, "is over"},
		"other nodes": {func(s *scene) {
			s.made("vmim-uid", func(m *vfMigration) {
				m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "c", PodName: "p", PodUID: "u"}
				m.Status.Target = m.Status.Source
			})
		}, nil, codes.FailedPrecondition, "abort it"},
		"no device process": {func(s *scene) {
			s.made("vmim-uid", func(m *vfMigration) {
				m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "a", PodName: "gone", PodUID: "u"}
				m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "b", PodName: "gone", PodUID: "u"}
			})
		}, nil, codes.Unavailable, "the device process of pod gone"},
		"post-copy": {func(s *scene) {}, func(v *virtv1.VirtualMachineInstance) {
			v.Status.MigrationState.VMIMConfigurationOptions = &virtv1.VMIMConfigurationOptions{AllowPostCopy: new(true)}
		}, codes.FailedPrecondition, "post-copy is allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			s := boot(t)
			tc.prepare(s)
			var change []func(*virtv1.VirtualMachineInstance)
			if tc.change != nil {
				change = append(change, tc.change)
			}
			expectHook(t, s.from.serveHooks()(nodehook.PreMigrationSource, change...), tc.code, tc.text)
			expectHook(t, s.to.serveHooks()(nodehook.PreMigrationTarget, change...), tc.code, tc.text)
			// The VM is there already: nothing is gained by holding KubeVirt.
			expectHook(t, s.to.serveHooks()(nodehook.PostMigrationTarget, change...), codes.OK, "")
			s.untouched()
		})
	}
}

// untouched checks that nothing was asked of the source's device process that
// has to do with a migration.
func (s *scene) untouched() {
	s.t.Helper()
	s.src.mu.Lock()
	defer s.src.mu.Unlock()
	for method, n := range s.src.calls {
		if method != "Status" {
			s.t.Errorf("%d calls of %s to the source's device process", n, method)
		}
	}
	if s.src.phase != pb.Phase_PHASE_RUNNING {
		s.t.Errorf("the source's device process is in %s", s.src.phase)
	}
}

type noReader struct{ client.Reader }

func (noReader) List(context.Context, client.ObjectList, ...client.ListOption) error {
	return errAPIDown
}

func TestHookWithoutAPIServer(t *testing.T) {
	a := &agent{node: "a", live: noReader{}, log: slog.New(slog.DiscardHandler)}
	vmi := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "vm", UID: "vmi-uid"}}
	vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "vmim-uid"}
	call := func(p nodehook.Point) error {
		return a.NodeHook(t.Context(), &nodehook.Call{Point: p, VMI: vmi, Migration: "vmim-uid"})
	}
	for _, p := range []nodehook.Point{nodehook.PreMigrationSource, nodehook.PreMigrationTarget} {
		expectHook(t, call(p), codes.Unavailable, "VFMigrations cannot be read: the API server is away")
	}
	expectHook(t, call(nodehook.PostMigrationTarget), codes.OK, "")
}

// made creates the VFMigration of KubeVirt's migration with that UID.
func (s *scene) made(uid types.UID, f func(*vfMigration)) {
	s.t.Helper()
	s.create(&vfMigration{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "m", UID: "m-uid"}, Spec: v1alpha1.VFMigrationSpec{VMIName: "vm"}})
	s.name = "m"
	s.status(func(m *vfMigration) {
		m.Status.MigrationRef = &v1alpha1.MigrationReference{Name: "vmim", UID: uid}
		f(m)
	})
}

// TestHookHalfPrepared has a device process that is prepared, but for another
// migration, or without the target's verdict.
func TestHookHalfPrepared(t *testing.T) {
	s := boot(t)
	atSource := s.from.serveHooks()
	s.made("vmim-uid", func(m *vfMigration) {
		m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "a", PodName: s.sPod.Name, PodUID: s.sPod.UID}
		m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "b", PodName: "launcher-target", PodUID: "none"}
		setTrue(m, v1alpha1.ConditionPrepared, "of a story that is not true")
	})
	s.src.set(func() { s.src.phase, s.src.uid = pb.Phase_PHASE_SOURCE_PREPARED, "other" })
	expectHook(t, atSource(nodehook.PreMigrationSource), codes.Unavailable, "is in PHASE_SOURCE_PREPARED")
	s.src.set(func() { s.src.uid = "m-uid" })
	expectHook(t, atSource(nodehook.PreMigrationSource), codes.OK, "")
	s.status(func(m *vfMigration) { setUnknown(m, v1alpha1.ConditionPrepared, v1alpha1.ReasonProgressing, "asking") })
	expectHook(t, atSource(nodehook.PreMigrationSource), codes.Unavailable, "node b has not accepted the VFs yet")
}

// TestHookAfterAbort aborts once both hooks have let KubeVirt go on: they must
// not a second time, and the VM's VFs work on at the source.
func TestHookAfterAbort(t *testing.T) {
	s := boot(t)
	atSource, atTarget := s.from.serveHooks(), s.to.serveHooks()
	s.begin()
	s.follow()
	goesOn(t, "the target is prepared", func() error { return atTarget(nodehook.PreMigrationTarget) })
	goesOn(t, "the source may send", func() error { return atSource(nodehook.PreMigrationSource) })
	s.fail(v1alpha1.ReasonAborted, "spec.abort was set")
	expectHook(t, atTarget(nodehook.PreMigrationTarget), codes.FailedPrecondition, "is being undone: Aborted")
	expectHook(t, atSource(nodehook.PreMigrationSource), codes.FailedPrecondition, "is being undone: Aborted")
	s.rolledBack(v1alpha1.ReasonAborted)
	if s.src.count("AwaitCapture") > 0 && s.src.vmStops() {
		t.Error("the source's VFs are captured after the abort")
	}
	if n := s.src.count("ReleaseSource") + s.src.count("Relinquish"); n != 0 {
		t.Errorf("%d calls that touch the guest", n)
	}
}

// launch makes a process of the node's that looks like the pod's virt-launcher,
// with a root directory in which there is the given QEMU.
func (n *labNode) launch(pid string, pod *corev1.Pod, qemu string) {
	n.lab.t.Helper()
	dir := filepath.Join(n.procDir, pid)
	bin := filepath.Join(dir, "root", "usr", "libexec")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		n.lab.t.Fatal(err)
	}
	for path, text := range map[string]string{
		filepath.Join(dir, "comm"):     "virt-launcher-m\n",
		filepath.Join(dir, "cgroup"):   "0::/kubepods.slice/kubepods-pod" + strings.ReplaceAll(string(pod.UID), "-", "_") + ".slice/x\n",
		filepath.Join(bin, "qemu-kvm"): qemu,
	} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			n.lab.t.Fatal(err)
		}
	}
}

// TestQEMUWithoutVFIOUser finds out what the virt-launcher image lacks before a VM
// starts with it, and before one is moved into it.
func TestQEMUWithoutVFIOUser(t *testing.T) {
	s := boot(t)
	atSource := s.from.serveHooks()
	condition := func(n *labNode) string {
		node := &v1alpha1.VFNode{}
		if err := s.client.Get(t.Context(), client.ObjectKey{Name: n.name}, node); err != nil {
			return ""
		}
		for _, c := range node.Status.Conditions {
			if c.Type == v1alpha1.ConditionQEMU {
				return string(c.Status) + " " + c.Reason
			}
		}
		return ""
	}
	eventually(t, "nothing is known", func() bool { return condition(s.from) == "Unknown NotSeen" })
	s.from.launch("41", s.sPod, "\x7fELF vfio-user-pci\x00")
	expectHook(t, atSource(nodehook.PreVMStart), codes.OK, "")
	eventually(t, "a QEMU that can", func() bool { return condition(s.from) == "True VFIOUserPresent" })

	s.tPod = s.pod("launcher-target", "b", vfB, "vmim-uid")
	s.to.launch("42", s.tPod, "\x7fELF vfio-pci\x00")
	s.dst, s.stopDst = startDevice(t, s.to.podsDir, s.tPod.UID)
	s.migration = s.migrate("m", s.sPod, s.tPod)
	c := s.expect(v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonIncompatible)
	if !strings.Contains(c.Message, "no device vfio-user-pci") {
		t.Errorf("message %q", c.Message)
	}
	eventually(t, "a QEMU that cannot", func() bool { return condition(s.to) == "False VFIOUserMissing" })
	if n := s.src.count("PrepareSource"); n != 0 {
		t.Errorf("the source was prepared %d times", n)
	}

	s.from.launch("41", s.sPod, "\x7fELF vfio-pci, another build\x00")
	expectHook(t, atSource(nodehook.PreVMStart), codes.FailedPrecondition, "no device vfio-user-pci")

	// A virt-launcher that is gone says nothing of the next, which may have
	// another image.
	s.tPod.Status.Phase = corev1.PodFailed
	if err := s.client.Status().Update(t.Context(), s.tPod); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod that ended to be forgotten", func() bool { return condition(s.to) == "Unknown NotSeen" })
}

// TestNewestQEMU: of several virt-launchers with VFs the newest tells what the
// next will have.
func TestNewestQEMU(t *testing.T) {
	s := boot(t)
	s.from.kill()
	a := s.from.agent
	a.client = s.client // the killed agent's writes nothing
	born := metav1.Now()
	var pods []*corev1.Pod
	for i, qemu := range []string{"vfio-user-pci", "vfio-pci", "vfio-user-pci"} {
		p := s.pod(fmt.Sprintf("launcher-%d", i), "a", vfB, "")
		p.CreationTimestamp = metav1.NewTime(born.Add(time.Duration(i) * time.Minute))
		s.from.launch(strconv.Itoa(50+i), p, "\x7fELF "+qemu+"\x00")
		pods = append(pods, p)
	}
	condition := func() metav1.Condition {
		a.found.mu.Lock()
		defer a.found.mu.Unlock()
		return a.qemuCondition(t.Context())
	}
	for i, want := range []string{v1alpha1.ReasonVFIOUserPresent, v1alpha1.ReasonVFIOUserMissing, v1alpha1.ReasonVFIOUserPresent} {
		if _, err := a.hasVFIOUser(pods[i]); err != nil {
			t.Fatal(err)
		}
		if c := condition(); c.Reason != want {
			t.Errorf("after pod %d: %+v", i, c)
		}
	}
	if err := s.client.Delete(t.Context(), pods[2]); err != nil {
		t.Fatal(err)
	}
	if c := condition(); c.Reason != v1alpha1.ReasonVFIOUserMissing || !strings.Contains(c.Message, "pod "+ns+"/launcher-1: ") {
		t.Errorf("the newest is gone: %+v", c)
	}
	// Its name is another pod's now.
	if err := s.client.Delete(t.Context(), pods[1]); err != nil {
		t.Fatal(err)
	}
	again := pods[1].DeepCopy()
	again.UID, again.ResourceVersion = "another", ""
	if err := s.client.Create(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	if c := condition(); c.Reason != v1alpha1.ReasonVFIOUserPresent || len(a.found.looks) != 1 {
		t.Errorf("the first is left: %+v, %v", c, a.found.looks)
	}
}
