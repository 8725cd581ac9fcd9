//go:build apiserver

package agent

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers"
)

// drain is a VM on node a whose migrations are of KubeVirt's own making. The
// manager and the agents are the product's, with their own rights; the test
// plays virt-controller, the kubelet and QEMU.
type drain struct {
	*scene
	admin client.WithWatch
	vmim  *virtv1.VirtualMachineInstanceMigration
	n     int
	// before are the calls to the source's device process up to this migration.
	before map[string]int
}

func runManager(t *testing.T, config *rest.Config) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- controllers.Run(ctx, controllers.Options{Config: config, Namespace: v1alpha1.SystemNamespace, Logger: logr.Discard()})
	}()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(waitLimit):
			t.Error("the manager does not end")
		}
	})
}

// evacuate creates a migration as KubeVirt's evacuation controller does.
func (d *drain) evacuate(change func(*virtv1.VirtualMachineInstanceMigration)) {
	d.t.Helper()
	d.n++
	d.before = d.src.snapshot()
	d.vmim = &virtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("kubevirt-evacuation-%d", d.n),
			Annotations: map[string]string{virtv1.EvacuationMigrationAnnotation: "a"}, Finalizers: []string{virtv1.VirtualMachineInstanceMigrationFinalizer}},
		Spec: virtv1.VirtualMachineInstanceMigrationSpec{VMIName: "vm"},
	}
	if change != nil {
		change(d.vmim)
	}
	d.create(d.vmim)
	d.name = d.vmim.Name + "-" + string(d.vmim.UID[:8])
	eventually(d.t, "the migration is adopted", func() bool {
		err := d.admin.Get(d.t.Context(), client.ObjectKey{Namespace: ns, Name: d.name}, &vfMigration{})
		return err == nil
	})
	d.phase(virtv1.MigrationPending)
}

// phase sets the phase of KubeVirt's migration.
func (d *drain) phase(p virtv1.VirtualMachineInstanceMigrationPhase) {
	d.t.Helper()
	if err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := d.admin.Get(d.t.Context(), client.ObjectKeyFromObject(d.vmim), d.vmim); err != nil {
			return err
		}
		d.vmim.Status.Phase = p
		d.vmim.Status.PhaseTransitionTimestamps = append(d.vmim.Status.PhaseTransitionTimestamps,
			virtv1.VirtualMachineInstanceMigrationPhaseTransitionTimestamp{Phase: p, PhaseTransitionTimestamp: metav1.Now()})
		return d.admin.Status().Update(d.t.Context(), d.vmim)
	}); err != nil {
		d.t.Fatal(err)
	}
}

// target is virt-controller making the target pod, and the kubelet starting it.
func (d *drain) target() {
	d.t.Helper()
	d.tPod = d.pod(fmt.Sprintf("launcher-target-%d", d.n), "b", vfB, string(d.vmim.UID))
	setPhase(d.t, d.admin, d.tPod, corev1.PodRunning)
	d.dst, d.stopDst = startDevice(d.t, d.to.podsDir, d.tPod.UID)
	d.phase(virtv1.MigrationScheduling)
}

// prepared waits until the target's sidecar would be ready.
func (d *drain) prepared() {
	d.t.Helper()
	eventually(d.t, "the target is prepared", func() bool { return d.dst.is(pb.Phase_PHASE_TARGET_PREPARED) })
	d.expect(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared)
}

