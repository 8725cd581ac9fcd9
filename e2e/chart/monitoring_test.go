//go:build e2echart

package chart

import (
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// TestRunbooks: every alert names its page, and where that is to be read if the
// chart is told; nothing else of it changes.
func TestRunbooks(t *testing.T) {
	s := set(t)
	for _, test := range []struct {
		base, want string // want: what stands before the page's name
	}{
		{"", ""},
		{"https://wiki.example/compsc/runbooks", "https://wiki.example/compsc/runbooks/"},
		{"https://wiki.example/compsc/runbooks/", "https://wiki.example/compsc/runbooks/"},
	} {
		rule := byKey(t, render(t, s, "compsc-system", values("metrics.prometheusRule.enabled=true", "metrics.prometheusRule.runbookURL="+test.base)...))["PrometheusRule compsc-system/compsc"]
		if rule == nil {
			t.Fatal("there is no PrometheusRule")
		}
		groups, _, err := unstructured.NestedSlice(rule.Object, "spec", "groups")
		check(t, err)
		n := 0
		for _, g := range groups {
			for _, r := range g.(map[string]any)["rules"].([]any) {
				n++
				alert, _, _ := unstructured.NestedString(r.(map[string]any), "alert")
				annotations, _, err := unstructured.NestedStringMap(r.(map[string]any), "annotations")
				check(t, err)
				page := alert + ".md"
				if _, err := os.Stat(filepath.Join(filepath.Dir(s.Config), annotations["runbook"])); err != nil || filepath.Base(annotations["runbook"]) != page {
					t.Errorf("alert %s: runbook %q: %v", alert, annotations["runbook"], err)
				}
				url, ok := annotations["runbook_url"]
				if want := test.want != ""; ok != want || want && url != test.want+page {
					t.Errorf("runbookURL=%q: alert %s has the URL %q", test.base, alert, url)
				}
			}
		}
		if n == 0 {
			t.Error("there are no alerts")
		}
	}
	if _, err := runHelm(t, s, append([]string{"template", "compsc", s.Chart}, values("metrics.prometheusRule.runbookURL=docs/runbooks")...)...); err == nil {
		t.Error("a path is taken for a URL")
	}
}
