package controllers

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

const (
	testNamespace   = "vms"
	systemNamespace = "compsc-system"
)

// t0 is when everything in a fixture happened; the clock stands a second later.
var t0 = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func at(d time.Duration) metav1.Time { return metav1.NewTime(t0.Add(d).Local()) }

// fixture is a cluster of two nodes, with a VM on node-a and a VFMigration of it.
type fixture struct {
	vfm       *v1alpha1.VFMigration
	vmi       *virtv1.VirtualMachineInstance
	vmim      *virtv1.VirtualMachineInstanceMigration
	sourcePod *corev1.Pod
	targetPod *corev1.Pod
	nodes     map[string]*corev1.Node
	vfnodes   map[string]*v1alpha1.VFNode
	leases    map[string]*coordinationv1.Lease
	others    []client.Object
	funcs     interceptor.Funcs
	clock     *clocktesting.FakePassiveClock
}

func newFixture() *fixture {
	f := &fixture{
		vfm: &v1alpha1.VFMigration{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: testNamespace, Name: "move", UID: "vfm-uid", Generation: 3,
				CreationTimestamp: at(0), Finalizers: []string{v1alpha1.VFMigrationFinalizer},
			},
			Spec: v1alpha1.VFMigrationSpec{VMIName: "vm"},
		},
		vmi: &virtv1.VirtualMachineInstance{
			ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: "vm", UID: "vmi-uid", CreationTimestamp: at(-time.Hour)},
			Status:     virtv1.VirtualMachineInstanceStatus{Phase: virtv1.Running, NodeName: "node-a"},
		},
		sourcePod: launcher("launcher-a", "node-a"),
		nodes:     map[string]*corev1.Node{},
		vfnodes:   map[string]*v1alpha1.VFNode{},
		leases:    map[string]*coordinationv1.Lease{},
		clock:     clocktesting.NewFakePassiveClock(t0.Add(time.Second)),
	}
	f.vmi.Spec.Domain.Devices.Interfaces = []virtv1.Interface{
		{Name: "default"},
		{Name: "fast", Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}},
	}
	for i, name := range []string{"node-a", "node-b"} {
		f.addNode(name)
		if i == 0 {
			f.vfnodes[name].Status.PFs[0].VFs[0].Holder = testNamespace + "/launcher-a"
		}
	}
	return f
}

func launcher(name, node string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: testNamespace, Name: name, UID: types.UID(name + "-uid"), CreationTimestamp: at(0),
			Labels: map[string]string{kubevirt.LabelApp: kubevirt.AppLauncher, kubevirt.LabelCreatedBy: "vmi-uid"},
		},
		Spec:   corev1.PodSpec{NodeName: node},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

// addNode adds a node with two VFs, and an agent that renewed its lease at t0.
func (f *fixture) addNode(name string) {
	f.nodes[name] = &corev1.Node{ObjectMeta: metav1.ObjectMeta{
		Name: name, Labels: map[string]string{kubevirt.LabelHostname: name, "zone": "z-" + name},
	}}
	f.vfnodes[name] = &v1alpha1.VFNode{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: v1alpha1.VFNodeStatus{PFs: []v1alpha1.PFStatus{{Name: "pf0", Backend: "model", VFs: []v1alpha1.VFStatus{
			{Address: "0000:01:10.0", DeviceID: "8086:10ed"},
			{Address: "0000:01:10.2", DeviceID: "8086:10ed"},
		}}}},
	}
	holder, seconds, renewed := "agent-of-"+name, int32(10), metav1.NewMicroTime(t0)
	f.leases[name] = &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: systemNamespace, Name: v1alpha1.AgentLeaseName(name), Labels: map[string]string{v1alpha1.LabelAgent: "true"},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &renewed},
	}
}

// dropNode removes a node and all that is known of it.
func (f *fixture) dropNode(name string) {
	delete(f.nodes, name)
	delete(f.vfnodes, name)
	delete(f.leases, name)
}

