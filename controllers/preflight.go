package controllers

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/protocol"
	"compsc.io/compsc/api/v1alpha1"
)

// refusal is the error with which preflight says that a migration cannot be.
type refusal struct{ reason, message string }

func (e *refusal) Error() string { return e.reason + ": " + e.message }

// notYet is the error with which preflight says that a migration cannot be yet,
// but presumably can be in a moment. It is a refusal to whom that is too late.
type notYet struct{ refusal }

func (e *notYet) Unwrap() error { return &e.refusal }

func refuse(reason, format string, args ...any) error {
	return &refusal{reason, fmt.Sprintf(format, args...)}
}

// preflight checks everything that can be known before a migration and returns
// where the VM runs, and in words what only the target's verdict can decide. A
// *refusal says why it cannot be, a *notYet why it cannot be yet, any other error
// that it could not be found out. A refusal is final, so all is read from the API server itself.
func (r *VFMigrationReconciler) preflight(ctx context.Context, m *v1alpha1.VFMigration) (*v1alpha1.VFMigrationEndpoint, string, error) {
	if err := r.checkOthers(ctx, m); err != nil {
		return nil, "", err
	}
	return r.assess(ctx, m)
}

// assess is preflight without regard to others that move the same VM.
func (r *VFMigrationReconciler) assess(ctx context.Context, m *v1alpha1.VFMigration) (*v1alpha1.VFMigrationEndpoint, string, error) {
	vmi, ifaces, err := r.checkVMI(ctx, m)
	if err != nil {
		return nil, "", err
	}
	pod, err := r.sourcePod(ctx, vmi)
	if err != nil {
		return nil, "", err
	}
	source := &v1alpha1.VFMigrationEndpoint{NodeName: vmi.Status.NodeName, PodName: pod.Name, PodUID: pod.UID}
	var nodes v1alpha1.VFNodeList
	if err := r.Live.List(ctx, &nodes); err != nil {
		return nil, "", fmt.Errorf("list VFNodes: %w", err)
	}
	needed, err := r.checkSource(ctx, source.NodeName, m.Namespace+"/"+pod.Name, len(ifaces), nodes.Items)
	if err != nil {
		return nil, "", err
	}
	if err := r.checkGuards(ctx, vmi); err != nil {
		return nil, "", err
	}
	open, err := r.checkTargets(ctx, m.Spec.Target, source.NodeName, needed, nodes.Items)
	return source, open, err
}

// checkVMI returns the VMI and those of its interfaces that have a VF.
func (r *VFMigrationReconciler) checkVMI(ctx context.Context, m *v1alpha1.VFMigration) (*virtv1.VirtualMachineInstance, []string, error) {
	vmi := &virtv1.VirtualMachineInstance{}
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: m.Namespace, Name: m.Spec.VMIName}, vmi)
	if apierrors.IsNotFound(err) {
		return nil, nil, refuse(v1alpha1.ReasonVMINotFound,
			"namespace %s has no VirtualMachineInstance %s; check spec.vmiName, and start the VM", m.Namespace, m.Spec.VMIName)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read VirtualMachineInstance %s: %w", m.Spec.VMIName, err)
	}
	if vmi.Status.Phase != virtv1.Running || vmi.Status.NodeName == "" || !vmi.DeletionTimestamp.IsZero() {
		state := fmt.Sprintf("in phase %q", vmi.Status.Phase)
		if !vmi.DeletionTimestamp.IsZero() {
			state = "being deleted"
		}
		return nil, nil, refuse(v1alpha1.ReasonVMINotRunning,
			"VirtualMachineInstance %s is %s; only a running VM can be moved", vmi.Name, state)
	}
	ifaces := kubevirt.BoundInterfaces(vmi)
	if len(ifaces) == 0 {
		return nil, nil, refuse(v1alpha1.ReasonInterfaceNotFound,
			"VirtualMachineInstance %s has no interface with network binding %q; without one, use a VirtualMachineInstanceMigration",
			vmi.Name, kubevirt.BindingName)
	}
	if _, err := kubevirt.FastPaths(vmi); err != nil {
		return nil, nil, refuse(v1alpha1.ReasonInterfaceNotFound, "VirtualMachineInstance %s: %v", vmi.Name, err)
	}
	for _, name := range m.Spec.Interfaces {
		if !slices.Contains(ifaces, name) {
			return nil, nil, refuse(v1alpha1.ReasonInterfaceNotFound,
				"VirtualMachineInstance %s has no interface %q with network binding %q; those with it are: %s",
				vmi.Name, name, kubevirt.BindingName, strings.Join(ifaces, ", "))
		}
	}
	return vmi, ifaces, nil
}

