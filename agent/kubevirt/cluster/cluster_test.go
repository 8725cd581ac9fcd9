package cluster

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	virtv1 "kubevirt.io/api/core/v1"
	migrationsv1alpha1 "kubevirt.io/api/migrations/v1alpha1"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"compsc.io/compsc/agent/kubevirt/nodehook"
)

func newKubeVirt() *virtv1.KubeVirt {
	kv := &virtv1.KubeVirt{ObjectMeta: metav1.ObjectMeta{Namespace: "kubevirt", Name: "kubevirt"}}
	kv.Status.ObservedKubeVirtVersion = "v1.9.0"
	kv.Spec.Configuration.DeveloperConfiguration = &virtv1.DeveloperConfiguration{FeatureGates: []string{"HostDisk", nodehook.FeatureGate}}
	kv.Spec.Configuration.NetworkConfiguration = &virtv1.NetworkConfiguration{Binding: map[string]virtv1.InterfaceBindingPlugin{
		"compsc": {SidecarImage: "compsc", DownwardAPI: virtv1.DeviceInfo, Migration: &virtv1.InterfaceBindingMigration{}},
	}}
	return kv
}

func newPlugin() *pluginv1alpha1.Plugin {
	return &pluginv1alpha1.Plugin{ObjectMeta: metav1.ObjectMeta{Name: nodehook.PluginName}, Spec: pluginv1alpha1.PluginSpec{
		DomainHooks: []pluginv1alpha1.DomainHook{{Sidecar: &pluginv1alpha1.SidecarDomainHook{SocketPath: nodehook.DomainHook},
			Condition: "true", FailureStrategy: pluginv1alpha1.FailureStrategyFail}},
		NodeHooks: []pluginv1alpha1.NodeHook{
			{Socket: nodehook.Socket, Condition: "true", FailureStrategy: pluginv1alpha1.FailureStrategyFail,
				PermittedHooks: []nodehook.Point{nodehook.PreVMStart, nodehook.PreMigrationTarget, nodehook.PreMigrationSource}},
			{Socket: nodehook.Socket, Condition: "true", FailureStrategy: pluginv1alpha1.FailureStrategyIgnore,
				PermittedHooks: []nodehook.Point{nodehook.PostMigrationTarget}},
		},
	}}
}

func reader(t *testing.T, funcs interceptor.Funcs, objs ...client.Object) client.Reader {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	return fake.NewClientBuilder().WithScheme(scheme).WithObjects(objs...).WithInterceptorFuncs(funcs).Build()
}

// without is an API server that does not have a list's kind.
func without[T client.ObjectList]() interceptor.Funcs {
	return interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
		if _, ok := l.(T); ok {
			return &meta.NoKindMatchError{GroupKind: schema.GroupKind{Kind: "X"}}
		}
		return c.List(ctx, l, opts...)
	}}
}