// stopped plays KubeVirt until its migration has ended: as virt-controller does it
// takes the loss of the target pod before the hand-over to libvirt, and its own
// object's deletion where it acts upon that, for a failure. Once libvirt migrates
// it fails as well when the source's device process has had QEMU give up.
func (d *drain) stopped() {
	d.t.Helper()
	eventually(d.t, "KubeVirt's migration ends", func() bool {
		m := &virtv1.VirtualMachineInstanceMigration{}
		err := d.admin.Get(d.t.Context(), client.ObjectKeyFromObject(d.vmim), m)
		if apierrors.IsNotFound(err) {
			return true
		}
		if err != nil {
			d.t.Fatal(err)
		}
		podGone := false
		if d.tPod != nil {
			podGone = apierrors.IsNotFound(d.admin.Get(d.t.Context(), client.ObjectKeyFromObject(d.tPod), &corev1.Pod{}))
		}
		acts := false // upon its object's deletion
		switch m.Status.Phase {
		case virtv1.MigrationPending, virtv1.MigrationScheduling, virtv1.MigrationScheduled, virtv1.MigrationRunning:
			acts = true
		}
		running := m.Status.Phase == virtv1.MigrationRunning
		gaveUp := running && d.src.snapshot()["CancelSource"] > d.before["CancelSource"]
		if m.Status.Phase != virtv1.MigrationFailed && !(acts && !m.DeletionTimestamp.IsZero()) && !(podGone && !running) && !gaveUp {
			return false
		}
		m.Status.Phase = virtv1.MigrationFailed
		if err := d.admin.Status().Update(d.t.Context(), m); err != nil {
			return false
		}
		controllerutil.RemoveFinalizer(m, virtv1.VirtualMachineInstanceMigrationFinalizer)
		return client.IgnoreNotFound(d.admin.Update(d.t.Context(), m)) == nil
	})
	// The target pod, if it is left, is KubeVirt's to delete.
	if d.tPod != nil {
		if err := client.IgnoreNotFound(d.admin.Delete(d.t.Context(), d.tPod, client.GracePeriodSeconds(0))); err != nil {
			d.t.Fatal(err)
		}
		d.stopDst()
	}
}

func (d *fakeDevice) snapshot() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.calls)
}

// harmless are the calls that arm a gate and disarm it, which the guest does not notice.
var harmless = []string{"Status", "PrepareSource", "AwaitCapture", "CancelSource"}

// ended waits for the VFMigration's end for a reason, and checks that the guest was
// not touched: the source's device process was asked for nothing but allowed.
func (d *drain) ended(reason string, allowed ...string) *vfMigration {
	d.t.Helper()
	eventually(d.t, "the VFMigration ends", func() bool { return over(d.get()) })
	m := d.get()
	if m.Status.Phase != v1alpha1.PhaseFailed || m.Status.Failure == nil || m.Status.Failure.Reason != reason {
		d.t.Errorf("status %+v", m.Status)
	}
	d.src.mu.Lock()
	defer d.src.mu.Unlock()
	for method, n := range d.src.calls {
		if n > d.before[method] && !slices.Contains(allowed, method) {
			d.t.Errorf("%d calls of %s to the source's device process", n-d.before[method], method)
		}
	}
	if d.src.phase != pb.Phase_PHASE_RUNNING || d.src.handed != 1 || d.src.vetoed != "" {
		d.t.Errorf("the source's device process: %s, VF handed over %d times, vetoed %q", d.src.phase, d.src.handed, d.src.vetoed)
	}
	return m
}

// told checks that the reason is on every object.
func (d *drain) told(reason string) {
	d.t.Helper()
	if err := d.admin.Get(d.t.Context(), client.ObjectKeyFromObject(d.vmim), d.vmim); err != nil {
		d.t.Fatal(err)
	}
	if why := d.vmim.Annotations[kubevirt.AnnotationFailure]; !strings.HasPrefix(why, reason+": ") {
		d.t.Errorf("annotation %q", why)
	}
	for kind, name := range map[string]string{"VFMigration": d.name, "VirtualMachineInstanceMigration": d.vmim.Name, "VirtualMachineInstance": "vm"} {
		eventually(d.t, "an event on the "+kind, func() bool {
			var list corev1.EventList
			if err := d.admin.List(d.t.Context(), &list, client.InNamespace(ns)); err != nil {
				d.t.Fatal(err)
			}
			return slices.ContainsFunc(list.Items, func(e corev1.Event) bool {
				return e.InvolvedObject.Kind == kind && e.InvolvedObject.Name == name && e.Reason == controllers.EventPreflightFailed &&
					strings.HasPrefix(e.Message, reason+": ")
			})
		})
	}
}

