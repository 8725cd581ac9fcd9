package harness

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/traffic"
	"compsc.io/compsc/e2e/wait"
)

const (
	// hopTimeout bounds a migration from its creation to its stated end.
	hopTimeout = 3 * time.Minute
	// pingSlack is how far from the VM's stop a ping that is lost may have
	// been sent: QEMU's events and the VF's stop and start are not one moment.
	pingSlack = 50 * time.Millisecond
	// multicastSlack is the same for multicast, of which nobody keeps the
	// times at which it was sent.
	multicastSlack = 150 * time.Millisecond
	// multicastInterval is how often one is sent during each hop.
	multicastInterval = 20 * time.Millisecond
	// maxJump is more than any counter of packets grows in one hop.
	maxJump = 1 << 24
)

// Hop is the account of one migration that succeeded. Its JSON form is part
// of out/demo.json.
type Hop struct {
	// VMStoppedMs is from QEMU's STOP event on the source to its RESUME event
	// on the target, DeviceStoppedMs what the product says of the VF.
	VMStoppedMs     float64 `json:"vmStoppedMs"`
	DeviceStoppedMs float64 `json:"deviceStoppedMs"`
	PingsLost       int     `json:"pingsLost"`
	// StreamBytes came through the checked stream, both ways, in the hop.
	StreamBytes  uint64 `json:"streamBytes"`
	StreamIntact bool   `json:"streamIntact"`
	DriverResets uint64 `json:"driverResets"`
	StateBytes   int64  `json:"stateBytes"`
	PagesMarked  int64  `json:"pagesMarked"`
	Steps        []Step `json:"steps"`
}

// Step is one timed step of a hop.
type Step struct {
	Name string  `json:"name"`
	Ms   float64 `json:"ms"`
}

// NewMigration is a VFMigration of the VM to the node.
func NewMigration(name, node string) *v1alpha1.VFMigration {
	return &v1alpha1.VFMigration{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "VFMigration"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace},
		Spec:       v1alpha1.VFMigrationSpec{VMIName: VMI, Target: &v1alpha1.VFMigrationTarget{NodeName: node}},
	}
}

// AwaitEnd waits until the VFMigration has ended and calls seen, if set, with
// each new version of it. An API server that is away is waited for.
func (h *Harness) AwaitEnd(ctx context.Context, m *v1alpha1.VFMigration, seen func(*v1alpha1.VFMigration)) error {
	return h.AwaitMigration(ctx, m, "to end", seen, Ended)
}

// Ended tells whether a VFMigration has ended, well or not.
func Ended(m *v1alpha1.VFMigration) bool {
	c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionSucceeded)
	return c != nil && c.Status != metav1.ConditionUnknown
}

// AwaitMigration waits until ok is true of the VFMigration.
func (h *Harness) AwaitMigration(ctx context.Context, m *v1alpha1.VFMigration, what string, seen func(*v1alpha1.VFMigration), ok func(*v1alpha1.VFMigration) bool) error {
	key, version := client.ObjectKeyFromObject(m), ""
	err := wait.Until(ctx, "VFMigration "+m.Name+" "+what, func(ctx context.Context) (bool, error) {
		if err := h.Client().Get(ctx, key, m); err != nil {
			return false, err
		}
		if m.ResourceVersion != version && seen != nil {
			seen(m.DeepCopy())
		}
		version = m.ResourceVersion
		return ok(m), nil
	})
	if err != nil {
		err = fmt.Errorf("%w; its state: %s", err, Describe(m))
	}
	return err
}

// Describe is a VFMigration's state in one line.
func Describe(m *v1alpha1.VFMigration) string {
	var b strings.Builder
	fmt.Fprintf(&b, "phase %s", m.Status.Phase)
	for _, c := range m.Status.Conditions {
		fmt.Fprintf(&b, ", %s=%s (%s: %s)", c.Type, c.Status, c.Reason, c.Message)
	}
	if f := m.Status.Failure; f != nil {
		fmt.Fprintf(&b, ", failure %s: %s", f.Reason, f.Message)
	}
	return b.String()
}

