//go:build e2esriov

package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/vfiouser"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/nbd"
	"compsc.io/compsc/e2e/sriov/driver"
	"compsc.io/compsc/e2e/sriov/sidecar"
)

// reached waits for a condition to be true; false says that something failed.
func (d *drill) reached(condition string) (ok bool) {
	d.t.Helper()
	d.await("condition "+condition, func() bool {
		m := d.get()
		ok = is(m, condition)
		return ok || d.failing(m)
	})
	return ok
}

func (d *drill) failing(m *vfMigration) bool {
	for _, c := range []string{v1alpha1.ConditionTargetPinned, v1alpha1.ConditionPrepared, v1alpha1.ConditionCaptured,
		v1alpha1.ConditionRestored, v1alpha1.ConditionVerified} {
		if isFalse(m, c) {
			return true
		}
	}
	return m.Status.Failure != nil
}

// Steps of a migration, after which something happens.
const (
	pinnedStep   = "pinned"   // the target's VF is attached, silent
	preparedStep = "prepared" // both gates are armed
	capturedStep = "captured" // the source's VF is quiet
	loadedStep   = "loaded"   // the target has the state
	heldStep     = "held"     // the target's QEMU wants to start the VM
	activeStep   = "active"   // the target's VF runs, the VM does not yet
	movedStep    = "moved"    // the VM runs on the target
	everyStep    = "every step"
)

var allSteps = []string{pinnedStep, preparedStep, capturedStep, loadedStep, heldStep, activeStep, movedStep}

// Outcomes.
const (
	moved  = "moved"  // the VM runs on the target
	stayed = "stayed" // the VM runs on the source as before
	lost   = "lost"   // the VM's VF is gone
)

// play does QEMU's part and the manager's, has the fault happen after a step,
// and returns how it ended.
func (d *drill) play(step string, fault func()) string {
	d.t.Helper()
	after := func(name string) {
		if name == step || step == everyStep {
			d.t.Logf("FAULT, %s", name)
			fault()
		}
	}
	d.stop(d.src)
	d.startPod(d.dst, "launcher-target", "vmim-uid")
	d.migration = d.migrate("m", d.src.pod, d.dst.pod)
	if !d.reached(v1alpha1.ConditionTargetPinned) {
		d.t.Fatal("the target was not pinned")
	}
	d.must(sidecar.Check(d.dst.process.Process.Pid))
	after(pinnedStep)
	d.start(d.src)
	if !d.reached(v1alpha1.ConditionPrepared) {
		return d.undo()
	}
	var err error
	if d.dst.machine, err = plugMachine(d.t, d.dst.dir, "inmigrate", d.memory); err != nil {
		d.t.Fatal(err)
	}
	d.await("the target's QEMU to be armed", func() bool {
		var b [4]byte
		err := d.dst.machine.client.RegionRead(d.t.Context(), vfiouserConfig, 0x70, b[:])
		return err == nil && b[3] == 0x80
	})
	after(preparedStep)
	d.stop(d.src)
	d.src.machine.tell("MIGRATION", "active")
	// QEMU begins long before it stops the VM.
	const begun = "event=MIGRATION status=active"
	if d.src.is(pb.Phase_PHASE_SOURCE_PREPARED) {
		d.await("the migration to be noticed", func() bool { return d.src.said.has(begun) })
	}
	flushed := nbd.Held(d.src.machine.gate.Flush)
	var answer *syscall.Errno
	d.await("the VM's stop", func() bool { return answered(flushed, &answer) || d.src.is(pb.Phase_PHASE_CAPTURED) })
	after(capturedStep)
	d.start(d.src)
	if e := d.answer(flushed, answer); e != 0 {
		d.src.machine.tell("RESUME", "")
		return d.undo()
	}
	after(loadedStep)
	d.stop(d.dst)
	started := nbd.Held(d.dst.machine.gate.Read)
	answer = nil
	d.await("the VM's start to be held", func() bool { return answered(started, &answer) || d.dst.is(pb.Phase_PHASE_TARGET_HELD) })
	after(heldStep)
	d.start(d.dst)
	if e := d.answer(started, answer); e != 0 {
		d.src.machine.tell("MIGRATION", "failed")
		d.src.machine.tell("RESUME", "")
		return d.undo()
	}
	after(activeStep)
	if !d.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) {
		// QEMU, that has lost its device, does not start the VM.
		return d.undo()
	}
	d.dst.machine.tell("RESUME", "")
	d.at, d.guest.Bus = d.dst, d.dst.machine
	d.await("the VM to run", func() bool { return !d.dst.is(pb.Phase_PHASE_TARGET_ACTIVE) })
	d.dst.machine.Read(8) // the driver's first access
	if !d.reached(v1alpha1.ConditionVerified) {
		return d.undo()
	}
	after(movedStep)
	if st, err := d.dst.status(); err != nil || slices.ContainsFunc(st.GetInterfaces(), (*pb.InterfaceStatus).GetLost) {
		return lost
	}
	return moved
}

