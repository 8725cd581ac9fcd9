package controllers

import (
	"context"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"compsc.io/compsc/api/v1alpha1"
)

// gather reads a registry: a counter's or gauge's value, and a histogram's
// number of observations and their sum, by name and label values.
func gather(t *testing.T, from prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := from.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "compsc_") {
			continue
		}
		for _, m := range f.Metric {
			name := strings.TrimPrefix(f.GetName(), "compsc_")
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			switch {
			case m.Counter != nil:
				out[name] = m.Counter.GetValue()
			case m.Gauge != nil:
				out[name] = m.Gauge.GetValue()
			case m.Histogram != nil:
				out[name+" count"], out[name+" sum"] = float64(m.Histogram.GetSampleCount()), m.Histogram.GetSampleSum()
			}
		}
	}
	return out
}

// observed returns what two reconciles of f add to the metrics.
func observed(t *testing.T, f *fixture) map[string]float64 {
	t.Helper()
	serveMetrics()
	before := gather(t, metrics.Registry)
	c := f.start(t)
	for range 2 { // an ended migration is counted once
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	after := gather(t, metrics.Registry)
	for name := range after {
		after[name] = math.Round((after[name]-before[name])*1e6) / 1e6
	}
	maps.DeleteFunc(after, func(_ string, v float64) bool { return v == 0 })
	return after
}

func took(name string, d time.Duration) v1alpha1.StepStatus {
	return v1alpha1.StepStatus{Name: name, Took: metav1.Duration{Duration: d}}
}

func TestMetricsOfSuccess(t *testing.T) {
	f := reached(v1alpha1.ConditionVerified, virtv1.MigrationSucceeded)
	f.vmi.Status.NodeName = "node-b"
	f.clock.SetTime(t0.Add(20 * time.Second))
	for i, typ := range []string{v1alpha1.ConditionTargetPinned, v1alpha1.ConditionPrepared, v1alpha1.ConditionCaptured, v1alpha1.ConditionRestored} {
		for j := range f.vfm.Status.Conditions {
			if c := &f.vfm.Status.Conditions[j]; c.Type == typ {
				// Restored is earlier than Captured, by another node's clock.
				c.LastTransitionTime = at([]time.Duration{2, 3, 11, 10}[i] * time.Second)
			}
		}
	}
	st := &f.vfm.Status
	st.Downtime = &v1alpha1.Downtime{
		VMStopped: metav1.Duration{Duration: 180 * time.Millisecond}, DeviceStopped: metav1.Duration{Duration: 90 * time.Millisecond},
		LinkGap: &metav1.Duration{Duration: 110 * time.Millisecond},
	}
	st.Steps = []v1alpha1.StepStatus{took("source/capture", time.Millisecond), took("source/hold", 60*time.Millisecond),
		took("target/hold", 40*time.Millisecond), took("target/dance", time.Second)}
	st.Devices = []v1alpha1.DeviceStatus{{Interface: "fast", StateBytes: 900, PagesMarked: 70}, {Interface: "slow", StateBytes: 1000}}
	want := map[string]float64{
		"vfmigration_total Succeeded succeeded":                  1,
		"vfmigration_duration_seconds succeeded count":           1,
		"vfmigration_duration_seconds succeeded sum":             20,
		"vfmigration_phase_duration_seconds Pinning count":       1,
		"vfmigration_phase_duration_seconds Pinning sum":         2,
		"vfmigration_phase_duration_seconds Preparing count":     1,
		"vfmigration_phase_duration_seconds Preparing sum":       1,
		"vfmigration_phase_duration_seconds Copying count":       1,
		"vfmigration_phase_duration_seconds Copying sum":         8,
		"vfmigration_phase_duration_seconds Switching count":     1,
		"vfmigration_phase_duration_seconds Verifying count":     1,
		"vfmigration_phase_duration_seconds Verifying sum":       10,
		"vfmigration_step_duration_seconds source/capture count": 1,
		"vfmigration_step_duration_seconds source/capture sum":   0.001,
		"vfmigration_step_duration_seconds source/hold count":    1,
		"vfmigration_step_duration_seconds source/hold sum":      0.06,
		"vfmigration_step_duration_seconds target/hold count":    1,
		"vfmigration_step_duration_seconds target/hold sum":      0.04,
		"vfmigration_step_duration_seconds other count":          1,
		"vfmigration_step_duration_seconds other sum":            1,
		"vfmigration_gate_hold_seconds source count":             1,
		"vfmigration_gate_hold_seconds source sum":               0.06,
		"vfmigration_gate_hold_seconds target count":             1,
		"vfmigration_gate_hold_seconds target sum":               0.04,
		"vfmigration_vm_stopped_seconds count":                   1,
		"vfmigration_vm_stopped_seconds sum":                     0.18,
		"vfmigration_device_stopped_seconds count":               1,
		"vfmigration_device_stopped_seconds sum":                 0.09,
		"vfmigration_link_gap_seconds count":                     1,
		"vfmigration_link_gap_seconds sum":                       0.11,
		"vfmigration_state_bytes count":                          2,
		"vfmigration_state_bytes sum":                            1900,
		"vfmigration_pages_marked count":                         2,
		"vfmigration_pages_marked sum":                           70,
	}
	if diff := cmp.Diff(want, observed(t, f)); diff != "" {
		t.Errorf("observed (-want +got):\n%s", diff)
	}
}

// TestMetricsOfFailure: what was not undone is told apart from what was, and
// no figure of a migration that failed is among those of what one costs.
func TestMetricsOfFailure(t *testing.T) {
	undone := func() *fixture {
		f := accepted()
		f.vfm.Status.Failure = &v1alpha1.VFMigrationFailure{Reason: v1alpha1.ReasonNoFreeVF, Message: "none", Time: at(0)}
		f.vfm.Status.Steps = []v1alpha1.StepStatus{took("source/hold", time.Second)}
		return f
	}
	notUndone := func() *fixture {
		f := undone()
		f.condition(v1alpha1.ConditionPrepared, metav1.ConditionTrue, v1alpha1.ConditionPrepared, "")
		return f
	}
	refused := func() *fixture {
		f := newFixture()
		f.vmi.Status.Phase = virtv1.Scheduled
		return f
	}
	for name, tc := range map[string]struct {
		f    func() *fixture
		want map[string]float64
	}{
		"undone": {undone, map[string]float64{"vfmigration_rollbacks_total NoFreeVF complete": 1, "vfmigration_total NoFreeVF failed": 1,
			"vfmigration_duration_seconds failed count": 1, "vfmigration_duration_seconds failed sum": 61}},
		"not undone": {notUndone, map[string]float64{"vfmigration_rollbacks_total NoFreeVF incomplete": 1, "vfmigration_total NoFreeVF failed": 1,
			"vfmigration_duration_seconds failed count": 1, "vfmigration_duration_seconds failed sum": 61}},
		"refused": {refused, map[string]float64{"vfmigration_total VMINotRunning failed": 1}},
	} {
		t.Run(name, func(t *testing.T) {
			f := tc.f()
			f.clock.SetTime(t0.Add(61 * time.Second)) // RollbackTimeout has passed
			if diff := cmp.Diff(tc.want, observed(t, f)); diff != "" {
				t.Errorf("observed (-want +got):\n%s", diff)
			}
		})
	}
}

// TestMetricsOfThoseUnderWay: those that ended are not among them, and one is
// overdue once all its own bounds are over.
func TestMetricsOfThoseUnderWay(t *testing.T) {
	ended := reached(v1alpha1.ConditionVerified, virtv1.MigrationSucceeded)
	ended.condition(v1alpha1.ConditionSucceeded, metav1.ConditionTrue, v1alpha1.ConditionSucceeded, "")
	ended.vfm.Name = "ended"
	pending := newFixture()
	pending.vfm.Name = "pending"
	f := accepted()
	f.vfm.Spec.Timeouts.Prepare = &metav1.Duration{Duration: 10 * time.Second}
	f.vfm.Spec.Timeouts.Migrate = &metav1.Duration{Duration: 20 * time.Second}
	f.others = []client.Object{ended.vfm, pending.vfm}
	broken := false
	f.funcs = interceptor.Funcs{List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, o ...client.ListOption) error {
		if broken {
			return errors.New("there is no cache")
		}
		return c.List(ctx, l, o...)
	}}
	c := f.start(t)
	p := &inProgress{number: underWayNow.number, oldest: underWayNow.oldest, overdue: underWayNow.overdue}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(p)
	if got := gather(t, registry); len(got) > 0 {
		t.Errorf("before there is anything to read from: %v", got)
	}
	p.read(c, f.clock)
	all := 30*time.Second + FinishTimeout + RollbackTimeout
	for age, overdue := range map[time.Duration]float64{all: 0, all + time.Second: 1} {
		f.clock.SetTime(t0.Add(age))
		want := map[string]float64{
			"vfmigrations Pending": 1, "vfmigrations Pinning": 1, "vfmigrations Preparing": 0, "vfmigrations Copying": 0,
			"vfmigrations Switching": 0, "vfmigrations Verifying": 0, "vfmigrations RollingBack": 0,
			"vfmigration_oldest_age_seconds": age.Seconds(), "vfmigrations_overdue": overdue,
		}
		if diff := cmp.Diff(want, gather(t, registry)); diff != "" {
			t.Errorf("after %s (-want +got):\n%s", age, diff)
		}
	}
	broken = true
	if got := slices.Collect(maps.Keys(gather(t, registry))); len(got) > 0 {
		t.Errorf("without a cache: %v", got)
	}
}