// Hop moves the VM to the node under load: create makes the VFMigration.
// The error says what of all that must hold does not.
func (vm *VM) Hop(ctx context.Context, m *v1alpha1.VFMigration, create func(context.Context, *v1alpha1.VFMigration) error, seen func(*v1alpha1.VFMigration)) (*Hop, error) {
	ctx, cancel := context.WithTimeout(ctx, hopTimeout)
	defer cancel()
	before, err := vm.Health(ctx)
	if err != nil {
		return nil, err
	}
	mark, bytes := vm.Pinger.Mark(), vm.Stream.Stats()

	stop, err := traffic.SendMulticast(vm.h.Lab, multicastInterval)
	if err != nil {
		return nil, err
	}
	err = create(ctx, m)
	if err == nil {
		err = vm.h.AwaitEnd(ctx, m, seen)
	}
	sent, serr := stop()
	if err := errors.Join(err, serr); err != nil {
		return nil, err
	}
	if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		return nil, fmt.Errorf("VFMigration %s failed: %s", m.Name, Describe(m))
	}
	var errs []error
	after, err := vm.CheckUndisturbed(ctx)
	if err != nil {
		errs = append(errs, err)
		if after.Stats.Driver == nil {
			// There is nothing to tell of a guest that does not answer.
			return nil, errors.Join(errs...)
		}
	}
	pings, err := vm.Pinger.Report(ctx, mark)
	if err != nil {
		return nil, err
	}
	timing, ok := vm.h.StandIn.Timing(m.Status.MigrationRef.UID)
	if !ok {
		return nil, fmt.Errorf("VFMigration %s succeeded, its VirtualMachineInstanceMigration did not", m.Name)
	}
	logged := []any{"migration", m.Name, "vmStopped", timing.Resumed.Sub(timing.Stopped), "pingsLost", pings.Lost, "worstRTT", pings.WorstRTT}
	if n := len(pings.LostAt); n > 0 {
		logged = append(logged, "firstLostAfterStop", pings.LostAt[0].Sub(timing.Stopped), "lastLostAfterResume", pings.LostAt[n-1].Sub(timing.Resumed))
	}
	vm.h.o.Log.Info("hop", logged...)
	st := vm.Stream.Stats()
	hop := &Hop{
		VMStoppedMs:  ms(timing.Resumed.Sub(timing.Stopped)),
		PingsLost:    pings.Lost,
		StreamBytes:  st.Sent - bytes.Sent + st.Received - bytes.Received,
		StreamIntact: st.Intact,
		DriverResets: after.Resets - before.Resets + after.CarrierDowns - before.CarrierDowns,
	}
	if d := m.Status.Downtime; d != nil {
		hop.DeviceStoppedMs = ms(d.DeviceStopped.Duration)
	} else {
		errs = append(errs, errors.New("the VFMigration tells no downtime"))
	}
	for _, d := range m.Status.Devices {
		hop.StateBytes += d.StateBytes
		hop.PagesMarked += d.PagesMarked
	}
	for _, s := range m.Status.Steps {
		hop.Steps = append(hop.Steps, Step{Name: s.Name, Ms: ms(s.Took.Duration)})
	}
	return hop, errors.Join(append(errs,
		checkPings(pings, timing), checkCounters(before, after), checkMulticast(before, after, uint64(sent), timing))...)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// checkPings fails if a ping was lost that did not fall into the stop.
func checkPings(r traffic.PingReport, t standin.Timing) error {
	for _, at := range r.LostAt {
		if at.Before(t.Stopped.Add(-pingSlack)) || at.After(t.Resumed.Add(pingSlack)) {
			return fmt.Errorf("a ping sent %s after the VM stopped, for %s, was lost", at.Sub(t.Stopped), t.Resumed.Sub(t.Stopped))
		}
	}
	return nil
}

// checkCounters fails if a counter of `ethtool -S` went backwards, or jumped.
func checkCounters(before, after Health) error {
	for name, was := range before.Stats.Driver {
		now, ok := after.Stats.Driver[name]
		limit := uint64(maxJump)
		if strings.Contains(name, "bytes") {
			limit <<= 10
		}
		switch {
		case !ok:
			return fmt.Errorf("counter %s vanished", name)
		case now < was:
			return fmt.Errorf("counter %s went backwards, from %d to %d", name, was, now)
		case now-was > limit:
			return fmt.Errorf("counter %s jumped from %d to %d", name, was, now)
		}
	}
	return nil
}

// checkMulticast compares the driver's count of multicast packets, which
// comes from the device, with what was sent and with what arrived: every one
// that the guest got must have been counted, once, on either device.
func checkMulticast(before, after Health, sent uint64, t standin.Timing) error {
	counted := after.Stats.Driver["multicast"] - before.Stats.Driver["multicast"]
	got := after.Stats.Multicast - before.Stats.Multicast
	stop := t.Resumed.Sub(t.Stopped) + 2*multicastSlack
	fall := uint64(stop/multicastInterval) + 1
	if counted > sent || counted+fall < sent {
		return fmt.Errorf("%d multicast packets were sent, the driver counts %d; at most %d can have fallen into the stop", sent, counted, fall)
	}
	if got > counted || got+fall < sent {
		return fmt.Errorf("%d multicast packets were sent, the driver counts %d, %d arrived", sent, counted, got)
	}
	return nil
}
