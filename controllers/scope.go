package controllers

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// scope is what one reconcile knows. Phases read the observations and write
// to vfm.Status only.
type scope struct {
	now time.Time
	// base is the VFMigration as it was read, vfm the copy that phases change.
	base, vfm *v1alpha1.VFMigration
	// vmi is nil when the VMI does not exist, or is another one of that name,
	// made after the migration was accepted.
	vmi *virtv1.VirtualMachineInstance
	// vmim is the VFMigration's own VirtualMachineInstanceMigration, created
	// or adopted, foreign one of its name that is not its own; either may be nil.
	vmim, foreign *virtv1.VirtualMachineInstanceMigration
	// targetPod is the virt-launcher pod that KubeVirt made to receive the
	// VM; nil when there is none.
	targetPod *corev1.Pod
	// outcome is what summarise makes of the migration.
	outcome outcome
	// remark is added to the message of a failed outcome.
	remark string
}

// outcome is how a migration stands.
type outcome int

const (
	underWay outcome = iota
	succeeded
	failed
)

// observe reads everything that concerns vfm.
func (r *VFMigrationReconciler) observe(ctx context.Context, vfm *v1alpha1.VFMigration) (*scope, error) {
	s := &scope{now: r.Clock.Now(), base: vfm.DeepCopy(), vfm: vfm}

	vmi := &virtv1.VirtualMachineInstance{}
	found, err := r.lookup(ctx, client.ObjectKey{Namespace: vfm.Namespace, Name: vfm.Spec.VMIName}, vmi)
	if err != nil {
		return nil, fmt.Errorf("read VirtualMachineInstance %s: %w", vfm.Spec.VMIName, err)
	}
	if start := vfm.Status.StartTime; found && (start == nil || !vmi.CreationTimestamp.After(start.Time)) {
		s.vmi = vmi
	}

	vmim := &virtv1.VirtualMachineInstanceMigration{}
	found, err = r.lookup(ctx, client.ObjectKey{Namespace: vfm.Namespace, Name: s.migrationName()}, vmim)
	if err != nil {
		return nil, fmt.Errorf("read VirtualMachineInstanceMigration %s: %w", s.migrationName(), err)
	}
	if found {
		own := metav1.IsControlledBy(vmim, vfm)
		if ref := vfm.Spec.MigrationRef; ref != nil {
			own = vmim.UID == ref.UID
		}
		if own {
			s.vmim = vmim
		} else {
			s.foreign = vmim
		}
	}
	if s.targetPod, err = r.findTargetPod(ctx, s); err != nil {
		return nil, fmt.Errorf("find the target pod: %w", err)
	}
	return s, nil
}

// findTargetPod returns the pod that was chosen as target while it exists,
// else the newest one that KubeVirt made for the migration.
func (r *VFMigrationReconciler) findTargetPod(ctx context.Context, s *scope) (*corev1.Pod, error) {
	var uid types.UID
	if s.vmim != nil {
		uid = s.vmim.UID
	} else if ref := s.vfm.Status.MigrationRef; ref != nil {
		uid = ref.UID
	} else if ref := s.vfm.Spec.MigrationRef; ref != nil {
		uid = ref.UID
	}
	if uid == "" {
		return nil, nil
	}
	var pods corev1.PodList
	if err := r.Client.List(ctx, &pods, client.InNamespace(s.vfm.Namespace),
		client.MatchingLabels{kubevirt.LabelMigrationJobUID: string(uid), kubevirt.LabelApp: kubevirt.AppLauncher}); err != nil {
		return nil, err
	}
	var newest *corev1.Pod
	for i := range pods.Items {
		pod := &pods.Items[i]
		if t := s.vfm.Status.Target; t != nil && t.PodUID == pod.UID {
			return pod, nil
		}
		if newest == nil || newest.CreationTimestamp.Before(&pod.CreationTimestamp) {
			newest = pod
		}
	}
	return newest, nil
}

// isTerminal tells whether a VFMigration has come to its end.
func isTerminal(m *v1alpha1.VFMigration) bool {
	c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionSucceeded)
	return c != nil && c.Status != metav1.ConditionUnknown
}

// condition returns the condition of that type, a zero one when it is not set.
func (s *scope) condition(typ string) metav1.Condition {
	if c := meta.FindStatusCondition(s.vfm.Status.Conditions, typ); c != nil {
		return *c
	}
	return metav1.Condition{Type: typ}
}

// is tells whether the condition of that type is True.
func (s *scope) is(typ string) bool { return s.condition(typ).Status == metav1.ConditionTrue }

// refused tells whether an agent reports that its step went wrong.
func refused(c metav1.Condition) bool {
	return c.Status == metav1.ConditionFalse && c.Reason != v1alpha1.ReasonProgressing
}

