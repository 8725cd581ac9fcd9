package controllers

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// adopt makes f's migration one that somebody else created: the
// VirtualMachineInstanceMigration "drain", linked already.
func (f *fixture) adopt() *fixture {
	ref := &v1alpha1.MigrationReference{Name: "drain", UID: "vmim-uid"}
	f.vfm.Spec.MigrationRef = ref
	if f.vfm.Status.MigrationRef != nil {
		f.vfm.Status.MigrationRef = ref
	}
	f.vmim.Name, f.vmim.OwnerReferences = "drain", nil
	f.vmim.Annotations = map[string]string{kubevirt.AnnotationVFMigration: "move"}
	return f
}

// queued is an adopted migration that was not accepted yet.
func queued(phase virtv1.VirtualMachineInstanceMigrationPhase) *fixture {
	f := migrating(phase).adopt()
	f.vfm.Status = v1alpha1.VFMigrationStatus{}
	return f
}

// occupied takes the last free VFs.
func (f *fixture) occupied() *fixture {
	f.other("node-b")
	for i := range f.vfnodes["node-b"].Status.PFs[0].VFs {
		f.vfnodes["node-b"].Status.PFs[0].VFs[i].Holder = "vms/other"
	}
	return f
}

// other adds the pod vms/other, of another VM, on the node.
func (f *fixture) other(node string) *corev1.Pod {
	pod := launcher("other", node)
	pod.Labels[kubevirt.LabelCreatedBy] = "other-uid"
	f.others = append(f.others, pod)
	return pod
}

func (c *cluster) vmim(t *testing.T, name string) *virtv1.VirtualMachineInstanceMigration {
	t.Helper()
	m := &virtv1.VirtualMachineInstanceMigration{}
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: testNamespace, Name: name}, m); err != nil {
		t.Fatal(err)
	}
	return m
}

