//go:build e2echart

package chart

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/scrape"
	"compsc.io/compsc/e2e/wait"
)

// ours is how the names of the product's metrics begin.
const ours = "compsc_"

// scrape reads the metrics of the node's agent; of the manager, if there is no
// node.
func (w *world) scrape(t *testing.T, node string) (m scrape.Metrics) {
	t.Helper()
	ctx := within(t, time.Minute)
	var err error
	if node != "" {
		m, err = scrape.Agent(ctx, w.h.Lab.Nodes[node].NS)
	} else {
		m, err = scrape.Process(ctx, net.JoinHostPort("127.0.0.1", strconv.Itoa(w.metricsPort)), (&net.Dialer{}).DialContext)
	}
	check(t, err)
	return m
}

// buildInfo is the version that a process says it is of.
func (w *world) buildInfo(t *testing.T, node, role string) string {
	t.Helper()
	for _, m := range w.scrape(t, node)[ours+"build_info"].GetMetric() {
		labels := map[string]string{}
		for _, l := range m.Label {
			labels[l.GetName()] = l.GetValue()
		}
		if labels["role"] == role && m.GetGauge().GetValue() == 1 {
			return labels["version"]
		}
	}
	return ""
}

// described is a metric: its type and its labels.
type described struct {
	Type   string
	Labels string
}

// reference reads docs/reference/metrics.md: what each role serves.
func reference(t *testing.T, s string) map[string]map[string]described {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(s, "docs", "reference", "metrics.md"))
	check(t, err)
	out := map[string]map[string]described{"manager": {}, "agent": {}}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| ([a-z]+) \\| ([^|]*) \\| ([a-z, ]+) \\|").FindAllStringSubmatch(string(page), -1) {
		labels := strings.Split(strings.ReplaceAll(strings.ReplaceAll(m[3], "`", ""), "-", ""), ", ")
		slices.Sort(labels)
		for role := range strings.SplitSeq(m[4], ", ") {
			out[role][m[1]] = described{m[2], strings.Join(labels, ",")}
		}
	}
	return out
}

// served describes the product's metrics among the scraped ones.
func served(m scrape.Metrics) map[string]described {
	out := map[string]described{}
	for name, f := range m {
		if !strings.HasPrefix(name, ours) {
			continue
		}
		var labels []string
		for _, l := range f.Metric[0].Label {
			labels = append(labels, l.GetName())
		}
		slices.Sort(labels)
		out[name] = described{strings.ToLower(f.GetType().String()), strings.Join(labels, ",")}
	}
	return out
}

// metrics: what the processes serve is what the reference says, and a migration
// is counted and measured in all its parts.
func (w *world) metrics(t *testing.T) {
	ctx := within(t, 3*time.Minute)
	before := w.scrape(t, "")
	w.migrates(t)
	after := w.scrape(t, "")
	grew := func(by float64, name string, labels ...string) {
		t.Helper()
		if was, is := before.Value(ours+name, labels...), after.Value(ours+name, labels...); is != was+by {
			t.Errorf("%s%q went from %v to %v in a migration, want %v more", ours+name, labels, was, is, by)
		}
	}
	grew(1, "vfmigration_total", "result", "succeeded", "reason", v1alpha1.ConditionSucceeded)
	grew(0, "vfmigration_total", "result", "failed", "reason", v1alpha1.ReasonTimeout)
	grew(1, "vfmigration_duration_seconds", "result", "succeeded")
	for _, phase := range []v1alpha1.VFMigrationPhase{v1alpha1.PhasePinning, v1alpha1.PhasePreparing, v1alpha1.PhaseCopying, v1alpha1.PhaseSwitching, v1alpha1.PhaseVerifying} {
		grew(1, "vfmigration_phase_duration_seconds", "phase", string(phase))
	}
	for _, step := range []string{"source/drain", "source/quiesce", "source/capture", "source/mark", "source/hold", "source/deliver",
		"target/arm", "target/load", "target/restore", "target/hold", "target/commit", "target/resume"} {
		grew(1, "vfmigration_step_duration_seconds", "step", step)
	}
	grew(0, "vfmigration_step_duration_seconds", "step", "other")
	for _, side := range []string{"source", "target"} {
		grew(1, "vfmigration_gate_hold_seconds", "side", side)
	}
	for _, name := range []string{"vm_stopped_seconds", "device_stopped_seconds", "link_gap_seconds", "state_bytes", "pages_marked"} {
		grew(1, "vfmigration_"+name)
	}
	if n := after.Value(ours+"vfmigrations", "phase", string(v1alpha1.PhaseCopying)); n != 0 {
		t.Errorf("%v migrations are in a phase, want none", n)
	}

	want := reference(t, filepath.Dir(w.set.Config))
	if diff := cmp.Diff(want["manager"], served(after)); diff != "" {
		t.Errorf("the manager's metrics: docs/reference/metrics.md (-), /metrics (+):\n%s", diff)
	}
	on, err := w.h.VMNode(ctx)
	check(t, err)
	for node := range w.h.Lab.Nodes {
		if diff := cmp.Diff(want["agent"], served(w.scrape(t, node))); diff != "" {
			t.Errorf("the metrics of node %s's agent: docs/reference/metrics.md (-), /metrics (+):\n%s", node, diff)
		}
		pins := 0.0
		if node == on {
			pins = 1
		}
		check(t, wait.Until(ctx, "node "+node+"'s agent to count its VFs", func(context.Context) (bool, error) {
			s := w.scrape(t, node)
			return s.Value(ours+"agent_pins") == pins && s.Value(ours+"agent_vfs", "state", "leased") == pins &&
				s.Value(ours+"agent_vfs", "state", "free") == harness.VFsPerNode-pins && s.Value(ours+"agent_condition", "type", v1alpha1.ConditionReady, "status", "True") == 1, nil
		}))
	}
}
