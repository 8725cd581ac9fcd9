package agent

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// +kubebuilder:rbac:groups="",resources=pods,verbs=get;list;watch
// +kubebuilder:rbac:groups=kubevirt.io,resources=virtualmachineinstances,verbs=get
// +kubebuilder:rbac:groups=events.k8s.io,resources=events,verbs=create;patch
// +kubebuilder:rbac:groups=coordination.k8s.io,namespace=compsc-system,resources=leases,verbs=get;list;watch;create;update

// reconcilePod follows one virt-launcher pod of this node:
//  1. A pod that has ended, or is no more, gives its VFs back, once its device
//     process is gone or silent.
//  2. A pod made to receive a VM is left to that migration.
//  3. Any other pod gets its VFs leased and attached, as the VM's first home.
func (a *agent) reconcilePod(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	pod := &corev1.Pod{}
	err := a.client.Get(ctx, req.NamespacedName, pod)
	if err != nil && !apierrors.IsNotFound(err) {
		return ctrl.Result{}, err
	}
	alive := holder{}
	if err == nil && !kubevirt.Finished(pod) {
		alive = holderOf(pod)
	}
	if result, err := a.releaseEnded(ctx, req, alive); err != nil || !result.IsZero() {
		return result, err
	}
	if alive == (holder{}) || !pod.DeletionTimestamp.IsZero() || kubevirt.IsTarget(pod) {
		return ctrl.Result{}, nil
	}
	if !a.hasVFs(ctx, pod) {
		// Another VM's image is none of our business.
	} else if has, err := a.hasVFIOUser(pod); err == nil && !has {
		a.events.Eventf(pod, a.vfNode(), corev1.EventTypeWarning, v1alpha1.ReasonVFIOUserMissing, "Pin", noVFIOUser)
	}
	what := "pod " + string(pod.UID)
	_, err = a.pin(ctx, pod, handoff.RolePrimary)
	var w *waiting
	switch {
	case err == nil:
		a.tries.worked(what)
		return ctrl.Result{}, nil
	case errors.As(err, &w):
		a.log.Debug("waiting", "pod", req.String(), "for", err)
		return ctrl.Result{RequeueAfter: w.again}, nil
	}
	if since := a.tries.failed(what); since > a.limits.retry {
		a.events.Eventf(pod, a.vfNode(), corev1.EventTypeWarning, v1alpha1.ReasonPinFailed, "Pin", "%s", cut(say(err), 1024))
	}
	return ctrl.Result{}, err // tried again, ever more slowly
}

// releaseEnded takes back the VFs leased to pods of this name other than the
// one that is alive.
func (a *agent) releaseEnded(ctx context.Context, req ctrl.Request, alive holder) (ctrl.Result, error) {
	leases, err := a.vfLeases(ctx)
	if err != nil {
		return ctrl.Result{}, err
	}
	ended := map[holder]bool{}
	for address, l := range leases {
		h, ok := parseHolder(identity(l))
		if !ok {
			if identity(l) != "" {
				a.log.Error("a VF's lease has a holder that compsc did not write; the VF stays out of use until it is cleared", "vf", address, "holder", identity(l))
			}
			continue
		}
		if h.namespace == req.Namespace && h.name == req.Name && h != alive {
			ended[h] = true
		}
	}
	var result ctrl.Result
	for h := range ended {
		free, err := a.ended(ctx, h)
		if err != nil {
			return result, fmt.Errorf("pod %s: %w", h, err)
		}
		if !free {
			result.RequeueAfter = a.limits.pause * 4
			continue
		}
		if err := a.release(ctx, h); err != nil {
			return result, err
		}
	}
	return result, nil
}

// ended tells whether a pod has ended and its VFs are silent.
func (a *agent) ended(ctx context.Context, h holder) (bool, error) {
	pod := &corev1.Pod{}
	err := a.live.Get(ctx, client.ObjectKey{Namespace: h.namespace, Name: h.name}, pod)
	if err != nil && !apierrors.IsNotFound(err) {
		return false, err
	}
	if err == nil && pod.UID == h.uid && !kubevirt.Finished(pod) {
		return false, nil
	}
	// A pod can be removed from the API while its processes live.
	d, err := a.devices.get(h.uid)
	if err != nil {
		return false, err
	}
	defer d.Close()
	if gone, err := d.gone(ctx); err != nil || gone {
		return gone, err
	}
	st, err := a.status(ctx, d)
	if err != nil {
		return false, nil // it may be ending right now
	}
	return silent(st), nil
}

// silent tells whether a device process enables none of its VFs, and will not
// of its own accord.
func silent(st *controlpb.StatusReply) bool {
	switch st.GetPhase() {
	case controlpb.Phase_PHASE_UNATTACHED, controlpb.Phase_PHASE_RELINQUISHED, controlpb.Phase_PHASE_CANCELLED:
		return true
	}
	return false
}
