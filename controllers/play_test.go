//go:build apiserver

package controllers

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"github.com/onsi/gomega"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// patience bounds every wait of a play. Nothing takes nearly as long.
const patience = 20 * time.Second

// play is one migration against the real API server, in which the test plays
// KubeVirt and the agents, and the manager is the product's.
type play struct {
	*testing.T
	*gomega.WithT
	ns, source, target string
	// vfmName and vmimName are the names of what is followed.
	vfmName, vmimName string
	stop              func()
}

// newPlay lays out two nodes and a running VM, and starts the manager.
func newPlay(t *testing.T) *play {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "vms-"}}
	if err := admin.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	p := &play{T: t, WithT: gomega.NewWithT(t), ns: ns.Name, source: ns.Name + "-a", target: ns.Name + "-b",
		vfmName: "move", vmimName: "move"}
	for _, node := range []string{p.source, p.target} {
		p.createNode(node)
	}
	vmi := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: p.ns, Name: "vm"}}
	vmi.Spec.Domain.Devices.Interfaces = []virtv1.Interface{{Name: "fast", Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}}}
	vmi.Status = virtv1.VirtualMachineInstanceStatus{Phase: virtv1.Running, NodeName: p.source}
	p.create(vmi)
	p.createLauncher("launcher-a", p.source, vmi, "")
	p.startManager()
	t.Cleanup(func() { p.stop() })
	return p
}

func (p *play) create(obj client.Object) {
	p.Helper()
	p.Expect(admin.Create(p.Context(), obj)).To(gomega.Succeed())
}

func (p *play) createNode(name string) {
	p.Helper()
	n := &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.create(n)
	p.Cleanup(func() { // or the next play's VM could go there
		p.Expect(client.IgnoreNotFound(admin.Delete(context.Background(), n))).To(gomega.Succeed())
	})
	vf := v1alpha1.VFStatus{Address: "0000:01:10.0", DeviceID: "8086:10ed"}
	if name == p.source {
		vf.Holder = p.ns + "/launcher-a"
	}
	n.Status.PFs = []v1alpha1.PFStatus{{Name: "pf0", Backend: "model", VFs: []v1alpha1.VFStatus{vf}}}
	p.Expect(admin.Status().Update(p.Context(), n)).To(gomega.Succeed())
	holder, seconds, now := "agent", int32(3600), metav1.NowMicro()
	p.create(&coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: v1alpha1.AgentLeaseName(name)},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &now},
	})
}

// createLauncher creates a virt-launcher pod. There is no kubelet to end it, so
// it is one that ends at once.
func (p *play) createLauncher(name, node string, vmi *virtv1.VirtualMachineInstance, migration string) {
	p.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.ns, Name: name, Labels: map[string]string{
			kubevirt.LabelApp: kubevirt.AppLauncher, kubevirt.LabelCreatedBy: string(vmi.UID),
		}},
		Spec: corev1.PodSpec{
			NodeName: node, Containers: []corev1.Container{{Name: "compute", Image: "virt-launcher"}}, TerminationGracePeriodSeconds: new(int64),
		},
	}
	if migration != "" {
		pod.Labels[kubevirt.LabelMigrationJobUID] = migration
	}
	p.create(pod)
}

// createHolder creates the pod of another VM, which has a VF of the node.
func (p *play) createHolder(name, node string) {
	p.Helper()
	p.create(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.ns, Name: name},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "compute", Image: "virt-launcher"}}},
	})
}

// endHolder has its containers end, as its kubelet would say.
func (p *play) endHolder(name string) {
	p.Helper()
	pod := &corev1.Pod{}
	p.Expect(p.get(pod, name)).To(gomega.Succeed())
	pod.Status.Phase = corev1.PodSucceeded
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "compute", State: corev1.ContainerState{
		Terminated: &corev1.ContainerStateTerminated{FinishedAt: metav1.Now()}}}}
	p.Expect(admin.Status().Update(p.Context(), pod)).To(gomega.Succeed())
}

// startManager starts the product's manager, with its own rights only.
func (p *play) startManager() {
	p.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{Config: managerConfig, Namespace: systemNamespace, LeaderElection: true, Logger: logr.Discard()})
	}()
	p.stop = func() {
		p.Helper()
		cancel()
		p.stop = func() {}
		select {
		case err := <-done:
			p.Expect(err).NotTo(gomega.HaveOccurred())
		case <-time.After(patience):
			p.Error("the manager does not stop")
		}
	}
}

func (p *play) get(obj client.Object, name string) error {
	return admin.Get(p.Context(), client.ObjectKey{Namespace: p.ns, Name: name}, obj)
}

func (p *play) vfm() *v1alpha1.VFMigration {
	p.Helper()
	m := &v1alpha1.VFMigration{}
	p.Expect(p.get(m, p.vfmName)).To(gomega.Succeed())
	return m
}

