package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/agent/kubevirt/launcher"
	"compsc.io/compsc/api/v1alpha1"
)

// +kubebuilder:rbac:groups=kubevirt.io,resources=kubevirts,verbs=list
// +kubebuilder:rbac:groups=plugin.kubevirt.io,resources=plugins,verbs=list

// findingsAge is how old what is known of the cluster's KubeVirt may become.
const findingsAge = time.Minute

// noVFIOUser is what a person is told of such a QEMU.
const noVFIOUser = "the QEMU of the virt-launcher image has no device vfio-user-pci, so that the VM cannot have its VFs; " +
	"use a virt-launcher image with QEMU 10.1 or newer that was built with it"

// found is what was found out about the KubeVirt that this node is part of.
// Losing it costs another look.
type found struct {
	qemus *launcher.QEMUs

	mu sync.Mutex
	at time.Time
	// kubevirt and hooks are conditions as of at.
	kubevirt, hooks metav1.Condition
	// looks are the looks into virt-launchers of VMs with VFs, by pod. They are
	// dropped with their pods: the image of one that is gone says nothing of the
	// image that the next gets.
	looks map[types.UID]look
}

// look is what a look into a virt-launcher found.
type look struct {
	pod  client.ObjectKey
	born metav1.Time
	has  bool
}

// findings returns the conditions of the VFNode that tell of KubeVirt.
func (a *agent) findings(ctx context.Context) []metav1.Condition {
	a.found.mu.Lock()
	defer a.found.mu.Unlock()
	f := &a.found
	if f.at.IsZero() || time.Since(f.at) > findingsAge/2 {
		a.detect(ctx)
		f.at = time.Now()
	}
	return []metav1.Condition{f.kubevirt, f.hooks, a.qemuCondition(ctx)}
}

// qemuCondition tells of the QEMU in the newest virt-launcher with VFs that is
// there: virt-launchers that come get what it got, or better. The caller holds
// the lock.
func (a *agent) qemuCondition(ctx context.Context) metav1.Condition {
	newest := look{}
	for uid, l := range a.found.looks {
		pod := &corev1.Pod{}
		err := a.client.Get(ctx, l.pod, pod)
		if apierrors.IsNotFound(err) || err == nil && (pod.UID != uid || kubevirt.Finished(pod)) {
			delete(a.found.looks, uid)
			continue
		}
		if newest.pod.Name == "" || newest.born.Before(&l.born) || newest.born.Equal(&l.born) && newest.pod.String() < l.pod.String() {
			newest = l
		}
	}
	c := metav1.Condition{Type: v1alpha1.ConditionQEMU, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonVFIOUserPresent,
		Message: "the QEMU of virt-launcher has the device vfio-user-pci"}
	switch {
	case newest.pod.Name == "":
		c.Status, c.Reason = metav1.ConditionUnknown, v1alpha1.ReasonNotSeen
		c.Message = "there is no virt-launcher of a VM with VFs on this node that was looked into; that takes an agent in the node's process namespace (hostPID)"
	case !newest.has:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, v1alpha1.ReasonVFIOUserMissing, cut("pod "+newest.pod.String()+": "+noVFIOUser, maxMessage)
	}
	return c
}

// detect looks at the cluster's KubeVirt. The caller holds the lock.
func (a *agent) detect(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, a.limits.call)
	defer cancel()
	installed, hooks, err := cluster.Detect(ctx, a.live)
	if !a.hooked && hooks.OK {
		hooks = cluster.Finding{Reason: v1alpha1.ReasonNotServed, Message: "the agent was told not to serve KubeVirt's node hooks (--hook-socket), which a Plugin names"}
	}
	condition := func(typ string, f cluster.Finding) metav1.Condition {
		c := metav1.Condition{Type: typ, Status: metav1.ConditionFalse, Reason: f.Reason, Message: cut(f.Message, maxMessage)}
		if f.OK {
			c.Status = metav1.ConditionTrue
		}
		if err != nil {
			c.Status, c.Reason, c.Message = metav1.ConditionUnknown, v1alpha1.ReasonUnreadable, cut(err.Error(), maxMessage)
		}
		return c
	}
	a.found.kubevirt = condition(v1alpha1.ConditionKubeVirt, installed)
	a.found.hooks = condition(v1alpha1.ConditionNodeHooks, hooks)
}

// hasVFIOUser tells whether the QEMU of a pod whose VM has VFs can attach them,
// and notes it for the VFNode. An error says that it cannot be told, which
// hinders nobody.
func (a *agent) hasVFIOUser(pod *corev1.Pod) (bool, error) {
	has, err := a.found.qemus.HasVFIOUser(pod.UID)
	if err != nil {
		a.log.Debug("QEMU not looked into", "pod", pod.Namespace+"/"+pod.Name, "error", err)
		return false, err
	}
	a.found.mu.Lock()
	defer a.found.mu.Unlock()
	if a.found.looks == nil {
		a.found.looks = map[types.UID]look{}
	}
	a.found.looks[pod.UID] = look{client.ObjectKeyFromObject(pod), pod.CreationTimestamp, has}
	return has, nil
}

// hasVFs tells whether the VM of the pod has VFs, as far as that is known yet.
func (a *agent) hasVFs(ctx context.Context, pod *corev1.Pod) bool {
	ifaces, err := a.interfaces(ctx, pod)
	return len(ifaces) > 0 || errors.Is(err, kubevirt.ErrNotYet)
}
