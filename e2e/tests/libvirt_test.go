//go:build e2e

package tests

import (
	"context"
	"encoding/xml"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"libvirt.org/go/libvirtxml"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

func vmKey() client.ObjectKey {
	return client.ObjectKey{Namespace: harness.Namespace, Name: harness.VMI}
}

func pod(t *testing.T, ctx context.Context, key client.ObjectKey) types.UID {
	t.Helper()
	uid, err := h.StandIn.Pod(ctx, key)
	check(t, err)
	return uid
}

// domainName is what virt-launcher calls a VM's domain.
func domainName(key client.ObjectKey) string { return key.Namespace + "_" + key.Name }

// libvirtSaid returns libvirt's reason for the failure of the VM's last
// migration.
func libvirtSaid(t *testing.T, ctx context.Context) string {
	t.Helper()
	v := &kubevirtv1.VirtualMachineInstance{}
	check(t, h.Client().Get(ctx, vmKey(), v))
	if v.Status.MigrationState == nil || !v.Status.MigrationState.Failed {
		t.Fatalf("the last migration did not fail: %+v", v.Status.MigrationState)
	}
	return v.Status.MigrationState.FailureReason
}

// TestLibvirtVeto: what the gates refuse, libvirt sees as an error of QEMU,
// and has the VM run on on its source.
func TestLibvirtVeto(t *testing.T) {
	t.Run("source", func(t *testing.T) {
		ctx := within(t, bound)
		source := vmNode(t, ctx)
		deviceArgs.Store([]string{"--fault=corrupt-state"})
		defer deviceArgs.Store(usualArgs())
		m := newMigration(t, ctx)
		check(t, create(ctx, m))
		refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonStateRejected)
		if s := libvirtSaid(t, ctx); !strings.Contains(s, "libvirt: ") || !strings.Contains(s, "Failed to stop the VM") {
			t.Errorf("libvirt said %q", s)
		}
	})
	t.Run("target", func(t *testing.T) {
		ctx := within(t, bound)
		source := vmNode(t, ctx)
		release := hold(t, standin.BeforeFinish)
		m := newMigration(t, ctx)
		check(t, create(ctx, m))
		reach(t, ctx, m, "loaded", loaded)
		before := m.DeepCopy()
		m.Spec.Abort = true
		check(t, h.Client().Patch(ctx, m, client.MergeFrom(before)))
		check(t, wait.Until(ctx, "the target to be cancelled", func(ctx context.Context) (bool, error) {
			phase, err := h.StandIn.DevicePhase(ctx, m.Status.Target.PodUID)
			return phase == controlpb.Phase_PHASE_CANCELLED, err
		}))
		release()
		refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonAborted)
		if s := libvirtSaid(t, ctx); !strings.Contains(s, "libvirt: ") || !strings.Contains(s, "Input/output error") {
			t.Errorf("libvirt said %q", s)
		}
	})
}

// TestLibvirtRestart: libvirtd is killed and comes back, before a migration
// and during one, on either side. The VM stays, or moves, undisturbed.
func TestLibvirtRestart(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		ctx := within(t, bound)
		check(t, h.StandIn.RestartLibvirt(ctx, pod(t, ctx, vmKey())))
		hop(t, ctx)
	})
	for _, side := range []string{"source", "target"} {
		t.Run(side, func(t *testing.T) {
			ctx := within(t, bound)
			source := vmNode(t, ctx)
			h.StandIn.SetBandwidth(1 << 20)
			defer h.StandIn.SetBandwidth(0)
			m := newMigration(t, ctx)
			check(t, create(ctx, m))
			reach(t, ctx, m, "copied", copying)
			victim := pod(t, ctx, vmKey())
			if side == "target" {
				victim = m.Status.Target.PodUID
			}
			// The target's pod may end before its libvirtd is back.
			if err := h.StandIn.RestartLibvirt(ctx, victim); err != nil && side == "source" {
				t.Fatal(err)
			}
			refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonMigrationFailed)
			h.StandIn.SetBandwidth(0)
			hop(t, ctx)
		})
	}
}

// TestLibvirtCancel: virsh cancels the migration behind everybody's back, in
// each phase that libvirt has. Where it comes too late the VM moves.
func TestLibvirtCancel(t *testing.T) {
	for _, s := range stages() {
		if s.name != "pre-copy" && s.name != "captured" && s.name != "before-start" {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			ctx := within(t, bound)
			source := vmNode(t, ctx)
			m, release := s.bring(t, ctx)
			victim := pod(t, ctx, vmKey())
			said := make(chan string, 1)
			go func() {
				out, err := h.StandIn.Virsh(ctx, victim, "domjobabort", domainName(vmKey()))
				if err != nil {
					out = err.Error()
				}
				said <- out
			}()
			if s.hold != "" {
				// libvirt stands still in these; it takes the request in when
				// it goes on.
				release()
			}
			t.Logf("virsh: %s", strings.TrimSpace(<-said))
			release()
			check(t, h.AwaitEnd(ctx, m, nil))
			if isTrue(v1alpha1.ConditionSucceeded)(m) {
				if s.name == "pre-copy" {
					t.Errorf("it was not cancelled: %s", harness.Describe(m))
				}
				undisturbed(t, ctx, harness.Other(source), harness.VFsPerNode)
				return
			}
			refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonMigrationFailed)
		})
	}
}

