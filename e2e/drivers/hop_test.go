//go:build e2edrivers

package drivers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/traffic"
)

const (
	// multicastInterval is how often one is sent during each hop.
	multicastInterval = 20 * time.Millisecond
	// broadcasts is more than the lab's ARP sends in that time. What of them a
	// device counts as multicast is not what is looked at here.
	broadcasts = 20
	// maxJump is more than any counter of packets grows in one hop.
	maxJump = 1 << 24
)

// hop checks that what was set works, moves the VM, and checks again.
func (r *rig) hop(ctx context.Context, how string) {
	r.t.Helper()
	r.verify(ctx)
	check(r.t, r.vm.Rebase(ctx))
	node, err := r.h.VMNode(ctx)
	check(r.t, err)
	r.hops++
	name := fmt.Sprintf("hop-%d", r.hops)
	if !r.want.trusted {
		name += "-untrusted"
	}
	progress(r.t, "%s: %s", name, how)
	m := harness.NewMigration(name, harness.Other(node))
	if err := r.move(ctx, m); err != nil {
		r.t.Fatalf("%s (%s): %v", name, how, err)
	}
	if now, err := r.h.VMNode(ctx); err != nil || now == node {
		r.t.Fatalf("%s: the VM is on node %s: %v", name, now, err)
	}
	r.verify(ctx)
	check(r.t, r.h.AwaitFreeVFs(ctx, node, harness.VFsPerNode))
	stopped, _ := r.h.StandIn.Timing(m.Status.MigrationRef.UID)
	progress(r.t, "%s: done; the VM stopped for %.0f ms", name, stopped.Resumed.Sub(stopped.Stopped).Seconds()*1000)
}

// move migrates the VM under traffic. Unlike harness.VM.Hop it does not mind
// when packets are lost, for what a guest sets here, and a machine that is
// busy, makes it late; but nothing that arrives may be wrong or counted wrong.
func (r *rig) move(ctx context.Context, m *v1alpha1.VFMigration) error {
	before, err := r.vm.Health(ctx)
	if err != nil {
		return err
	}
	stop, err := traffic.SendMulticast(r.h.Lab, multicastInterval)
	if err != nil {
		return err
	}
	err = r.h.Client().Create(ctx, m)
	if err == nil {
		err = r.h.AwaitEnd(ctx, m, nil)
	}
	sent, serr := stop()
	if err := errors.Join(err, serr); err != nil {
		return err
	}
	if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		return fmt.Errorf("it failed: %s", harness.Describe(m))
	}
	after, err := r.vm.CheckUndisturbed(ctx)
	if err != nil {
		return err
	}
	return errors.Join(checkCounters(before, after), checkMulticast(before, after, uint64(sent)))
}

// checkCounters fails if a counter of `ethtool -S` went backwards, or jumped.
func checkCounters(before, after harness.Health) error {
	for name, was := range before.Stats.Driver {
		limit := uint64(maxJump)
		if strings.Contains(name, "bytes") {
			limit <<= 10
		}
		if now, ok := after.Stats.Driver[name]; !ok || now < was || now-was > limit {
			return fmt.Errorf("counter %s was %d and is %d (there: %v)", name, was, now, ok)
		}
	}
	return nil
}

// checkMulticast compares the driver's count of multicast packets, which
// comes from the device, with what was sent and with what arrived: each one
// that the guest got was counted, once, on either device.
func checkMulticast(before, after harness.Health, sent uint64) error {
	counted := after.Stats.Driver["multicast"] - before.Stats.Driver["multicast"]
	got := after.Stats.Multicast - before.Stats.Multicast
	if got == 0 || got > counted || counted > sent+broadcasts {
		return fmt.Errorf("%d multicast packets were sent, the driver counts %d, %d arrived", sent, counted, got)
	}
	return nil
}