const vfiouserConfig = 7

// answered takes the answer to a held request, if it is there.
func answered(c <-chan syscall.Errno, into **syscall.Errno) bool {
	if *into != nil {
		return true
	}
	select {
	case e := <-c:
		*into = &e
		return true
	default:
		return false
	}
}

// answer waits for it.
func (d *drill) answer(c <-chan syscall.Errno, have *syscall.Errno) syscall.Errno {
	d.t.Helper()
	d.await("the gate's answer", func() bool { return answered(c, &have) })
	return *have
}

// undo is the manager's part of an undoing.
func (d *drill) undo() string {
	d.t.Helper()
	d.await("the failure to be told", func() bool { return d.failing(d.get()) })
	d.fail(v1alpha1.ReasonMigrationFailed, "see the conditions")
	outcome := ""
	d.await("the end of the undoing", func() bool {
		m := d.get()
		switch {
		case is(m, v1alpha1.ConditionRolledBack):
			outcome = stayed
		case isFalse(m, v1alpha1.ConditionRolledBack):
			outcome = lost
		}
		return outcome != "" && (outcome == lost || isFalse(m, v1alpha1.ConditionTargetPinned))
	})
	return outcome
}

// free ends both pods, as KubeVirt does, and checks that nothing is left of
// them.
func (d *drill) free() {
	d.t.Helper()
	d.endPod(d.src)
	d.endPod(d.dst)
	d.status(func(m *vfMigration) {
		if c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionSucceeded); c.Status == metav1.ConditionUnknown {
			setFalse(m, v1alpha1.ConditionSucceeded, v1alpha1.ReasonMigrationFailed, "over")
		}
	})
	d.freed()
}

// endPod ends an end's pod with all that runs in it.
func (d *drill) endPod(e *end) {
	d.t.Helper()
	d.start(e)
	e.killProcess()
	if e.machine != nil {
		e.machine.client.Close()
	}
	pod := &corev1.Pod{}
	d.must(d.client.Get(d.t.Context(), client.ObjectKeyFromObject(e.pod), pod))
	pod.Status.Phase = corev1.PodSucceeded
	d.must(d.client.Status().Update(d.t.Context(), pod))
}

// freed waits until nothing is left of pods: no lease, no VF in use or bound, no
// setting.
func (d *drill) freed() {
	d.t.Helper()
	for _, e := range []*end{d.src, d.dst} {
		d.await("the VFs of node "+e.name+" to be free", func() bool {
			holder, _ := d.lease(e.name, e.vf.Address)
			held, err := e.agent.host.Held(d.t.Context())
			is, serr := e.settings()
			return holder == "" && err == nil && len(held) == 0 && serr == nil && is == e.before
		})
	}
}

// outcomes of a migration by the step after which a fault happens.
type outcomes map[string]string

