package controllers

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// allowPostCopy lets the whole cluster use it.
func (f *fixture) allowPostCopy() *fixture {
	kv := &virtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: "kubevirt", Name: "kubevirt"}}
	kv.Spec.Configuration.MigrationConfiguration = &virtv1.MigrationConfiguration{AllowPostCopy: new(true)}
	f.others = append(f.others, kv)
	return f
}

// hardware makes the VM's VF one behind kernel VFIO.
func (f *fixture) hardware() *fixture {
	f.vfnodes["node-a"].Status.PFs[0].Backend = "vfio"
	return f
}

// sample makes the VM one that is like the sample.
func (f *fixture) sample() *fixture {
	b, err := os.ReadFile(filepath.Join("..", "config", "samples", "kubevirt", "virtual-machine.yaml"))
	if err != nil {
		panic(err)
	}
	vm := &virtv1.VirtualMachine{}
	if err := yaml.UnmarshalStrict(b, vm); err != nil {
		panic(err)
	}
	f.vmi.Spec = vm.Spec.Template.Spec
	return f
}

// unfit makes a node's QEMU one that cannot attach VFs.
func (f *fixture) unfit(node string, status metav1.ConditionStatus) *fixture {
	f.vfnodes[node].Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionQEMU, Status: status,
		Reason: v1alpha1.ReasonVFIOUserMissing, Message: "no device vfio-user-pci", LastTransitionTime: at(0)}}
	return f
}

var guardCases = map[string]struct {
	f      func() *fixture
	reason string
	text   string
}{
	"all well":                       {newFixture, "", ""},
	"hardware":                       {func() *fixture { return newFixture().hardware() }, "", ""},
	"hardware, the VM is the sample": {func() *fixture { return newFixture().hardware().sample() }, "", ""},
	"post-copy": {func() *fixture { return newFixture().allowPostCopy() }, v1alpha1.ReasonPostCopyAllowed,
		"KubeVirt kubevirt/kubevirt (spec.configuration.migrations) allows post-copy"},
	"no fit QEMU":       {func() *fixture { return newFixture().unfit("node-b", metav1.ConditionFalse) }, v1alpha1.ReasonIncompatible, "node-b: no device"},
	"QEMU not seen":     {func() *fixture { return newFixture().unfit("node-b", metav1.ConditionUnknown) }, "", ""},
	"the source's QEMU": {func() *fixture { return newFixture().unfit("node-a", metav1.ConditionFalse) }, "", ""},
	"no free VF":        {func() *fixture { return newFixture().occupied() }, v1alpha1.ReasonNoFreeVF, "no node has enough free VFs"},
}

// What KubeVirt does not know to be dangerous is refused in preflight.
func TestGuards(t *testing.T) {
	for name, tc := range guardCases {
		t.Run(name, func(t *testing.T) {
			f := tc.f()
			c := f.start(t)
			if _, err := c.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			got, text := "", ""
			if failure := c.vfm(t).Status.Failure; failure != nil {
				got, text = failure.Reason, failure.Message
			}
			if got != tc.reason || !strings.Contains(text, tc.text) {
				t.Errorf("refused for %q: %q, want %q: %q", got, text, tc.reason, tc.text)
			}
		})
	}
}

