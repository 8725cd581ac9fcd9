package standin

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

const (
	// Images name what the stand-in runs instead of them.
	launcherImage = "quay.io/kubevirt/virt-launcher:v1.9.0"
	sidecarImage  = "compsc.io/compsc"
)

// reconcileVMI plays virt-controller and virt-handler for a VMI that starts
// or is deleted.
func (s *StandIn) reconcileVMI(ctx context.Context, r reconcile.Request) (ctrl.Result, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := s.client.Get(ctx, r.NamespacedName, v); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if v.DeletionTimestamp != nil {
		return s.deleteVMI(ctx, v)
	}
	switch v.Status.Phase {
	case "", kubevirtv1.Pending:
		if err := s.createLauncher(ctx, v, nil); err != nil {
			return ctrl.Result{}, err
		}
		return ctrl.Result{}, s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) {
			controllerutil.AddFinalizer(v, kubevirtv1.VirtualMachineInstanceFinalizer)
			v.Status.Phase = kubevirtv1.Scheduling
		})
	case kubevirtv1.Scheduling:
		return ctrl.Result{}, s.scheduleVMI(ctx, v)
	case kubevirtv1.Scheduled:
		return ctrl.Result{}, s.startVMI(ctx, v)
	case kubevirtv1.Running:
		return ctrl.Result{}, s.watchVMI(ctx, v)
	}
	return ctrl.Result{}, nil
}

// scheduleVMI hands the VMI to the node once its pod is ready.
func (s *StandIn) scheduleVMI(ctx context.Context, v *kubevirtv1.VirtualMachineInstance) error {
	o := &corev1.Pod{}
	if err := s.client.Get(ctx, client.ObjectKey{Namespace: v.Namespace, Name: launcherName(v, nil)}, o); err != nil {
		return err
	}
	if podDown(o) {
		return s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) { v.Status.Phase = kubevirtv1.Failed })
	}
	if !podReady(o) {
		return nil // the pod's next event comes here again
	}
	if err := s.writeNetworkInfo(ctx, o, v); err != nil {
		return err
	}
	return s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) {
		v.Status.Phase = kubevirtv1.Scheduled
		v.Status.NodeName = o.Spec.NodeName
		setLabel(v, kubevirtv1.NodeNameLabel, o.Spec.NodeName)
		v.Status.ActivePods = map[types.UID]string{o.UID: o.Spec.NodeName}
	})
}

// startVMI starts the domain.
func (s *StandIn) startVMI(ctx context.Context, v *kubevirtv1.VirtualMachineInstance) error {
	p, err := s.activePod(v)
	if err != nil {
		return err
	}
	if p.activeDomain() == nil {
		d, err := s.startDomain(ctx, p, v)
		if errors.Is(err, errRefused) {
			s.log.Info("VM does not start yet", "vmi", v.Name, "error", err)
			return err // virt-handler tries again
		}
		if err != nil {
			s.log.Error("VM does not start", "vmi", v.Name, "error", err)
			s.finishPod(p, corev1.PodFailed)
			return s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) {
				v.Status.Phase, v.Status.Reason = kubevirtv1.Failed, err.Error()
			})
		}
		if err := s.setDomain(p, d); err != nil {
			return err
		}
	}
	return s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) {
		v.Status.Phase = kubevirtv1.Running
		v.Status.NodeName = p.node
		v.Status.Interfaces = nil
		for _, i := range v.Spec.Domain.Devices.Interfaces {
			v.Status.Interfaces = append(v.Status.Interfaces, kubevirtv1.VirtualMachineInstanceNetworkInterface{
				Name: i.Name, MAC: i.MacAddress, InfoSource: "domain, multus-status",
			})
		}
		setVMICondition(v, kubevirtv1.VirtualMachineInstanceReady)
		setVMICondition(v, kubevirtv1.VirtualMachineInstanceIsMigratable)
		if startsPaused(v) {
			setVMICondition(v, kubevirtv1.VirtualMachineInstancePaused)
		}
	})
}

// watchVMI notices that the VM is gone.
func (s *StandIn) watchVMI(ctx context.Context, v *kubevirtv1.VirtualMachineInstance) error {
	if p, err := s.activePod(v); err == nil && p.activeDomain() != nil {
		return nil
	}
	if m := v.Status.MigrationState; m != nil && m.EndTimestamp == nil {
		return nil // a migration's end decides
	}
	return s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) {
		v.Status.Phase, v.Status.Reason = kubevirtv1.Failed, "the domain is gone"
	})
}

func (s *StandIn) deleteVMI(ctx context.Context, v *kubevirtv1.VirtualMachineInstance) (ctrl.Result, error) {
	pods := &corev1.PodList{}
	if err := s.client.List(ctx, pods, client.InNamespace(v.Namespace), client.MatchingLabels{kubevirtv1.CreatedByLabel: string(v.UID)}); err != nil {
		return ctrl.Result{}, err
	}
	if len(pods.Items) > 0 {
		for i := range pods.Items {
			if err := client.IgnoreNotFound(s.client.Delete(ctx, &pods.Items[i])); err != nil {
				return ctrl.Result{}, err
			}
		}
		return ctrl.Result{RequeueAfter: retryInterval}, nil
	}
	return ctrl.Result{}, client.IgnoreNotFound(s.updateVMI(ctx, v, func(v *kubevirtv1.VirtualMachineInstance) {
		controllerutil.RemoveFinalizer(v, kubevirtv1.VirtualMachineInstanceFinalizer)
	}))
}