// until waits for the VFMigration to look as described.
func (p *play) until(what string, match func(*v1alpha1.VFMigration) bool) *v1alpha1.VFMigration {
	p.Helper()
	var m *v1alpha1.VFMigration
	p.Eventually(func() bool { m = p.vfm(); return match(m) }, patience, 10*time.Millisecond).
		Should(gomega.BeTrue(), func() string { return fmt.Sprintf("%s: %+v", what, p.vfm().Status) })
	return m
}

// reaches waits for a phase.
func (p *play) reaches(phase v1alpha1.VFMigrationPhase) {
	p.Helper()
	p.until("phase "+string(phase), func(m *v1alpha1.VFMigration) bool { return m.Status.Phase == phase })
}

// vmim waits for the VirtualMachineInstanceMigration.
func (p *play) vmim() *virtv1.VirtualMachineInstanceMigration {
	p.Helper()
	vmim := &virtv1.VirtualMachineInstanceMigration{}
	p.Eventually(func() error { return p.get(vmim, p.vmimName) }, patience, 10*time.Millisecond).Should(gomega.Succeed())
	return vmim
}

// kubevirt sets the VirtualMachineInstanceMigration's phase, as virt-controller does.
func (p *play) kubevirt(phase virtv1.VirtualMachineInstanceMigrationPhase) {
	p.Helper()
	p.Expect(retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		vmim := p.vmim()
		if controllerutil.AddFinalizer(vmim, virtv1.VirtualMachineInstanceMigrationFinalizer) {
			if err := admin.Update(p.Context(), vmim); err != nil {
				return err
			}
		}
		vmim.Status.Phase = phase
		return admin.Status().Update(p.Context(), vmim)
	})).To(gomega.Succeed())
}

// agents changes the status as the agents do.
func (p *play) agents(change func(*v1alpha1.VFMigrationStatus)) {
	p.Helper()
	p.Expect(retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		m := p.vfm()
		base := m.DeepCopy()
		change(&m.Status)
		return admin.Status().Patch(p.Context(), m, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{}))
	})).To(gomega.Succeed())
}

func (p *play) report(typ string) {
	p.Helper()
	p.agents(func(st *v1alpha1.VFMigrationStatus) { now(st, typ, metav1.ConditionTrue, typ) })
}

func now(st *v1alpha1.VFMigrationStatus, typ string, status metav1.ConditionStatus, reason string) {
	setCondition(st, typ, status, reason, "", time.Since(t0))
}

// move writes the VMI's node, as virt-handler does when the VM has moved.
func (p *play) move() {
	p.Helper()
	vmi := &virtv1.VirtualMachineInstance{}
	p.Expect(p.get(vmi, "vm")).To(gomega.Succeed())
	vmi.Status.NodeName = p.target
	p.Expect(admin.Update(p.Context(), vmi)).To(gomega.Succeed())
}

// step is what somebody else does, and the phase that the manager sums up then.
type step struct {
	name string
	do   func(*play)
	then v1alpha1.VFMigrationPhase
}

// course is a whole migration. The first committed steps may still be undone.
var course = []step{
	{"create", func(p *play) {
		p.create(&v1alpha1.VFMigration{
			ObjectMeta: metav1.ObjectMeta{Namespace: p.ns, Name: "move"},
			Spec:       v1alpha1.VFMigrationSpec{VMIName: "vm", Target: &v1alpha1.VFMigrationTarget{NodeName: p.target}},
		})
	}, v1alpha1.PhasePinning},
	{"target pod", func(p *play) {
		p.kubevirt(virtv1.MigrationScheduling)
		vmi := &virtv1.VirtualMachineInstance{}
		p.Expect(p.get(vmi, "vm")).To(gomega.Succeed())
		p.createLauncher("launcher-b", p.target, vmi, string(p.vmim().UID))
	}, v1alpha1.PhasePinning},
	{"pinned", func(p *play) {
		p.until("target", func(m *v1alpha1.VFMigration) bool { return m.Status.Target != nil })
		p.report(v1alpha1.ConditionTargetPinned)
	}, v1alpha1.PhasePreparing},
	{"prepared", func(p *play) { p.report(v1alpha1.ConditionPrepared) }, v1alpha1.PhaseCopying},
	{"target ready", func(p *play) { p.kubevirt(virtv1.MigrationTargetReady) }, v1alpha1.PhaseCopying},
	{"running", func(p *play) { p.kubevirt(virtv1.MigrationRunning) }, v1alpha1.PhaseCopying},
	{"captured", func(p *play) { p.report(v1alpha1.ConditionCaptured) }, v1alpha1.PhaseSwitching},
	{"restored", func(p *play) { p.report(v1alpha1.ConditionRestored) }, v1alpha1.PhaseVerifying},
	{"verified", func(p *play) {
		p.agents(func(st *v1alpha1.VFMigrationStatus) {
			now(st, v1alpha1.ConditionVerified, metav1.ConditionTrue, v1alpha1.ConditionVerified)
			st.Downtime = &v1alpha1.Downtime{VMStopped: metav1.Duration{Duration: time.Second}, DeviceStopped: metav1.Duration{Duration: time.Second}}
		})
		p.move()
	}, v1alpha1.PhaseVerifying},
	{"succeeded", func(p *play) { p.kubevirt(virtv1.MigrationSucceeded) }, v1alpha1.PhaseSucceeded},
}