// The same verdicts are on the VMI for admission policies, and go away with
// their causes.
func TestBlocked(t *testing.T) {
	for name, tc := range guardCases {
		t.Run(name, func(t *testing.T) {
			f := tc.f()
			f.vfm = nil
			c := f.start(t)
			r := &GuardReconciler{VFMigrationReconciler: c.r}
			assess := func() *virtv1.VirtualMachineInstance {
				t.Helper()
				res, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(f.vmi)})
				if err != nil || res.RequeueAfter != assessInterval {
					t.Fatal(res, err)
				}
				vmi := &virtv1.VirtualMachineInstance{}
				if err := c.Get(t.Context(), client.ObjectKeyFromObject(f.vmi), vmi); err != nil {
					t.Fatal(err)
				}
				return vmi
			}
			vmi := assess()
			why := vmi.Annotations[kubevirt.AnnotationMigrationBlocked]
			if vmi.Labels[kubevirt.LabelVF] != "true" || tc.reason == "" && why != "" ||
				tc.reason != "" && (!strings.HasPrefix(why, tc.reason+": ") || !strings.Contains(why, tc.text)) {
				t.Errorf("labels %v, blocked for %q", vmi.Labels, why)
			}
			events := len(c.rec.events)
			if (events == 1) != (tc.reason != "") {
				t.Errorf("events %v", c.rec.events)
			}
			version := vmi.ResourceVersion
			if vmi = assess(); vmi.ResourceVersion != version || len(c.rec.events) != events {
				t.Errorf("the same verdict was written or told twice: %v", c.rec.events)
			}
			if tc.reason != v1alpha1.ReasonNoFreeVF {
				return
			}
			f.vfnodes["node-b"].Status.PFs[0].VFs[0].Holder = ""
			n := &v1alpha1.VFNode{}
			if err := c.Get(t.Context(), client.ObjectKey{Name: "node-b"}, n); err != nil {
				t.Fatal(err)
			}
			n.Status.PFs[0].VFs[0].Holder = ""
			if err := c.Update(t.Context(), n); err != nil {
				t.Fatal(err)
			}
			if why, left := assess().Annotations[kubevirt.AnnotationMigrationBlocked]; left {
				t.Errorf("still blocked for %q", why)
			}
		})
	}
}

func TestNotAssessed(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*virtv1.VirtualMachineInstance)
		after  time.Duration
	}{
		"no VF":       {func(v *virtv1.VirtualMachineInstance) { v.Spec.Domain.Devices.Interfaces = nil }, 0},
		"not running": {func(v *virtv1.VirtualMachineInstance) { v.Status.Phase = virtv1.Scheduled }, 0},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture().occupied()
			f.vfm = nil
			tc.change(f.vmi)
			c := f.start(t)
			r := &GuardReconciler{VFMigrationReconciler: c.r}
			res, err := r.Reconcile(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(f.vmi)})
			if err != nil || res.RequeueAfter != tc.after {
				t.Error(res, err)
			}
			vmi := &virtv1.VirtualMachineInstance{}
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(f.vmi), vmi); err != nil || len(vmi.Labels)+len(vmi.Annotations)+len(c.rec.events) != 0 {
				t.Errorf("%v, %v, %v, %v", vmi.Labels, vmi.Annotations, c.rec.events, err)
			}
		})
	}
}

// A VM that is being moved gets no verdict, whoever moves it: what its target
// holds is its own. The one that it had is taken away.
func TestNotBlockedOnItsWay(t *testing.T) {
	for name, change := range map[string]func(*fixture){
		"KubeVirt has begun": func(f *fixture) {
			start := at(0)
			f.vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{StartTimestamp: &start}
		},
		"VFMigration": func(f *fixture) { f.vfm = accepted().vfm },
		"VirtualMachineInstanceMigration": func(f *fixture) {
			f.others = append(f.others, otherVMIM("other", "vm", virtv1.MigrationScheduling))
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture().occupied()
			f.vfm = nil
			f.vmi.Annotations = map[string]string{kubevirt.AnnotationMigrationBlocked: "NoFreeVF: of before"}
			change(f)
			c := f.start(t)
			if why := c.blocked(t); why != "" || len(c.rec.events) != 0 {
				t.Errorf("blocked for %q, told %v", why, c.rec.events)
			}
		})
	}
	// Those of others, and those that have ended, are no reason.
	f := newFixture().occupied()
	f.vfm.Spec.VMIName = "vm2"
	ended := otherVFM("ended", 0)
	setCondition(&ended.Status, v1alpha1.ConditionSucceeded, metav1.ConditionTrue, "Succeeded", "", 0)
	f.others = append(f.others, ended, otherVMIM("other", "vm", virtv1.MigrationSucceeded), otherVMIM("vm2", "vm2", virtv1.MigrationRunning))
	if why := f.start(t).blocked(t); !strings.HasPrefix(why, "NoFreeVF: ") {
		t.Errorf("blocked for %q", why)
	}
}