// accepted is the fixture once the migration was accepted at t0.
func accepted() *fixture {
	f := newFixture()
	start := at(0)
	f.vfm.Status = v1alpha1.VFMigrationStatus{
		ObservedGeneration: 3, Phase: v1alpha1.PhasePinning, StartTime: &start,
		Source: &v1alpha1.VFMigrationEndpoint{NodeName: "node-a", PodName: "launcher-a", PodUID: "launcher-a-uid"},
	}
	f.condition(v1alpha1.ConditionAccepted, metav1.ConditionTrue, v1alpha1.ConditionAccepted, "Everything known beforehand allows the migration.")
	f.condition(v1alpha1.ConditionSucceeded, metav1.ConditionUnknown, v1alpha1.ReasonProgressing, "The migration is under way.")
	return f
}

// migrating is the fixture once KubeVirt has a target pod on node-b.
func migrating(phase virtv1.VirtualMachineInstanceMigrationPhase) *fixture {
	f := accepted()
	isController := true
	f.vmim = &virtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: testNamespace, Name: "move", UID: "vmim-uid", Labels: map[string]string{kubevirt.LabelVFMigrationUID: "vfm-uid"},
			Finalizers: []string{virtv1.VirtualMachineInstanceMigrationFinalizer},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: v1alpha1.GroupVersion.String(), Kind: "VFMigration", Name: "move", UID: "vfm-uid", Controller: &isController,
			}},
		},
		Spec:   virtv1.VirtualMachineInstanceMigrationSpec{VMIName: "vm"},
		Status: virtv1.VirtualMachineInstanceMigrationStatus{Phase: phase},
	}
	f.targetPod = launcher("launcher-b", "node-b")
	f.targetPod.Labels[kubevirt.LabelMigrationJobUID] = "vmim-uid"
	f.vfm.Status.MigrationRef = &v1alpha1.MigrationReference{Name: "move", UID: "vmim-uid"}
	f.vfm.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "node-b", PodName: "launcher-b", PodUID: "launcher-b-uid"}
	return f
}

// reached is the fixture once the agents reported every condition up to last.
func reached(last string, phase virtv1.VirtualMachineInstanceMigrationPhase) *fixture {
	f := migrating(phase)
	for _, step := range []struct {
		typ   string
		phase v1alpha1.VFMigrationPhase
	}{
		{v1alpha1.ConditionTargetPinned, v1alpha1.PhasePreparing},
		{v1alpha1.ConditionPrepared, v1alpha1.PhaseCopying},
		{v1alpha1.ConditionCaptured, v1alpha1.PhaseSwitching},
		{v1alpha1.ConditionRestored, v1alpha1.PhaseVerifying},
		{v1alpha1.ConditionVerified, v1alpha1.PhaseVerifying},
	} {
		f.condition(step.typ, metav1.ConditionTrue, step.typ, "")
		f.vfm.Status.Phase = step.phase
		if step.typ == last {
			break
		}
	}
	return f
}

// failing makes f a migration that is being undone since t0.
func (f *fixture) failing() *fixture {
	f.vfm.Status.Failure = &v1alpha1.VFMigrationFailure{Reason: v1alpha1.ReasonAborted, Message: "spec.abort was set", Time: at(0)}
	f.vfm.Status.Phase = v1alpha1.PhaseRollingBack
	f.condition(v1alpha1.ConditionSucceeded, metav1.ConditionUnknown, v1alpha1.ReasonRollingBack, "Being undone: spec.abort was set")
	return f
}

// condition sets a condition as of t0.
func (f *fixture) condition(typ string, status metav1.ConditionStatus, reason, message string) {
	setCondition(&f.vfm.Status, typ, status, reason, message, 0)
}

func setCondition(st *v1alpha1.VFMigrationStatus, typ string, status metav1.ConditionStatus, reason, message string, when time.Duration) {
	meta.SetStatusCondition(&st.Conditions, metav1.Condition{
		Type: typ, Status: status, Reason: reason, Message: message, ObservedGeneration: 3, LastTransitionTime: at(when),
	})
}