// One that KubeVirt has queued waits, and is judged when its turn has come.
func TestAdoptedWaitsForKubeVirt(t *testing.T) {
	for _, phase := range []virtv1.VirtualMachineInstanceMigrationPhase{virtv1.MigrationPhaseUnset, virtv1.MigrationPending} {
		f := queued(phase).occupied()
		c := f.start(t)
		if res, err := c.reconcile(t.Context()); err != nil || res != (ctrl.Result{}) {
			t.Fatalf("phase %q: %v, %v", phase, res, err)
		}
		st := c.vfm(t).Status
		if st.Phase != v1alpha1.PhasePending || st.Failure != nil || st.StartTime != nil || isTerminal(c.vfm(t)) {
			t.Errorf("phase %q: %+v", phase, st)
		}
	}
	for _, phase := range []virtv1.VirtualMachineInstanceMigrationPhase{virtv1.MigrationScheduling, virtv1.MigrationPreparingTarget} {
		f := queued(phase)
		f.vmim.Annotations, f.vmim.Labels = nil, nil
		c := f.start(t)
		for range 2 {
			if _, err := c.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		m := c.vfm(t)
		if st := m.Status; st.Phase != v1alpha1.PhasePinning || st.MigrationRef == nil || st.MigrationRef.UID != "vmim-uid" ||
			st.Target == nil || st.Target.PodName != "launcher-b" {
			t.Errorf("phase %q: %+v", phase, st)
		}
		vmim := c.vmim(t, "drain")
		if vmim.Labels[kubevirt.LabelVFMigrationUID] != "vfm-uid" || vmim.Annotations[kubevirt.AnnotationVFMigration] != "move" ||
			vmim.Annotations[kubevirt.AnnotationFailure] != "" {
			t.Errorf("labels %v, annotations %v", vmim.Labels, vmim.Annotations)
		}
		var list virtv1.VirtualMachineInstanceMigrationList
		if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 1 {
			t.Errorf("%d VirtualMachineInstanceMigrations, %v", len(list.Items), err)
		}
	}
}

// A refused one is stopped before KubeVirt touches the VM, in such a way that
// KubeVirt knows it for a failed one; the reason is on every object.
func TestAdoptedRefusal(t *testing.T) {
	f := queued(virtv1.MigrationScheduling).occupied()
	c := f.start(t)
	if _, err := c.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := c.vfm(t)
	if m.Status.Failure == nil || m.Status.Failure.Reason != v1alpha1.ReasonNoFreeVF || isTerminal(m) {
		t.Fatalf("status %+v", m.Status)
	}
	note := "NoFreeVF: " + m.Status.Failure.Message
	want := []string{"VMI Warning PreflightFailed: " + note, "VMIM Warning PreflightFailed: " + note, "VFMigration Warning PreflightFailed: " + note}
	if diff := cmp.Diff(want, c.rec.events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	res, err := c.reconcile(t.Context())
	if err != nil || res.RequeueAfter != stopGrace {
		t.Errorf("%v, %v", res, err)
	}
	vmim := c.vmim(t, "drain")
	if vmim.DeletionTimestamp != nil || vmim.Annotations[kubevirt.AnnotationFailure] != note {
		t.Errorf("deleted %v, annotations %v", vmim.DeletionTimestamp, vmim.Annotations)
	}
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(f.targetPod), f.targetPod); err == nil {
		t.Error("the target pod is left")
	}
	if isTerminal(c.vfm(t)) {
		t.Error("ended before KubeVirt stopped")
	}
	vmim.Status.Phase = virtv1.MigrationFailed
	if err := c.Status().Update(t.Context(), vmim); err != nil {
		t.Fatal(err)
	}
	if _, err := c.reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	m = c.vfm(t)
	if s := m.Status; s.Phase != v1alpha1.PhaseFailed || s.Failure.Reason != v1alpha1.ReasonNoFreeVF || s.StartTime != nil {
		t.Errorf("status %+v", s)
	}
	if len(c.rec.events) != len(want) {
		t.Errorf("told twice: %v", c.rec.events)
	}
}

// Where the loss of its target pod does not end it, it is deleted.
func TestAdoptedIsStopped(t *testing.T) {
	for _, tc := range []struct {
		name    string
		phase   virtv1.VirtualMachineInstanceMigrationPhase
		reason  string
		since   time.Duration
		deleted bool
		podGone bool
	}{
		{"failed while scheduling", virtv1.MigrationScheduling, v1alpha1.ReasonPinFailed, 0, false, true},
		{"failed once prepared", virtv1.MigrationTargetReady, v1alpha1.ReasonIncompatible, 0, false, true},
		{"KubeVirt does not act", virtv1.MigrationTargetReady, v1alpha1.ReasonIncompatible, stopGrace, true, true},
		{"failed in pre-copy", virtv1.MigrationRunning, v1alpha1.ReasonPeerUnavailable, 0, true, false},
		{"aborted while pending", virtv1.MigrationPending, v1alpha1.ReasonAborted, 0, true, true},
		{"aborted once prepared", virtv1.MigrationTargetReady, v1alpha1.ReasonAborted, 0, true, true},
		{"aborted in pre-copy", virtv1.MigrationRunning, v1alpha1.ReasonAborted, 0, true, false},
		{"VFMigration deleted", virtv1.MigrationScheduled, v1alpha1.ReasonDeleted, 0, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := migrating(tc.phase).adopt().failing()
			f.vfm.Status.Failure.Reason = tc.reason
			f.clock.SetTime(t0.Add(tc.since))
			c := f.start(t)
			if _, err := c.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := c.vmim(t, "drain").DeletionTimestamp != nil; got != tc.deleted {
				t.Errorf("VirtualMachineInstanceMigration deleted: %t, want %t", got, tc.deleted)
			}
			if got := c.Get(t.Context(), client.ObjectKeyFromObject(f.targetPod), f.targetPod) != nil; got != tc.podGone {
				t.Errorf("target pod deleted: %t, want %t", got, tc.podGone)
			}
		})
	}
}

