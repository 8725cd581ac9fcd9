package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilwait "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/retry"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/api/v1alpha1"
)

// errOver is returned by a mutation that finds that the migration is no longer
// to go forward.
var errOver = errors.New("the migration is over, or being undone")

const (
	// maxMessage bounds a condition's message.
	maxMessage = 4096
	maxSteps   = 32
	maxName    = 63
)

type vfMigration = v1alpha1.VFMigration

// update changes the status of a migration as it is now on the API server.
// mutate touches only what this agent owns; its error ends the update.
func (a *agent) update(ctx context.Context, m *vfMigration, mutate func(*vfMigration) error) error {
	backoff := utilwait.Backoff{Steps: 10, Duration: 10 * time.Millisecond, Factor: 1.5, Jitter: 0.3}
	err := retry.RetryOnConflict(backoff, func() error {
		now := &vfMigration{}
		if err := a.live.Get(ctx, client.ObjectKeyFromObject(m), now); err != nil {
			return err
		}
		if now.UID != m.UID {
			return errOver
		}
		base := now.DeepCopy()
		if err := mutate(now); err != nil {
			return err
		}
		if equality.Semantic.DeepEqual(base.Status, now.Status) {
			return nil
		}
		return a.client.Status().Patch(ctx, now, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{}))
	})
	if apierrors.IsNotFound(err) {
		return errOver
	}
	if err != nil && !errors.Is(err, errOver) {
		return fmt.Errorf("status of VFMigration %s/%s: %w", m.Namespace, m.Name, err)
	}
	return err
}

// record is update for workers: it outlasts an API server that is away.
func (a *agent) record(ctx context.Context, m *vfMigration, mutate func(*vfMigration) error) error {
	for {
		err := a.update(ctx, m, mutate)
		if err == nil || errors.Is(err, errOver) {
			return err
		}
		a.log.Warn("status not written, trying again", "migration", m.Namespace+"/"+m.Name, "error", err)
		if !pauseFor(ctx, a.limits.pause*4) {
			return err
		}
	}
}

// forward makes a mutation that applies only while the migration goes forward.
func forward(mutate func(*vfMigration)) func(*vfMigration) error {
	return func(m *vfMigration) error {
		if over(m) || m.Status.Failure != nil {
			return errOver
		}
		mutate(m)
		return nil
	}
}

// always makes a mutation that applies until the migration is over.
func always(mutate func(*vfMigration)) func(*vfMigration) error {
	return func(m *vfMigration) error {
		if over(m) {
			return errOver
		}
		mutate(m)
		return nil
	}
}

// over tells whether the migration has come to its end.
func over(m *vfMigration) bool {
	c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionSucceeded)
	return c != nil && c.Status != metav1.ConditionUnknown
}

func is(m *vfMigration, typ string) bool {
	return meta.IsStatusConditionTrue(m.Status.Conditions, typ)
}

func isFalse(m *vfMigration, typ string) bool {
	return meta.IsStatusConditionFalse(m.Status.Conditions, typ)
}

// setTrue, setFalse and setUnknown write a condition. True has its own type as
// reason.
func setTrue(m *vfMigration, typ, format string, args ...any) {
	setCondition(m, typ, metav1.ConditionTrue, typ, fmt.Sprintf(format, args...))
}

func setFalse(m *vfMigration, typ, reason, format string, args ...any) {
	setCondition(m, typ, metav1.ConditionFalse, reason, fmt.Sprintf(format, args...))
}

func setUnknown(m *vfMigration, typ, reason, format string, args ...any) {
	setCondition(m, typ, metav1.ConditionUnknown, reason, fmt.Sprintf(format, args...))
}

func setCondition(m *vfMigration, typ string, s metav1.ConditionStatus, reason, message string) {
	meta.SetStatusCondition(&m.Status.Conditions, metav1.Condition{
		Type: typ, Status: s, Reason: reason, Message: cut(message, maxMessage), ObservedGeneration: m.Generation})
}

func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n-3], "") + "..."
}

// deviceOf returns the entry of an interface, which it adds if need be.
func deviceOf(m *vfMigration, name string) *v1alpha1.DeviceStatus {
	i := slices.IndexFunc(m.Status.Devices, func(d v1alpha1.DeviceStatus) bool { return d.Interface == name })
	if i < 0 {
		m.Status.Devices = append(m.Status.Devices, v1alpha1.DeviceStatus{Interface: name})
		i = len(m.Status.Devices) - 1
	}
	return &m.Status.Devices[i]
}

// addSteps adds timed steps of one side, or corrects them.
func addSteps(m *vfMigration, of side, steps []*controlpb.Step) {
	for _, s := range steps {
		name := s.GetName()
		if !strings.HasPrefix(name, string(of)+"/") {
			name = string(of) + "/" + name
		}
		name = cut(name, maxName)
		took := metav1.Duration{Duration: s.GetTook().AsDuration()}
		i := slices.IndexFunc(m.Status.Steps, func(s v1alpha1.StepStatus) bool { return s.Name == name })
		switch {
		case i >= 0:
			m.Status.Steps[i].Took = took
		case len(m.Status.Steps) < maxSteps:
			m.Status.Steps = append(m.Status.Steps, v1alpha1.StepStatus{Name: name, Took: took})
		}
	}
}

func timed(name string, took time.Duration) *controlpb.Step {
	return &controlpb.Step{Name: name, Took: durationpb.New(took)}
}