// blocked has the VMI assessed and returns what is found on it then.
func (c *cluster) blocked(t *testing.T) string {
	t.Helper()
	key := client.ObjectKey{Namespace: testNamespace, Name: "vm"}
	res, err := (&GuardReconciler{VFMigrationReconciler: c.r}).Reconcile(t.Context(), ctrl.Request{NamespacedName: key})
	if err != nil || res.RequeueAfter != assessInterval {
		t.Fatal(res, err)
	}
	vmi := &virtv1.VirtualMachineInstance{}
	if err := c.Get(t.Context(), key, vmi); err != nil {
		t.Fatal(err)
	}
	return vmi.Annotations[kubevirt.AnnotationMigrationBlocked]
}

// Post-copy that KubeVirt has settled on for this very migration ends it, as
// long as that helps.
func TestPostCopyIsNoticed(t *testing.T) {
	for name, tc := range map[string]struct {
		f    *fixture
		want string
	}{
		"prepared": {reached(v1alpha1.ConditionPrepared, virtv1.MigrationTargetReady), v1alpha1.ReasonPostCopyAllowed},
		"restored": {reached(v1alpha1.ConditionRestored, virtv1.MigrationRunning), ""},
	} {
		for allowed, want := range map[bool]string{true: tc.want, false: ""} {
			f := tc.f
			f.vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "vmim-uid",
				VMIMConfigurationOptions: &virtv1.VMIMConfigurationOptions{AllowPostCopy: &allowed}}
			c := f.start(t)
			if _, err := c.reconcile(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := ""
			if failure := c.vfm(t).Status.Failure; failure != nil {
				got = failure.Reason
			}
			if got != want {
				t.Errorf("%s, allowed %v: failure %q, want %q", name, allowed, got, want)
			}
		}
	}
}

func TestWorthAssessing(t *testing.T) {
	base := newFixture().vmi
	for name, tc := range map[string]struct {
		change func(*virtv1.VirtualMachineInstance)
		want   bool
	}{
		"nothing": {func(v *virtv1.VirtualMachineInstance) { v.ResourceVersion = "9" }, false},
		"phase":   {func(v *virtv1.VirtualMachineInstance) { v.Status.Phase = virtv1.Failed }, true},
		"node":    {func(v *virtv1.VirtualMachineInstance) { v.Status.NodeName = "node-b" }, true},
		"label":   {func(v *virtv1.VirtualMachineInstance) { v.Labels = map[string]string{kubevirt.LabelVF: "true"} }, true},
		"annotation": {func(v *virtv1.VirtualMachineInstance) {
			v.Annotations = map[string]string{kubevirt.AnnotationMigrationBlocked: ""}
		}, false},
		"migration": {func(v *virtv1.VirtualMachineInstance) {
			v.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{}
		}, true},
	} {
		changed := base.DeepCopy()
		tc.change(changed)
		if got := worthAssessing(event.UpdateEvent{ObjectOld: base, ObjectNew: changed}); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	m := newFixture().vfm
	over := m.DeepCopy()
	setCondition(&over.Status, v1alpha1.ConditionSucceeded, metav1.ConditionFalse, "NoFreeVF", "", 0)
	if beganOrEnded(event.UpdateEvent{ObjectOld: m, ObjectNew: m}) || !beganOrEnded(event.UpdateEvent{ObjectOld: m, ObjectNew: over}) {
		t.Error("the end of a VFMigration, and nothing else of it, is worth it")
	}
	if reqs := subject(t.Context(), m); len(reqs) != 1 || reqs[0].NamespacedName != client.ObjectKeyFromObject(base) {
		t.Errorf("VFMigration %s is of %v", m.Name, reqs)
	}
	if !worthAssessing(event.UpdateEvent{ObjectOld: &corev1.Pod{}, ObjectNew: &corev1.Pod{}}) {
		t.Error("what is not understood is not assessed")
	}
}
