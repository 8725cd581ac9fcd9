//go:build apiserver

package controllers

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// evacuate creates what KubeVirt's evacuation controller creates, and waits
// for its VFMigration, which p follows from here.
func (p *play) evacuate() {
	p.Helper()
	vmim := &virtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.ns, GenerateName: "kubevirt-evacuation-", Annotations: map[string]string{virtv1.EvacuationMigrationAnnotation: p.source},
		},
		Spec: virtv1.VirtualMachineInstanceMigrationSpec{VMIName: "vm", AddedNodeSelector: map[string]string{corev1.LabelHostname: p.target}},
	}
	p.create(vmim)
	p.vmimName, p.vfmName = vmim.Name, vmim.Name+"-"+string(vmim.UID[:8])
	p.Eventually(func() bool { return p.exists(&v1alpha1.VFMigration{}, p.vfmName) }, patience, 10*time.Millisecond).Should(gomega.BeTrue())
	p.kubevirt(virtv1.MigrationPending)
}

// foreignCourse is course with a migration of KubeVirt's own making.
var foreignCourse = append([]step{
	{"evacuate", (*play).evacuate, v1alpha1.PhasePending},
}, course[1:]...)

func TestAdoptedMigration(t *testing.T) {
	p := newPlay(t)
	for _, s := range foreignCourse {
		p.run(s)
	}
	p.checkSucceeded()
	vmim := p.vmim()
	if vmim.Annotations[kubevirt.AnnotationVFMigration] != p.vfmName || vmim.Labels[kubevirt.LabelVFMigrationUID] != string(p.vfm().UID) ||
		vmim.Annotations[kubevirt.AnnotationFailure] != "" || len(vmim.OwnerReferences) != 0 {
		t.Errorf("%+v", vmim.ObjectMeta)
	}
	for _, want := range []string{
		"VirtualMachineInstanceMigration MigrationAdopted", "VirtualMachineInstanceMigration MigrationStarted",
		"VirtualMachineInstanceMigration MigrationSucceeded", "VirtualMachineInstance MigrationSucceeded",
	} {
		p.Eventually(p.events, patience, 20*time.Millisecond).Should(gomega.ContainElement(want))
	}
}

// TestAdoptedAbortInEachPhase undoes a migration of KubeVirt's own making after
// each step before the point of no return: by its deletion, by that of its
// VFMigration, and by abort. Where KubeVirt does not act upon the deletion of
// its object, the target pod must go.
func TestAdoptedAbortInEachPhase(t *testing.T) {
	before := slices.IndexFunc(foreignCourse, func(s step) bool { return s.name == "restored" })
	for name, abort := range map[string]func(*play){
		"delete VirtualMachineInstanceMigration": func(p *play) { p.Expect(admin.Delete(p.Context(), p.vmim())).To(gomega.Succeed()) },
		"delete VFMigration":                     func(p *play) { p.Expect(admin.Delete(p.Context(), p.vfm())).To(gomega.Succeed()) },
		"abort": func(p *play) {
			m := p.vfm()
			base := m.DeepCopy()
			m.Spec.Abort = true
			p.Expect(admin.Patch(p.Context(), m, client.MergeFrom(base))).To(gomega.Succeed())
		},
	} {
		for n := 1; n <= before; n++ {
			t.Run(fmt.Sprintf("%s after %s", name, foreignCourse[n-1].name), func(t *testing.T) {
				p := newPlay(t)
				for _, s := range foreignCourse[:n] {
					p.run(s)
				}
				uid := p.vfm().UID
				abort(p)
				p.undo()
				if name == "delete VFMigration" {
					p.Eventually(func() bool {
						m := &v1alpha1.VFMigration{}
						return p.exists(m, p.vfmName) && m.UID == uid
					}, patience, 10*time.Millisecond).Should(gomega.BeFalse())
				} else if m := p.until("end", isTerminal); m.Status.Phase != v1alpha1.PhaseFailed || m.Status.Failure.Reason != v1alpha1.ReasonAborted {
					t.Errorf("status %+v", m.Status)
				}
				if p.left() || !p.exists(&corev1.Pod{}, "launcher-a") {
					t.Error("the VirtualMachineInstanceMigration is left, or the source pod is not")
				}
			})
		}
	}
}

// TestAdoptedRefusalAgainstTheAPIServer has no free VF on the target: KubeVirt's
// migration fails before the VM is touched, and tells why.
func TestAdoptedRefusalAgainstTheAPIServer(t *testing.T) {
	p := newPlay(t)
	n := &v1alpha1.VFNode{}
	p.Expect(admin.Get(t.Context(), client.ObjectKey{Name: p.target}, n)).To(gomega.Succeed())
	p.createHolder("holder", p.target)
	n.Status.PFs[0].VFs[0].Holder = p.ns + "/holder"
	p.Expect(admin.Status().Update(t.Context(), n)).To(gomega.Succeed())

	p.evacuate()
	p.reaches(v1alpha1.PhasePending)
	vmi := &virtv1.VirtualMachineInstance{}
	p.Expect(p.get(vmi, "vm")).To(gomega.Succeed())
	p.createLauncher("launcher-b", p.target, vmi, string(p.vmim().UID))
	p.kubevirt(virtv1.MigrationScheduling)
	p.Eventually(func() bool { return p.exists(&corev1.Pod{}, "launcher-b") }, patience, 10*time.Millisecond).Should(gomega.BeFalse())
	p.Eventually(func() string { return p.vmim().Annotations[kubevirt.AnnotationFailure] }, patience, 10*time.Millisecond).
		Should(gomega.HavePrefix("NoFreeVF: no node has enough free VFs"))
	p.kubevirt(virtv1.MigrationFailed)
	m := p.until("end", isTerminal)
	if f := m.Status.Failure; f.Reason != v1alpha1.ReasonNoFreeVF || m.Status.Source != nil || m.Status.StartTime != nil {
		t.Errorf("status %+v", m.Status)
	}
	if p.vmim().DeletionTimestamp != nil {
		t.Error("the VirtualMachineInstanceMigration was deleted: KubeVirt would forget that it failed")
	}
	for _, want := range []string{
		"VFMigration PreflightFailed", "VirtualMachineInstance PreflightFailed", "VirtualMachineInstanceMigration PreflightFailed",
	} {
		p.Eventually(p.events, patience, 20*time.Millisecond).Should(gomega.ContainElement(want))
	}
}
