//go:build e2enodes

package nodes_test

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/traffic"
)

// TestMigration moves a guest under traffic from a VF of one node to a VF of the
// other, by a VFMigration.
func TestMigration(t *testing.T) {
	r := newRig(t)
	before := map[string]card.Node{harness.NodeA: r.look(harness.NodeA), harness.NodeB: r.look(harness.NodeB)}
	r.must(r.h.CreateVM(r.ctx, harness.VMI, harness.MAC, guestMemory, 1, false))
	r.guest(bootTimeout, func(ctx context.Context, c *proto.Client) error {
		for {
			// Until the guest has opened its port it echoes.
			if _, err := c.WaitUp(ctx, 1); err == nil || ctx.Err() != nil {
				return err
			}
		}
	})
	r.guest(callTimeout, func(ctx context.Context, c *proto.Client) error {
		info, err := c.Info(ctx)
		if i := info.Interfaces; err != nil || len(i) != 1 || i[0].Driver != "igbvf" || i[0].MAC != harness.MAC {
			return fmt.Errorf("the guest's interfaces are %+v (%v), want one with driver igbvf and MAC %s", i, err, harness.MAC)
		}
		return nil
	})
	r.owner(harness.NodeA)
	ping, s := r.load()
	r.flow(s)
	was := r.health()

	m := r.move()
	if node, err := r.h.VMNode(r.ctx); err != nil || node != harness.NodeB {
		t.Fatalf("the VM is on node %q (%v)", node, err)
	}
	r.owner(harness.NodeB)
	r.flow(s)
	r.must(ping.Await(r.ctx, 5))
	r.account(m)
	here, err := s.Stop(r.ctx)
	r.must(err)
	is := r.health()
	r.undisturbed(was, is)
	r.guest(callTimeout, func(ctx context.Context, c *proto.Client) error { return traffic.CheckIntact(ctx, c, here) })

	r.must(r.h.DeleteVM(r.ctx, harness.VMI))
	for node, was := range before {
		r.must(r.h.AwaitFreeVFs(r.ctx, node, harness.VFsPerNode))
		if is := r.look(node); !reflect.DeepEqual(was, is) {
			t.Errorf("node %s was\n%+v and is\n%+v", node, was, is)
		}
	}
	r.released()
}

// released fails unless there are leases of VFs, the one that was used on each
// node, that nobody holds.
func (r *rig) released() {
	r.Helper()
	var leases coordinationv1.LeaseList
	r.must(r.h.Client().List(r.ctx, &leases, client.InNamespace(v1alpha1.SystemNamespace)))
	n := 0
	for _, l := range leases.Items {
		if !strings.HasPrefix(l.Name, "vf-") {
			continue
		}
		n++
		if h := l.Spec.HolderIdentity; h != nil && *h != "" {
			r.Errorf("lease %s is still held, by %s", l.Name, *h)
		}
	}
	if n != 2 {
		r.Errorf("there are %d leases of VFs, want that of the VM's VF on each node", n)
	}
}

// look returns how a node is.
func (r *rig) look(node string) card.Node {
	r.Helper()
	n, err := r.nodes.Look(node)
	r.must(err)
	if len(n.VFs) != harness.VFsPerNode {
		r.Fatalf("node %s has VFs %+v, want %d", node, n.VFs, harness.VFsPerNode)
	}
	return n
}

// holders are the nodes one of whose PFs has given the VM's MAC to a VF. The
// target is asked first: if both have it, they had it at once.
func (r *rig) holders() (nodes []string) {
	r.Helper()
	for _, node := range []string{harness.NodeB, harness.NodeA} {
		if slices.ContainsFunc(r.look(node).VFs, func(s card.State) bool { return s.MAC == harness.MAC }) {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

// owner fails unless the node alone has the VM's MAC.
func (r *rig) owner(node string) {
	r.Helper()
	if got := r.holders(); !slices.Equal(got, []string{node}) {
		r.Errorf("the VM's MAC is on nodes %v, want %s", got, node)
	}
}

// move moves the VM to the other node.
func (r *rig) move() *v1alpha1.VFMigration {
	r.Helper()
	m := harness.NewMigration("move", harness.NodeB)
	m.Spec.Timeouts = v1alpha1.VFMigrationTimeouts{
		Prepare: &metav1.Duration{Duration: 10 * time.Minute}, Hold: &metav1.Duration{Duration: 10 * time.Second},
	}
	r.must(r.h.Client().Create(r.ctx, m))
	r.must(r.h.AwaitEnd(r.ctx, m, func(m *v1alpha1.VFMigration) {
		on := r.holders()
		if len(on) > 1 {
			r.Errorf("the VM's MAC is on nodes %v at once", on)
		}
		r.Logf("the VM's MAC is on %v; VFMigration: %s", on, harness.Describe(m))
	}))
	if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		r.Fatalf("the VFMigration failed: %s", harness.Describe(m))
	}
	return m
}

// account fails unless the VFMigration tells what was done.
func (r *rig) account(m *v1alpha1.VFMigration) {
	r.Helper()
	if len(m.Status.Devices) != 1 || m.Status.Downtime == nil {
		r.Fatalf("the VFMigration tells of devices %+v, downtime %+v", m.Status.Devices, m.Status.Downtime)
	}
	d := m.Status.Devices[0]
	r.Logf("VM stopped for %v, VF for %v; %+v", m.Status.Downtime.VMStopped, m.Status.Downtime.DeviceStopped, d)
	for _, s := range m.Status.Steps {
		r.Logf("step %s took %v", s.Name, s.Took.Duration)
	}
	if d.PagesMarked == 0 || d.ReplayedOperations == 0 || d.StateBytes == 0 {
		r.Errorf("no page was marked, or nothing replayed: %+v", d)
	}
}

// undisturbed fails if the guest has noticed anything.
func (r *rig) undisturbed(was, is traffic.Health) {
	r.Helper()
	if err := is.Undisturbed(was); err != nil {
		r.Error(err)
	}
	for _, name := range []string{"rx_packets", "tx_packets", "rx_bytes", "tx_bytes"} {
		before, now := was.Stats.Driver[name], is.Stats.Driver[name]
		r.Logf("counter %s was %d before the move and is %d with more traffic", name, before, now)
		// The driver takes a counter that goes back for one that has wrapped.
		if now <= before || now-before > maxGrowth {
			r.Errorf("counter %s did not go on", name)
		}
	}
	if is.Interrupts() <= was.Interrupts() {
		r.Errorf("interrupts were %v before the move and are %v", was.Stats.Interrupts, is.Stats.Interrupts)
	}
}