// objects are the fixture's objects, those that are nil left out.
func (f *fixture) objects() []client.Object {
	objs := append([]client.Object{}, f.others...)
	if f.vfm != nil {
		objs = append(objs, f.vfm)
	}
	if f.vmi != nil {
		objs = append(objs, f.vmi)
	}
	if f.vmim != nil {
		objs = append(objs, f.vmim)
	}
	for _, p := range []*corev1.Pod{f.sourcePod, f.targetPod} {
		if p != nil {
			objs = append(objs, p)
		}
	}
	for _, n := range f.nodes {
		objs = append(objs, n)
	}
	for _, n := range f.vfnodes {
		objs = append(objs, n)
	}
	for _, l := range f.leases {
		objs = append(objs, l)
	}
	return objs
}

// recorder keeps events as "kind type reason: note".
type recorder struct{ events []string }

func (r *recorder) Eventf(regarding, _ runtime.Object, typ, reason, _, note string, args ...any) {
	kind := "VFMigration"
	switch regarding.(type) {
	case *virtv1.VirtualMachineInstance:
		kind = "VMI"
	case *virtv1.VirtualMachineInstanceMigration:
		kind = "VMIM"
	}
	r.events = append(r.events, fmt.Sprintf("%s %s %s: %s", kind, typ, reason, fmt.Sprintf(note, args...)))
}

// cluster is a fixture's objects behind a fake API server, and a reconciler.
type cluster struct {
	client.WithWatch
	r   *VFMigrationReconciler
	rec *recorder
}

func (f *fixture) start(t *testing.T) *cluster {
	t.Helper()
	scheme, err := newScheme()
	if err != nil {
		t.Fatal(err)
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(f.objects()...).
		WithStatusSubresource(&v1alpha1.VFMigration{}, &virtv1.VirtualMachineInstanceMigration{}).
		WithInterceptorFuncs(f.funcs).Build()
	rec := &recorder{}
	return &cluster{c, &VFMigrationReconciler{Client: c, Live: c, Recorder: rec, Clock: f.clock, Namespace: systemNamespace}, rec}
}

func (c *cluster) reconcile(ctx context.Context) (ctrl.Result, error) {
	return c.r.Reconcile(ctx, ctrl.Request{NamespacedName: types.NamespacedName{Namespace: testNamespace, Name: "move"}})
}

// vfm reads the VFMigration, also one that is being deleted.
func (c *cluster) vfm(t *testing.T) *v1alpha1.VFMigration {
	t.Helper()
	m := &v1alpha1.VFMigration{}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: testNamespace, Name: "move"}, m); err != nil {
		t.Fatal(err)
	}
	return m
}

// exists reads an object of the test's namespace; one that is being deleted
// counts as gone.
func (c *cluster) exists(t *testing.T, obj client.Object, name string) bool {
	t.Helper()
	err := c.Get(t.Context(), client.ObjectKey{Namespace: testNamespace, Name: name}, obj)
	if err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	return err == nil && obj.GetDeletionTimestamp().IsZero()
}

// expect is what one reconcile of a fixture must come to.
type expect struct {
	// status is what becomes of the status.
	status func(*v1alpha1.VFMigrationStatus)
	events []string
	after  time.Duration
	// vmimGone and podGone: these were deleted.
	vmimGone, podGone bool
}

// check reconciles f once and compares everything with want.
func (f *fixture) check(t *testing.T, want expect) {
	t.Helper()
	wantStatus := f.vfm.Status.DeepCopy()
	if want.status != nil {
		want.status(wantStatus)
	}
	c := f.start(t)
	res, err := c.reconcile(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if res.RequeueAfter != want.after {
		t.Errorf("requeued after %s, want %s", res.RequeueAfter, want.after)
	}
	if diff := cmp.Diff(*wantStatus, c.vfm(t).Status); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want.events, c.rec.events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	if f.vmim != nil && c.exists(t, &virtv1.VirtualMachineInstanceMigration{}, "move") == want.vmimGone {
		t.Errorf("VirtualMachineInstanceMigration gone: %t, want %t", !want.vmimGone, want.vmimGone)
	}
	if f.targetPod != nil && c.exists(t, &corev1.Pod{}, f.targetPod.Name) == want.podGone {
		t.Errorf("target pod gone: %t, want %t", !want.podGone, want.podGone)
	}
	if f.sourcePod != nil && !c.exists(t, &corev1.Pod{}, f.sourcePod.Name) {
		t.Error("the source pod was deleted")
	}
}

func typeString(o any) string { return fmt.Sprintf("%T", o) }
