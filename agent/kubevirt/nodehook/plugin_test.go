package nodehook

import (
	"os"
	"path/filepath"
	"testing"

	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"
	"sigs.k8s.io/yaml"
)

// TestPluginManifest: our Plugin object is as the agent wants it, and KubeVirt
// admits it: KubeVirt 1.9 compiles the spec's own condition, which it does not
// apply to node hooks, in the language of domain hooks.
func TestPluginManifest(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "config", "kubevirt", "plugin", "plugin.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	p := pluginv1alpha1.Plugin{}
	if err := yaml.UnmarshalStrict(b, &p); err != nil {
		t.Fatal(err)
	}
	if found, err := CheckPlugin(&PluginList{Items: []pluginv1alpha1.Plugin{p}}); !found || err != nil {
		t.Errorf("the agent finds it: %v, and wrong with it: %v", found, err)
	}
	if p.Spec.Condition != "" {
		t.Errorf("the spec has the condition %s", p.Spec.Condition)
	}
}