// checkSucceeded checks all that a good migration leaves behind.
func (p *play) checkSucceeded() {
	p.Helper()
	m := p.until("finalizer gone", func(m *v1alpha1.VFMigration) bool { return len(m.Finalizers) == 0 })
	st := m.Status
	if !isTerminal(m) || st.Failure != nil || st.StartTime == nil || st.CompletionTime == nil || st.MigrationRef == nil ||
		st.Source.NodeName != p.source || st.Target.NodeName != p.target || st.Downtime == nil || st.ObservedGeneration != m.Generation {
		p.Errorf("status %+v", st)
	}
	vmim := p.vmim()
	if want := map[string]string{corev1.LabelHostname: p.target}; fmt.Sprint(vmim.Spec.AddedNodeSelector) != fmt.Sprint(want) {
		p.Errorf("the migration may go to %v, want %v", vmim.Spec.AddedNodeSelector, want)
	}
	if !p.exists(&corev1.Pod{}, "launcher-b") {
		p.Error("the target pod is gone")
	}
}

func (p *play) exists(obj client.Object, name string) bool {
	p.Helper()
	err := p.get(obj, name)
	if err != nil && !apierrors.IsNotFound(err) {
		p.Fatal(err)
	}
	return err == nil
}

func (p *play) run(s step) {
	p.Helper()
	s.do(p)
	p.reaches(s.then)
}

func TestMigration(t *testing.T) {
	p := newPlay(t)
	for _, s := range course {
		p.run(s)
	}
	p.checkSucceeded()
	for _, want := range []string{
		"VFMigration MigrationStarted", "VFMigration TargetChosen", "VFMigration MigrationSucceeded",
		"VirtualMachineInstance MigrationStarted", "VirtualMachineInstance MigrationSucceeded",
	} {
		p.Eventually(p.events, patience, 20*time.Millisecond).Should(gomega.ContainElement(want))
	}
}

func (p *play) events() []string {
	var list eventsv1.EventList
	if err := admin.List(p.Context(), &list, client.InNamespace(p.ns)); err != nil {
		return []string{err.Error()}
	}
	var out []string
	for _, e := range list.Items {
		out = append(out, e.Regarding.Kind+" "+e.Reason)
	}
	return out
}

// A new manager goes on where another one stopped, and sees what happened
// while there was none.
func TestRestartInEachPhase(t *testing.T) {
	p := newPlay(t)
	for i, s := range course {
		if i == 0 {
			p.run(s)
			p.vmim() // what the next step needs, the manager must have done
			continue
		}
		if s.name == "pinned" {
			p.until("target", func(m *v1alpha1.VFMigration) bool { return m.Status.Target != nil })
		}
		p.stop()
		s.do(p)
		p.startManager()
		p.reaches(s.then)
	}
	p.checkSucceeded()
}

// undo plays KubeVirt's and the agents' part of an undoing.
func (p *play) undo() {
	p.Helper()
	p.until("failure", func(m *v1alpha1.VFMigration) bool { return m.Status.Failure != nil })
	agents := func() {
		p.agents(func(st *v1alpha1.VFMigrationStatus) {
			now(st, v1alpha1.ConditionTargetPinned, metav1.ConditionFalse, v1alpha1.ReasonReleased)
			now(st, v1alpha1.ConditionRolledBack, metav1.ConditionTrue, v1alpha1.ConditionRolledBack)
		})
	}
	vmim := &virtv1.VirtualMachineInstanceMigration{}
	if p.exists(vmim, p.vmimName) {
		if vmim := p.vmim(); vmim.Status.Phase == virtv1.MigrationRunning && vmim.DeletionTimestamp == nil {
			// The source's agent has QEMU give up, and KubeVirt sees its migration fail.
			agents()
			if p.vmim().DeletionTimestamp != nil {
				p.Error("KubeVirt is asked to abort a migration that is about to fail")
			}
			p.kubevirt(virtv1.MigrationFailed)
			return
		}
		p.Eventually(func() bool { return p.vmim().DeletionTimestamp != nil }, patience, 10*time.Millisecond).Should(gomega.BeTrue())
		vmim = p.vmim()
		if phase := vmim.Status.Phase; phase != virtv1.MigrationRunning {
			p.Eventually(func() bool { return p.exists(&corev1.Pod{}, "launcher-b") }, patience, 10*time.Millisecond).
				Should(gomega.BeFalse(), "the target pod keeps KubeVirt in phase %s", phase)
		} else if !p.exists(&corev1.Pod{}, "launcher-b") {
			p.Error("the target pod of a running migration was deleted")
		}
		p.Expect(retry.RetryOnConflict(retry.DefaultBackoff, func() error {
			vmim = p.vmim()
			vmim.Finalizers = nil
			return admin.Update(p.Context(), vmim)
		})).To(gomega.Succeed())
	}
	if m := p.vfm(); slices.ContainsFunc(m.Status.Conditions, func(c metav1.Condition) bool { return c.Type == v1alpha1.ConditionTargetPinned }) {
		if isTerminal(m) {
			p.Errorf("ended before the agents undid their part: %+v", m.Status)
		}
		agents()
	}
}

