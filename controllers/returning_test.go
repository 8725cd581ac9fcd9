package controllers

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// left makes the fixture one whose VM has just come from node-b, where its pod
// of before is ending.
func left() *fixture {
	f := newFixture().occupied()
	f.holder().Labels[kubevirt.LabelCreatedBy] = "vmi-uid"
	f.holder().Annotations = map[string]string{kubevirt.AnnotationVMIName: "vm"}
	start, end := at(-10*time.Second), at(0)
	f.vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{StartTimestamp: &start, EndTimestamp: &end, Completed: true, SourcePod: "other"}
	return f
}

// holder is the pod that holds node-b's VFs.
func (f *fixture) holder() *corev1.Pod {
	for _, o := range f.others {
		if p, ok := o.(*corev1.Pod); ok && p.Name == "other" {
			return p
		}
	}
	return nil
}

// finished has the holder's containers end.
func (f *fixture) finished(when time.Duration) *fixture {
	p := f.holder()
	p.Status.Phase = corev1.PodSucceeded
	p.Status.ContainerStatuses = []corev1.ContainerStatus{
		{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: at(when)}}},
		{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: at(when - time.Hour)}}},
	}
	return f
}

// deleted has the holder be one that must have ended then.
func (f *fixture) deleted(when time.Duration) *fixture {
	p, t := f.holder(), at(when)
	p.DeletionTimestamp, p.Finalizers = &t, []string{"x/y"}
	return f
}

// A VF of a pod that is ending is neither free nor taken: a migration that
// needs it waits, and the VM is not said to be blocked; but not for ever.
func TestReturning(t *testing.T) {
	for name, tc := range map[string]struct {
		f     func() *fixture
		waits bool
	}{
		"the VM has left it":          {left, true},
		"the VM left it long ago":     {func() *fixture { f := left(); *f.vmi.Status.MigrationState.EndTimestamp = at(-time.Minute); return f }, false},
		"the VM is about to leave it": {func() *fixture { f := left(); f.vmi.Status.MigrationState.EndTimestamp = nil; return f }, false},
		"the VM's other pod":          {func() *fixture { f := left(); f.holder().Labels[kubevirt.LabelCreatedBy] = "older-uid"; return f }, false},
		"of a VM that never moved":    {func() *fixture { f := left(); f.vmi.Status.MigrationState = nil; return f }, false},
		"ended":                       {func() *fixture { return newFixture().occupied().finished(0) }, true},
		"ended long ago":              {func() *fixture { return newFixture().occupied().finished(-time.Minute) }, false},
		"being deleted":               {func() *fixture { return newFixture().occupied().deleted(30 * time.Second) }, true},
		"being deleted for long":      {func() *fixture { return newFixture().occupied().deleted(-2 * time.Minute) }, false},
		"being deleted, but not soon": {func() *fixture { return newFixture().occupied().deleted(time.Hour) }, false},
		"gone":                        {func() *fixture { f := newFixture().occupied(); f.others = nil; return f }, true},
		"runs":                        {func() *fixture { return newFixture().occupied() }, false},
		"not a pod":                   {func() *fixture { f := newFixture().occupied(); f.heldBy("somebody/else/here"); return f }, false},
		"one of two":                  {func() *fixture { f := newFixture().occupied().finished(0); f.heldBy("vms/launcher-a"); return f }, true},
		"one of two that are needed":  {func() *fixture { return f2(newFixture().occupied().finished(0), "vms/launcher-a") }, false},
		"both of two that are needed": {func() *fixture { return f2(newFixture().occupied().finished(0), "vms/other") }, true},
		"what comes back is of no use": {func() *fixture {
			f := left()
			f.vfnodes["node-b"].Status.PFs[0].VFs[0].Obstacle = "broken"
			f.heldBy("vms/launcher-a")
			f.vfnodes["node-b"].Status.PFs[0].VFs[1].Obstacle = ""
			return f
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := tc.f()
			c := f.start(t)
			res, err := c.reconcile(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			m := c.vfm(t)
			a := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionAccepted)
			if tc.waits {
				if a == nil || a.Status != metav1.ConditionUnknown || !strings.HasPrefix(a.Message, "Waiting: no node has enough free VFs yet (node-b: ") || res.RequeueAfter != returnLook {
					t.Errorf("%+v, %v, want to wait", a, res)
				}
			} else if a == nil || a.Status != metav1.ConditionFalse || a.Reason != v1alpha1.ReasonNoFreeVF && a.Reason != v1alpha1.ReasonIncompatible {
				t.Errorf("%+v, want a refusal", a)
			}
			f = tc.f()
			f.vfm = nil
			if f.vmi.Status.MigrationState != nil && f.vmi.Status.MigrationState.EndTimestamp == nil {
				return // on its way, no verdict
			}
			if why := f.start(t).blocked(t); (why == "") != tc.waits {
				t.Errorf("the VMI is blocked for %q", why)
			}
		})
	}
}

