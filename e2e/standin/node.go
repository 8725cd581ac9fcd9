package standin

import (
	"context"
	"fmt"
	"slices"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"compsc.io/compsc/api/v1alpha1"
)

const (
	computeContainer = "compute"
	sidecarContainer = "hook-sidecar-0"
	launcherLabel    = "virt-launcher"
)

// reconcilePod plays kube-scheduler, device plugin, Multus and kubelet for
// virt-launcher pods.
func (s *StandIn) reconcilePod(ctx context.Context, r reconcile.Request) (ctrl.Result, error) {
	o := &corev1.Pod{}
	if err := s.client.Get(ctx, r.NamespacedName, o); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if o.Labels[kubevirtv1.AppLabel] != launcherLabel {
		return ctrl.Result{}, nil
	}
	switch {
	case o.DeletionTimestamp != nil:
		s.endPod(s.podOf(o.UID))
		s.free(o.UID)
		// The kubelet's last word: the containers are gone.
		return ctrl.Result{}, client.IgnoreNotFound(s.client.Delete(ctx, o, client.GracePeriodSeconds(0), client.Preconditions{UID: &o.UID}))
	case o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed:
		s.free(o.UID)
		return ctrl.Result{}, nil
	case o.Spec.NodeName == "":
		return s.schedule(ctx, o)
	}
	if o.Annotations[nadv1.NetworkStatusAnnot] == "" {
		return ctrl.Result{}, s.attachNetworks(ctx, o)
	}
	p := s.podOf(o.UID)
	if p == nil {
		var err error
		if p, err = s.startPod(o); err != nil {
			return ctrl.Result{}, err
		}
	}
	return ctrl.Result{}, s.reportPod(ctx, o, p)
}

// schedule binds the pod to a node with enough VFs, which are the pod's from
// then on.
func (s *StandIn) schedule(ctx context.Context, o *corev1.Pod) (ctrl.Result, error) {
	networks, err := requestedNetworks(o)
	if err != nil {
		return ctrl.Result{}, err
	}
	nodes := &corev1.NodeList{}
	if err := s.client.List(ctx, nodes, client.MatchingLabelsSelector{Selector: labels.SelectorFromSet(o.Spec.NodeSelector)}); err != nil {
		return ctrl.Result{}, err
	}
	slices.SortFunc(nodes.Items, func(a, b corev1.Node) int { return slices.Compare([]byte(a.Name), []byte(b.Name)) })
	for _, n := range nodes.Items {
		if excluded(o, n.Name) {
			continue
		}
		ok, err := s.allocate(ctx, o, n.Name, len(networks))
		if err != nil {
			return ctrl.Result{}, err
		}
		if !ok {
			continue
		}
		binding := &corev1.Binding{
			ObjectMeta: metav1.ObjectMeta{Name: o.Name, Namespace: o.Namespace, UID: o.UID},
			Target:     corev1.ObjectReference{Kind: "Node", Name: n.Name},
		}
		if err := s.client.SubResource("binding").Create(ctx, o, binding); err != nil {
			s.free(o.UID)
			return ctrl.Result{}, fmt.Errorf("bind pod %s: %w", o.Name, err)
		}
		return ctrl.Result{}, nil
	}
	return ctrl.Result{RequeueAfter: retryInterval}, s.updatePodStatus(ctx, o, func(o *corev1.Pod) {
		setPodCondition(o, corev1.PodScheduled, false, corev1.PodReasonUnschedulable,
			"no node that the pod may run on has enough free VFs")
	})
}

// excluded tells whether the pod must not run on the node: KubeVirt gives a
// target pod an anti-affinity to the source's.
func excluded(o *corev1.Pod, node string) bool {
	a := o.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return false
	}
	for _, t := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		for _, e := range t.MatchExpressions {
			if e.Key == corev1.LabelHostname && e.Operator == corev1.NodeSelectorOpNotIn && slices.Contains(e.Values, node) {
				return true
			}
		}
	}
	return false
}

