package agent

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/api/v1alpha1"
)

// NodeHook implements nodehook.Handler. Every answer is derived from what the
// API server and the device processes say now, so a call may be repeated at any
// time, also after a restart of either side:
//
//   - before the VM starts, it must have its VFs, or QEMU would not find them;
//   - before the target is prepared and before the source migrates, the
//     migration must be one that goes forward, with both ends prepared: this
//     is the last chance to stop without touching the VM;
//   - whatever has happened already, or must not be held (a VM that stops), is
//     never refused.
func (a *agent) NodeHook(ctx context.Context, c *nodehook.Call) (err error) {
	defer func() { observeHook(c.Point, err) }()
	switch c.Point {
	case nodehook.PreVMStart:
		return a.beforeStart(ctx, c.VMI)
	case nodehook.PreMigrationTarget:
		return a.beforeMigration(ctx, c, target)
	case nodehook.PreMigrationSource:
		return a.beforeMigration(ctx, c, source)
	case nodehook.PostMigrationTarget:
		return a.afterMigration(ctx, c)
	case nodehook.PostVMStart, nodehook.PreVMStop, nodehook.PostVMStop:
		a.log.Debug("node hook", "hook", c.Point, "vmi", c.VMI.Namespace+"/"+c.VMI.Name)
		return nil
	}
	return status.Errorf(codes.Unimplemented, "compsc has nothing to say at hook point %s", c.Point)
}

// notYet is the answer that asks KubeVirt to come again; never the one for
// what will not come to be.
func notYet(format string, args ...any) error {
	return status.Errorf(codes.Unavailable, "compsc: not yet: "+format, args...)
}

// never is the answer for what will not come to be.
func never(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, "compsc: "+format, args...)
}

// beforeStart holds a VM's start until its VFs are attached.
func (a *agent) beforeStart(ctx context.Context, vmi *virtv1.VirtualMachineInstance) error {
	if len(kubevirt.BoundInterfaces(vmi)) == 0 {
		return nil // a Plugin object whose condition is too wide
	}
	var pods corev1.PodList
	if err := a.client.List(ctx, &pods, client.InNamespace(vmi.Namespace),
		client.MatchingLabels{kubevirt.LabelCreatedBy: string(vmi.UID), kubevirt.LabelApp: kubevirt.AppLauncher}); err != nil {
		return err
	}
	why := fmt.Sprintf("VMI %s has no pod on node %s", vmi.Name, a.node)
	for i := range pods.Items {
		pod := &pods.Items[i]
		if kubevirt.Finished(pod) || !pod.DeletionTimestamp.IsZero() || kubevirt.IsTarget(pod) {
			continue
		}
		if has, err := a.hasVFIOUser(pod); err == nil && !has {
			return never("pod %s: %s", pod.Name, noVFIOUser)
		}
		st, err := a.statusOfPod(ctx, pod.UID)
		switch {
		case err != nil:
			why = fmt.Sprintf("the device process of pod %s: %s", pod.Name, say(err))
		case st.GetPhase() == controlpb.Phase_PHASE_UNATTACHED:
			why = fmt.Sprintf("pod %s does not have its VFs; see its events", pod.Name)
		default:
			return nil
		}
	}
	return notYet("%s", why)
}

