//go:build e2echart

package chart

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

const (
	managerKey = "Deployment compsc-system/compsc-manager"
	agentKey   = "DaemonSet compsc-system/compsc-agent"
	bindingKey = "Job compsc-system/compsc-binding-*"
)

// switches are what can be set, and what that does.
var switches = []struct {
	set     []string
	adds    []string
	removes []string
	// changes are objects that are not as they were, with texts that they have
	// now and, if they were there, had not.
	changes map[string][]string
}{
	{set: []string{"crds.keep=false"}, changes: map[string][]string{"CustomResourceDefinition vfmigrations.compsc.io": nil, "CustomResourceDefinition vfnodes.compsc.io": nil}},
	{set: []string{"crds.enabled=false"}, removes: []string{
		"CustomResourceDefinition vfmigrations.compsc.io", "CustomResourceDefinition vfnodes.compsc.io"}},
	{set: []string{"admission.enabled=false"}, removes: []string{
		"ValidatingAdmissionPolicy compsc-agent-writes", "ValidatingAdmissionPolicyBinding compsc-agent-writes"}},
	{set: []string{"networkPolicy.enabled=false"}, removes: []string{"NetworkPolicy compsc-system/compsc-manager"}},
	{set: []string{"networkPolicy.apiServerPorts={8443}"}, changes: map[string][]string{"NetworkPolicy compsc-system/compsc-manager": {`"port":8443`}}},
	{set: []string{"networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.who=them"}, changes: map[string][]string{"NetworkPolicy compsc-system/compsc-manager": {`"who":"them"`}}},
	{set: []string{"manager.podDisruptionBudget.enabled=false"}, removes: []string{"PodDisruptionBudget compsc-system/compsc-manager"}},
	{set: []string{"manager.podDisruptionBudget.maxUnavailable=50%"}, changes: map[string][]string{"PodDisruptionBudget compsc-system/compsc-manager": {`"50%"`}}},
	{set: []string{"metrics.podMonitor.enabled=true", "metrics.podMonitor.labels.team=net", "metrics.podMonitor.interval=7s"}, adds: []string{"PodMonitor compsc-system/compsc"},
		changes: map[string][]string{agentKey: {"--metrics-bind-address=[$(HOST_IP)]:9444"}, "PodMonitor compsc-system/compsc": {`"team":"net"`, `"interval":"7s"`}}},
	{set: []string{"metrics.dashboard.enabled=true", "metrics.dashboard.labels.team=net", "metrics.dashboard.annotations.folder=vms"}, adds: []string{"ConfigMap compsc-system/compsc-dashboard"},
		changes: map[string][]string{"ConfigMap compsc-system/compsc-dashboard": {`"grafana_dashboard":"1"`, `"team":"net"`, `"annotations":{"folder":"vms"}`}}},
	{set: []string{"metrics.prometheusRule.enabled=true", "metrics.prometheusRule.labels.team=net", "metrics.prometheusRule.runbookURL=https://r.example"}, adds: []string{"PrometheusRule compsc-system/compsc"},
		changes: map[string][]string{"PrometheusRule compsc-system/compsc": {`"team":"net"`, `"alert":"CompSCAgentMissing"`, `"runbook_url":"https://r.example/CompSCAgentMissing.md"`}}},
	{set: []string{"kubevirt.migrationPolicy.enabled=true"}, adds: []string{"MigrationPolicy compsc"}},
	{set: []string{"kubevirt.admission.enabled=true"}, adds: []string{
		"MutatingAdmissionPolicy compsc-hold-targets", "MutatingAdmissionPolicyBinding compsc-hold-targets",
		"MutatingAdmissionPolicy compsc-confine-devices", "MutatingAdmissionPolicyBinding compsc-confine-devices",
		"ValidatingAdmissionPolicy compsc-migrations", "ValidatingAdmissionPolicyBinding compsc-migrations"}},
	{set: []string{"kubevirt.binding.enabled=true"}, adds: []string{bindingKey, "ServiceAccount compsc-system/compsc-binding",
		"Role kubevirt/compsc-binding", "RoleBinding kubevirt/compsc-binding"}, changes: map[string][]string{
		bindingKey:                     {`"--kubevirt-namespace=kubevirt"`, `"--kubevirt-name=kubevirt"`, `"serviceAccountName":"compsc-binding"`, `"readOnlyRootFilesystem":true`},
		"Role kubevirt/compsc-binding": {`"rules":[{"apiGroups":["kubevirt.io"],"resourceNames":["kubevirt"],"resources":["kubevirts"],"verbs":["get","patch"]}]`}}},
	{set: []string{"kubevirt.binding.enabled=true", "kubevirt.binding.namespace=kv", "kubevirt.binding.name=main", "image.repository=r.example/compsc", "image.tag=v7", "image.pullPolicy=Always",
		"imagePullSecrets[0].name=pull", "manager.nodeSelector.a=b", "manager.tolerations[0].key=t", "logLevel=warn"}, adds: []string{bindingKey,
		"ServiceAccount compsc-system/compsc-binding", "Role kv/compsc-binding", "RoleBinding kv/compsc-binding"}, changes: map[string][]string{
		managerKey: {`"r.example/compsc:v7"`}, agentKey: {`"r.example/compsc:v7"`},
		bindingKey: {`"--kubevirt-namespace=kv"`, `"--kubevirt-name=main"`, `"--image=r.example/compsc:v7"`, `"image":"r.example/compsc:v7"`, `"imagePullPolicy":"Always"`,
			`"imagePullSecrets":[{"name":"pull"}]`, `"nodeSelector":{"a":"b"}`, `"tolerations":[{"key":"t"}]`, `"--log-level=warn"`},
		"Role kv/compsc-binding": {`"resourceNames":["main"]`}}},
	{set: []string{"kubevirt.plugin.enabled=true"}, adds: []string{"Plugin compsc",
		"MutatingAdmissionPolicy compsc-mount-domain-hook", "MutatingAdmissionPolicyBinding compsc-mount-domain-hook"}},
	{set: []string{"certificates.authority=certManager", "certificates.certManager.duration=99h", "certificates.certManager.renewBefore=9h"},
		adds:    []string{"Certificate compsc-system/compsc-ca", "Issuer compsc-system/compsc-ca"},
		changes: map[string][]string{managerKey: {"--ca-rotate=false"}, "Certificate compsc-system/compsc-ca": {`"duration":"99h"`, `"renewBefore":"9h"`, `"kind":"Issuer"`, `"name":"compsc-ca"`}}},
	{set: []string{"certificates.authority=certManager", "certificates.certManager.issuerRef.kind=ClusterIssuer", "certificates.certManager.issuerRef.name=corp"},
		adds: []string{"Certificate compsc-system/compsc-ca"}, changes: map[string][]string{managerKey: {"--ca-rotate=false"},
			"Certificate compsc-system/compsc-ca": {`"issuerRef":{"kind":"ClusterIssuer","name":"corp"}`}}},
	{set: []string{"certificates.overlap=5m"}, changes: map[string][]string{managerKey: {"--ca-overlap=5m"}}},
	{set: []string{"image.repository=r.example/c", "image.tag=v7"}, changes: map[string][]string{
		managerKey: {`"r.example/c:v7"`}, agentKey: {`"r.example/c:v7"`}}},
	{set: []string{"image.digest=sha256:" + strings.Repeat("ab", 32)}, changes: map[string][]string{
		managerKey: {"compsc@sha256:abab"}, agentKey: {"compsc@sha256:abab"}}},
	{set: []string{"image.pullPolicy=Always", "imagePullSecrets[0].name=pull"}, changes: map[string][]string{
		managerKey: {`"Always"`, `"imagePullSecrets":[{"name":"pull"}]`}, agentKey: {`"Always"`, `"imagePullSecrets":[{"name":"pull"}]`}}},
	{set: []string{"logLevel=debug"}, changes: map[string][]string{managerKey: {"--log-level=debug"}, agentKey: {"--log-level=debug"}}},
	{set: []string{"manager.replicas=3"}, changes: map[string][]string{managerKey: {`"replicas":3`}}},
	{set: []string{"manager.resources.limits.memory=1Gi", "manager.priorityClassName=high", "manager.nodeSelector.a=b", "manager.tolerations[0].key=t",
		"manager.affinity.nodeAffinity.x=y", "manager.podAnnotations.pa=1x", "manager.podLabels.pl=2x", "manager.extraArgs={--extra}"},
		changes: map[string][]string{managerKey: {`"1Gi"`, `"priorityClassName":"high"`, `"nodeSelector":{"a":"b"}`, `"key":"t"`, `"x":"y"`, `"pa":"1x"`, `"pl":"2x"`, `"--extra"`}}},
	{set: []string{"agent.resources.limits.memory=1Gi", "agent.priorityClassName=high", "agent.nodeSelector.a=b", "agent.tolerations[0].key=t",
		"agent.affinity.nodeAffinity.x=y", "agent.podAnnotations.pa=1x", "agent.podLabels.pl=2x", "agent.extraArgs={--extra}"},
		changes: map[string][]string{agentKey: {`"1Gi"`, `"priorityClassName":"high"`, `"a":"b"`, `"key":"t"`, `"x":"y"`, `"pa":"1x"`, `"pl":"2x"`, `"--extra"`}}},
	{set: []string{`agent.modelPFs={name=pf0\,vfs=2}`}, changes: map[string][]string{agentKey: {`"--model-pf=name=pf0,vfs=2"`, `"mountPath":"/dev/net/tun"`, `"path":"/dev/net/tun"`}}},
	{set: []string{"agent.peerPort=1", "agent.metricsPort=2", "agent.healthPort=3", "agent.podsDir=/k/pods", "agent.drainTimeout=1h",
		"agent.terminationGracePeriodSeconds=4000", "agent.updateStrategy.rollingUpdate.maxUnavailable=9"},
		changes: map[string][]string{agentKey: {"--peer-listen=:1", "--peer-advertise=[$(HOST_IP)]:1", "127.0.0.1:2", "127.0.0.1:3", `"port":3`, "--pods-dir=/k/pods", `"mountPath":"/k/pods"`,
			`"path":"/k/pods"`, "--drain-timeout=1h", `"terminationGracePeriodSeconds":4000`, `"maxUnavailable":9`}}},
}