// heldBy changes the holder of node-b's second VF.
func (f *fixture) heldBy(holder string) {
	f.vfnodes["node-b"].Status.PFs[0].VFs[1].Holder = holder
}

// f2 has the VM need two VFs, and node-b's second one held by somebody.
func f2(f *fixture, holder string) *fixture {
	f.vmi.Spec.Domain.Devices.Interfaces = append(f.vmi.Spec.Domain.Devices.Interfaces,
		virtv1.Interface{Name: "second", Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}})
	f.vfnodes["node-a"].Status.PFs[0].VFs[1].Holder = "vms/launcher-a"
	f.heldBy(holder)
	return f
}

// The wait ends with the VF, or with the migration's patience.
func TestWaitForReturn(t *testing.T) {
	t.Run("back", func(t *testing.T) {
		c := left().start(t)
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		n := &v1alpha1.VFNode{}
		if err := c.Get(t.Context(), client.ObjectKey{Name: "node-b"}, n); err != nil {
			t.Fatal(err)
		}
		n.Status.PFs[0].VFs[0].Holder = ""
		if err := c.Update(t.Context(), n); err != nil {
			t.Fatal(err)
		}
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
		if m := c.vfm(t); !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionAccepted) {
			t.Errorf("status %+v", m.Status)
		}
	})
	for name, tc := range map[string]struct {
		age   time.Duration // of the VFMigration
		begun time.Duration // before now, by KubeVirt; 0 for not
		waits bool
	}{
		"young":               {age: 58 * time.Second, waits: true},
		"old":                 {age: time.Minute},
		"old, but just begun": {age: time.Hour, begun: time.Second, waits: true},
		"begun long ago":      {age: time.Hour, begun: time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			f := queued(virtv1.MigrationScheduling).occupied().finished(0)
			f.vfm.CreationTimestamp = metav1.NewTime(f.clock.Now().Add(-tc.age))
			f.vmim.Status.PhaseTransitionTimestamps = nil
			if tc.begun != 0 {
				f.vmim.Status.PhaseTransitionTimestamps = []virtv1.VirtualMachineInstanceMigrationPhaseTransitionTimestamp{
					{Phase: virtv1.MigrationScheduling, PhaseTransitionTimestamp: metav1.NewTime(f.clock.Now().Add(-tc.begun))},
				}
			}
			c := f.start(t)
			if _, err := c.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			m := c.vfm(t)
			if waits := m.Status.Failure == nil; waits != tc.waits {
				t.Errorf("status %+v", m.Status)
			}
		})
	}
}

// Who asks beforehand is told of the wait.
func TestPreflightOfReturning(t *testing.T) {
	f := left()
	c := f.start(t)
	v, err := Preflight(t.Context(), c, f.clock, systemNamespace, f.vfm)
	if err != nil || !v.Accepted || !strings.HasPrefix(v.Message, "It would wait: no node has enough free VFs yet") {
		t.Errorf("%+v, %v", v, err)
	}
}