// allocate gives n of the node's VFs to the pod.
func (s *StandIn) allocate(ctx context.Context, o *corev1.Pod, node string, n int) (bool, error) {
	if n == 0 {
		return true, nil
	}
	inventory := &v1alpha1.VFNode{}
	if err := s.client.Get(ctx, client.ObjectKey{Name: node}, inventory); err != nil {
		return false, client.IgnoreNotFound(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	free := s.freeVFs(inventory)
	if len(free) < n {
		return false, nil
	}
	if s.allocated[node] == nil {
		s.allocated[node] = map[string]types.UID{}
	}
	for _, vf := range free[:n] {
		s.allocated[node][vf] = o.UID
	}
	return true, nil
}

// allocation is what the pod has, in a stable order.
func (s *StandIn) allocation(node string, pod types.UID) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var vfs []string
	for vf, uid := range s.allocated[node] {
		if uid == pod {
			vfs = append(vfs, vf)
		}
	}
	slices.Sort(vfs)
	return vfs
}

// allocations are what the pods on the node of a pod that is about to start have.
func (s *StandIn) allocations(starting *corev1.Pod) []Allocation {
	of := func(namespace, name string, vfs []string) Allocation {
		return Allocation{Namespace: namespace, Pod: name, Container: computeContainer, VFs: vfs}
	}
	all := []Allocation{of(starting.Namespace, starting.Name, s.allocation(starting.Spec.NodeName, starting.UID))}
	s.mu.Lock()
	var others []*pod
	for _, p := range s.pods {
		if p.node == starting.Spec.NodeName && p.uid != starting.UID {
			others = append(others, p)
		}
	}
	s.mu.Unlock()
	for _, p := range others {
		if vfs := s.allocation(p.node, p.uid); len(vfs) > 0 {
			all = append(all, of(p.namespace, p.name, vfs))
		}
	}
	return all
}

func (s *StandIn) free(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, vfs := range s.allocated {
		for vf, holder := range vfs {
			if holder == uid {
				delete(vfs, vf)
			}
		}
	}
}

func (s *StandIn) attachNetworks(ctx context.Context, o *corev1.Pod) error {
	networks, err := requestedNetworks(o)
	if err != nil {
		return err
	}
	vfs := s.allocation(o.Spec.NodeName, o.UID)
	if len(vfs) != len(networks) {
		return fmt.Errorf("pod %s: %d VFs for %d networks", o.Name, len(vfs), len(networks))
	}
	status, err := networkStatus(networks, vfs)
	if err != nil {
		return err
	}
	return s.updatePod(ctx, o, func(o *corev1.Pod) {
		o.Annotations[nadv1.NetworkStatusAnnot] = status
	})
}

// reportPod writes what the kubelet knows of a pod.
func (s *StandIn) reportPod(ctx context.Context, o *corev1.Pod, p *pod) error {
	ready, ended := p.state()
	return s.updatePodStatus(ctx, o, func(o *corev1.Pod) {
		if o.Status.StartTime == nil {
			o.Status.StartTime = &metav1.Time{Time: p.started}
		}
		if n := s.cfg.Lab.Nodes[p.node]; n != nil {
			o.Status.HostIP, o.Status.PodIP = n.IP.String(), n.IP.String()
		}
		o.Status.Phase = corev1.PodRunning
		compute := corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Time{Time: p.started}}}
		sidecar := compute
		if ended != "" {
			o.Status.Phase = ended
			exit := &corev1.ContainerStateTerminated{Reason: "Completed"}
			if ended == corev1.PodFailed {
				exit.ExitCode, exit.Reason = 1, "Error"
			}
			compute, sidecar = corev1.ContainerState{Terminated: exit}, corev1.ContainerState{Terminated: exit}
			ready = false
		} else if p.sidecarEnded() {
			sidecar = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Error", ExitCode: 137}}
			ready = false
		}
		o.Status.ContainerStatuses = []corev1.ContainerStatus{
			{Name: computeContainer, Image: launcherImage, State: compute, Ready: ended == "", Started: new(ended == "")},
			{Name: sidecarContainer, Image: sidecarImage, State: sidecar, Ready: ready, Started: new(sidecar.Running != nil)},
		}
		setPodCondition(o, corev1.PodInitialized, true, "", "")
		setPodCondition(o, corev1.ContainersReady, ready, "ContainersNotReady", "")
		setPodCondition(o, corev1.PodReady, ready, "ContainersNotReady", "")
	})
}

func (s *StandIn) updatePodStatus(ctx context.Context, o *corev1.Pod, mutate func(*corev1.Pod)) error {
	err := update(ctx, s.client, o, mutate, func(o *corev1.Pod) error { return s.client.Status().Update(ctx, o) })
	if err != nil {
		return fmt.Errorf("pod %s: %w", o.Name, client.IgnoreNotFound(err))
	}
	return nil
}

func setPodCondition(o *corev1.Pod, t corev1.PodConditionType, ok bool, reason, message string) {
	c := corev1.PodCondition{Type: t, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Time{Time: time.Now().Truncate(time.Second)}}
	if !ok {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, reason, message
	}
	for i, old := range o.Status.Conditions {
		if old.Type == t {
			if old.Status == c.Status {
				c.LastTransitionTime = old.LastTransitionTime
			}
			o.Status.Conditions[i] = c
			return
		}
	}
	o.Status.Conditions = append(o.Status.Conditions, c)
}

// podReady is KubeVirt's IsPodReady: compute need only run, everything else
// must be ready.
func podReady(o *corev1.Pod) bool {
	if o.DeletionTimestamp != nil || o.Status.Phase != corev1.PodRunning || len(o.Status.ContainerStatuses) == 0 {
		return false
	}
	for _, c := range o.Status.ContainerStatuses {
		if c.Name == computeContainer {
			if c.State.Running == nil {
				return false
			}
		} else if !c.Ready {
			return false
		}
	}
	return true
}

func podDown(o *corev1.Pod) bool {
	return o.DeletionTimestamp != nil || o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed
}