// hash is a part of names that says what an object holds.
var hash = regexp.MustCompile(`-[0-9a-f]{10}$`)

// switched are the chart's objects, those that are named after what they hold
// under the same key always.
func switched(t *testing.T, all []*unstructured.Unstructured) map[string]*unstructured.Unstructured {
	t.Helper()
	m := byKey(t, all)
	for k, u := range m {
		if u.GetKind() == "Job" {
			delete(m, k)
			m[hash.ReplaceAllString(k, "-*")] = u
		}
	}
	return m
}

// TestSwitches: each value does what it says, and nothing else.
func TestSwitches(t *testing.T) {
	s := set(t)
	base := switched(t, render(t, s, "compsc-system"))
	for _, test := range switches {
		t.Run(strings.Join(test.set, ","), func(t *testing.T) {
			got := switched(t, render(t, s, "compsc-system", values(test.set...)...))
			want := slices.Collect(maps.Keys(base))
			want = slices.DeleteFunc(want, func(k string) bool { return slices.Contains(test.removes, k) })
			want = append(want, test.adds...)
			slices.Sort(want)
			if diff := cmp.Diff(want, slices.Sorted(maps.Keys(got))); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
			for k := range test.changes {
				if got[k] == nil {
					t.Errorf("there is no %s to have changed", k)
				}
			}
			for k, u := range got {
				was, is := "", text(t, u)
				if base[k] != nil {
					was = text(t, base[k])
				}
				if _, changes := test.changes[k]; was != "" && changes != (was != is) {
					t.Errorf("%s changes: %v, want %v:\n%s", k, was != is, changes, cmp.Diff(base[k], u))
				}
				for _, c := range test.changes[k] {
					if strings.Contains(was, c) || !strings.Contains(is, c) {
						t.Errorf("%s: %q was there: %v, is there: %v", k, c, strings.Contains(was, c), strings.Contains(is, c))
					}
				}
			}
		})
	}
}

