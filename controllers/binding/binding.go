// Package binding registers CompSC's network binding with KubeVirt, for those who
// have the chart do it.
package binding

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
)

// Options say what Run does.
type Options struct {
	// Config reaches the API server.
	Config *rest.Config
	// KubeVirt names the cluster's KubeVirt object.
	KubeVirt types.NamespacedName
	// Image is what KubeVirt is to run as sidecar.
	Image string
	Log   *slog.Logger
}

// Run registers the binding with the KubeVirt object.
func Run(ctx context.Context, o Options) error {
	scheme := runtime.NewScheme()
	if err := virtv1.AddToScheme(scheme); err != nil {
		return err
	}
	c, err := client.New(o.Config, client.Options{Scheme: scheme})
	if err != nil {
		return err
	}
	changed, err := Register(ctx, c, o.KubeVirt, o.Image)
	if err != nil {
		return err
	}
	o.Log.Info("network binding registered", "kubevirt", o.KubeVirt, "binding", kubevirt.BindingName, "image", o.Image, "changed", changed)
	return nil
}

// Register has the KubeVirt object know the binding, with the image as its
// sidecar, and tells whether that changed it. Other bindings stay as they are, and
// so does what somebody has added to this one.
func Register(ctx context.Context, c client.Client, kubeVirt types.NamespacedName, image string) (changed bool, err error) {
	kv := &virtv1.KubeVirt{}
	if err := c.Get(ctx, kubeVirt, kv); err != nil {
		return false, fmt.Errorf("KubeVirt %s, which is to know the network binding: %w", kubeVirt, err)
	}
	if n := kv.Spec.Configuration.NetworkConfiguration; n != nil {
		b, ok := n.Binding[kubevirt.BindingName]
		if ok && b.SidecarImage == image && b.DownwardAPI == virtv1.DeviceInfo && b.Migration != nil {
			return false, nil
		}
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"configuration": map[string]any{"network": map[string]any{
		"binding": map[string]any{kubevirt.BindingName: map[string]any{
			"sidecarImage": image,
			// Shows the sidecar which VF each network was given.
			"downwardAPI": virtv1.DeviceInfo,
			// A VM with such an interface may be migrated.
			"migration": map[string]any{},
		}},
	}}}})
	if err != nil {
		return false, err
	}
	if err := c.Patch(ctx, kv, client.RawPatch(types.MergePatchType, patch)); err != nil {
		return false, fmt.Errorf("KubeVirt %s, which is to know the network binding: %w", kubeVirt, err)
	}
	return true, nil
}
