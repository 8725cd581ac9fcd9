//go:build e2echart

package chart

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/e2e/helm"
)

// TestLint: Helm finds nothing to say about the chart.
func TestLint(t *testing.T) {
	s := set(t)
	out, err := runHelm(t, s, "lint", "--strict", s.Chart)
	if err != nil || strings.Contains(out, "[WARNING]") || strings.Contains(out, "[ERROR]") {
		t.Errorf("%v\n%s", err, out)
	}
}

// TestChartIsTheKustomization: both ways of installing give the same objects.
func TestChartIsTheKustomization(t *testing.T) {
	s := set(t)
	for _, test := range []struct {
		dir    string
		values []string
	}{
		{"default", nil},
		{"kubevirt", values("kubevirt.migrationPolicy.enabled=true", "kubevirt.admission.enabled=true")},
		// Kubernetes has MutatingAdmissionPolicies since 1.36.
		{"kubevirt-1.32", append(values("kubevirt.migrationPolicy.enabled=true", "kubevirt.admission.enabled=true"), "--kube-version", "1.34.0")},
		{"kubevirt/plugin", values("kubevirt.plugin.enabled=true")},
	} {
		t.Run(test.dir, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), filepath.Join(s.ControlPlane, "kubectl"), "kustomize", filepath.Join(s.Config, test.dir)).Output()
			check(t, err)
			want := byKey(t, objects(t, string(out)))
			chart := byKey(t, render(t, s, "compsc-system", test.values...))
			base := byKey(t, render(t, s, "compsc-system"))
			got := map[string]*unstructured.Unstructured{}
			for k, u := range chart {
				if test.dir == "default" || base[k] == nil {
					got[k] = u
				}
			}
			// Helm makes the namespace itself, and its users label it.
			delete(want, "Namespace compsc-system")
			for _, m := range []map[string]*unstructured.Unstructured{want, got} {
				for _, u := range m {
					plain(u)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("config/%s (-) and the chart (+) differ:\n%s", test.dir, diff)
			}
		})
	}
}

// plain takes off what only Helm or only kustomize has: labels that are not in
// selectors, Helm's annotation, and the empty lines that kustomize adds to folded
// texts, which are CEL and mean the same without.
func plain(u *unstructured.Unstructured) {
	u.Object = unfold(u.Object).(map[string]any)
	u.SetLabels(nil)
	a := u.GetAnnotations()
	delete(a, "helm.sh/resource-policy")
	if len(a) == 0 {
		a = nil
	}
	u.SetAnnotations(a)
}