// started tells whether the acceptance is written, so that it may be acted upon.
func (s *scope) started() bool {
	return meta.IsStatusConditionTrue(s.base.Status.Conditions, v1alpha1.ConditionAccepted)
}

// proceeding tells whether the migration is on its way forward.
func (s *scope) proceeding() bool {
	return s.started() && s.vfm.Status.Failure == nil && s.outcome == underWay
}

// committed tells whether the migration is known to be past its point of no
// return. Between the agents' passing it and the first sign of it the manager
// may still ask for an undo; the agents then say that it is too late.
func (s *scope) committed() bool {
	if s.is(v1alpha1.ConditionRolledBack) {
		return false
	}
	return s.is(v1alpha1.ConditionRestored) || s.is(v1alpha1.ConditionVerified) || s.tooLate() ||
		s.onTarget() || s.vmim != nil && s.vmim.Status.Phase == virtv1.MigrationSucceeded
}

// tooLate tells whether the source's agent found the point of no return passed.
func (s *scope) tooLate() bool {
	c := s.condition(v1alpha1.ConditionRolledBack)
	return c.Status == metav1.ConditionFalse && c.Reason == v1alpha1.ReasonPointOfNoReturn
}

// committedSince is the earliest sign of the point of no return: the agents'
// conditions, or KubeVirt's end of the migration.
func (s *scope) committedSince() time.Time {
	var first time.Time
	note := func(t time.Time) {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	for _, typ := range []string{v1alpha1.ConditionRestored, v1alpha1.ConditionVerified} {
		if c := s.condition(typ); c.Status == metav1.ConditionTrue {
			note(c.LastTransitionTime.Time)
		}
	}
	if s.tooLate() {
		note(s.condition(v1alpha1.ConditionRolledBack).LastTransitionTime.Time)
	}
	note(s.migrationEnd())
	if first.IsZero() { // the VM moved, but nobody says when
		first, _ = s.deadline()
	}
	return first
}

// migrationEnd is when KubeVirt finished the migration, zero if it has not, or
// does not tell.
func (s *scope) migrationEnd() time.Time {
	if s.vmim == nil || !s.vmim.IsFinal() {
		return time.Time{}
	}
	for _, p := range s.vmim.Status.PhaseTransitionTimestamps {
		if p.Phase == s.vmim.Status.Phase {
			return p.PhaseTransitionTimestamp.Time
		}
	}
	if st := s.migrationState(); st != nil && st.EndTimestamp != nil {
		return st.EndTimestamp.Time
	}
	return time.Time{}
}

// migrationState is KubeVirt's account of this migration, nil if it has none.
func (s *scope) migrationState() *virtv1.VirtualMachineInstanceMigrationState {
	if s.vmim == nil {
		return nil
	}
	if st := s.vmim.Status.MigrationState; st != nil {
		return st
	}
	if s.vmi != nil && s.vmi.Status.MigrationState != nil && s.vmi.Status.MigrationState.MigrationUID == s.vmim.UID {
		return s.vmi.Status.MigrationState
	}
	return nil
}

// onTarget tells whether KubeVirt holds that the VM runs on the target node.
func (s *scope) onTarget() bool {
	t, src := s.vfm.Status.Target, s.vfm.Status.Source
	return s.vmi != nil && t != nil && src != nil && t.NodeName != src.NodeName && s.vmi.Status.NodeName == t.NodeName
}

// deadline is when the step that the migration is in must be over, and that
// step's name in words.
func (s *scope) deadline() (time.Time, string) {
	timeouts := &s.vfm.Spec.Timeouts
	if c := s.condition(v1alpha1.ConditionPrepared); c.Status == metav1.ConditionTrue {
		return c.LastTransitionTime.Add(timeouts.MigrateTimeout()),
			fmt.Sprintf("spec.timeouts.migrate, %s, passed", timeouts.MigrateTimeout())
	}
	return s.vfm.Status.StartTime.Add(timeouts.PrepareTimeout()),
		fmt.Sprintf("spec.timeouts.prepare, %s, passed", timeouts.PrepareTimeout())
}

// fail records why the migration is to be undone. The first cause stands.
func (s *scope) fail(reason, format string, args ...any) {
	if s.vfm.Status.Failure == nil {
		s.vfm.Status.Failure = &v1alpha1.VFMigrationFailure{
			Reason: reason, Message: bounded(fmt.Sprintf(format, args...), 4096), Time: metav1.NewTime(s.now),
		}
	}
}

// bounded cuts text to n bytes at most, without splitting a character.
func bounded(text string, n int) string {
	if len(text) <= n {
		return text
	}
	return strings.ToValidUTF8(text[:n-3], "") + "..."
}