// faults by name. What was pulled out is put back by mend, which tells whether
// the guest's driver has to begin anew.
var faults = []struct {
	name     string
	do       func(*drill)
	mend     func(*drill) (restarted bool)
	outcomes outcomes
	// chosen are the steps that are tried unless all are.
	chosen []string
}{
	{"agents killed", func(d *drill) {
		for _, e := range []*end{d.src, d.dst} {
			d.stop(e)
			d.start(e)
		}
	}, nil, outcomes{pinnedStep: moved, preparedStep: moved, capturedStep: moved, loadedStep: moved, heldStep: moved, activeStep: moved, movedStep: moved,
		everyStep: moved}, []string{everyStep}},
	// With its device process a VM loses its VF.
	{"source's device process killed", func(d *drill) { d.src.killProcess() }, nil,
		outcomes{pinnedStep: lost, preparedStep: lost, capturedStep: lost, loadedStep: lost, heldStep: lost, activeStep: moved, movedStep: moved},
		[]string{capturedStep, activeStep}},
	{"target's device process killed", func(d *drill) { d.dst.killProcess() }, nil,
		outcomes{pinnedStep: stayed, preparedStep: stayed, capturedStep: stayed, loadedStep: stayed, heldStep: stayed, activeStep: stayed, movedStep: lost},
		[]string{preparedStep, loadedStep, activeStep}},
	// A VM stays with its VF when a PF is down, and goes on when it is up again.
	{"source's PF down", func(d *drill) { d.down(d.src) }, func(d *drill) bool { return d.raise(d.src) },
		outcomes{pinnedStep: moved, preparedStep: moved, capturedStep: moved, loadedStep: moved, heldStep: moved, activeStep: moved, movedStep: moved},
		[]string{preparedStep, loadedStep}},
	{"target's PF down", func(d *drill) { d.down(d.dst) }, func(d *drill) bool { return d.raise(d.dst) },
		outcomes{pinnedStep: stayed, preparedStep: stayed, capturedStep: stayed, loadedStep: stayed, heldStep: stayed, activeStep: moved, movedStep: moved},
		[]string{pinnedStep, heldStep}},
	// Captured, the source's VFs are needed no more; before that the VM has
	// them.
	{"source's VFs removed", func(d *drill) { d.remove(d.src) }, func(d *drill) bool { d.again(d.src); return false },
		outcomes{pinnedStep: lost, preparedStep: lost, capturedStep: moved, loadedStep: moved, heldStep: moved, activeStep: moved, movedStep: moved},
		[]string{capturedStep, movedStep}},
	{"target's VFs removed", func(d *drill) { d.remove(d.dst) }, func(d *drill) bool { d.again(d.dst); return false },
		outcomes{pinnedStep: stayed, preparedStep: stayed, capturedStep: stayed, loadedStep: stayed, heldStep: stayed, activeStep: lost, movedStep: lost},
		[]string{loadedStep, activeStep}},
}

func (d *drill) down(e *end) {
	d.t.Helper()
	d.interrupted = e == d.at && (e.is(pb.Phase_PHASE_RUNNING) || e.is(pb.Phase_PHASE_SOURCE_PREPARED))
	link, err := e.pf.Link()
	d.must(err)
	d.must(netlink.LinkSetDown(link))
}

// raise brings an end's PF up again; a guest on it sees a reset of its PF.
func (d *drill) raise(e *end) bool {
	d.t.Helper()
	d.must(e.pf.Up())
	d.await("the link of "+e.pf.Name, func() bool {
		link, err := e.pf.Link()
		return err == nil && link.Attrs().OperState == netlink.OperUp
	})
	return d.interrupted || d.at == e
}

// removal bounds how long somebody who removes VFs has to wait.
const removal = 5 * time.Second

// remove removes an end's VFs, which takes until nobody uses them.
func (d *drill) remove(e *end) {
	d.t.Helper()
	begin, done := time.Now(), make(chan error, 1)
	go func() { done <- e.pf.RemoveVFs() }()
	select {
	case err := <-done:
		d.must(err)
		d.t.Logf("the VFs were removed within %v", time.Since(begin))
	case <-time.After(removal):
		d.t.Errorf("the VFs are not removed within %v", removal)
		e.killProcess()
		d.must(<-done)
	}
	if n := d.damage(e); n == 0 {
		d.t.Error("that the VFs are gone is not told")
	}
}

func (d *drill) damage(e *end) int {
	d.start(e)
	list, err := e.agent.host.Damage(d.t.Context())
	d.must(err)
	return len(list)
}

// again makes the VFs anew.
func (d *drill) again(e *end) {
	d.t.Helper()
	_, err := e.pf.MakeVFs(vfsPerNode)
	d.must(err)
	e.before, err = e.settings()
	d.must(err)
	d.raise(e)
}

