package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const root = "../.."

// TestPages: the pages are written, from the project's own source, with lines
// of each kind.
func TestPages(t *testing.T) {
	metrics, err := metricsOf(root, metricDirs)
	if err != nil {
		t.Fatal(err)
	}
	constants, err := constantsOf(root, conditionDirs)
	if err != nil {
		t.Fatal(err)
	}
	conditions, err := conditionsPage(constants)
	if err != nil {
		t.Fatal(err)
	}
	for page, want := range map[string][]string{
		metricsPage(metrics): {
			"| `compsc_build_info` | gauge | `version`, `role` | manager, agent |",
			"| `compsc_vfmigration_phase_duration_seconds` | histogram | `phase` | manager | How long",
			"| `compsc_agent_pins` | gauge | - | agent |",
		},
		conditions: {
			"| `Captured` | True once the VM is stopped",
			"| `Aborted` | spec.abort was set, or",
			"| `VFIOUserMissing` | `VFIOUserPresent` and `VFIOUserMissing`: QEMU has, or lacks,",
			"| `PluginsGateOff` | KubeVirt's feature gate",
		},
	} {
		for _, line := range want {
			if !strings.Contains(page, line) {
				t.Errorf("no %q in\n%s", line, page)
			}
		}
	}
	if err := run(root, nil); err == nil {
		t.Error("wrote nowhere without an error")
	}
	if err := run(t.TempDir(), []string{"docs"}); err == nil {
		t.Error("read an empty tree without an error")
	}
}

// TestRefused: what could not be documented is an error.
func TestRefused(t *testing.T) {
	for source, want := range map[string]string{
		`var _ = prometheus.NewGauge(opts)`:                                                                                                               "no literal",
		`var _ = prometheus.NewGauge(prometheus.GaugeOpts{Name: "a"})`:                                                                                    "no help",
		`var _ = prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: "h"})`:                                                                        "no literal",
		`var _ = prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "n", Name: "a", Help: "h"})`:                                                         "write Namespace out",
		`var _ = prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "a", Help: "h"}, labels)`:                                                              "labels of a",
		`var a, b = prometheus.NewGauge(prometheus.GaugeOpts{Name: "a", Help: "h"}), prometheus.NewCounter(prometheus.CounterOpts{Name: "a", Help: "h"})`: "defined twice",
		`const ReasonNone = "None"`: "ReasonNone has no comment",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "a.go"), []byte("package a\n"+source), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := metricsOf(dir, []string{"."})
		if err == nil {
			_, err = constantsOf(dir, []string{"."})
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error containing %q", source, err, want)
		}
	}
	if _, err := conditionsPage(nil); err == nil {
		t.Error("a page without conditions")
	}
}
