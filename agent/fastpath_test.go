package agent

import (
	"strings"
	"testing"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

// shown is what the VFNode says of a VF.
func (s *scene) shown(node, vf string) (st v1alpha1.VFStatus) {
	n := &v1alpha1.VFNode{}
	if err := s.client.Get(s.t.Context(), client.ObjectKey{Name: node}, n); err != nil {
		return st
	}
	for _, p := range n.Status.PFs {
		for _, v := range p.VFs {
			if v.Address == vf {
				st = v
			}
		}
	}
	return st
}

// What the VMI's annotation asks for reaches the device processes of both
// sides, and is told by the VFNodes and the VFMigration.
func TestFastPath(t *testing.T) {
	s := bootWith(t, map[string]string{v1alpha1.AnnotationFastPath: interfaceName})
	if !s.src.handoffs[interfaceName].FastPath {
		t.Fatal("the source's device process has the complete path")
	}
	eventually(t, "the source's VFNode to tell", func() bool { return s.shown("a", vfA).FastPath })
	if other := s.shown("a", vfB); other.FastPath {
		t.Errorf("a VF that is free has the fast path: %+v", other)
	}
	s.begin()
	s.switchOver()
	s.succeed()
	if !s.dst.handoffs[interfaceName].FastPath {
		t.Error("the target's device process has the complete path")
	}
	if d := s.get().Status.Devices; len(d) != 1 || !d[0].FastPath {
		t.Errorf("the VFMigration says %+v", d)
	}
	eventually(t, "the target's VFNode to tell", func() bool { return s.shown("b", vfB).FastPath })
	// A VF that is free tells nothing of who had it.
	s.stopSrc()
	if err := s.client.Delete(t.Context(), s.sPod); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the source's VF to be free", func() bool { v := s.shown("a", vfA); return v.Holder == "" && !v.FastPath })
}

func TestCompletePathIsTheDefault(t *testing.T) {
	s := boot(t)
	eventually(t, "the VFNode to have the VF's holder", func() bool { return s.shown("a", vfA).Holder != "" })
	if s.src.handoffs[interfaceName].FastPath || s.shown("a", vfA).FastPath {
		t.Errorf("without being asked for, the fast path: %+v", s.shown("a", vfA))
	}
}

// A VF that cannot be moved is told of before anybody tries.
func TestImmovableIsShown(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	s := &scene{from: l.nodes["a"], to: l.nodes["b"], migration: &migration{lab: l}}
	l.vmi(map[string]string{v1alpha1.AnnotationFastPath: " " + interfaceName + " "})
	pod := l.pod("launcher-source", "a", vfA, "")
	s.src, _ = startDevice(t, s.from.podsDir, pod.UID)
	s.src.set(func() { s.src.fixed = "nothing tells what it writes" })
	s.from.start()
	eventually(t, "the VFNode to say why", func() bool { return s.shown("a", vfA).Immovable == "nothing tells what it writes" })
}

// An annotation that names what is no interface with a VF gets nobody a VF.
func TestFastPathOfNoInterface(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.vmi(map[string]string{v1alpha1.AnnotationFastPath: interfaceName + ",red"})
	pod := l.pod("launcher-source", "a", vfA, "")
	src, _ := startDevice(t, l.nodes["a"].podsDir, pod.UID)
	l.nodes["a"].start()
	a := l.nodes["a"].agent
	_, err := a.interfaces(t.Context(), pod)
	if err == nil || !strings.Contains(err.Error(), `annotation compsc.io/fast-path names interface "red", and the VMI's interfaces with network binding compsc are: blue`) {
		t.Errorf("got %v", err)
	}
	if _, err := a.pin(t.Context(), pod, "primary"); err == nil || src.handed != 0 {
		t.Errorf("pinned: %v, %d VFs handed over", err, src.handed)
	}
}
