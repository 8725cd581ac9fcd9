//go:build e2e

package tests

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

// place is a moment of a migration at which something is killed. The source's
// agent stands still where nothing else keeps the migration in it.
type place struct {
	name string
	// bring starts the migration and brings it there.
	bring func(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, source string)
	// leave lets it go on.
	leave func(t *testing.T, ctx context.Context, source string)
}

func signalAgent(t *testing.T, node string, s unix.Signal) {
	t.Helper()
	if p := h.Agent(node); p != nil {
		check(t, p.Signal(s))
	}
}

// halt stops the source's agent, and returns once each of its threads has
// stopped: a busy machine takes its time. wake lets it go on.
func halt(t *testing.T, ctx context.Context, source string) {
	t.Helper()
	signalAgent(t, source, unix.SIGSTOP)
	t.Cleanup(func() { signalAgent(t, source, unix.SIGCONT) })
	pid := h.Agent(source).PID()
	check(t, wait.Until(ctx, "the source's agent to stand still", func(context.Context) (bool, error) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			return false, err
		}
		if len(threads) == 0 {
			return false, fmt.Errorf("process %d is not there", pid)
		}
		for _, thread := range threads {
			b, err := os.ReadFile(thread)
			if err != nil {
				return false, nil // it ended; the others are looked at again
			}
			// The state follows the name, which is in parentheses (proc(5)).
			if _, state, _ := bytes.Cut(b, []byte(") ")); !bytes.HasPrefix(state, []byte("T")) {
				return false, nil
			}
		}
		return true, nil
	}))
}

func wake(t *testing.T, _ context.Context, source string) { signalAgent(t, source, unix.SIGCONT) }

func hold(t *testing.T, p standin.Point) (release func()) {
	release = h.StandIn.Hold(p)
	t.Cleanup(release)
	return release
}

var places = []place{
	// The target's VFs are leased and attached, nobody has looked at them.
	{"pinned", func(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, source string) {
		release := hold(t, standin.InPending)
		check(t, create(ctx, m))
		check(t, h.AwaitMigration(ctx, m, "to be accepted", nil, isTrue(v1alpha1.ConditionAccepted)))
		halt(t, ctx, source)
		release()
		check(t, h.AwaitMigration(ctx, m, "to be pinned", nil, isTrue(v1alpha1.ConditionTargetPinned)))
	}, wake},
	// Pre-copy, which ends once it has left.
	{"copying", func(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, source string) {
		h.StandIn.SetBandwidth(1 << 20)
		t.Cleanup(func() { h.StandIn.SetBandwidth(0) })
		check(t, create(ctx, m))
		reach(t, ctx, m, "copied", copying)
	}, func(t *testing.T, ctx context.Context, _ string) { check(t, h.StandIn.SpeedUp(ctx)) }},
	// The target's QEMU waits to start the VM, for the source to give its
	// VFs up.
	{"held", func(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, source string) {
		release := hold(t, standin.BeforeFinish)
		check(t, create(ctx, m))
		reach(t, ctx, m, "loaded", loaded)
		halt(t, ctx, source)
		release()
		check(t, wait.Until(ctx, "QEMU to wait in the target's gate", func(ctx context.Context) (bool, error) {
			phase, err := h.StandIn.DevicePhase(ctx, m.Status.Target.PodUID)
			return phase == controlpb.Phase_PHASE_TARGET_HELD, err
		}))
	}, wake},
}

// TestKilled: agents and the target's device process are killed in the middle
// of a migration; agents come back only once the migration is known to have
// failed. It ends with its reason stated, the VM on its source with its
// network, and the target's VF free.
func TestKilled(t *testing.T) {
	victims := []struct {
		name string
		kill func(t *testing.T, m *v1alpha1.VFMigration, source string) (back func() error)
		// reasons by place; several where agents and KubeVirt notice together.
		reasons map[string][]string
	}{
		{"target-agent", func(t *testing.T, m *v1alpha1.VFMigration, source string) func() error {
			node := harness.Other(source)
			h.StopAgent(node)
			return func() error { return h.StartAgent(node, harness.VFsPerNode) }
		}, map[string][]string{
			"pinned": {v1alpha1.ReasonPeerUnavailable}, "copying": {v1alpha1.ReasonPeerUnavailable}, "held": {v1alpha1.ReasonMigrationFailed},
		}},
		{"source-agent", func(t *testing.T, m *v1alpha1.VFMigration, source string) func() error {
			h.StopAgent(source)
			return func() error { return h.StartAgent(source, harness.VFsPerNode) }
		}, map[string][]string{
			"pinned": {v1alpha1.ReasonTimeout}, "copying": {v1alpha1.ReasonMigrationFailed}, "held": {v1alpha1.ReasonPeerUnavailable},
		}},
		{"target-device", func(t *testing.T, m *v1alpha1.VFMigration, source string) func() error {
			check(t, h.StandIn.KillSidecar(m.Status.Target.PodUID))
			return func() error { return nil }
		}, map[string][]string{
			// QEMU may not survive the loss of its sockets.
			"pinned": {v1alpha1.ReasonPeerUnavailable}, "copying": {v1alpha1.ReasonPeerUnavailable, v1alpha1.ReasonMigrationFailed},
			"held": {v1alpha1.ReasonMigrationFailed, v1alpha1.ReasonRestoreFailed, v1alpha1.ReasonDeviceUnavailable},
		}},
	}
	for _, v := range victims {
		t.Run(v.name, func(t *testing.T) {
			for _, p := range places {
				t.Run(p.name, func(t *testing.T) {
					ctx := within(t, bound)
					source := vmNode(t, ctx)
					m := newMigration(t, ctx)
					// Longer than the source agent's lease, so that the message can name it.
					m.Spec.Timeouts.Prepare = &metav1.Duration{Duration: 15 * time.Second}
					p.bring(t, ctx, m, source)
					back := v.kill(t, m, source)
					p.leave(t, ctx, source)
					failing := h.AwaitMigration(ctx, m, "to fail", nil, func(m *v1alpha1.VFMigration) bool {
						return m.Status.Failure != nil || harness.Ended(m)
					})
					check(t, back())
					check(t, failing)
					check(t, h.AwaitEnd(ctx, m, nil))
					reason := v.reasons[p.name][0]
					if f := m.Status.Failure; f != nil && slices.Contains(v.reasons[p.name], f.Reason) {
						reason = f.Reason
					}
					refused(t, ctx, m, source, harness.VFsPerNode, reason)
					for node := range h.Lab.Nodes {
						check(t, h.AwaitAgentLease(ctx, node, true))
					}
				})
			}
		})
	}
}
