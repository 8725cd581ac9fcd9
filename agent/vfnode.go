package agent

import (
	"context"
	"fmt"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/protocol"
	"compsc.io/compsc/api/v1alpha1"
)

// +kubebuilder:rbac:groups=compsc.io,resources=vfnodes,verbs=get;list;watch;create
// +kubebuilder:rbac:groups=compsc.io,resources=vfnodes/status,verbs=get;patch

// reconcileNode reports the node's VFs and their holders in its VFNode, when
// they differ from what it says.
func (a *agent) reconcileNode(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	leases, err := a.vfLeases(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	n := &v1alpha1.VFNode{}
	err = a.client.Get(ctx, client.ObjectKey{Name: a.node}, n)
	if apierrors.IsNotFound(err) {
		n = &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: a.node}}
		if err := a.client.Create(ctx, n); err != nil && !apierrors.IsAlreadyExists(err) {
			return ctrl.Result{}, fmt.Errorf("VFNode %s: %w", a.node, err)
		}
		err = a.live.Get(ctx, client.ObjectKey{Name: a.node}, n)
	}
	if err != nil {
		return ctrl.Result{}, fmt.Errorf("VFNode %s: %w", a.node, err)
	}
	base := n.DeepCopy()
	pfs, err := a.host.Inventory(ctx)
	ready := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: v1alpha1.ConditionReady,
		Message: "the agent serves migrations", ObservedGeneration: n.Generation}
	draining := a.draining.Load()
	if err != nil {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, v1alpha1.ReasonInventoryFailed, cut(err.Error(), maxMessage)
	} else if draining {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, v1alpha1.ReasonDraining, "the agent ends when the migrations of its node have; its successor serves new ones"
	} else if err := a.creds.Check(time.Now()); err != nil {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, v1alpha1.ReasonCertificateUnavailable, cut(err.Error(), maxMessage)
	}
	meta.SetStatusCondition(&n.Status.Conditions, ready)
	for _, c := range a.findings(ctx) {
		c.ObservedGeneration = n.Generation
		meta.SetStatusCondition(&n.Status.Conditions, c)
	}
	intact, damage := a.intact(ctx, n.Generation)
	meta.SetStatusCondition(&n.Status.Conditions, intact)
	n.Status.PeerAddress, n.Status.AgentVersion = a.advertise, a.version
	n.Status.Protocols = &v1alpha1.ProtocolRange{Oldest: protocol.Oldest, Newest: protocol.Newest}
	n.Status.PFs = nil
	for _, p := range pfs {
		s := v1alpha1.PFStatus{Name: p.Name, Backend: p.Backend, Address: p.Address,
			Driver: p.Driver, DriverVersion: p.DriverVersion, FirmwareVersion: p.Firmware}
		for _, v := range p.VFs {
			vf := v1alpha1.VFStatus{Address: v.Address, DeviceID: v.DeviceID, Family: v.Family, Obstacle: cut(v.Obstacle, maxMessage), Damage: cut(damage[v.Address], maxDamage)}
			vf.Holder, vf.Epoch = holderShown(leases[v.Address])
			a.showPath(&vf)
			s.VFs = append(s.VFs, vf)
		}
		n.Status.PFs = append(n.Status.PFs, s)
	}
	observeNode(&n.Status)
	if !equality.Semantic.DeepEqual(base.Status, n.Status) {
		if err := a.client.Status().Patch(ctx, n, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})); err != nil {
			if apierrors.IsConflict(err) {
				return ctrl.Result{RequeueAfter: a.limits.pause}, nil
			}
			return ctrl.Result{}, fmt.Errorf("VFNode %s: %w", a.node, err)
		}
	}
	a.drainTold.Store(draining)
	if ready.Status != metav1.ConditionTrue {
		return ctrl.Result{RequeueAfter: a.limits.retry}, nil
	}
	// VFs come and go, and change, without an event.
	return ctrl.Result{RequeueAfter: min(findingsAge, a.limits.look)}, nil
}

// maxDamage bounds what a VFNode says of the damage to one of its VFs, of which
// it may have hundreds.
const maxDamage = 1024

// intact tells whether the VFs in use are as they were prepared, after it has
// finished what could not be finished before, and what happened to each that is
// not, by PCI address.
func (a *agent) intact(ctx context.Context, generation int64) (metav1.Condition, map[string]string) {
	c := metav1.Condition{Type: v1alpha1.ConditionIntact, Status: metav1.ConditionTrue, Reason: v1alpha1.ConditionIntact,
		Message: "the VFs in use are as they were prepared", ObservedGeneration: generation}
	if err := a.host.Settle(ctx); err != nil {
		a.log.Warn("VFs that were released are not back as they were", "error", err)
	}
	list, err := a.host.Damage(ctx)
	if err != nil {
		c.Status, c.Reason, c.Message = metav1.ConditionUnknown, v1alpha1.ReasonInventoryFailed, cut(err.Error(), maxMessage)
		return c, nil
	}
	var all []string
	of := map[string]string{}
	for _, d := range list {
		all = append(all, d.String())
		if of[d.VF] != "" {
			of[d.VF] += "; "
		}
		of[d.VF] += d.What
	}
	if len(all) > 0 {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, v1alpha1.ReasonReconfigured, cut(strings.Join(all, "; "), maxMessage)
	}
	return c, of
}

// holderShown is a lease's holder as a VFNode shows it.
func holderShown(l *coordinationv1.Lease) (string, int64) {
	if l == nil {
		return "", 0
	}
	if h, ok := parseHolder(identity(l)); ok {
		return h.namespace + "/" + h.name, epoch(l)
	}
	return identity(l), epoch(l)
}
