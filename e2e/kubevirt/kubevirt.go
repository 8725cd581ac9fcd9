// Package kubevirt installs real KubeVirt, Multus and this project on a real
// Kubernetes, all on this machine, and moves virtual machines on it as users
// do. Nothing of Kubernetes or KubeVirt is simulated. What is stood in for:
// the VFs are modelled (package agent/model), on the lab's network; the
// program that announces them to the kubelet is e2e/deviceplugin, not the
// SR-IOV network device plugin; and virtual machines are emulated by QEMU,
// not run by KVM.
package kubevirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/kubernetes"
	"compsc.io/compsc/e2e/lab"
)

const (
	// Namespace is where VMs and migrations live.
	Namespace = "default"
	// NodeA and NodeB are the nodes.
	NodeA, NodeB = "a", "b"

	// launcherImage is what hack/kubevirt names the image.
	launcherImage = "localhost/virt-launcher-vfio-user"

	kubevirtNamespace = "kubevirt"
	controlPlaneLabel = "node-role.kubernetes.io/control-plane"

	deployTimeout = 10 * time.Minute

	// operatorFailures is how many of its liveness probes virt-operator may fail
	// in a row.
	operatorFailures = 60
)

// Options of a Stack.
type Options struct {
	Artifacts artifacts.Real
	// Images are further archives of images for the nodes.
	Images []string
	// Progress, if set, is told what is about to be done.
	Progress func(string)
}

// Stack is a running installation.
type Stack struct {
	Lab  *lab.Lab
	Kube *kubernetes.Cluster

	o Options
}

// Start brings up Kubernetes, Multus, KubeVirt and this project. The caller must Close it.
func Start(ctx context.Context, o Options) (_ *Stack, err error) {
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	s := &Stack{o: o}
	defer func() {
		if err != nil {
			if s.Kube != nil {
				s.o.Progress("what there is after the failure:\n" + s.Diagnose(context.WithoutCancel(ctx)))
			}
			err = errors.Join(err, s.Close())
		}
	}()
	if s.Lab, err = lab.New(ctx, NodeA, NodeB); err != nil {
		return nil, err
	}
	s.Kube, err = kubernetes.Start(ctx, s.Lab, kubernetes.Options{
		ControlPlane: o.Artifacts.ControlPlane, Programs: o.Artifacts.Programs, Tree: o.Artifacts.NodeTree,
		Store: o.Artifacts.Store, Images: append(o.Images, o.Artifacts.Images...), Progress: o.Progress,
	})
	if err != nil {
		return nil, err
	}
	if err := s.installMultus(ctx); err != nil {
		return nil, err
	}
	// The product needs of KubeVirt what its operator makes first, its kinds; so
	// both come up at the same time. But a Plugin is KubeVirt's to admit.
	g, gctx := errgroup.WithContext(ctx)
	if s.Plugins() {
		g.SetLimit(1)
	}
	for _, part := range []struct {
		what    string
		install func(context.Context) error
	}{{"KubeVirt", s.installKubeVirt}, {"CompSC", s.installProduct}} {
		g.Go(func() error {
			err := part.install(gctx)
			if err == nil {
				s.o.Progress(part.what + ": it works")
			}
			return err
		})
	}
	return s, g.Wait()
}

// Plugins tells whether KubeVirt has plugins, as it has since 1.9.
func (s *Stack) Plugins() bool { return s.o.Artifacts.Release != "1.8" }

// Close takes everything down. It may be called again.
func (s *Stack) Close() error {
	var errs []error
	if s.Kube != nil {
		errs = append(errs, s.Kube.Close())
		s.Kube = nil
	}
	if s.Lab != nil {
		errs = append(errs, s.Lab.Close())
	}
	return errors.Join(errs...)
}

// Client reaches the API server with all rights.
func (s *Stack) Client() client.Client { return s.Kube.Client }

