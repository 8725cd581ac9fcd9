// Package cluster tells how the cluster's KubeVirt is configured, as far as
// migrations with VFs depend on it: its version, whether its feature gate
// Plugins is on, whether CompSC's Plugin object and network binding are there, and
// whether a migration may use post-copy. It only reads.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/version"
	virtv1 "kubevirt.io/api/core/v1"
	migrationsv1alpha1 "kubevirt.io/api/migrations/v1alpha1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/nodehook"
)

// oldest is the first KubeVirt that CompSC is made for: before it, a target's
// hook sidecar is not asked when the target is prepared.
var oldest = version.MustParseSemantic("v1.8.0")

// sidecarImage is what the policy of config/kubevirt/hold_targets.yaml knows a
// sidecar of CompSC's by.
var sidecarImage = regexp.MustCompile("(^|/)compsc(:[^/]*)?(@[^/]*)?$")

// AddToScheme registers the types of KubeVirt that this package reads.
func AddToScheme(s *runtime.Scheme) error {
	return errors.Join(virtv1.AddToScheme(s), migrationsv1alpha1.AddToScheme(s), nodehook.AddToScheme(s), corev1.AddToScheme(s))
}

// Finding is a verdict on one point, with what a person would have to do.
type Finding struct {
	// OK says that all is as it should be.
	OK bool
	// Reason is the verdict in one word, fit for a condition.
	Reason string
	// Message says it in words.
	Message string
}

