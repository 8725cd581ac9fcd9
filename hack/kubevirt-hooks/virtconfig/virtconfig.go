// Package virtconfig stands in for kubevirt.io/kubevirt/pkg/virt-config: the
// configuration of a cluster with the feature gate Plugins.
package virtconfig

// ClusterConfig is a cluster's configuration.
type ClusterConfig struct{}

// PluginsEnabled tells that the feature gate Plugins is on.
func (*ClusterConfig) PluginsEnabled() bool { return true }