func text(t *testing.T, u *unstructured.Unstructured) string {
	t.Helper()
	b, err := json.Marshal(u.Object)
	check(t, err)
	return string(b)
}

// TestSwitchesAreComplete: there is no value that no test sets.
func TestSwitchesAreComplete(t *testing.T) {
	chart := set(t).Chart
	var all, schema map[string]any
	b, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	check(t, err)
	check(t, yaml.Unmarshal(b, &all))
	b, err = os.ReadFile(filepath.Join(chart, "values.schema.json"))
	check(t, err)
	check(t, json.Unmarshal(b, &schema))
	tested := map[string]bool{}
	for _, test := range switches {
		for _, s := range test.set {
			name, _, _ := strings.Cut(s, "=")
			name, _, _ = strings.Cut(name, "[")
			tested[name] = true
		}
	}
	leaves := leaves("", all, schema, schema["definitions"].(map[string]any))
	if len(leaves) < 40 {
		t.Fatalf("these are all values: %q", leaves)
	}
	for _, leaf := range leaves {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(tested)), func(name string) bool {
			return name == leaf || strings.HasPrefix(name, leaf+".")
		}) {
			t.Errorf("no test sets %s", leaf)
		}
	}
}

// leaves are the names of the values that have no names of the chart's below
// them, such as a map of anything.
func leaves(path string, values, schema, definitions map[string]any) (out []string) {
	for name, v := range values {
		below, _ := schema["properties"].(map[string]any)[name].(map[string]any)
		if ref, ok := below["$ref"].(string); ok {
			below = definitions[strings.TrimPrefix(ref, "#/definitions/")].(map[string]any)
		}
		full := strings.TrimPrefix(path+"."+name, ".")
		sub, isMap := v.(map[string]any)
		if _, named := below["properties"]; isMap && named {
			out = append(out, leaves(full, sub, below, definitions)...)
		} else {
			out = append(out, full)
		}
	}
	slices.Sort(out)
	return out
}