func bad(reason, format string, args ...any) Finding {
	return Finding{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Reasons of findings.
const (
	// ReasonInstalled: KubeVirt is there and knows the compsc network binding.
	ReasonInstalled = "Installed"
	// ReasonNotFound: the cluster has no KubeVirt object.
	ReasonNotFound = "KubeVirtNotFound"
	// ReasonTooOld: KubeVirt is older than 1.8.
	ReasonTooOld = "KubeVirtTooOld"
	// ReasonBindingMissing: the compsc network binding is not registered, or
	// not as it must be.
	ReasonBindingMissing = "BindingNotRegistered"
	// ReasonSidecarUnrecognised: the admission policy that holds target pods
	// does not take the binding's image for CompSC's.
	ReasonSidecarUnrecognised = "SidecarUnrecognised"
	// ReasonCalled: KubeVirt calls the agents' hooks.
	ReasonCalled = "HooksCalled"
	// ReasonPluginAPIMissing: KubeVirt has no Plugin API; 1.9 brought it.
	ReasonPluginAPIMissing = "PluginAPIMissing"
	// ReasonGateOff: KubeVirt's feature gate Plugins is off.
	ReasonGateOff = "PluginsGateOff"
	// ReasonPluginMissing: there is no Plugin object named compsc.
	ReasonPluginMissing = "PluginMissing"
	// ReasonPluginMismatch: the Plugin object is not as CompSC needs it.
	ReasonPluginMismatch = "PluginMismatch"
)

// fallback says what guards migrations without node hooks.
const fallback = "; without it, the target pod's readiness and its sidecar hold migrations until they are prepared"

// Detect looks at the cluster's KubeVirt. Installed tells whether VMs can use the
// compsc network binding, hooks whether KubeVirt calls the agents' hooks. An
// error says that it could not be found out.
func Detect(ctx context.Context, r client.Reader) (installed, hooks Finding, err error) {
	kv, err := kubeVirt(ctx, r)
	if err != nil {
		return Finding{}, Finding{}, err
	}
	if kv == nil {
		missing := bad(ReasonNotFound, "the cluster has no KubeVirt object; install KubeVirt")
		return missing, missing, nil
	}
	hooks, err = pluginFinding(ctx, r, kv)
	return kubeVirtFinding(kv), hooks, err
}

// kubeVirt returns the cluster's KubeVirt object, nil if there is none.
func kubeVirt(ctx context.Context, r client.Reader) (*virtv1.KubeVirt, error) {
	var list virtv1.KubeVirtList
	if err := r.List(ctx, &list); err != nil {
		if absent(err) {
			return nil, nil
		}
		return nil, fmt.Errorf("list KubeVirts: %w", err)
	}
	if len(list.Items) == 0 { // KubeVirt itself allows only one
		return nil, nil
	}
	return &list.Items[0], nil
}

// absent tells whether an error says that the API server has no such kind.
func absent(err error) bool { return meta.IsNoMatchError(err) || apierrors.IsNotFound(err) }

func kubeVirtFinding(kv *virtv1.KubeVirt) Finding {
	observed := kv.Status.ObservedKubeVirtVersion
	// A build that has no number is taken for new.
	if v, err := version.ParseSemantic(observed); err == nil && v.LessThan(oldest) {
		return bad(ReasonTooOld, "KubeVirt is %s, at least 1.8 is needed", observed)
	}
	var plugin *virtv1.InterfaceBindingPlugin
	if n := kv.Spec.Configuration.NetworkConfiguration; n != nil {
		if p, ok := n.Binding[kubevirt.BindingName]; ok {
			plugin = &p
		}
	}
	where := fmt.Sprintf("spec.configuration.network.binding.%s of KubeVirt %s/%s", kubevirt.BindingName, kv.Namespace, kv.Name)
	switch {
	case plugin == nil:
		return bad(ReasonBindingMissing, "%s is missing; register the binding", where)
	case plugin.SidecarImage == "":
		return bad(ReasonBindingMissing, "%s has no sidecarImage; set it to CompSC's image", where)
	case plugin.DownwardAPI != virtv1.DeviceInfo:
		return bad(ReasonBindingMissing, "%s has downwardAPI %q; it must be %q", where, plugin.DownwardAPI, virtv1.DeviceInfo)
	case plugin.Migration == nil:
		return bad(ReasonBindingMissing, "%s has no migration; set it to {}", where)
	case !sidecarImage.MatchString(plugin.SidecarImage):
		return bad(ReasonSidecarUnrecognised, "%s has sidecarImage %s, which the admission policy compsc-hold-targets does not take for CompSC's, "+
			"so that it holds no target pods; the sidecar itself does, a step later. Name the image .../compsc", where, plugin.SidecarImage)
	}
	return Finding{OK: true, Reason: ReasonInstalled, Message: fmt.Sprintf("KubeVirt %s knows the network binding %s", observed, kubevirt.BindingName)}
}

func pluginFinding(ctx context.Context, r client.Reader, kv *virtv1.KubeVirt) (Finding, error) {
	var list nodehook.PluginList
	switch err := r.List(ctx, &list); {
	case err != nil && absent(err):
		return bad(ReasonPluginAPIMissing, "KubeVirt %s has no Plugin API%s", kv.Status.ObservedKubeVirtVersion, fallback), nil
	case err != nil:
		return Finding{}, fmt.Errorf("list Plugins: %w", err)
	}
	if dev := kv.Spec.Configuration.DeveloperConfiguration; dev == nil ||
		!slices.Contains(dev.FeatureGates, nodehook.FeatureGate) || slices.Contains(dev.DisabledFeatureGates, nodehook.FeatureGate) {
		return bad(ReasonGateOff, "KubeVirt's feature gate %s is off%s", nodehook.FeatureGate, fallback), nil
	}
	switch found, err := nodehook.CheckPlugin(&list); {
	case !found && len(list.Items) > 0:
		return bad(ReasonPluginMissing, "there are Plugins, with which virt-launcher drops VFs from the domain so that their VMs do not start, and no Plugin %s, "+
			"which prevents that; apply config/kubevirt/plugin", nodehook.PluginName), nil
	case !found:
		return bad(ReasonPluginMissing, "there is no Plugin %s; apply config/kubevirt/plugin%s", nodehook.PluginName, fallback), nil
	case err != nil:
		return bad(ReasonPluginMismatch, "Plugin %s: %v; apply config/kubevirt/plugin again", nodehook.PluginName, err), nil
	}
	return Finding{OK: true, Reason: ReasonCalled, Message: fmt.Sprintf("KubeVirt %s calls the agent's hooks", kv.Status.ObservedKubeVirtVersion)}, nil
}