// Deleting the VirtualMachineInstanceMigration asks for an undo, up to the
// point of no return.
func TestAdoptedDeletionAborts(t *testing.T) {
	deleted := func(f *fixture) *fixture {
		when := at(0)
		f.vmim.DeletionTimestamp = &when
		return f
	}
	for name, tc := range map[string]struct {
		f    *fixture
		want string
	}{
		"queued":        {deleted(queued(virtv1.MigrationPending)), v1alpha1.ReasonAborted},
		"scheduling":    {deleted(migrating(virtv1.MigrationScheduling).adopt()), v1alpha1.ReasonAborted},
		"target ready":  {deleted(reached(v1alpha1.ConditionPrepared, virtv1.MigrationTargetReady).adopt()), v1alpha1.ReasonAborted},
		"captured":      {deleted(reached(v1alpha1.ConditionCaptured, virtv1.MigrationRunning).adopt()), v1alpha1.ReasonAborted},
		"restored":      {deleted(reached(v1alpha1.ConditionRestored, virtv1.MigrationRunning).adopt()), ""},
		"failed for it": {deleted(reached(v1alpha1.ConditionPrepared, virtv1.MigrationFailed).adopt()), v1alpha1.ReasonAborted},
		"already ended": {deleted(reached(v1alpha1.ConditionVerified, virtv1.MigrationSucceeded).adopt()), ""},
		"gone": {func() *fixture {
			f := reached(v1alpha1.ConditionPrepared, virtv1.MigrationRunning).adopt()
			f.vmim = nil
			return f
		}(), v1alpha1.ReasonAborted},
		"another of its name": {func() *fixture {
			f := queued(virtv1.MigrationScheduling)
			f.vmim.UID = "other"
			return f
		}(), v1alpha1.ReasonAborted},
		"to another cluster": {func() *fixture {
			f := queued(virtv1.MigrationScheduling)
			f.vmim.Spec.SendTo = &virtv1.VirtualMachineInstanceMigrationSource{MigrationID: "m"}
			return f
		}(), v1alpha1.ReasonDecentralized},
		"ended unseen": {queued(virtv1.MigrationFailed), v1alpha1.ReasonMigrationFailed},
	} {
		t.Run(name, func(t *testing.T) {
			c := tc.f.start(t)
			if _, err := c.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := ""
			if failure := c.vfm(t).Status.Failure; failure != nil {
				got = failure.Reason
			}
			if got != tc.want {
				t.Errorf("failure %q, want %q", got, tc.want)
			}
		})
	}
}