func TestDetect(t *testing.T) {
	for name, tc := range map[string]struct {
		kubevirt         func(*virtv1.KubeVirt)
		plugin           func(*pluginv1alpha1.Plugin)
		funcs            interceptor.Funcs
		none, noPlugin   bool
		installed, hooks string
		text             string
	}{
		"1.9 with everything": {installed: ReasonInstalled, hooks: ReasonCalled},
		"no KubeVirt":         {none: true, installed: ReasonNotFound, hooks: ReasonNotFound},
		"no KubeVirt API":     {funcs: without[*virtv1.KubeVirtList](), installed: ReasonNotFound, hooks: ReasonNotFound},
		"1.8": {kubevirt: func(kv *virtv1.KubeVirt) { kv.Status.ObservedKubeVirtVersion = "v1.8.4" },
			funcs: without[*pluginv1alpha1.PluginList](), installed: ReasonInstalled, hooks: ReasonPluginAPIMissing, text: "target pod's readiness"},
		"1.7": {kubevirt: func(kv *virtv1.KubeVirt) { kv.Status.ObservedKubeVirtVersion = "v1.7.2" },
			funcs: without[*pluginv1alpha1.PluginList](), installed: ReasonTooOld, hooks: ReasonPluginAPIMissing},
		"a build without number": {kubevirt: func(kv *virtv1.KubeVirt) { kv.Status.ObservedKubeVirtVersion = "devel" },
			installed: ReasonInstalled, hooks: ReasonCalled},
		"no network configuration": {kubevirt: func(kv *virtv1.KubeVirt) { kv.Spec.Configuration.NetworkConfiguration = nil },
			installed: ReasonBindingMissing, hooks: ReasonCalled, text: "is missing"},
		"no image": {kubevirt: binding(func(b *virtv1.InterfaceBindingPlugin) { b.SidecarImage = "" }),
			installed: ReasonBindingMissing, hooks: ReasonCalled, text: "no sidecarImage"},
		"a mirrored image": {kubevirt: binding(func(b *virtv1.InterfaceBindingPlugin) { b.SidecarImage = "r.example:5000/mirror/compsc:v1@sha256:00" }),
			installed: ReasonInstalled, hooks: ReasonCalled},
		"a renamed image": {kubevirt: binding(func(b *virtv1.InterfaceBindingPlugin) { b.SidecarImage = "r.example/mirror/compsc-io:v1" }),
			installed: ReasonSidecarUnrecognised, hooks: ReasonCalled, text: "sidecarImage r.example/mirror/compsc-io:v1"},
		"no device-info": {kubevirt: binding(func(b *virtv1.InterfaceBindingPlugin) { b.DownwardAPI = "" }),
			installed: ReasonBindingMissing, hooks: ReasonCalled, text: `must be "device-info"`},
		"no migration": {kubevirt: binding(func(b *virtv1.InterfaceBindingPlugin) { b.Migration = nil }),
			installed: ReasonBindingMissing, hooks: ReasonCalled, text: "no migration"},
		"gate off": {kubevirt: func(kv *virtv1.KubeVirt) { kv.Spec.Configuration.DeveloperConfiguration.FeatureGates = nil },
			installed: ReasonInstalled, hooks: ReasonGateOff, text: "target pod's readiness"},
		"no developer configuration": {kubevirt: func(kv *virtv1.KubeVirt) { kv.Spec.Configuration.DeveloperConfiguration = nil },
			installed: ReasonInstalled, hooks: ReasonGateOff},
		"gate disabled": {kubevirt: func(kv *virtv1.KubeVirt) {
			kv.Spec.Configuration.DeveloperConfiguration.DisabledFeatureGates = []string{nodehook.FeatureGate}
		}, installed: ReasonInstalled, hooks: ReasonGateOff},
		"no Plugin": {noPlugin: true, installed: ReasonInstalled, hooks: ReasonPluginMissing},
		"only another's Plugin": {plugin: func(p *pluginv1alpha1.Plugin) { p.Name = "other" },
			installed: ReasonInstalled, hooks: ReasonPluginMissing, text: "their VMs do not start"},
		"no domain hook": {plugin: func(p *pluginv1alpha1.Plugin) { p.Spec.DomainHooks = nil },
			installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "no domain hook calls " + nodehook.DomainHook},
		"a domain hook for all": {plugin: func(p *pluginv1alpha1.Plugin) { p.Spec.DomainHooks[0].Condition = "" },
			installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "domain hook 0 has no condition"},
		"a domain hook that may fail": {plugin: func(p *pluginv1alpha1.Plugin) { p.Spec.DomainHooks[0].FailureStrategy = "Ignore" },
			installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "domain hook 0 has failureStrategy"},
		"another socket": {plugin: func(p *pluginv1alpha1.Plugin) { p.Spec.NodeHooks[0].Socket = "/x" },
			installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "socket /x"},
		"a hook without condition": {plugin: func(p *pluginv1alpha1.Plugin) { p.Spec.NodeHooks[1].Condition = "" },
			installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "node hook 1 has no condition"},
		"a gate that does not hold": {plugin: func(p *pluginv1alpha1.Plugin) { p.Spec.NodeHooks[0].FailureStrategy = "" },
			installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "it must be Fail"},
		"a gate missing": {plugin: func(p *pluginv1alpha1.Plugin) {
			p.Spec.NodeHooks[0].PermittedHooks = []nodehook.Point{nodehook.PreVMStart, nodehook.PreMigrationTarget}
		}, installed: ReasonInstalled, hooks: ReasonPluginMismatch, text: "no node hook permits PreMigrationSource"},
	} {
		t.Run(name, func(t *testing.T) {
			kv, p := newKubeVirt(), newPlugin()
			if tc.kubevirt != nil {
				tc.kubevirt(kv)
			}
			if tc.plugin != nil {
				tc.plugin(p)
			}
			var objs []client.Object
			if !tc.none {
				objs = append(objs, kv)
			}
			if !tc.noPlugin {
				objs = append(objs, p)
			}
			installed, hooks, err := Detect(t.Context(), reader(t, tc.funcs, objs...))
			if err != nil {
				t.Fatal(err)
			}
			if installed.Reason != tc.installed || installed.OK != (tc.installed == ReasonInstalled) ||
				hooks.Reason != tc.hooks || hooks.OK != (tc.hooks == ReasonCalled) {
				t.Errorf("installed %+v, hooks %+v", installed, hooks)
			}
			if !strings.Contains(installed.Message+hooks.Message, tc.text) {
				t.Errorf("messages %q, %q, want %q in one", installed.Message, hooks.Message, tc.text)
			}
		})
	}
}

// TestSidecarImage: the policy and this package know the sidecar by the same name.
func TestSidecarImage(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "..", "config", "kubevirt", "hold_targets.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if want := `image.matches("` + sidecarImage.String() + `")`; !strings.Contains(string(b), want) {
		t.Errorf("config/kubevirt/hold_targets.yaml does not say %s", want)
	}
}

func binding(change func(*virtv1.InterfaceBindingPlugin)) func(*virtv1.KubeVirt) {
	return func(kv *virtv1.KubeVirt) {
		b := kv.Spec.Configuration.NetworkConfiguration.Binding["compsc"]
		change(&b)
		kv.Spec.Configuration.NetworkConfiguration.Binding["compsc"] = b
	}
}