// left tells whether KubeVirt's migration is there and has not failed.
func (p *play) left() bool {
	p.Helper()
	return p.exists(&virtv1.VirtualMachineInstanceMigration{}, p.vmimName) && p.vmim().Status.Phase != virtv1.MigrationFailed
}

// TestAbortInEachPhase undoes a migration after each step before the point of
// no return, by abort and by deletion.
func TestAbortInEachPhase(t *testing.T) {
	before := slices.IndexFunc(course, func(s step) bool { return s.name == "restored" })
	for n := 1; n <= before; n++ {
		t.Run(course[n-1].name, func(t *testing.T) {
			p := newPlay(t)
			for _, s := range course[:n] {
				p.run(s)
			}
			if n == 1 {
				p.vmim()
				p.kubevirt(virtv1.MigrationPending)
			}
			m := p.vfm()
			base := m.DeepCopy()
			m.Spec.Abort = true
			p.Expect(admin.Patch(p.Context(), m, client.MergeFrom(base))).To(gomega.Succeed())
			p.undo()
			m = p.until("end", isTerminal)
			if f := m.Status.Failure; m.Status.Phase != v1alpha1.PhaseFailed || f.Reason != v1alpha1.ReasonAborted {
				t.Errorf("status %+v", m.Status)
			}
			if p.left() || !p.exists(&corev1.Pod{}, "launcher-a") {
				t.Error("the VirtualMachineInstanceMigration is left, or the source pod is not")
			}
		})
	}
}

func TestDeleteInEachPhase(t *testing.T) {
	before := slices.IndexFunc(course, func(s step) bool { return s.name == "restored" })
	for n := 1; n <= before; n++ {
		t.Run(course[n-1].name, func(t *testing.T) {
			p := newPlay(t)
			for _, s := range course[:n] {
				p.run(s)
			}
			if n == 1 {
				p.vmim()
				p.kubevirt(virtv1.MigrationPending)
			}
			p.Expect(admin.Delete(p.Context(), p.vfm())).To(gomega.Succeed())
			p.undo()
			p.Eventually(func() bool { return p.exists(&v1alpha1.VFMigration{}, "move") }, patience, 10*time.Millisecond).Should(gomega.BeFalse())
		})
	}
	t.Run("too late", func(t *testing.T) {
		p := newPlay(t)
		for _, s := range course[:before+1] {
			p.run(s)
		}
		p.Expect(admin.Delete(p.Context(), p.vfm())).To(gomega.Succeed())
		for _, s := range course[before+1 : len(course)-1] {
			p.run(s)
		}
		if m := p.vfm(); m.Status.Failure != nil || m.DeletionTimestamp == nil {
			t.Errorf("failure %+v, deleted %v", m.Status.Failure, m.DeletionTimestamp)
		}
		course[len(course)-1].do(p)
		p.Eventually(func() bool { return p.exists(&v1alpha1.VFMigration{}, "move") }, patience, 10*time.Millisecond).Should(gomega.BeFalse())
		if !p.exists(&corev1.Pod{}, "launcher-b") {
			t.Error("the target pod is gone")
		}
	})
}

func TestRefusalAgainstTheAPIServer(t *testing.T) {
	p := newPlay(t)
	p.create(&v1alpha1.VFMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.ns, Name: "move"}, Spec: v1alpha1.VFMigrationSpec{VMIName: "nobody"},
	})
	m := p.until("end", isTerminal)
	if f := m.Status.Failure; f == nil || f.Reason != v1alpha1.ReasonVMINotFound || m.Status.Phase != v1alpha1.PhaseFailed {
		t.Errorf("status %+v", m.Status)
	}
	p.until("finalizer gone", func(m *v1alpha1.VFMigration) bool { return len(m.Finalizers) == 0 })
}