// free waits until the target's VFs are given back.
func (d *drain) free() {
	d.t.Helper()
	eventually(d.t, "the target's VFs are free", func() bool {
		return !slices.ContainsFunc(d.holders("b"), func(holder string) bool { return holder != "" })
	})
}

// holders tells who holds each VF of a node's PF, by the node's VFNode, for which
// it waits.
func (l *lab) holders(node string) []string {
	l.t.Helper()
	n := &v1alpha1.VFNode{}
	eventually(l.t, "VFNode "+node, func() bool {
		return l.client.Get(l.t.Context(), client.ObjectKey{Name: node}, n) == nil && len(n.Status.PFs) > 0 && len(n.Status.PFs[0].VFs) > 0
	})
	var holders []string
	for _, vf := range n.Status.PFs[0].VFs {
		holders = append(holders, vf.Holder)
	}
	return holders
}

func (d *drain) abort(spec bool) func() {
	return func() {
		if !spec {
			if err := d.admin.Delete(d.t.Context(), d.vmim); err != nil {
				d.t.Fatal(err)
			}
			return
		}
		m := d.get()
		base := m.DeepCopy()
		m.Spec.Abort = true
		if err := d.admin.Patch(d.t.Context(), m, client.MergeFrom(base)); err != nil {
			d.t.Fatal(err)
		}
	}
}

