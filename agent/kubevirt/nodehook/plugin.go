package nodehook

import (
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/runtime"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"

	"compsc.io/compsc/agent/kubevirt"
)

const (
	// PluginName is the name of CompSC's Plugin object.
	PluginName = "compsc"
	// FeatureGate is KubeVirt's feature gate for Plugin objects (alpha since 1.9).
	FeatureGate = "Plugins"
)

// PluginList is what Plugin objects are listed as.
type PluginList = pluginv1alpha1.PluginList

// AddToScheme registers the Plugin API.
func AddToScheme(s *runtime.Scheme) error { return pluginv1alpha1.AddToScheme(s) }

// gated are the points that must hold KubeVirt.
var gated = map[Point]bool{PreVMStart: true, PreMigrationTarget: true, PreMigrationSource: true}

// CheckPlugin tells whether CompSC's Plugin object is among those of the
// cluster, and what is wrong with it.
func CheckPlugin(l *PluginList) (found bool, err error) {
	i := slices.IndexFunc(l.Items, func(p pluginv1alpha1.Plugin) bool { return p.Name == PluginName })
	if i < 0 {
		return false, nil
	}
	return true, check(&l.Items[i])
}

// DomainHook is where virt-launcher finds the domain hook of CompSC's sidecar.
const DomainHook = kubevirt.PluginDir + "/" + kubevirt.PluginSocket

// check tells what is wrong with a Plugin object. KubeVirt reads a node hook's own
// condition and failureStrategy only, not those of the spec.
func check(p *pluginv1alpha1.Plugin) error {
	// Where there are Plugin objects, virt-launcher drops what the sidecar did to
	// the domain (see package hook beside this one): a VM would start without its VFs.
	i := slices.IndexFunc(p.Spec.DomainHooks, func(h pluginv1alpha1.DomainHook) bool { return h.Sidecar != nil && h.Sidecar.SocketPath == DomainHook })
	switch {
	case i < 0:
		return fmt.Errorf("no domain hook calls %s", DomainHook)
	case p.Spec.DomainHooks[i].Condition == "":
		return fmt.Errorf("domain hook %d has no condition, so that it holds every VM of the cluster", i)
	case p.Spec.DomainHooks[i].FailureStrategy != pluginv1alpha1.FailureStrategyFail:
		return fmt.Errorf("domain hook %d has failureStrategy %q, it must be %s", i, p.Spec.DomainHooks[i].FailureStrategy, pluginv1alpha1.FailureStrategyFail)
	}
	served := map[Point]bool{}
	for i, h := range p.Spec.NodeHooks {
		switch {
		case h.Socket != Socket:
			return fmt.Errorf("node hook %d has socket %s, the agent serves %s", i, h.Socket, Socket)
		case h.Condition == "":
			return fmt.Errorf("node hook %d has no condition, so that it holds every VM of the cluster", i)
		}
		for _, point := range h.PermittedHooks {
			if gated[point] && h.FailureStrategy != pluginv1alpha1.FailureStrategyFail {
				return fmt.Errorf("node hook %d at %s has failureStrategy %q, it must be %s", i, point, h.FailureStrategy, pluginv1alpha1.FailureStrategyFail)
			}
			served[point] = true
		}
	}
	for point := range gated {
		if !served[point] {
			return fmt.Errorf("no node hook permits %s", point)
		}
	}
	return nil
}