// installKubeVirt has KubeVirt's operator install it, as its users do.
func (s *Stack) installKubeVirt(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, deployTimeout, errors.New("KubeVirt took too long"))
	defer cancel()
	s.o.Progress("KubeVirt: its operator installs it")
	// Its operator runs on nodes of the control plane.
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: NodeA}}
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:""}}}`, controlPlaneLabel)
	if err := s.Client().Patch(ctx, node, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
		return fmt.Errorf("node %s: %w", NodeA, err)
	}
	manifest, err := os.ReadFile(s.o.Artifacts.KubeVirt)
	if err != nil {
		return err
	}
	if err := s.Kube.Apply(ctx, manifest, configureOperator); err != nil {
		return fmt.Errorf("KubeVirt's operator: %w", err)
	}
	cr, err := toUnstructured(s.kubeVirt())
	if err != nil {
		return err
	}
	if err := s.Kube.ApplyObject(ctx, cr); err != nil {
		return err
	}
	kv := &kubevirtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: kubevirtNamespace, Name: "kubevirt"}}
	if err := s.Kube.Until(ctx, "KubeVirt to be deployed", func(ctx context.Context) (bool, error) {
		err := s.Client().Get(ctx, client.ObjectKeyFromObject(kv), kv)
		return kv.Status.Phase == kubevirtv1.KubeVirtPhaseDeployed, err
	}); err != nil {
		return errors.Join(err, fmt.Errorf("KubeVirt is %q: %+v", kv.Status.Phase, kv.Status.Conditions))
	}
	return s.Kube.Until(ctx, "nodes that run virtual machines", func(ctx context.Context) (bool, error) {
		nodes := &corev1.NodeList{}
		err := s.Client().List(ctx, nodes, client.MatchingLabels{kubevirtv1.NodeSchedulable: "true"})
		return len(nodes.Items) == 2, err
	})
}

// configureOperator tells virt-operator of an image for virt-launcher whose QEMU
// has vfio-user-pci, as docs/quick-start.md says. It has one virt-operator where
// there would be two: nothing here tests its failover. And it is not killed for
// the time that it takes to start on a busy machine.
func configureOperator(u *unstructured.Unstructured) error {
	if u.GetKind() != "Deployment" || u.GetName() != "virt-operator" {
		return nil
	}
	containers, _, err := unstructured.NestedSlice(u.Object, "spec", "template", "spec", "containers")
	if err != nil {
		return err
	}
	for _, c := range containers {
		container, ok := c.(map[string]any)
		if !ok {
			return fmt.Errorf("a container of virt-operator is a %T", c)
		}
		env, _, err := unstructured.NestedSlice(container, "env")
		if err != nil {
			return err
		}
		_, version, _ := strings.Cut(fmt.Sprint(container["image"]), ":")
		container["env"] = append(env, map[string]any{"name": "VIRT_LAUNCHER_IMAGE", "value": launcherImage + ":" + version})
		if probe, ok := container["livenessProbe"].(map[string]any); ok {
			probe["failureThreshold"] = int64(operatorFailures)
		}
	}
	return errors.Join(
		unstructured.SetNestedSlice(u.Object, containers, "spec", "template", "spec", "containers"),
		unstructured.SetNestedField(u.Object, int64(1), "spec", "replicas"))
}

// kubeVirt is KubeVirt's configuration.
func (s *Stack) kubeVirt() *kubevirtv1.KubeVirt {
	replicas := uint8(1)
	kv := &kubevirtv1.KubeVirt{
		TypeMeta:   metav1.TypeMeta{APIVersion: kubevirtv1.GroupVersion.String(), Kind: "KubeVirt"},
		ObjectMeta: metav1.ObjectMeta{Namespace: kubevirtNamespace, Name: "kubevirt"},
		Spec: kubevirtv1.KubeVirtSpec{
			ImagePullPolicy: corev1.PullIfNotPresent,
			Infra:           &kubevirtv1.ComponentConfig{Replicas: &replicas},
			CustomizeComponents: kubevirtv1.CustomizeComponents{
				// Without KVM the node labeller has to be told what to ask libvirt for.
				Patches: []kubevirtv1.CustomizeComponentsPatch{
					{
						ResourceType: "DaemonSet", ResourceName: "virt-handler", Type: kubevirtv1.StrategicMergePatchType,
						Patch: `{"spec":{"template":{"spec":{"initContainers":[{"name":"virt-launcher","env":[{"name":"PREFERRED_VIRTTYPE","value":"qemu"}]}]}}}}`,
					},
					soonReady("Deployment", "virt-api"), soonReady("Deployment", "virt-controller"), soonReady("DaemonSet", "virt-handler"),
				},
			},
			Configuration: kubevirtv1.KubeVirtConfiguration{
				ImagePullPolicy:        corev1.PullIfNotPresent,
				DeveloperConfiguration: &kubevirtv1.DeveloperConfiguration{UseEmulation: true},
			},
		},
	}
	if s.Plugins() {
		kv.Spec.Configuration.DeveloperConfiguration.FeatureGates = []string{nodehook.FeatureGate}
		// There is no network resources injector: KubeVirt is to ask for VFs itself.
		kv.Spec.Configuration.DeveloperConfiguration.DisabledFeatureGates = []string{"ExternalNetResourceInjection"}
		// There are no images of virt-template.
		kv.Spec.Configuration.VirtTemplateDeployment = &kubevirtv1.VirtTemplateDeployment{Enabled: new(false)}
	} else {
		// KubeVirt 1.8 may miss the end of a migration until then (docs/limits.md).
		kv.Spec.CustomizeComponents.Flags = &kubevirtv1.Flags{Handler: map[string]string{"domain-resync-period-seconds": "2"}}
	}
	return kv
}

// soonReady has a component of KubeVirt asked often whether it is ready. By
// default nobody asks for 15 s, and the operator waits for one after the other.
func soonReady(kind, name string) kubevirtv1.CustomizeComponentsPatch {
	return kubevirtv1.CustomizeComponentsPatch{
		ResourceType: kind, ResourceName: name, Type: kubevirtv1.StrategicMergePatchType,
		Patch: fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":%q,"readinessProbe":{"initialDelaySeconds":1,"periodSeconds":1,"failureThreshold":30}}]}}}}`, name),
	}
}