// TestFailureReasons: every documented reason of a VFMigration is one that is
// counted from the start, or one that no failure has.
func TestFailureReasons(t *testing.T) {
	const types = "../api/v1alpha1/vfmigration_types.go"
	f, err := parser.ParseFile(token.NewFileSet(), types, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for n := range ast.Preorder(f) {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Reason") {
			continue
		}
		found++
		reason, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		ongoing := slices.Contains([]string{v1alpha1.ReasonProgressing, v1alpha1.ReasonRollingBack, v1alpha1.ReasonReleased}, reason)
		if ongoing == slices.Contains(failureReasons, reason) {
			t.Errorf("reason %s: counted from the start: %t, says that something is under way: %t", reason, ongoing, ongoing)
		}
	}
	if found < len(failureReasons) {
		t.Errorf("%s has %d reasons only", types, found)
	}
}

// TestFailuresAreExplained: docs/failures.md says of every reason that a failure
// may have what to do about it, and of no other.
func TestFailuresAreExplained(t *testing.T) {
	const page = "../docs/failures.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	explained := map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| ((?:`[A-Za-z]+`(?:, )?)+) \\|").FindAllStringSubmatch(string(text), -1) {
		for reason := range strings.SplitSeq(row[1], ", ") {
			explained[strings.Trim(reason, "`")] = true
		}
	}
	for _, reason := range failureReasons {
		if !explained[reason] {
			t.Errorf("%s has no row about %s", page, reason)
		}
		delete(explained, reason)
	}
	for reason := range explained {
		t.Errorf("%s has a row about %s, which no failure has", page, reason)
	}
}

// TestSeriesFromTheStart: a series that appears with its first migration has no
// increase by it, so all are there before.
func TestSeriesFromTheStart(t *testing.T) {
	want := map[*prometheus.HistogramVec]int{duration: 2, phaseDuration: 5, stepDuration: len(steps) + 1, gateHold: 2}
	for vec, n := range want {
		vec.Reset()
		startSeries()
		registry := prometheus.NewRegistry()
		registry.MustRegister(vec)
		if got := gather(t, registry); len(got) != 2*n { // of each its count and its sum
			t.Errorf("%v: %v, want %d series", desc(vec), slices.Sorted(maps.Keys(got)), n)
		}
	}
}