func TestAdoption(t *testing.T) {
	vmim := func() *virtv1.VirtualMachineInstanceMigration {
		return &virtv1.VirtualMachineInstanceMigration{
			ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: "kubevirt-evacuation-abcde", UID: "0123456789"},
			Spec:       virtv1.VirtualMachineInstanceMigrationSpec{VMIName: "vm"},
		}
	}
	many := map[string]string{}
	for i := range maxSelector + 1 {
		many[fmt.Sprint("k", i)] = "v"
	}
	for name, tc := range map[string]struct {
		change func(*fixture, *virtv1.VirtualMachineInstanceMigration)
		want   string
		target *v1alpha1.VFMigrationTarget
	}{
		"evacuation": {nil, "kubevirt-evacuation-abcde-01234567", nil},
		"with selector": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) {
			m.Spec.AddedNodeSelector = map[string]string{"zone": "b"}
		}, "kubevirt-evacuation-abcde-01234567", &v1alpha1.VFMigrationTarget{NodeSelector: map[string]string{"zone": "b"}}},
		"with large selector": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) { m.Spec.AddedNodeSelector = many },
			"kubevirt-evacuation-abcde-01234567", nil},
		"with long name": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) { m.Name = strings.Repeat("n", 253) },
			strings.Repeat("n", 244) + "-01234567", nil},
		"owned by something else": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) {
			m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: "u", Controller: new(true)}}
		}, "kubevirt-evacuation-abcde-01234567", nil},
		"of a VFMigration": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) {
			m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "compsc.io/v1alpha1", Kind: "VFMigration", Name: "p", UID: "u", Controller: new(true)}}
		}, "", nil},
		"ended": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) { m.Status.Phase = virtv1.MigrationFailed }, "", nil},
		"deleted": {func(_ *fixture, m *virtv1.VirtualMachineInstanceMigration) {
			when := at(0)
			m.DeletionTimestamp, m.Finalizers = &when, []string{"f"}
		}, "", nil},
		"VM without VF": {func(f *fixture, _ *virtv1.VirtualMachineInstanceMigration) {
			f.vmi.Spec.Domain.Devices.Interfaces = f.vmi.Spec.Domain.Devices.Interfaces[:1]
		}, "", nil},
		"no VM": {func(f *fixture, _ *virtv1.VirtualMachineInstanceMigration) { f.vmi = nil }, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			f, m := newFixture(), vmim()
			f.vfm = nil
			if tc.change != nil {
				tc.change(f, m)
			}
			f.others = append(f.others, m)
			c := f.start(t)
			r := &AdoptionReconciler{Client: c, Live: c, Recorder: c.rec}
			for range 2 { // and not twice
				if _, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(m)}); err != nil {
					t.Fatal(err)
				}
			}
			var list v1alpha1.VFMigrationList
			if err := c.List(t.Context(), &list); err != nil {
				t.Fatal(err)
			}
			if tc.want == "" {
				if len(list.Items) != 0 || len(c.rec.events) != 0 {
					t.Errorf("%v, events %v", list.Items, c.rec.events)
				}
				return
			}
			if len(list.Items) != 1 || len(c.rec.events) != 1 || !strings.HasPrefix(c.rec.events[0], "VMIM Normal MigrationAdopted: ") {
				t.Fatalf("%d VFMigrations, events %v", len(list.Items), c.rec.events)
			}
			got := list.Items[0]
			if !slices.Equal(got.Finalizers, []string{v1alpha1.VFMigrationFinalizer}) {
				t.Errorf("finalizers %v", got.Finalizers)
			}
			if got.Name != tc.want || got.Labels[kubevirt.LabelMigrationUID] != "0123456789" || got.OwnerReferences[0].UID != "vmi-uid" {
				t.Errorf("%+v", got.ObjectMeta)
			}
			want := v1alpha1.VFMigrationSpec{VMIName: "vm", Target: tc.target, MigrationRef: &v1alpha1.MigrationReference{Name: m.Name, UID: m.UID}}
			if diff := cmp.Diff(want, got.Spec); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
		})
	}
}

// Of what was adopted for a VMI, only the last that ended are kept.
func TestPrune(t *testing.T) {
	f := newFixture()
	f.vfm = nil
	add := func(i int, change func(*v1alpha1.VFMigration)) {
		m := &v1alpha1.VFMigration{
			ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: fmt.Sprint("old-", i), UID: types.UID(fmt.Sprint(i)),
				CreationTimestamp: at(time.Duration(i) * time.Second), Labels: map[string]string{kubevirt.LabelMigrationUID: "u"}},
			Spec: v1alpha1.VFMigrationSpec{VMIName: "vm", MigrationRef: &v1alpha1.MigrationReference{Name: "m", UID: "u"}},
		}
		setCondition(&m.Status, v1alpha1.ConditionSucceeded, metav1.ConditionFalse, v1alpha1.ReasonNoFreeVF, "", 0)
		if change != nil {
			change(m)
		}
		f.others = append(f.others, m)
	}
	add(0, func(m *v1alpha1.VFMigration) { m.Spec.VMIName = "other" })
	add(1, func(m *v1alpha1.VFMigration) { m.Status.Conditions = nil })                // under way
	add(2, func(m *v1alpha1.VFMigration) { m.Labels, m.Spec.MigrationRef = nil, nil }) // a user's
	for i := 3; i < 3+keptAdopted+2; i++ {
		add(i, nil)
	}
	vmim := &virtv1.VirtualMachineInstanceMigration{ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: "new", UID: "0123456789"},
		Spec: virtv1.VirtualMachineInstanceMigrationSpec{VMIName: "vm"}}
	f.others = append(f.others, vmim)
	c := f.start(t)
	r := &AdoptionReconciler{Client: c, Live: c, Recorder: c.rec}
	if _, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(vmim)}); err != nil {
		t.Fatal(err)
	}
	var list v1alpha1.VFMigrationList
	if err := c.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range list.Items {
		got = append(got, m.Name)
	}
	want := []string{"new-01234567", "old-0", "old-1", "old-2", "old-5", "old-6", "old-7", "old-8", "old-9"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}