// toUnstructured converts an object for server-side apply, without a status.
func toUnstructured(o client.Object) (*unstructured.Unstructured, error) {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, err
	}
	delete(m, "status")
	u := &unstructured.Unstructured{Object: m}
	unstructured.RemoveNestedField(u.Object, "metadata", "creationTimestamp")
	return u, nil
}

// awaitRollout waits until all pods of a workload are ready, and none is of an
// earlier version.
func (s *Stack) awaitRollout(ctx context.Context, o client.Object) error {
	key := client.ObjectKeyFromObject(o)
	return s.Kube.Until(ctx, "the pods of "+key.String(), func(ctx context.Context) (bool, error) {
		if err := s.Client().Get(ctx, key, o); err != nil {
			return false, err
		}
		switch w := o.(type) {
		case *appsv1.Deployment:
			return w.Status.ObservedGeneration == w.Generation && w.Status.UpdatedReplicas == *w.Spec.Replicas &&
				w.Status.Replicas == *w.Spec.Replicas && w.Status.ReadyReplicas == *w.Spec.Replicas, nil
		case *appsv1.DaemonSet:
			return w.Status.ObservedGeneration == w.Generation && w.Status.DesiredNumberScheduled > 0 &&
				w.Status.UpdatedNumberScheduled == w.Status.DesiredNumberScheduled &&
				w.Status.NumberReady == w.Status.DesiredNumberScheduled, nil
		default:
			return false, fmt.Errorf("%T is not a workload", o)
		}
	})
}
