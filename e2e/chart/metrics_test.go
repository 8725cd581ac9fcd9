//go:build e2echart

package chart

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/wait"
)

// ours is how the names of the product's metrics begin.
const ours = "compsc_"

// scraped are the metrics of a process, by name.
type scraped map[string]*dto.MetricFamily

// scrape reads the metrics of the node's agent, as a Prometheus on that node
// would; of the manager, if there is no node.
func (w *world) scrape(t *testing.T, node string) scraped {
	t.Helper()
	ctx := within(t, 30*time.Second)
	address, dial := net.JoinHostPort("127.0.0.1", strconv.Itoa(w.metricsPort)), (&net.Dialer{}).DialContext
	if node != "" {
		address = "127.0.0.1:9444" // the chart's agent.metricsPort
		dial = func(ctx context.Context, network, address string) (conn net.Conn, err error) {
			err = w.h.Lab.Nodes[node].NS.Do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
				return err
			})
			return conn, err
		}
	}
	c := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	var out scraped
	check(t, wait.Until(ctx, "metrics at "+address, func(ctx context.Context) (bool, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
		if err != nil {
			return false, err
		}
		answer, err := c.Do(r)
		if err != nil {
			return false, nil // it has just been started
		}
		defer answer.Body.Close()
		p := expfmt.NewTextParser(model.UTF8Validation)
		out, err = p.TextToMetricFamilies(answer.Body)
		return err == nil, err
	}))
	return out
}

// value is that of the series of a metric with these labels, in pairs; of a
// histogram the number of its observations. No such series is 0.
func (s scraped) value(name string, labels ...string) float64 {
	f := s[name]
	if f == nil {
		return 0
	}
	for _, m := range f.Metric {
		matches := len(m.Label)*2 == len(labels)
		for i := 0; matches && i < len(labels); i += 2 {
			matches = slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetName() == labels[i] && l.GetValue() == labels[i+1] })
		}
		if matches {
			return m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return 0
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
func (s scraped) served() map[string]described {
	out := map[string]described{}
	for name, f := range s {
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
		if was, is := before.value(ours+name, labels...), after.value(ours+name, labels...); is != was+by {
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
	if n := after.value(ours+"vfmigrations", "phase", string(v1alpha1.PhaseCopying)); n != 0 {
		t.Errorf("%v migrations are in a phase, want none", n)
	}

	want := reference(t, filepath.Dir(w.set.Config))
	if diff := cmp.Diff(want["manager"], after.served()); diff != "" {
		t.Errorf("the manager's metrics: docs/reference/metrics.md (-), /metrics (+):\n%s", diff)
	}
	on, err := w.h.VMNode(ctx)
	check(t, err)
	for node := range w.h.Lab.Nodes {
		if diff := cmp.Diff(want["agent"], w.scrape(t, node).served()); diff != "" {
			t.Errorf("the metrics of node %s's agent: docs/reference/metrics.md (-), /metrics (+):\n%s", node, diff)
		}
		pins := 0.0
		if node == on {
			pins = 1
		}
		check(t, wait.Until(ctx, "node "+node+"'s agent to count its VFs", func(context.Context) (bool, error) {
			s := w.scrape(t, node)
			return s.value(ours+"agent_pins") == pins && s.value(ours+"agent_vfs", "state", "leased") == pins &&
				s.value(ours+"agent_vfs", "state", "free") == harness.VFsPerNode-pins && s.value(ours+"agent_condition", "type", v1alpha1.ConditionReady, "status", "True") == 1, nil
		}))
	}
}