// activePod is the pod in which the VMI runs.
func (s *StandIn) activePod(v *kubevirtv1.VirtualMachineInstance) (*pod, error) {
	for uid, node := range v.Status.ActivePods {
		if p := s.podOf(uid); p != nil && node == v.Status.NodeName {
			return p, nil
		}
	}
	return nil, fmt.Errorf("VMI %s has no pod on node %q", v.Name, v.Status.NodeName)
}

// AgentSocket is the socket of the second serial port of the VMI's VM, where
// it runs now.
func (s *StandIn) AgentSocket(ctx context.Context, key client.ObjectKey) (string, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := s.client.Get(ctx, key, v); err != nil {
		return "", err
	}
	p, err := s.activePod(v)
	if err != nil {
		return "", err
	}
	d := p.activeDomain()
	if d == nil {
		return "", fmt.Errorf("VMI %s has no running VM", v.Name)
	}
	return d.dir + "/agent.sock", nil
}

// DevicePID is the process that mediates the VMI's VFs.
func (s *StandIn) DevicePID(ctx context.Context, key client.ObjectKey) (int, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := s.client.Get(ctx, key, v); err != nil {
		return 0, err
	}
	p, err := s.activePod(v)
	if err != nil {
		return 0, err
	}
	return p.currentSidecar().PID(), nil
}

// launcherName is the name of the VMI's virt-launcher pod, or of the target's
// of a migration.
func launcherName(v *kubevirtv1.VirtualMachineInstance, m *kubevirtv1.VirtualMachineInstanceMigration) string {
	uid := v.UID
	if m != nil {
		uid = m.UID
	}
	return "virt-launcher-" + v.Name + "-" + string(uid[:8])
}

// createLauncher makes the virt-launcher pod, for a migration with m set, if
// it does not exist.
func (s *StandIn) createLauncher(ctx context.Context, v *kubevirtv1.VirtualMachineInstance, m *kubevirtv1.VirtualMachineInstanceMigration) error {
	networks, err := networksAnnotation(v)
	if err != nil {
		return err
	}
	o := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: launcherName(v, m), Namespace: v.Namespace,
			Labels: map[string]string{
				kubevirtv1.AppLabel:                          launcherLabel,
				kubevirtv1.CreatedByLabel:                    string(v.UID),
				kubevirtv1.DeprecatedVirtualMachineNameLabel: v.Name,
			},
			Annotations: map[string]string{
				kubevirtv1.DomainAnnotation:   v.Name,
				"k8s.v1.cni.cncf.io/networks": networks,
			},
		},
		Spec: corev1.PodSpec{
			RestartPolicy: corev1.RestartPolicyNever,
			NodeSelector:  map[string]string{kubevirtv1.NodeSchedulable: "true"},
			Containers: []corev1.Container{
				{Name: computeContainer, Image: launcherImage},
				{Name: sidecarContainer, Image: sidecarImage},
			},
			Volumes: []corev1.Volume{{Name: "hook-sidecar-sockets", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
		},
	}
	for k, x := range v.Spec.NodeSelector {
		o.Spec.NodeSelector[k] = x
	}
	if m != nil {
		o.Labels[kubevirtv1.MigrationJobLabel] = string(m.UID)
		o.Annotations[kubevirtv1.MigrationJobNameAnnotation] = m.Name
		for k, x := range m.Spec.AddedNodeSelector {
			o.Spec.NodeSelector[k] = x
		}
		o.Spec.Affinity = notOn(v.Status.NodeName)
	}
	if err := controllerutil.SetControllerReference(v, o, s.client.Scheme()); err != nil {
		return err
	}
	if err := s.client.Create(ctx, o); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("pod %s: %w", o.Name, err)
	}
	return nil
}

func notOn(node string) *corev1.Affinity {
	return &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
		RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{
				Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpNotIn, Values: []string{node},
			}},
		}}},
	}}
}

func (s *StandIn) writeNetworkInfo(ctx context.Context, o *corev1.Pod, v *kubevirtv1.VirtualMachineInstance) error {
	info, err := digestNetworks(o, v)
	if err != nil {
		return err
	}
	return s.updatePod(ctx, o, func(o *corev1.Pod) { o.Annotations[networkInfoAnnotation] = info })
}

func setLabel(o client.Object, key, value string) {
	l := o.GetLabels()
	if l == nil {
		l = map[string]string{}
	}
	l[key] = value
	o.SetLabels(l)
}

func setVMICondition(v *kubevirtv1.VirtualMachineInstance, t kubevirtv1.VirtualMachineInstanceConditionType) {
	for _, c := range v.Status.Conditions {
		if c.Type == t {
			return
		}
	}
	v.Status.Conditions = append(v.Status.Conditions, kubevirtv1.VirtualMachineInstanceCondition{
		Type: t, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now(),
	})
}
