//go:build e2echart

package chart

import (
	"encoding/json"
	"fmt"
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
		// overlay, if any, goes on top of it.
		overlay string
	}{
		{"default", nil, ""},
		{"kubevirt", values("kubevirt.migrationPolicy.enabled=true", "kubevirt.admission.enabled=true"), ""},
		// Kubernetes has MutatingAdmissionPolicies since 1.36.
		{"kubevirt-1.32", append(values("kubevirt.migrationPolicy.enabled=true", "kubevirt.admission.enabled=true"), "--kube-version", "1.34.0"), ""},
		{"kubevirt/plugin", values("kubevirt.plugin.enabled=true"), ""},
		{"default", values("metrics.podMonitor.enabled=true", "metrics.prometheusRule.enabled=true", "metrics.dashboard.enabled=true"), "monitoring"},
		{"default", values("certificates.authority=certManager"), "cert-manager"},
	} {
		t.Run(strings.TrimSuffix(test.dir+" "+test.overlay, " "), func(t *testing.T) {
			out := kustomize(t, s, filepath.Join(s.Config, test.dir))
			if test.overlay != "" {
				out = kustomize(t, s, overlay(t, filepath.Join(s.Config, test.dir), filepath.Join(s.Config, test.overlay)))
			}
			want := byKey(t, out)
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
				t.Errorf("config/%s (-) and the chart (+) differ:\n%s", filepath.Join(test.dir, test.overlay), diff)
			}
		})
	}
}

// overlay writes a kustomization as users do, of a directory and a component.
func overlay(t *testing.T, dir, component string) string {
	t.Helper()
	to, err := filepath.EvalSymlinks(t.TempDir())
	check(t, err)
	relative := func(path string) string {
		r, err := filepath.Rel(to, path)
		check(t, err)
		return r
	}
	check(t, os.WriteFile(filepath.Join(to, "kustomization.yaml"), fmt.Appendf(nil,
		"resources: [%q]\ncomponents: [%q]\n", relative(dir), relative(component)), 0o600))
	return to
}

// TestUninstall: what is to be deleted when CompSC is uninstalled without Helm
// runs, and holds nothing: neither the namespace, with the leases of VFs in use
// and the agents' authority, nor a CRD.
func TestUninstall(t *testing.T) {
	s := set(t)
	b, err := os.ReadFile(filepath.Join(s.Config, "..", "docs", "operating.md"))
	check(t, err)
	_, section, found := strings.Cut(string(b), "\n## Uninstall\n")
	if !found {
		t.Fatal("docs/operating.md does not say how to uninstall")
	}
	var deleted []string
	for _, m := range regexp.MustCompile(`(?m)^    kubectl delete -k config/(\S+)$`).FindAllStringSubmatch(section, -1) {
		for _, u := range kustomize(t, s, filepath.Join(s.Config, m[1])) {
			deleted = append(deleted, keyOf(u))
		}
	}
	slices.Sort(deleted)
	want := []string{agentKey, managerKey, "NetworkPolicy compsc-system/compsc-manager", "PodDisruptionBudget compsc-system/compsc-manager"}
	if diff := cmp.Diff(want, deleted); diff != "" {
		t.Errorf("deleted (-want +got):\n%s", diff)
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
		"kubevirt.binding.enabled=true", "metrics.podMonitor.enabled=true", "metrics.prometheusRule.enabled=true", "metrics.dashboard.enabled=true", "certificates.authority=certManager")...) {
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
	for _, v := range []string{"replicas=3", "manager.replicas=0", "manager.podDisruptionBudget.maxUnavailable=0", "manager.replica=2", "agent.peerPort=70000", "agent.drainTimeout=soon", "logLevel=loud",
		"certificates.authority=none", "image.digest=latest", "agent.podsDir=relative", "kubevirt.plugin=true", "kubevirt.binding.name=", "agent.modelPFs=name", "networkPolicy.apiServerPorts={}"} {
		if _, err := runHelm(t, s, append([]string{"template", helm.Release, s.Chart}, values(v)...)...); err == nil {
			t.Errorf("%s is taken", v)
		}
	}
}

// TestContradictions: values that contradict each other are refused, and it is
// said why.
func TestContradictions(t *testing.T) {
	s := set(t)
	for _, test := range []struct {
		set  []string
		says string
	}{
		{[]string{"agent.drainTimeout=21m"}, "agent.terminationGracePeriodSeconds is 1260: at least 1300 is needed for agent.drainTimeout=21m"},
		{[]string{"agent.terminationGracePeriodSeconds=1239"}, "at least 1240 is needed for agent.drainTimeout=20m"},
		{[]string{"agent.terminationGracePeriodSeconds=1240"}, ""},
		{[]string{"agent.drainTimeout=1h30m0.5s", "agent.terminationGracePeriodSeconds=5440"}, ""},
		{[]string{"kubevirt.plugin.enabled=true"}, "kubevirt.plugin.enabled needs Kubernetes 1.36"},
	} {
		_, err := runHelm(t, s, append([]string{"template", helm.Release, s.Chart, "--kube-version", "1.35.0"}, values(test.set...)...)...)
		if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%v: got %v, want %q", test.set, err, test.says)
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
	for _, test := range []struct {
		set        string
		says, none []string
	}{
		{"crds.keep=true", []string{"leaves the CRDs", `kubectl patch kubevirt kubevirt -n kubevirt`, `"sidecarImage":"r.example/c:`, "kubevirt.admission.enabled"}, []string{"agent.modelPFs"}},
		{"crds.keep=false", []string{"deletes the CRDs"}, nil},
		{"kubevirt.binding.name=kv", []string{"kubectl patch kubevirt kv -n kubevirt"}, nil},
		{"kubevirt.binding.enabled=true", []string{"kubectl -n elsewhere logs -l app.kubernetes.io/component=binding"}, []string{"kubectl patch kubevirt"}},
		{"kubevirt.admission.enabled=true", nil, []string{"kubevirt.admission.enabled"}},
		{"agent.modelPFs={name=pf0}", []string{"agent.modelPFs"}, nil},
	} {
		out, err := runHelm(t, s, append([]string{"install", helm.Release, s.Chart, "--namespace", "elsewhere", "--dry-run=client"},
			values(test.set, "image.repository=r.example/c")...)...)
		check(t, err)
		_, notes, found := strings.Cut(out, "\nNOTES:\n")
		if !found {
			t.Fatalf("no notes:\n%s", out)
		}
		for _, w := range append(test.says, "kubectl -n elsewhere rollout status", "kubectl get vfnodes") {
			if !strings.Contains(notes, w) {
				t.Errorf("%s: the notes do not say %q:\n%s", test.set, w, notes)
			}
		}
		for _, w := range test.none {
			if strings.Contains(notes, w) {
				t.Errorf("%s: the notes say %q:\n%s", test.set, w, notes)
			}
		}
	}
}