// TestDeviceRestart: a VM whose device process was killed has lost its VF, but
// not its life: libvirt stops it and starts it again, and QEMU finds the gate of
// the process that comes after. Until then it cannot be moved, and is told so.
// It is killed while the VM is stopped: QEMU
// 11.1.3 aborts (error_setv in its vfio-user client) if the kernel tells it that
// the process has not read all that it wrote.
func TestDeviceRestart(t *testing.T) {
	ctx := within(t, 2*bound)
	const name = "orphan"
	key := client.ObjectKey{Namespace: harness.Namespace, Name: name}
	orphan, err := h.BootVM(ctx, name, "52:54:00:c0:5c:03", 2)
	check(t, err)
	uid := pod(t, ctx, key)
	if n, err := h.StandIn.GateConnections(uid); err != nil || n != 1 {
		t.Fatalf("%d connections at the gate: %v", n, err)
	}
	virsh := func(command string) {
		t.Helper()
		if out, err := h.StandIn.Virsh(ctx, uid, command, domainName(key)); err != nil {
			t.Fatalf("virsh %s: %v, %s", command, err, out)
		}
	}
	virsh("suspend")
	check(t, h.StandIn.RestartSidecar(uid))
	check(t, wait.Until(ctx, "the new device process to have the VF", func(ctx context.Context) (bool, error) {
		st, err := h.StandIn.DeviceStatus(ctx, key)
		if err != nil {
			return false, nil // it starts
		}
		return st.Phase == controlpb.Phase_PHASE_RUNNING, nil
	}))
	// At the latest, the stop's flush makes QEMU connect again.
	virsh("resume")
	virsh("suspend")
	virsh("resume")
	check(t, wait.Until(ctx, "QEMU to connect to the gate again", func(context.Context) (bool, error) {
		n, err := h.StandIn.GateConnections(uid)
		return n == 1, err
	}))

	// A migration would move a VM that has no VF, and be called a success.
	node, err := orphan.Node(ctx)
	check(t, err)
	m := orphan.NewMigration(uniqueName(t), harness.Other(node))
	check(t, create(ctx, m))
	check(t, h.AwaitEnd(ctx, m, nil))
	rolledBack := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionRolledBack)
	if f := m.Status.Failure; f == nil || f.Reason != v1alpha1.ReasonDeviceUnavailable || !strings.Contains(f.Message, "QEMU is not connected to the VF") ||
		rolledBack == nil || !strings.Contains(rolledBack.Message, "the VM has no VF until it is restarted") {
		t.Errorf("a VM that has lost its VF was to be moved: %s", harness.Describe(m))
	}
	if now, err := orphan.Node(ctx); err != nil || now != node {
		t.Errorf("the VM that could not be moved is on node %s, was on %s: %v", now, node, err)
	}
	check(t, h.DeleteVM(ctx, name))
	undisturbed(t, ctx, vmNode(t, ctx), harness.VFsPerNode)
}

// TestLibvirtNominal: libvirt knows the VF's interface by the name and the
// address that KubeVirt asks it for, wherever the VM is, and the guest has no
// device for that but the VF.
func TestLibvirtNominal(t *testing.T) {
	ctx := within(t, bound)
	for range 2 {
		var guest proto.Info
		check(t, vm.Call(ctx, func(ctx context.Context, c *proto.Client) (err error) {
			guest, err = c.Info(ctx)
			return err
		}))
		if len(guest.Interfaces) != 1 || !slices.Contains(guest.PCI, "0000:00:10.0") {
			t.Fatalf("the guest has %+v", guest)
		}
		for _, a := range guest.PCI {
			if strings.HasPrefix(a, "0000:00:18.") {
				t.Errorf("the guest found device %s", a)
			}
		}
		doc, err := h.StandIn.Virsh(ctx, pod(t, ctx, vmKey()), "dumpxml", domainName(vmKey()), "--xpath", "//devices/interface", "--wrap")
		check(t, err)
		var d struct {
			Interfaces []libvirtxml.DomainInterface `xml:"interface"`
		}
		if err := xml.Unmarshal([]byte(doc), &d); err != nil || len(d.Interfaces) != 1 {
			t.Fatalf("the domain has the interfaces %s (%v)", doc, err)
		}
		i := d.Interfaces[0]
		if i.Alias == nil || i.Alias.Name != "ua-"+harness.Interface || i.MAC == nil || i.MAC.Address != guest.Interfaces[0].MAC {
			t.Errorf("the interface is %+v with MAC %+v, the guest's has %s", i.Alias, i.MAC, guest.Interfaces[0].MAC)
		}
		hop(t, ctx)
	}
}
