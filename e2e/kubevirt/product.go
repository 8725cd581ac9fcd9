package kubevirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/api/v1alpha1"
)

const (
	// image is this project's, as hack/image names it for e2e/kubevirt.
	image = "localhost/compsc:e2e"
	// resourceName is what VFs are announced as, in the sample network and in
	// deploy/deviceplugin.yaml.
	resourceName = "intel.com/intel_82599_vf"

	productTimeout = 5 * time.Minute
)

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

// installProduct installs this project by its manifests and waits until it
// works: pods ready, VFs announced to the kubelet and in the nodes' inventories.
func (s *Stack) installProduct(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, productTimeout, errors.New("it took too long"))
	defer cancel()
	s.o.Progress("CompSC: manager, agents, network binding; device plugin")
	if err := s.registerBinding(ctx); err != nil {
		return fmt.Errorf("the network binding: %w", err)
	}
	root := s.o.Artifacts.Repository
	for _, args := range [][]string{
		{"-k", filepath.Join(root, "e2e", "kubevirt", "deploy")},
		{"-f", filepath.Join(root, "config", "samples", "kubevirt", "network-attachment-definition.yaml")},
	} {
		if _, err := s.Kubectl(ctx, "", append([]string{"apply", "--server-side"}, args...)...); err != nil {
			return err
		}
	}
	for _, o := range []client.Object{
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "kube-multus-ds"}},
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "sriov-device-plugin-standin"}},
		&appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: "compsc-manager"}},
		&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: "compsc-agent"}},
	} {
		if err := s.awaitRollout(ctx, o); err != nil {
			return err
		}
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

// registerBinding tells KubeVirt of our network binding as config/kubevirt
// does, with the image that there is here.
func (s *Stack) registerBinding(ctx context.Context) error {
	b, err := os.ReadFile(filepath.Join(s.o.Artifacts.Repository, "config", "kubevirt", "binding", "kubevirt.yaml"))
	if err != nil {
		return err
	}
	kv := &kubevirtv1.KubeVirt{}
	if err := yaml.UnmarshalStrict(b, kv); err != nil {
		return err
	}
	bindings := kv.Spec.Configuration.NetworkConfiguration.Binding
	ours, ok := bindings[Binding]
	if !ok {
		return fmt.Errorf("config/kubevirt registers no binding %s", Binding)
	}
	ours.SidecarImage = image
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"configuration": map[string]any{
		"network": map[string]any{"binding": map[string]any{Binding: ours}},
	}}})
	if err != nil {
		return err
	}
	return s.Client().Patch(ctx, kv, client.RawPatch(types.MergePatchType, patch))
}
