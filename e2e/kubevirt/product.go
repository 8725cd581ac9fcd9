package kubevirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/helm"
)

const (
	// image is this project's, as hack/image names it for e2e/kubevirt.
	repository, tag = "localhost/compsc", "e2e"
	image           = repository + ":" + tag
	// resourceName is what VFs are announced as, in the sample network and in
	// deploy/deviceplugin.yaml.
	resourceName = "intel.com/intel_82599_vf"
)

// InstallChart has Helm install the product: our image, all that this KubeVirt
// has a use for, and nodes with modelled VFs.
func (s *Stack) InstallChart(ctx context.Context) error {
	args := []string{"install", helm.Release, s.o.Artifacts.Chart,
		"--set", "image.repository=" + repository + ",image.tag=" + tag,
		"--set", "kubevirt.binding.enabled=true,kubevirt.migrationPolicy.enabled=true,kubevirt.admission.enabled=true",
		"--set-json", `agent.modelPFs=["name=pf0,vfs=2,bridge=br0"]`,
	}
	if s.Plugins() {
		args = append(args, "--set", "kubevirt.plugin.enabled=true")
	}
	return s.Helm(ctx, args...)
}

// Helm runs Helm on the product's namespace.
func (s *Stack) Helm(ctx context.Context, args ...string) error {
	h := helm.Helm{Program: s.o.Artifacts.Helm, Home: filepath.Join(s.Lab.Dir, "helm"), Kubeconfig: s.Kube.Kubeconfig}
	_, err := h.Run(ctx, append(args, "--namespace", v1alpha1.SystemNamespace)...)
	return err
}

// AwaitProduct waits until the product's pods are ready, and those of its
// newest version.
func (s *Stack) AwaitProduct(ctx context.Context) error {
	return errors.Join(
		s.awaitRollout(ctx, &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: "compsc-manager"}}),
		s.awaitRollout(ctx, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: "compsc-agent"}}))
}

// installMultus applies Multus' own manifest.
func (s *Stack) installMultus(ctx context.Context) error {
	manifest, err := os.ReadFile(s.o.Artifacts.Multus)
	if err != nil {
		return err
	}
	if err := s.Kube.Apply(ctx, manifest, nil); err != nil {
		return fmt.Errorf("install Multus: %w", err)
	}
	return nil
}

// installProduct installs this project with Helm, as the README says, and waits
// until it works: pods ready, VFs announced to the kubelet and in the nodes'
// inventories.
func (s *Stack) installProduct(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, deployTimeout, errors.New("it took too long"))
	defer cancel()
	s.o.Progress("CompSC: manager, agents, network binding; device plugin")
	root := s.o.Artifacts.Repository
	for _, args := range [][]string{
		{"create", "namespace", v1alpha1.SystemNamespace},
		{"label", "namespace", v1alpha1.SystemNamespace, "pod-security.kubernetes.io/enforce=privileged"},
		{"apply", "--server-side", "-f", filepath.Join(root, "e2e", "kubevirt", "deploy", "deviceplugin.yaml")},
		{"apply", "--server-side", "-f", filepath.Join(root, "config", "samples", "kubevirt", "network-attachment-definition.yaml")},
	} {
		if _, err := s.Kubectl(ctx, "", args...); err != nil {
			return err
		}
	}
	if err := s.Kube.Until(ctx, "the kind MigrationPolicy", func(ctx context.Context) (bool, error) {
		crd := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: "apiextensions.k8s.io/v1", Kind: "CustomResourceDefinition"}}
		err := s.Client().Get(ctx, client.ObjectKey{Name: "migrationpolicies.migrations.kubevirt.io"}, crd)
		return err == nil, client.IgnoreNotFound(err)
	}); err != nil {
		return err
	}
	if err := s.InstallChart(ctx); err != nil {
		return err
	}
	for _, name := range []string{"kube-multus-ds", "sriov-device-plugin-standin"} {
		if err := s.awaitRollout(ctx, &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: name}}); err != nil {
			return err
		}
	}
	if err := s.AwaitProduct(ctx); err != nil {
		return err
	}
	if err := s.Kube.Until(ctx, "KubeVirt to know the network binding", func(ctx context.Context) (bool, error) {
		kv := &kubevirtv1.KubeVirt{}
		if err := s.Client().Get(ctx, client.ObjectKey{Namespace: kubevirtNamespace, Name: "kubevirt"}, kv); err != nil {
			return false, err
		}
		network := kv.Spec.Configuration.NetworkConfiguration
		return network != nil && network.Binding[Binding].SidecarImage == image, nil
	}); err != nil {
		return err
	}
	return s.Kube.Until(ctx, "VFs on every node", func(ctx context.Context) (bool, error) {
		for name := range s.Lab.Nodes {
			node := &corev1.Node{}
			if err := s.Client().Get(ctx, client.ObjectKey{Name: name}, node); err != nil {
				return false, err
			}
			if q := node.Status.Allocatable[resourceName]; q.Value() != VFsPerNode {
				return false, nil
			}
			free, err := s.FreeVFs(ctx, name)
			if err != nil || free != VFsPerNode {
				return false, client.IgnoreNotFound(err)
			}
		}
		return true, nil
	})
}

// FreeVFs counts the node's VFs that nobody holds.
func (s *Stack) FreeVFs(ctx context.Context, node string) (free int, err error) {
	n := &v1alpha1.VFNode{}
	if err := s.Client().Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
		return 0, err
	}
	for _, pf := range n.Status.PFs {
		for _, vf := range pf.VFs {
			if vf.Holder == "" {
				free++
			}
		}
	}
	return free, nil
}
