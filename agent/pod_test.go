package agent

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// TestReleaseAfterTheProcess: a pod that is gone from the API keeps its VF as
// long as its device process may use it.
func TestReleaseAfterTheProcess(t *testing.T) {
	s := boot(t)
	req := ctrl.Request{NamespacedName: client.ObjectKeyFromObject(s.sPod)}
	s.from.kill()
	if err := s.client.Delete(t.Context(), s.sPod); err != nil {
		t.Fatal(err)
	}
	a := s.from.agent
	a.devices = newDevices(s.from.podsDir) // the killed agent's are severed
	again := func() ctrl.Result {
		t.Helper()
		r, err := a.reconcilePod(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := again(); r.RequeueAfter == 0 || !s.from.host.has(vfA) || s.lease(s.from, vfA) == "" {
		t.Fatalf("VF taken from a living device process: %+v", r)
	}
	// Silent is as good as ended.
	s.src.set(func() { s.src.phase = pb.Phase_PHASE_RELINQUISHED })
	if r := again(); r.RequeueAfter != 0 || s.from.host.has(vfA) || s.lease(s.from, vfA) != "" {
		t.Fatalf("VF of a silent device process kept: %+v", r)
	}

	// The next pod gets the VF with the next epoch, once it has begun.
	p := s.pod("launcher-next", "a", vfA, "")
	req.NamespacedName = client.ObjectKeyFromObject(p)
	if r := again(); r.RequeueAfter == 0 || s.from.host.has(vfA) {
		t.Fatalf("VF prepared before there is a device process: %+v", r)
	}
	next, stop := startDevice(t, s.from.podsDir, p.UID)
	if r := again(); r.RequeueAfter != 0 || next.handoffs[interfaceName].Epoch != 2 || !next.is(pb.Phase_PHASE_RUNNING) {
		t.Fatalf("handoff %+v, %+v", next.handoffs, r)
	}
	// Its end frees it.
	stop()
	p.Status.Phase = corev1.PodFailed
	if err := s.client.Status().Update(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if again(); s.lease(s.from, vfA) != "" || s.from.host.has(vfA) {
		t.Error("VF of a pod that failed kept")
	}
}

func TestForeignPodsAreLeftAlone(t *testing.T) {
	s := boot(t)
	// A VMI without an interface of ours is asked about once, and not waited for.
	plain := s.pod("launcher-plain", "a", vfB, "")
	s.from.agent.known.Store(plain.UID, []kubevirt.Interface(nil))
	s.from.launch("43", plain, "\x7fELF vfio-pci\x00") // that its QEMU is an old one is nobody's business
	r, err := s.from.agent.reconcilePod(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(plain)})
	if err != nil || !r.IsZero() || s.lease(s.from, vfB) != "" {
		t.Errorf("%+v, %v, lease %q", r, err, s.lease(s.from, vfB))
	}
	s.from.agent.found.mu.Lock()
	defer s.from.agent.found.mu.Unlock()
	if c := s.from.agent.qemuCondition(t.Context()); c.Reason != v1alpha1.ReasonNotSeen {
		t.Errorf("the QEMU of a VM without VFs is told of: %+v", c)
	}
}

func TestHolders(t *testing.T) {
	h := holder{"ns", "pod", "uid"}
	if got, ok := parseHolder(h.String()); !ok || got != h {
		t.Errorf("parseHolder(%q) = %v, %v", h, got, ok)
	}
	for _, s := range []string{"", "a/b", "a/b/c/d", "a//c", "/b/c", "a/b/"} {
		if got, ok := parseHolder(s); ok {
			t.Errorf("parseHolder(%q) = %v", s, got)
		}
	}
	if n := vfLeaseName("node-1", "0000:03:10.2"); n != "vf-node-1-0000-03-10-2" || strings.ContainsAny(n, ":.") {
		t.Errorf("lease name %q", n)
	}
}
