package agent

import (
	"context"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/api/v1alpha1"
)

// An agent that was started anew gives back what nobody holds, and nothing
// that a pod holds.
func TestOrphansAreReleased(t *testing.T) {
	s := boot(t)
	a := s.from.agent
	if _, err := s.from.host.Prepare(t.Context(), host.Request{Address: vfB}); err != nil {
		t.Fatal(err)
	}
	a.recover(t.Context())
	if s.from.host.has(vfB) || !s.from.host.has(vfA) {
		t.Errorf("after the start: VF of a pod %v, orphan %v", s.from.host.has(vfA), s.from.host.has(vfB))
	}
	// What cannot be found out is asked again, and takes nothing.
	s.from.host.mu.Lock()
	s.from.host.err = errors.New("journal unreadable")
	s.from.host.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 5*a.limits.pause)
	defer cancel()
	a.recover(ctx)
	if !s.from.host.has(vfA) {
		t.Error("the VF of a pod was released")
	}
	// One entry of the journal that cannot be read keeps no other VF.
	s.from.host.mu.Lock()
	s.from.host.prepared[vfB] = ""
	s.from.host.mu.Unlock()
	if err := a.releaseOrphans(t.Context()); err == nil || !strings.Contains(err.Error(), "journal unreadable") || s.from.host.has(vfB) {
		t.Errorf("%v; orphan %v", err, s.from.host.has(vfB))
	}
}

func TestReconfiguredNodeIsReported(t *testing.T) {
	s := boot(t)
	s.from.kill()
	a := s.from.agent
	n := &v1alpha1.VFNode{}
	condition := func() *metav1.Condition {
		t.Helper()
		if _, err := a.reconcileNode(t.Context(), ctrl.Request{}); err != nil {
			t.Fatal(err)
		}
		s.api(s.client.Get(t.Context(), client.ObjectKey{Name: "a"}, n))
		return meta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionIntact)
	}
	a.client = s.client // the killed agent's writes nothing
	if c := condition(); c == nil || c.Status != metav1.ConditionTrue {
		t.Errorf("condition %+v", c)
	}
	s.from.host.mu.Lock()
	s.from.host.damage = []host.Damage{{VF: vfA, What: strings.Repeat("long ", 2000)}, {VF: vfB, What: "it was removed"}, {VF: vfB, What: "too"}}
	s.from.host.mu.Unlock()
	if c := condition(); c.Status != metav1.ConditionFalse || c.Reason != v1alpha1.ReasonReconfigured || !strings.Contains(c.Message, "VF "+vfA+": long") {
		t.Errorf("condition %+v", c)
	}
	// However much there is to say of one VF, what is said of the others is whole.
	for _, vf := range n.Status.PFs[0].VFs {
		if vf.Address == vfA && len(vf.Damage) != maxDamage || vf.Address == vfB && vf.Damage != "it was removed; too" {
			t.Errorf("VF %s: damage %.40q of %d bytes", vf.Address, vf.Damage, len(vf.Damage))
		}
	}
	if s.from.host.settled == 0 {
		t.Error("what was left was never finished")
	}
}

func TestMemlockIsRaised(t *testing.T) {
	dir := t.TempDir()
	_, stop := startDevice(t, dir, "pod")
	d, err := newDevices(dir).get("pod")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	// The fake device process is this one.
	var before, now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &before); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_MEMLOCK, &before) })
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 1 << 20, Max: before.Max}); err != nil {
		t.Fatal(err)
	}
	if err := d.unlimitMemlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &now); err != nil || now.Cur < before.Max {
		t.Errorf("limit %d (%v)", now.Cur, err)
	}
	stop()
	if err := d.unlimitMemlock(t.Context()); err == nil {
		t.Error("raised the limit of a process that has ended")
	}
}
