package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
)

const (
	// labelNode is on every lease of a node's agent.
	labelNode = "compsc.io/node"
	// annotationVF holds the PCI address that a lease is for.
	annotationVF = "compsc.io/vf"

	// A VF's lease does not run out, because a VF is never taken from a pod
	// whose device process may live; its renewal shows that somebody cares.
	vfLeaseDuration = 3 * time.Minute
	vfLeaseRenewal  = time.Minute

	agentLeaseDuration = 10 * time.Second
	agentLeaseRenewal  = 3 * time.Second
)

// holder is the pod that a VF is leased to.
type holder struct {
	namespace, name string
	uid             types.UID
}

func holderOf(pod *corev1.Pod) holder { return holder{pod.Namespace, pod.Name, pod.UID} }

// String returns the holder identity of a lease.
func (h holder) String() string { return h.namespace + "/" + h.name + "/" + string(h.uid) }

func parseHolder(s string) (holder, bool) {
	p := strings.Split(s, "/")
	if len(p) != 3 || p[0] == "" || p[1] == "" || p[2] == "" {
		return holder{}, false
	}
	return holder{p[0], p[1], types.UID(p[2])}, true
}

// heldError says that a VF is leased to another pod.
type heldError struct {
	address, holder string
}

func (e *heldError) Error() string {
	return fmt.Sprintf("VF %s is leased to pod %s, whose device process has not been seen to end; it is never taken away: end that pod", e.address, e.holder)
}

func vfLeaseName(node, address string) string {
	return "vf-" + node + "-" + strings.NewReplacer(":", "-", ".", "-").Replace(address)
}

// acquire leases a VF to a pod and returns the epoch, which counts the
// acquisitions of the VF. A lease that the pod already has keeps its epoch.
func (a *agent) acquire(ctx context.Context, address string, to holder) (int64, error) {
	l := &coordinationv1.Lease{}
	key := client.ObjectKey{Namespace: a.namespace, Name: vfLeaseName(a.node, address)}
	// Nobody but this agent frees a lease: one that the cache knows to be the
	// pod's still is.
	if err := a.client.Get(ctx, key, l); err == nil && identity(l) == to.String() {
		return epoch(l), nil
	}
	trouble := func(err error) error {
		return wait(a.limits.pause*4, "lease of VF %s: %w", address, err)
	}
	err := a.live.Get(ctx, key, l)
	if apierrors.IsNotFound(err) {
		l = &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name,
			Labels: map[string]string{labelNode: a.node}, Annotations: map[string]string{annotationVF: address}}}
		grant(l, to)
		if err := a.client.Create(ctx, l); err != nil {
			return 0, trouble(err)
		}
		return epoch(l), nil
	}
	if err != nil {
		return 0, trouble(err)
	}
	switch identity(l) {
	case to.String():
		return epoch(l), nil
	case "":
	default:
		return 0, &heldError{address, identity(l)}
	}
	grant(l, to)
	if err := a.client.Update(ctx, l); err != nil { // refused if anybody changed it meanwhile
		return 0, trouble(err)
	}
	return epoch(l), nil
}

func grant(l *coordinationv1.Lease, to holder) {
	id, now, seconds := to.String(), metav1.NowMicro(), int32(vfLeaseDuration/time.Second)
	transitions := int32(epoch(l)) + 1
	l.Spec = coordinationv1.LeaseSpec{HolderIdentity: &id, AcquireTime: &now, RenewTime: &now,
		LeaseDurationSeconds: &seconds, LeaseTransitions: &transitions}
}

func identity(l *coordinationv1.Lease) string {
	if l.Spec.HolderIdentity == nil {
		return ""
	}
	return *l.Spec.HolderIdentity
}

func epoch(l *coordinationv1.Lease) int64 {
	if l.Spec.LeaseTransitions == nil {
		return 0
	}
	return int64(*l.Spec.LeaseTransitions)
}

// vfLeases returns the leases of this node's VFs, by PCI address.
func (a *agent) vfLeases(ctx context.Context) (map[string]*coordinationv1.Lease, error) {
	var list coordinationv1.LeaseList
	if err := a.client.List(ctx, &list, client.InNamespace(a.namespace), client.MatchingLabels{labelNode: a.node}); err != nil {
		return nil, fmt.Errorf("listing the VFs' leases: %w", err)
	}
	out := map[string]*coordinationv1.Lease{}
	for i := range list.Items {
		if l := &list.Items[i]; l.Annotations[annotationVF] != "" {
			out[l.Annotations[annotationVF]] = l
		}
	}
	return out, nil
}