// checkOthers refuses when somebody else moves the VM. Of several VFMigrations
// the one that was accepted stands, else the oldest.
func (r *VFMigrationReconciler) checkOthers(ctx context.Context, m *v1alpha1.VFMigration) error {
	var others v1alpha1.VFMigrationList
	if err := r.Live.List(ctx, &others, client.InNamespace(m.Namespace)); err != nil {
		return fmt.Errorf("list VFMigrations: %w", err)
	}
	for i := range others.Items {
		o := &others.Items[i]
		if o.UID == m.UID || o.Spec.VMIName != m.Spec.VMIName || isTerminal(o) {
			continue
		}
		if meta.IsStatusConditionTrue(o.Status.Conditions, v1alpha1.ConditionAccepted) || older(o, m) {
			return refuse(v1alpha1.ReasonMigrationInProgress,
				"VFMigration %s is moving VirtualMachineInstance %s; wait for its end or abort it, then create a new VFMigration",
				o.Name, m.Spec.VMIName)
		}
	}
	var vmims virtv1.VirtualMachineInstanceMigrationList
	if err := r.Live.List(ctx, &vmims, client.InNamespace(m.Namespace)); err != nil {
		return fmt.Errorf("list VirtualMachineInstanceMigrations: %w", err)
	}
	for i := range vmims.Items {
		o := &vmims.Items[i]
		if metav1.IsControlledBy(o, m) || m.Spec.MigrationRef != nil && m.Spec.MigrationRef.UID == o.UID {
			continue
		}
		if m.Spec.MigrationRef == nil && o.Name == m.Name && o.Labels[kubevirt.LabelVFMigrationUID] == "" {
			return refuse(v1alpha1.ReasonMigrationInProgress,
				"a VirtualMachineInstanceMigration %s exists that is not this VFMigration's; delete it, or create a VFMigration of another name", o.Name)
		}
		if o.Spec.VMIName == m.Spec.VMIName && !o.IsFinal() {
			return refuse(v1alpha1.ReasonMigrationInProgress,
				"VirtualMachineInstanceMigration %s is moving VirtualMachineInstance %s; wait for its end or delete it, then create a new VFMigration",
				o.Name, m.Spec.VMIName)
		}
	}
	return nil
}

// older tells whether a comes before b.
func older(a, b *v1alpha1.VFMigration) bool {
	if !a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.CreationTimestamp.Before(&b.CreationTimestamp)
	}
	return a.UID < b.UID
}

// sourcePod returns the pod that the VM runs in.
func (r *VFMigrationReconciler) sourcePod(ctx context.Context, vmi *virtv1.VirtualMachineInstance) (*corev1.Pod, error) {
	var pods corev1.PodList
	if err := r.Live.List(ctx, &pods, client.InNamespace(vmi.Namespace),
		client.MatchingLabels{kubevirt.LabelCreatedBy: string(vmi.UID), kubevirt.LabelApp: kubevirt.AppLauncher}); err != nil {
		return nil, fmt.Errorf("list pods of VirtualMachineInstance %s: %w", vmi.Name, err)
	}
	var source *corev1.Pod
	for i := range pods.Items {
		pod := &pods.Items[i]
		if pod.Spec.NodeName != vmi.Status.NodeName || kubevirt.Finished(pod) || !pod.DeletionTimestamp.IsZero() {
			continue
		}
		if source == nil || source.CreationTimestamp.Before(&pod.CreationTimestamp) {
			source = pod
		}
	}
	if source == nil {
		return nil, refuse(v1alpha1.ReasonVMINotRunning,
			"VirtualMachineInstance %s has no running virt-launcher pod on its node %s; see the VMI's events", vmi.Name, vmi.Status.NodeName)
	}
	return source, nil
}