func unfold(v any) any {
	switch v := v.(type) {
	case string:
		return strings.ReplaceAll(v, "\n\n", "\n")
	case []any:
		for i := range v {
			v[i] = unfold(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = unfold(v[k])
		}
	}
	return v
}

// TestSwitches: each value does what it says, and nothing else.
func TestSwitches(t *testing.T) {
	s := set(t)
	base := byKey(t, render(t, s, "compsc-system"))
	for _, test := range []struct {
		set     []string
		adds    []string
		removes []string
		// changes are objects, with texts that they have now and had not.
		changes map[string][]string
	}{
		{set: []string{"crds.enabled=false"}, removes: []string{
			"CustomResourceDefinition vfmigrations.compsc.io", "CustomResourceDefinition vfnodes.compsc.io"}},
		{set: []string{"admission.enabled=false"}, removes: []string{
			"ValidatingAdmissionPolicy compsc-agent-writes", "ValidatingAdmissionPolicyBinding compsc-agent-writes"}},
		{set: []string{"networkPolicy.enabled=false"}, removes: []string{"NetworkPolicy compsc-system/compsc-manager"}},
		{set: []string{"networkPolicy.apiServerPorts={8443}"}, changes: map[string][]string{"NetworkPolicy compsc-system/compsc-manager": {`"port":8443`}}},
		{set: []string{"networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.who=them"}, changes: map[string][]string{"NetworkPolicy compsc-system/compsc-manager": {`"who":"them"`}}},
		{set: []string{"manager.podDisruptionBudget.enabled=false"}, removes: []string{"PodDisruptionBudget compsc-system/compsc-manager"}},
		{set: []string{"manager.podDisruptionBudget.minAvailable=50%"}, changes: map[string][]string{"PodDisruptionBudget compsc-system/compsc-manager": {`"50%"`}}},
		{set: []string{"metrics.podMonitor.enabled=true", "metrics.podMonitor.labels.team=net"}, adds: []string{"PodMonitor compsc-system/compsc"},
			changes: map[string][]string{agentKey: {"--metrics-bind-address=$(HOST_IP):9444"}}},
		{set: []string{"metrics.dashboard.enabled=true"}, adds: []string{"ConfigMap compsc-system/compsc-dashboard"}},
		{set: []string{"metrics.prometheusRule.enabled=true"}, adds: []string{"PrometheusRule compsc-system/compsc"}},
		{set: []string{"kubevirt.migrationPolicy.enabled=true"}, adds: []string{"MigrationPolicy compsc"}},
		{set: []string{"kubevirt.admission.enabled=true"}, adds: []string{
			"MutatingAdmissionPolicy compsc-hold-targets", "MutatingAdmissionPolicyBinding compsc-hold-targets",
			"ValidatingAdmissionPolicy compsc-migrations", "ValidatingAdmissionPolicyBinding compsc-migrations"}},
		{set: []string{"kubevirt.plugin.enabled=true"}, adds: []string{"Plugin compsc"}},
		{set: []string{"certificates.authority=certManager"}, adds: []string{"Certificate compsc-system/compsc-ca", "Issuer compsc-system/compsc-ca"},
			changes: map[string][]string{managerKey: {"--ca-rotate=false"}}},
		{set: []string{"certificates.authority=certManager", "certificates.certManager.issuerRef.kind=ClusterIssuer", "certificates.certManager.issuerRef.name=corp"},
			adds: []string{"Certificate compsc-system/compsc-ca"}, changes: map[string][]string{managerKey: {"--ca-rotate=false"}}},
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
		{set: []string{"agent.peerPort=1", "agent.metricsPort=2", "agent.healthPort=3", "agent.podsDir=/k/pods", "agent.drainTimeout=1h",
			"agent.terminationGracePeriodSeconds=4000", "agent.updateStrategy.rollingUpdate.maxUnavailable=9"},
			changes: map[string][]string{agentKey: {"--peer-listen=:1", "$(HOST_IP):1", "127.0.0.1:2", "127.0.0.1:3", `"port":3`, "--pods-dir=/k/pods", `"mountPath":"/k/pods"`,
				`"path":"/k/pods"`, "--drain-timeout=1h", `"terminationGracePeriodSeconds":4000`, `"maxUnavailable":9`}}},
	} {
		t.Run(strings.Join(test.set, ","), func(t *testing.T) {
			got := byKey(t, render(t, s, "compsc-system", values(test.set...)...))
			want := slices.Collect(maps.Keys(base))
			want = slices.DeleteFunc(want, func(k string) bool { return slices.Contains(test.removes, k) })
			want = append(want, test.adds...)
			slices.Sort(want)
			if diff := cmp.Diff(want, slices.Sorted(maps.Keys(got))); diff != "" {
				t.Errorf("objects (-want +got):\n%s", diff)
			}
			for k, u := range got {
				if base[k] == nil {
					continue
				}
				was, is := text(t, base[k]), text(t, u)
				if test.changes[k] == nil && was != is {
					t.Errorf("%s is not to change:\n%s", k, cmp.Diff(base[k], u))
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

const (
	managerKey = "Deployment compsc-system/compsc-manager"
	agentKey   = "DaemonSet compsc-system/compsc-agent"
)

func text(t *testing.T, u *unstructured.Unstructured) string {
	t.Helper()
	b, err := json.Marshal(u.Object)
	check(t, err)
	return string(b)
}

// TestCRDsAreKept: uninstalling leaves the CRDs unless that is not wanted.
func TestCRDsAreKept(t *testing.T) {
	s := set(t)
	for keep, want := range map[string]string{"true": "keep", "false": ""} {
		n := 0
		for _, u := range render(t, s, "compsc-system", values("crds.keep="+keep)...) {
			if u.GetKind() != "CustomResourceDefinition" {
				continue
			}
			n++
			if got := u.GetAnnotations()["helm.sh/resource-policy"]; got != want {
				t.Errorf("crds.keep=%s: %s has the policy %q, want %q", keep, u.GetName(), got, want)
			}
			if u.GetAnnotations()["controller-gen.kubebuilder.io/version"] == "" {
				t.Errorf("%s lost its own annotation", u.GetName())
			}
		}
		if n != 2 {
			t.Errorf("%d CRDs, want 2", n)
		}
	}
}

// TestNamespace: nothing is left of the namespace that config/ installs into.
func TestNamespace(t *testing.T) {
	s := set(t)
	for _, u := range render(t, s, "elsewhere", values("kubevirt.migrationPolicy.enabled=true", "kubevirt.admission.enabled=true", "kubevirt.plugin.enabled=true",
		"metrics.podMonitor.enabled=true", "certificates.authority=certManager")...) {
		if strings.Contains(text(t, u), "compsc-system") && u.GetKind() != "CustomResourceDefinition" {
			t.Errorf("%s names compsc-system", keyOf(u))
		}
		if u.GetLabels()["app.kubernetes.io/managed-by"] != "Helm" || u.GetLabels()["helm.sh/chart"] == "" {
			t.Errorf("%s has the labels %v", keyOf(u), u.GetLabels())
		}
	}
}

// TestSchema: values that mean nothing are refused.
func TestSchema(t *testing.T) {
	s := set(t)
	for _, v := range []string{"replicas=3", "manager.replicas=0", "manager.replica=2", "agent.peerPort=70000", "agent.drainTimeout=soon", "logLevel=loud",
		"certificates.authority=none", "image.digest=latest", "agent.podsDir=relative", "kubevirt.plugin=true", "networkPolicy.apiServerPorts={}"} {
		if _, err := runHelm(t, s, append([]string{"template", helm.Release, s.Chart}, values(v)...)...); err == nil {
			t.Errorf("%s is taken", v)
		}
	}
}

// TestSchemaIsComplete: the schema knows exactly the values that there are.
func TestSchemaIsComplete(t *testing.T) {
	s := set(t)
	var values, schema map[string]any
	b, err := os.ReadFile(filepath.Join(s.Chart, "values.yaml"))
	check(t, err)
	check(t, yaml.Unmarshal(b, &values))
	b, err = os.ReadFile(filepath.Join(s.Chart, "values.schema.json"))
	check(t, err)
	check(t, json.Unmarshal(b, &schema))
	delete(schema["properties"].(map[string]any), "global") // Helm's own
	compare(t, "", values, schema, schema["definitions"].(map[string]any))
}

func compare(t *testing.T, path string, values, schema, definitions map[string]any) {
	t.Helper()
	if ref, ok := schema["$ref"].(string); ok {
		schema = definitions[strings.TrimPrefix(ref, "#/definitions/")].(map[string]any)
	}
	properties, ok := schema["properties"].(map[string]any)
	if !ok {
		return // a map of anything
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(values)), slices.Sorted(maps.Keys(properties))); diff != "" {
		t.Errorf("values.yaml (-) and values.schema.json (+) differ at %q:\n%s", path, diff)
	}
	for k, v := range values {
		if sub, ok := v.(map[string]any); ok {
			if p, ok := properties[k].(map[string]any); ok {
				compare(t, path+"."+k, sub, p, definitions)
			}
		}
	}
}

// TestNotes: the notes say how to see that it works, for these values.
func TestNotes(t *testing.T) {
	s := set(t)
	for keep, want := range map[string]string{"true": "leaves the CRDs", "false": "deletes the CRDs"} {
		out, err := runHelm(t, s, append([]string{"install", helm.Release, s.Chart, "--namespace", "elsewhere", "--dry-run=client"},
			values("crds.keep="+keep, "image.repository=r.example/c")...)...)
		check(t, err)
		for _, w := range []string{"kubectl -n elsewhere rollout status", "kubectl get vfnodes", `"sidecarImage":"r.example/c:`, want} {
			if !strings.Contains(out, w) {
				t.Errorf("crds.keep=%s: the notes do not say %q:\n%s", keep, w, out)
			}
		}
	}
}