// release takes VFs back from a pod whose device process is known to be gone
// or silent: first from the host, then their leases.
func (a *agent) release(ctx context.Context, from holder) error {
	leases, err := a.vfLeases(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for address, l := range leases {
		if identity(l) != from.String() {
			continue
		}
		errs = append(errs, a.releaseOne(ctx, address, l, from))
	}
	return errors.Join(errs...)
}

func (a *agent) releaseOne(ctx context.Context, address string, cached *coordinationv1.Lease, from holder) error {
	// The cache may be late: nothing is touched that somebody else has by now.
	l := &coordinationv1.Lease{}
	if err := a.live.Get(ctx, client.ObjectKeyFromObject(cached), l); err != nil {
		return fmt.Errorf("lease of VF %s: %w", address, err)
	}
	if identity(l) != from.String() {
		return nil
	}
	if err := a.host.Release(ctx, address); err != nil {
		return err
	}
	none, now := "", metav1.NowMicro()
	l.Spec.HolderIdentity, l.Spec.RenewTime = &none, &now
	if err := a.client.Update(ctx, l); err != nil {
		return fmt.Errorf("lease of VF %s: %w", address, err)
	}
	a.known.Delete(from.uid)
	a.log.Info("VF released", "vf", address, "pod", from.String(), "epoch", epoch(l))
	return nil
}

// recover releases the VFs that an agent before this one prepared and that no
// pod holds: its release, or the lease, was lost in between. It tries until it
// has found out, or ctx ends.
func (a *agent) recover(ctx context.Context) {
	for {
		err := a.releaseOrphans(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		a.log.Warn("VFs of an agent before this one", "error", err)
		if !pauseFor(ctx, a.limits.pause*4) {
			return
		}
	}
}

func (a *agent) releaseOrphans(ctx context.Context) error {
	// In this order: a VF is leased before it is prepared, and released before
	// its lease ends.
	held, unread := a.host.Held(ctx)
	if len(held) == 0 {
		return unread
	}
	var list coordinationv1.LeaseList
	if err := a.live.List(ctx, &list, client.InNamespace(a.namespace), client.MatchingLabels{labelNode: a.node}); err != nil {
		return errors.Join(unread, fmt.Errorf("listing the VFs' leases: %w", err))
	}
	leased := map[string]bool{}
	for i := range list.Items {
		if l := &list.Items[i]; identity(l) != "" {
			leased[l.Annotations[annotationVF]] = true
		}
	}
	errs := []error{unread}
	for _, address := range held {
		if leased[address] {
			continue
		}
		if err := a.host.Release(ctx, address); err != nil {
			errs = append(errs, err)
			continue
		}
		a.log.Info("VF released that no pod holds", "vf", address)
	}
	return errors.Join(errs...)
}

// renew renews the leases that pods hold.
func (a *agent) renew(ctx context.Context) error {
	leases, err := a.vfLeases(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range leases {
		if identity(l) == "" {
			continue
		}
		now := metav1.NowMicro()
		l.Spec.RenewTime = &now
		// Whoever changed it meanwhile has renewed it.
		if err := a.client.Update(ctx, l); err != nil && !apierrors.IsConflict(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// beat renews the lease by which this agent is known to be alive. l is the
// lease as it was last written, nil if that is not known.
func (a *agent) beat(ctx context.Context, instance string, l *coordinationv1.Lease) (*coordinationv1.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, agentLeaseRenewal)
	defer cancel()
	key := client.ObjectKey{Namespace: a.namespace, Name: v1alpha1.AgentLeaseName(a.node)}
	missing := false
	if l == nil {
		l = &coordinationv1.Lease{}
		err := a.live.Get(ctx, key, l)
		missing = apierrors.IsNotFound(err)
		if err != nil && !missing {
			return nil, fmt.Errorf("lease %s: %w", key.Name, err)
		}
	}
	now, seconds := metav1.NowMicro(), int32(agentLeaseDuration/time.Second)
	if identity(l) != instance {
		transitions := int32(epoch(l)) + 1
		l.Spec.HolderIdentity, l.Spec.AcquireTime, l.Spec.LeaseTransitions = &instance, &now, &transitions
	}
	l.Spec.RenewTime, l.Spec.LeaseDurationSeconds = &now, &seconds
	if l.Labels == nil {
		l.Labels = map[string]string{}
	}
	l.Labels[labelNode], l.Labels[v1alpha1.LabelAgent] = a.node, "true"
	var err error
	if missing {
		l.Namespace, l.Name = key.Namespace, key.Name
		err = a.client.Create(ctx, l)
	} else {
		err = a.client.Update(ctx, l)
	}
	if err != nil {
		return nil, fmt.Errorf("lease %s: %w", key.Name, err)
	}
	return l, nil
}

// heartbeat beats, and renews the VFs' leases, until ctx ends.
func (a *agent) heartbeat(ctx context.Context, instance string) {
	beat, renew := time.NewTicker(agentLeaseRenewal), time.NewTicker(vfLeaseRenewal)
	defer beat.Stop()
	defer renew.Stop()
	var l *coordinationv1.Lease
	for {
		var err error
		if l, err = a.beat(ctx, instance, l); err != nil && ctx.Err() == nil {
			a.log.Warn("heartbeat failed", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-renew.C:
			if err := a.renew(ctx); err != nil && ctx.Err() == nil {
				a.log.Warn("renewing the VFs' leases failed", "error", err)
			}
		case <-beat.C:
		}
	}
}
