package agent

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"compsc.io/compsc/agent/kubevirt/launcher"
	"compsc.io/compsc/agent/kubevirt/nodehook"
)

// counting counts how often the API server is asked.
type counting struct {
	client.Reader
	n int
}

func (c *counting) List(ctx context.Context, l client.ObjectList, opts ...client.ListOption) error {
	c.n++
	return c.Reader.List(ctx, l, opts...)
}

// TestFindings tells in the VFNode what is missing of KubeVirt.
func TestFindings(t *testing.T) {
	kv := &virtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: "kubevirt", Name: "kubevirt"}}
	kv.Status.ObservedKubeVirtVersion = "v1.9.0"
	kv.Spec.Configuration.DeveloperConfiguration = &virtv1.DeveloperConfiguration{FeatureGates: []string{"Plugins"}}
	plugin := &pluginv1alpha1.Plugin{ObjectMeta: metav1.ObjectMeta{Name: nodehook.PluginName}, Spec: pluginv1alpha1.PluginSpec{
		DomainHooks: []pluginv1alpha1.DomainHook{{Sidecar: &pluginv1alpha1.SidecarDomainHook{SocketPath: nodehook.DomainHook},
			Condition: "true", FailureStrategy: pluginv1alpha1.FailureStrategyFail}},
		NodeHooks: []pluginv1alpha1.NodeHook{{Socket: nodehook.Socket, Condition: "true", FailureStrategy: pluginv1alpha1.FailureStrategyFail,
			PermittedHooks: nodehook.Points}}}}
	for name, tc := range map[string]struct {
		objs   []client.Object
		away   bool
		hooked bool
		want   []string
	}{
		"no KubeVirt": {nil, false, true, []string{"KubeVirt False KubeVirtNotFound", "NodeHooks False KubeVirtNotFound", "QEMU Unknown NotSeen"}},
		"hooks": {[]client.Object{kv, plugin}, false, true,
			[]string{"KubeVirt False BindingNotRegistered", "NodeHooks True HooksCalled", "QEMU Unknown NotSeen"}},
		"hooks not served": {[]client.Object{kv, plugin}, false, false,
			[]string{"KubeVirt False BindingNotRegistered", "NodeHooks False NotServed", "QEMU Unknown NotSeen"}},
		"no Plugin, not served": {[]client.Object{kv}, false, false,
			[]string{"KubeVirt False BindingNotRegistered", "NodeHooks False PluginMissing", "QEMU Unknown NotSeen"}},
		"API server away": {nil, true, true, []string{"KubeVirt Unknown Unreadable", "NodeHooks Unknown Unreadable", "QEMU Unknown NotSeen"}},
	} {
		t.Run(name, func(t *testing.T) {
			scheme, err := newScheme()
			if err != nil {
				t.Fatal(err)
			}
			r := &counting{Reader: fake.NewClientBuilder().WithScheme(scheme).WithObjects(tc.objs...).Build()}
			if tc.away {
				r.Reader = noReader{}
			}
			a := &agent{live: r, log: slog.New(slog.DiscardHandler), limits: limits{call: time.Second}, hooked: tc.hooked,
				found: found{qemus: launcher.New(t.TempDir())}}
			var got []string
			for _, c := range a.findings(t.Context()) {
				got = append(got, c.Type+" "+string(c.Status)+" "+c.Reason)
				if c.Message == "" {
					t.Errorf("%s has no message", c.Type)
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			asked := r.n
			a.findings(t.Context())
			if r.n != asked {
				t.Error("the API server is asked again at once")
			}
			a.found.at = a.found.at.Add(-findingsAge)
			if a.findings(t.Context()); r.n == asked {
				t.Error("the API server is never asked again")
			}
		})
	}
}