func TestUnreadable(t *testing.T) {
	away := errors.New("away")
	for kind, fails := range map[string]func(client.ObjectList) bool{
		"KubeVirts":         func(l client.ObjectList) bool { _, is := l.(*virtv1.KubeVirtList); return is },
		"Plugins":           func(l client.ObjectList) bool { _, is := l.(*pluginv1alpha1.PluginList); return is },
		"MigrationPolicies": func(l client.ObjectList) bool { _, is := l.(*migrationsv1alpha1.MigrationPolicyList); return is },
	} {
		r := reader(t, interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
			if fails(l) {
				return away
			}
			return c.List(ctx, l, opts...)
		}}, newKubeVirt(), newPlugin())
		_, _, derr := Detect(t.Context(), r)
		_, _, perr := PostCopy(t.Context(), r, &virtv1.VirtualMachineInstance{})
		if errors.Is(derr, away) != (kind != "MigrationPolicies") || errors.Is(perr, away) != (kind != "Plugins") {
			t.Errorf("%s: %v, %v", kind, derr, perr)
		}
	}
}

func policy(name string, allow *bool, ns, vmi map[string]string) *migrationsv1alpha1.MigrationPolicy {
	return &migrationsv1alpha1.MigrationPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: migrationsv1alpha1.MigrationPolicySpec{
		AllowPostCopy: allow, Selectors: &migrationsv1alpha1.Selectors{NamespaceSelector: ns, VirtualMachineInstanceSelector: vmi},
	}}
}

func TestPostCopy(t *testing.T) {
	yes, no := new(true), new(false)
	ours := policy("compsc", no, nil, map[string]string{"compsc.io/vf": "true"})
	for name, tc := range map[string]struct {
		cluster  *bool
		policies []client.Object
		funcs    interceptor.Funcs
		unlabel  bool
		allowed  bool
		by       string
	}{
		"default":              {},
		"cluster allows":       {cluster: yes, allowed: true, by: "KubeVirt kubevirt/kubevirt (spec.configuration.migrations)"},
		"cluster forbids":      {cluster: no, by: "KubeVirt kubevirt/kubevirt (spec.configuration.migrations)"},
		"ours forbids":         {cluster: yes, policies: []client.Object{ours}, by: "MigrationPolicy compsc"},
		"a policy allows":      {policies: []client.Object{policy("p", yes, nil, map[string]string{"app": "db"})}, allowed: true, by: "MigrationPolicy p"},
		"one of others allows": {policies: []client.Object{policy("p", yes, nil, map[string]string{"app": "web"})}},
		"the closer one wins": {policies: []client.Object{ours, policy("p", yes, map[string]string{"team": "t"}, map[string]string{"app": "db"})},
			allowed: true, by: "MigrationPolicy p"},
		"the VM's labels win": {policies: []client.Object{ours, policy("a", yes, map[string]string{"team": "t"}, nil)}, by: "MigrationPolicy compsc"},
		"the first name wins": {policies: []client.Object{ours, policy("a", yes, nil, map[string]string{"app": "db"})}, allowed: true, by: "MigrationPolicy a"},
		"a later name loses":  {policies: []client.Object{ours, policy("d", yes, nil, map[string]string{"app": "db"})}, by: "MigrationPolicy compsc"},
		"says nothing of it":  {cluster: yes, policies: []client.Object{policy("a", nil, nil, map[string]string{"app": "db"})}, allowed: true, by: "KubeVirt kubevirt/kubevirt (spec.configuration.migrations)"},
		"no selectors":        {policies: []client.Object{&migrationsv1alpha1.MigrationPolicy{ObjectMeta: metav1.ObjectMeta{Name: "a"}, Spec: migrationsv1alpha1.MigrationPolicySpec{AllowPostCopy: yes}}}},
		"a VM without labels": {unlabel: true, policies: []client.Object{policy("a", yes, nil, map[string]string{"app": "web"})}, allowed: true, by: "MigrationPolicy a"},
		"no such API":         {cluster: yes, policies: []client.Object{ours}, funcs: without[*migrationsv1alpha1.MigrationPolicyList](), allowed: true, by: "KubeVirt kubevirt/kubevirt (spec.configuration.migrations)"},
	} {
		t.Run(name, func(t *testing.T) {
			kv := newKubeVirt()
			if tc.cluster != nil {
				kv.Spec.Configuration.MigrationConfiguration = &virtv1.MigrationConfiguration{AllowPostCopy: tc.cluster}
			}
			vmi := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "vm",
				Labels: map[string]string{"compsc.io/vf": "true", "app": "db"}}}
			if tc.unlabel {
				vmi.Labels = nil
			}
			objs := append([]client.Object{kv, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns", Labels: map[string]string{"team": "t"}}}}, tc.policies...)
			allowed, by, err := PostCopy(t.Context(), reader(t, tc.funcs, objs...), vmi)
			if err != nil || allowed != tc.allowed || by != tc.by {
				t.Errorf("%v by %q, %v; want %v by %q", allowed, by, err, tc.allowed, tc.by)
			}
		})
	}
}