// TestNodeAdministration: a VM does not come into another port VLAN.
func TestNodeAdministration(t *testing.T) {
	d := newDrill(t)
	link, err := d.dst.pf.Link()
	d.must(err)
	d.must(netlink.LinkSetVfVlanQos(link, d.dst.vf.Number, 7, 0))
	t.Cleanup(func() { d.must(netlink.LinkSetVfVlanQos(link, d.dst.vf.Number, 0, 0)) })
	d.dst.before, err = d.dst.settings()
	d.must(err)
	if got := d.play("", nil); got != stayed {
		t.Errorf("the VM %s", got)
	}
	c := meta.FindStatusCondition(d.get().Status.Conditions, v1alpha1.ConditionPrepared)
	if c == nil || c.Reason != v1alpha1.ReasonIncompatible || !strings.Contains(c.Message, "port VLAN 0, here 7") {
		t.Errorf("condition %+v", c)
	}
	d.must(d.traffic("afterwards"))
	d.free()
}

// TestNodeMemlock: a device process without privileges lets its VF reach the
// guest's RAM because its agent has raised what it may lock, and says so where
// nobody has.
func TestNodeMemlock(t *testing.T) {
	d := newAttached(t)
	pid := d.src.process.Process.Pid
	var l unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, nil, &l); err != nil || l.Cur != unix.RLIM_INFINITY {
		t.Errorf("attached, it may lock %d bytes (%v)", l.Cur, err)
	}
	// As if no agent had.
	d.must(sidecar.Limit(pid, sidecar.Memlock))
	vf, err := vfiouser.Dial(t.Context(), filepath.Join(d.src.dir, vfSocket), nil)
	d.must(err)
	defer vf.Close()
	ram := vfiouser.DMAMap{Addr: guestBase, Size: driver.MemorySize, Readable: true, Writable: true, File: d.memory}
	if err := vf.DMAMap(t.Context(), ram); !errors.Is(err, unix.ENOMEM) {
		t.Errorf("more than it may lock was mapped: %v", err)
	}
	st, err := d.src.status()
	d.must(err)
	for _, want := range []string{d.src.vf.Address, "RLIMIT_MEMLOCK", "this process may lock 64 KiB", "this VF needs "} {
		if !strings.Contains(st.GetLastError(), want) {
			t.Errorf("its status says %q, want %q in it", st.GetLastError(), want)
		}
	}
	// And as the agent does.
	proxy, err := newDevices(d.src.podsDir).get(d.src.pod.UID)
	d.must(err)
	defer proxy.Close()
	d.must(proxy.unlimitMemlock(t.Context()))
	d.must(vf.DMAMap(t.Context(), ram))
	vf.Close()
	d.boot()
	d.endPod(d.src)
	d.freed()
}

// TestNodeFaults: whatever is killed, pulled down or removed, in whatever step of
// a migration, the VM runs on one side with a VF that works, or has none; and
// when its pods have ended all VFs are as they were.
func TestNodeFaults(t *testing.T) {
	for _, f := range faults {
		list := f.chosen
		if os.Getenv("COMPSC_FAULTS") == "all" {
			list = allSteps
		}
		for _, step := range list {
			t.Run(f.name+"/"+step, func(t *testing.T) {
				d := newDrill(t)
				happened := false
				got := d.play(step, func() { f.do(d); happened = true })
				for _, c := range d.get().Status.Conditions {
					if c.Status != metav1.ConditionTrue {
						t.Logf("%s is %s for %s: %s", c.Type, c.Status, c.Reason, c.Message)
					}
				}
				t.Logf("OUTCOME %s, %s: %s", f.name, step, got)
				if want := f.outcomes[step]; got != want {
					t.Errorf("the VM %s, want %s", got, want)
				}
				if !happened {
					t.Error("the migration ended before that")
				} else if f.mend != nil && f.mend(d) {
					d.must(d.guest.Start(d.guest.MAC))
				}
				if got != lost {
					if err := d.traffic("afterwards"); err != nil {
						t.Error(err)
					}
				}
				d.free()
			})
		}
	}
}