// beforeMigration holds a migration until both ends are prepared, and for good
// if it is not to go on.
func (a *agent) beforeMigration(ctx context.Context, c *nodehook.Call, end side) error {
	if o := c.VMI.Status.MigrationState.VMIMConfigurationOptions; o != nil && o.AllowPostCopy != nil && *o.AllowPostCopy {
		return never("post-copy is allowed for this migration (status.migrationState.migrationConfiguration), which a VF does not survive; " +
			"forbid it in the MigrationPolicy that matches the VM")
	}
	m, err := a.migrationOf(ctx, c)
	if err != nil {
		return err
	}
	switch {
	case m == nil:
		return notYet("VirtualMachineInstanceMigration %s has no VFMigration; see that the compsc manager runs", c.Migration)
	case m.Status.Failure != nil:
		return never("VFMigration %s is being undone: %s", m.Name, why(m))
	case over(m):
		return never("VFMigration %s is over; delete the VirtualMachineInstanceMigration", m.Name)
	case m.Status.Source == nil || m.Status.Target == nil:
		return notYet("VFMigration %s waits to be accepted (phase %s)", m.Name, m.Status.Phase)
	}
	endpoint, phase := m.Status.Target, controlpb.Phase_PHASE_TARGET_PREPARED
	if end == source {
		endpoint, phase = m.Status.Source, controlpb.Phase_PHASE_SOURCE_PREPARED
	}
	if endpoint.NodeName != a.node {
		return never("VFMigration %s has node %s as its %s, KubeVirt has %s; abort it", m.Name, endpoint.NodeName, end, a.node)
	}
	st, err := a.statusOfPod(ctx, endpoint.PodUID)
	if err != nil {
		return notYet("the device process of pod %s: %s", endpoint.PodName, say(err))
	}
	if st.GetMigrationUid() != string(m.UID) || !reachedPhase(st.GetPhase(), phase) {
		return notYet("VFMigration %s: the device process of the %s's pod %s is in %s", m.Name, end, endpoint.PodName, st.GetPhase())
	}
	if end == source && !reachedTarget(m) {
		return notYet("VFMigration %s: node %s has not accepted the VFs yet", m.Name, m.Status.Target.NodeName)
	}
	return nil
}

// reachedPhase tells whether a device process is prepared, or beyond: a call
// may come, or be repeated, later than anybody needs it.
func reachedPhase(p, prepared controlpb.Phase) bool {
	if p == prepared {
		return true
	}
	if prepared == controlpb.Phase_PHASE_SOURCE_PREPARED {
		return p == controlpb.Phase_PHASE_CAPTURED || p == controlpb.Phase_PHASE_RELINQUISHED
	}
	switch p {
	case controlpb.Phase_PHASE_TARGET_LOADED, controlpb.Phase_PHASE_TARGET_HELD, controlpb.Phase_PHASE_TARGET_ACTIVE, controlpb.Phase_PHASE_RUNNING:
		return true
	}
	return false
}

// reachedTarget tells whether the target has judged the VFs to be movable.
func reachedTarget(m *vfMigration) bool { return is(m, v1alpha1.ConditionPrepared) }

// afterMigration sees that the target's worker runs. The VM is here already,
// and to refuse would only keep KubeVirt from noticing.
func (a *agent) afterMigration(ctx context.Context, c *nodehook.Call) error {
	m, err := a.migrationOf(ctx, c)
	if err != nil || m == nil {
		a.log.Warn("a migration ends that is not known here", "vmi", c.VMI.Namespace+"/"+c.VMI.Name, "migration", c.Migration, "error", err)
		return nil
	}
	if a.isTarget(m) && !over(m) && m.Status.Failure == nil && is(m, v1alpha1.ConditionTargetPinned) && !is(m, v1alpha1.ConditionVerified) {
		a.startTarget(m)
	}
	return nil
}

// migrationOf returns the VFMigration that goes with KubeVirt's migration, nil if
// there is none. It is as the API server has it: the cache may not know of an abort.
func (a *agent) migrationOf(ctx context.Context, c *nodehook.Call) (*vfMigration, error) {
	var list v1alpha1.VFMigrationList
	if err := a.live.List(ctx, &list, client.InNamespace(c.VMI.Namespace)); err != nil {
		return nil, notYet("VFMigrations cannot be read: %v", err)
	}
	for i := range list.Items {
		m := &list.Items[i]
		made, adopted := m.Status.MigrationRef, m.Spec.MigrationRef
		if made != nil && made.UID == c.Migration || adopted != nil && adopted.UID == c.Migration {
			return m, nil
		}
	}
	return nil, nil
}

// statusOfPod asks the device process of a pod of this node.
func (a *agent) statusOfPod(ctx context.Context, pod types.UID) (*controlpb.StatusReply, error) {
	d, err := a.devices.get(pod)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return a.status(ctx, d)
}
