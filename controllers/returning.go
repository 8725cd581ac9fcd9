package controllers

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// ReturnTimeout bounds how long a migration waits for VFs of a pod that is
// ending: a node's agent has them back some seconds after the pod's processes.
const ReturnTimeout = time.Minute

// returnLook is how often it is looked whether they are back.
const returnLook = time.Second

// returning are the node's VFs that are about to be free, and the pods that
// have them: those that are ending, and those that their VM has left, which will.
func (r *VFMigrationReconciler) returning(ctx context.Context, n *v1alpha1.VFNode) ([]placedVF, []string, error) {
	var back []placedVF
	var pods []string
	ending := map[string]bool{}
	for i := range n.Status.PFs {
		pf := &n.Status.PFs[i]
		for _, vf := range pf.VFs {
			if vf.Holder == "" {
				continue
			}
			ends, known := ending[vf.Holder]
			if !known {
				var err error
				if ends, err = r.ends(ctx, vf.Holder, n.Name); err != nil {
					return nil, nil, err
				}
				ending[vf.Holder] = ends
			}
			if ends {
				back = append(back, placedVF{vf, pf})
				if !slices.Contains(pods, vf.Holder) {
					pods = append(pods, vf.Holder)
				}
			}
		}
	}
	return back, pods, nil
}

// ends tells whether the pod, namespace/name, on the node has ended or is about
// to, and has not been for so long that something else must be wrong.
func (r *VFMigrationReconciler) ends(ctx context.Context, holder, node string) (bool, error) {
	namespace, name, ok := strings.Cut(holder, "/")
	if !ok || strings.Contains(name, "/") {
		return false, nil // not what an agent writes
	}
	recent := func(t time.Time) bool {
		d := r.Clock.Now().Sub(t)
		return d < ReturnTimeout && d > -ReturnTimeout
	}
	pod := &corev1.Pod{}
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, pod)
	switch {
	case apierrors.IsNotFound(err):
		return true, nil // its agent is about to notice
	case err != nil:
		return false, fmt.Errorf("read Pod %s: %w", holder, err)
	case pod.DeletionTimestamp != nil:
		return recent(pod.DeletionTimestamp.Time), nil // when it must have ended
	case kubevirt.Finished(pod):
		return recent(finishedAt(pod)), nil
	}
	owner := kubevirt.VMIName(pod)
	if owner == "" {
		return false, nil
	}
	vmi := &virtv1.VirtualMachineInstance{}
	err = r.Live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: owner}, vmi)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read VirtualMachineInstance %s of Pod %s: %w", owner, holder, err)
	}
	st := vmi.Status.MigrationState
	return vmi.UID == kubevirt.VMIUID(pod) && vmi.Status.NodeName != node && st != nil && st.EndTimestamp != nil && recent(st.EndTimestamp.Time), nil
}

// finishedAt is when the last of the pod's containers ended.
func finishedAt(pod *corev1.Pod) time.Time {
	var last time.Time
	for _, c := range pod.Status.ContainerStatuses {
		if t := c.State.Terminated; t != nil && t.FinishedAt.After(last) {
			last = t.FinishedAt.Time
		}
	}
	return last
}

// patience is until when the VFMigration may wait for VFs: it begins when
// somebody asked for it, and when KubeVirt began to carry it out.
func (s *scope) patience() time.Time {
	since := s.vfm.CreationTimestamp.Time
	if s.vmim != nil {
		for _, t := range s.vmim.Status.PhaseTransitionTimestamps {
			if t.Phase == virtv1.MigrationScheduling && t.PhaseTransitionTimestamp.After(since) {
				since = t.PhaseTransitionTimestamp.Time
			}
		}
	}
	return since.Add(ReturnTimeout)
}