// TestDrain evacuates one and the same VM again and again: refused for every
// reason there is, aborted at every point, each time without the guest's noticing;
// and at last moved.
func TestDrain(t *testing.T) {
	admin, agentConfig, managerConfig := apiServer(t)
	l := &lab{t: t, client: admin}
	l.addNodes()
	d := &drain{scene: &scene{from: l.nodes["a"], to: l.nodes["b"], migration: &migration{lab: l}}, admin: admin}
	runAgent(t, d.from, agentConfig)
	runAgent(t, d.to, agentConfig)
	runManager(t, managerConfig)
	l.vmi(nil)
	vmi := &virtv1.VirtualMachineInstance{}
	if err := admin.Get(t.Context(), keyOf("vm"), vmi); err != nil {
		t.Fatal(err)
	}
	vmi.Status.Phase, vmi.Status.NodeName = virtv1.Running, "a"
	if err := admin.Update(t.Context(), vmi); err != nil {
		t.Fatal(err)
	}
	d.sPod = l.pod("launcher-source", "a", vfA, "")
	d.src, d.stopSrc = startDevice(t, d.from.podsDir, d.sPod.UID)
	setPhase(t, admin, d.sPod, corev1.PodRunning)
	eventually(t, "the VM's VF is attached", func() bool { return d.src.is(pb.Phase_PHASE_RUNNING) })
	eventually(t, "node a says who holds the VF", func() bool { return l.holders("a")[0] != "" })
	d.free()

	kv := func(allow bool) *virtv1.KubeVirt {
		k := &virtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "kubevirt"}}
		k.Spec.Configuration.MigrationConfiguration = &virtv1.MigrationConfiguration{AllowPostCopy: &allow}
		return k
	}
	t.Run("refusals", func(t *testing.T) {
		for _, tc := range []struct {
			reason      string
			lay, remove func(t *testing.T)
			change      func(*virtv1.VirtualMachineInstanceMigration)
		}{
			{v1alpha1.ReasonPostCopyAllowed, func(*testing.T) { l.create(kv(true)) }, func(t *testing.T) {
				if err := admin.Delete(t.Context(), kv(true)); err != nil {
					t.Fatal(err)
				}
			}, nil},
			{v1alpha1.ReasonNoFreeVF, func(t *testing.T) {
				for i, vf := range []string{vfA, vfB} {
					p := l.pod(fmt.Sprintf("launcher-other-%d", i), "b", vf, "")
					_, stop := startDevice(t, d.to.podsDir, p.UID)
					t.Cleanup(stop)
				}
				eventually(t, "the target's VFs are taken", func() bool { return !slices.Contains(l.holders("b"), "") })
			}, func(t *testing.T) {
				for i := range 2 {
					p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("launcher-other-%d", i)}}
					if err := admin.Get(t.Context(), client.ObjectKeyFromObject(p), p); err != nil {
						t.Fatal(err)
					}
					if err := os.RemoveAll(filepath.Dir(kubevirt.DeviceDir(d.to.podsDir, p.UID, 1))); err != nil {
						t.Fatal(err)
					}
					if err := admin.Delete(t.Context(), p, client.GracePeriodSeconds(0)); err != nil {
						t.Fatal(err)
					}
				}
			}, nil},
			{v1alpha1.ReasonTargetNotFound, func(*testing.T) {}, func(*testing.T) {}, func(m *virtv1.VirtualMachineInstanceMigration) {
				m.Spec.AddedNodeSelector = map[string]string{corev1.LabelHostname: "nowhere"}
			}},
			{v1alpha1.ReasonDecentralized, func(*testing.T) {}, func(*testing.T) {}, func(m *virtv1.VirtualMachineInstanceMigration) {
				m.Spec.SendTo = &virtv1.VirtualMachineInstanceMigrationSource{MigrationID: "m", ConnectURL: "u"}
			}},
		} {
			t.Run(tc.reason, func(t *testing.T) {
				d.t = t
				l.t = t
				tc.lay(t)
				d.evacuate(tc.change)
				d.tPod = nil
				if tc.reason != v1alpha1.ReasonDecentralized {
					p := l.pod(fmt.Sprintf("launcher-target-%d", d.n), "b", vfB, string(d.vmim.UID))
					d.tPod, d.stopDst = p, func() {}
					d.phase(virtv1.MigrationScheduling)
					eventually(t, "the reason is on KubeVirt's migration", func() bool {
						return admin.Get(t.Context(), client.ObjectKeyFromObject(d.vmim), d.vmim) == nil && d.vmim.Annotations[kubevirt.AnnotationFailure] != ""
					})
				}
				d.stopped()
				d.ended(tc.reason, "Status")
				if tc.reason != v1alpha1.ReasonDecentralized {
					d.told(tc.reason)
				}
				tc.remove(t)
				d.free()
			})
		}
	})

	t.Run("aborts", func(t *testing.T) {
		steps := []struct {
			name string
			do   func()
		}{
			{"pending", func() { d.tPod = nil }},
			{"scheduling", d.target},
			{"prepared", d.prepared},
			{"scheduled", func() { d.phase(virtv1.MigrationScheduled) }},
			{"preparing target", func() { d.phase(virtv1.MigrationPreparingTarget) }},
			{"target ready", func() { d.phase(virtv1.MigrationTargetReady) }},
			{"running", func() { d.phase(virtv1.MigrationRunning) }},
		}
		for _, spec := range []bool{false, true} {
			for n := range steps {
				t.Run(fmt.Sprintf("%s, by spec.abort %v", steps[n].name, spec), func(t *testing.T) {
					d.t = t
					l.t = t
					d.evacuate(nil)
					for _, s := range steps[:n+1] {
						s.do()
					}
					d.abort(spec)()
					d.stopped()
					d.ended(v1alpha1.ReasonAborted, harmless...)
					d.free()
				})
			}
		}
	})

	t.Run("at last", func(t *testing.T) {
		d.t = t
		l.t = t
		d.evacuate(nil)
		d.target()
		d.prepared()
		d.phase(virtv1.MigrationRunning)
		d.switchOver()
		d.expect(v1alpha1.ConditionVerified, metav1.ConditionTrue, v1alpha1.ConditionVerified)
		if err := admin.Get(t.Context(), keyOf("vm"), vmi); err != nil {
			t.Fatal(err)
		}
		base := vmi.DeepCopy()
		vmi.Status.NodeName = "b"
		if err := admin.Patch(t.Context(), vmi, client.MergeFrom(base)); err != nil {
			t.Fatal(err)
		}
		d.phase(virtv1.MigrationSucceeded)
		eventually(t, "the VM is moved", func() bool { return d.get().Status.Phase == v1alpha1.PhaseSucceeded })
	})
}