// checkSource returns the VFs that holder, the source pod, has on the source
// node.
func (r *VFMigrationReconciler) checkSource(ctx context.Context, node, holder string, ifaces int, nodes []v1alpha1.VFNode) ([]placedVF, error) {
	i := slices.IndexFunc(nodes, func(n v1alpha1.VFNode) bool { return n.Name == node })
	if i < 0 {
		return nil, refuse(v1alpha1.ReasonAgentUnavailable,
			"the source node %s has no VFNode; see that the compsc agent runs there", node)
	}
	why, err := r.agentDown(ctx, &nodes[i])
	if err != nil {
		return nil, err
	}
	if why != "" {
		return nil, refuse(v1alpha1.ReasonAgentUnavailable,
			"the agent of the source node %s is not available: %s; see that the compsc agent runs there", node, why)
	}
	if why := apart(&nodes[i], protocol.Own(), "the manager"); why != "" {
		return nil, refuse(v1alpha1.ReasonVersionMismatch, "%s; finish the upgrade of CompSC first", why)
	}
	held := vfsOf(&nodes[i], holder)
	if n := len(held); n < ifaces {
		return nil, refuse(v1alpha1.ReasonDeviceUnavailable,
			"VFNode %s lists %d VFs held by pod %s, its VMI has %d interfaces with network binding %q; see the compsc agent's log on that node",
			node, n, holder, ifaces, kubevirt.BindingName)
	}
	if err := checkIntact(&nodes[i], held); err != nil {
		return nil, err
	}
	return held, checkMovable(&nodes[i], held)
}

// checkTargets refuses when no node that KubeVirt may choose can take the VM.
// Which of several it takes is left to KubeVirt. It returns in words what is
// left to the verdict of the first that can.
func (r *VFMigrationReconciler) checkTargets(ctx context.Context, target *v1alpha1.VFMigrationTarget, source string, needed []placedVF, nodes []v1alpha1.VFNode) (string, error) {
	if target != nil && target.NodeName == source {
		return "", refuse(v1alpha1.ReasonTargetNotFound,
			"spec.target.nodeName %s is the node that the VM runs on; name another node", source)
	}
	var matching, unavailable, strange, unfit, full, awaited []string
	for i := range nodes {
		n := &nodes[i]
		if n.Name == source {
			continue
		}
		ok, err := r.allows(ctx, target, n.Name)
		if err != nil {
			return "", err
		}
		if !ok {
			continue
		}
		matching = append(matching, n.Name)
		why, err := r.agentDown(ctx, n)
		if err != nil {
			return "", err
		}
		if why != "" {
			unavailable = append(unavailable, n.Name+": "+why)
			continue
		}
		if why := cmp.Or(apart(n, protocol.Own(), "the manager"), apart(n, spoken(nodes, source), "that of the source node "+source)); why != "" {
			strange = append(strange, why)
			continue
		}
		if c := meta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionQEMU); c != nil && c.Status == metav1.ConditionFalse {
			unfit = append(unfit, n.Name+": "+c.Message)
			continue
		}
		f := fit(needed, vfsOf(n, ""))
		if f.missing == "" {
			return f.open(n.Name), nil
		}
		if f.unfit {
			unfit = append(unfit, n.Name+": "+f.missing)
			continue
		}
		back, pods, err := r.returning(ctx, n)
		if err != nil {
			return "", err
		}
		if len(back) > 0 && fit(needed, append(vfsOf(n, ""), back...)).missing == "" {
			awaited = append(awaited, fmt.Sprintf("%s: %s, until VFs of pod %s are given back", n.Name, f.missing, strings.Join(pods, ", ")))
			continue
		}
		full = append(full, n.Name+": "+f.missing)
	}
	switch {
	case len(awaited) > 0:
		return "", &notYet{refusal{v1alpha1.ReasonNoFreeVF, fmt.Sprintf("no node has enough free VFs yet (%s)", strings.Join(awaited, "; "))}}
	case len(full) > 0:
		return "", refuse(v1alpha1.ReasonNoFreeVF, "no node has enough free VFs (%s); free some, or add VFs there%s",
			strings.Join(full, "; "), alsoDown(unavailable))
	case len(unfit) > 0:
		return "", refuse(v1alpha1.ReasonIncompatible, "no node can run the VM with its VFs (%s)%s", strings.Join(unfit, "; "), alsoDown(unavailable))
	case len(strange) > 0:
		return "", refuse(v1alpha1.ReasonVersionMismatch, "%s; finish the upgrade of CompSC first%s", strings.Join(strange, "; "), alsoDown(unavailable))
	case len(unavailable) > 0:
		return "", refuse(v1alpha1.ReasonAgentUnavailable, "no agent of a possible target node is available (%s); see that the compsc agent runs there",
			strings.Join(unavailable, "; "))
	case len(matching) == 0 && target != nil && target.NodeName != "":
		return "", r.explainMissing(ctx, target.NodeName)
	case target != nil:
		return "", refuse(v1alpha1.ReasonTargetNotFound,
			"no node but the source %s has a VFNode and the labels %s; correct spec.target.nodeSelector in a new VFMigration",
			source, labels.FormatLabels(target.NodeSelector))
	default:
		return "", refuse(v1alpha1.ReasonTargetNotFound,
			"no node but the source %s has a VFNode; see that the compsc agent runs on other nodes", source)
	}
}

// spoken is what the agent of a node says that it speaks.
func spoken(nodes []v1alpha1.VFNode, node string) protocol.Range {
	i := slices.IndexFunc(nodes, func(n v1alpha1.VFNode) bool { return n.Name == node })
	if i < 0 || nodes[i].Status.Protocols == nil {
		return protocol.Range{}
	}
	p := nodes[i].Status.Protocols
	return protocol.Range{Oldest: uint32(p.Oldest), Newest: uint32(p.Newest)}
}

// apart says in words that the agent of a node and another part have no version
// of CompSC's protocol in common; it is empty if they have.
func apart(n *v1alpha1.VFNode, other protocol.Range, who string) string {
	own := spoken([]v1alpha1.VFNode{*n}, n.Name)
	if own.Meets(other) {
		return ""
	}
	return fmt.Sprintf("the agent of node %s (%s) speaks version %s of CompSC's protocol, %s version %s", n.Name, n.Status.AgentVersion, own, who, other)
}

func alsoDown(unavailable []string) string {
	if len(unavailable) == 0 {
		return ""
	}
	return "; without an available agent: " + strings.Join(unavailable, "; ")
}

// explainMissing tells a node without an agent from one that does not exist.
func (r *VFMigrationReconciler) explainMissing(ctx context.Context, name string) error {
	err := r.Live.Get(ctx, client.ObjectKey{Name: name}, &corev1.Node{})
	if apierrors.IsNotFound(err) {
		return refuse(v1alpha1.ReasonTargetNotFound,
			"no node is named %s; correct spec.target.nodeName in a new VFMigration", name)
	}
	if err != nil {
		return fmt.Errorf("read Node %s: %w", name, err)
	}
	return refuse(v1alpha1.ReasonAgentUnavailable,
		"node %s has no VFNode; see that the compsc agent runs there", name)
}

// allows tells whether target, nil for no restriction, lets the VM go to node.
func (r *VFMigrationReconciler) allows(ctx context.Context, target *v1alpha1.VFMigrationTarget, node string) (bool, error) {
	switch {
	case target == nil:
		return true, nil
	case target.NodeName != "":
		return target.NodeName == node, nil
	}
	set, err := r.nodeLabels(ctx, node)
	if err != nil {
		return false, err
	}
	return labels.SelectorFromSet(target.NodeSelector).Matches(set), nil
}

// nodeLabels returns the labels of a node. One that has no Node object goes
// by its name alone.
func (r *VFMigrationReconciler) nodeLabels(ctx context.Context, name string) (labels.Set, error) {
	node := &corev1.Node{}
	err := r.Live.Get(ctx, client.ObjectKey{Name: name}, node)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("read Node %s: %w", name, err)
	}
	if node.Labels[kubevirt.LabelHostname] == "" {
		return labels.Merge(node.Labels, labels.Set{kubevirt.LabelHostname: name}), nil
	}
	return node.Labels, nil
}

// agentDown says in words why the agent of a node is not available; it is
// empty when the agent is.
func (r *VFMigrationReconciler) agentDown(ctx context.Context, n *v1alpha1.VFNode) (string, error) {
	if c := meta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionReady); c != nil && c.Status == metav1.ConditionFalse {
		return fmt.Sprintf("its VFNode is not ready (%s: %s)", c.Reason, c.Message), nil
	}
	lease := &coordinationv1.Lease{}
	name := v1alpha1.AgentLeaseName(n.Name)
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: name}, lease)
	if apierrors.IsNotFound(err) {
		return fmt.Sprintf("lease %s/%s does not exist", r.Namespace, name), nil
	}
	if err != nil {
		return "", fmt.Errorf("read Lease %s/%s: %w", r.Namespace, name, err)
	}
	spec := lease.Spec
	if spec.HolderIdentity == nil || *spec.HolderIdentity == "" || spec.RenewTime == nil || spec.LeaseDurationSeconds == nil {
		return fmt.Sprintf("lease %s/%s is not held", r.Namespace, name), nil
	}
	if end := spec.RenewTime.Add(time.Duration(*spec.LeaseDurationSeconds) * time.Second); !end.After(r.Clock.Now()) {
		return fmt.Sprintf("lease %s/%s ended at %s", r.Namespace, name, end.UTC().Format(time.RFC3339)), nil
	}
	return "", nil
}
