package rules

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

const root = "../.."

// alerts reads the alerts of the chart, by name, as Prometheus does.
func alerts(t *testing.T) map[string]rulefmt.Rule {
	t.Helper()
	groups, errs := rulefmt.ParseFile(filepath.Join(root, "charts/compsc/files/prometheus-rules.yaml"), false,
		model.UTF8Validation, parser.NewParser(parser.Options{}), slog.New(slog.DiscardHandler))
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	out := map[string]rulefmt.Rule{}
	for _, g := range groups.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || out[r.Alert].Alert != "" {
				t.Errorf("%q is no alert, or is there twice", r.Alert)
			}
			out[r.Alert] = r
		}
	}
	if len(out) == 0 {
		t.Fatal("there are no alerts")
	}
	return out
}

// line is a line of the generated reference: name, type, labels.
var line = regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| ([a-z]+) \\| ([^|]*) \\|")

// metrics reads the labels of each series that there is from the reference.
func metrics(t *testing.T) map[string]map[string]bool {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(root, "docs/reference/metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string]bool{}
	for _, m := range line.FindAllStringSubmatch(string(page), -1) {
		known := map[string]bool{model.MetricNameLabel: true}
		for _, l := range strings.Split(m[3], ", ") {
			known[strings.Trim(l, "`")] = true
		}
		if m[2] != "histogram" {
			out[m[1]] = known
			continue
		}
		out[m[1]+"_sum"], out[m[1]+"_count"] = known, known
		out[m[1]+"_bucket"] = map[string]bool{"le": true}
		for l := range known {
			out[m[1]+"_bucket"][l] = true
		}
	}
	if len(out) == 0 {
		t.Fatal("the reference has no metrics")
	}
	return out
}

// wrong returns what an expression names that does not exist.
func wrong(expr string, known map[string]map[string]bool) (string, error) {
	parsed, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	if err != nil {
		return "", err
	}
	var bad string
	selectors := 0
	parser.Inspect(parsed, func(n parser.Node, _ []parser.Node) error {
		s, ok := n.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		selectors++
		if known[s.Name] == nil {
			bad = "there is no metric " + s.Name
			return nil
		}
		for _, m := range s.LabelMatchers {
			if !known[s.Name][m.Name] {
				bad = fmt.Sprintf("metric %s has no label %s", s.Name, m.Name)
			}
		}
		return nil
	})
	if selectors == 0 {
		bad = "it asks for no metric"
	}
	return bad, nil
}

func TestAlertsNameWhatExists(t *testing.T) {
	known := metrics(t)
	for name, r := range alerts(t) {
		if bad, err := wrong(r.Expr, known); bad != "" || err != nil {
			t.Errorf("alert %s: %s%v", name, bad, err)
		}
		if r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("alert %s lacks severity, summary or description", name)
		}
		if want := "docs/runbooks/" + name + ".md"; r.Annotations["runbook"] != want {
			t.Errorf("alert %s: runbook %q, want %s", name, r.Annotations["runbook"], want)
		} else if _, err := os.Stat(filepath.Join(root, want)); err != nil {
			t.Errorf("alert %s: %v", name, err)
		}
	}
	for expr, want := range map[string]string{
		`compsc_none > 0`:                              "there is no metric compsc_none",
		`compsc_vfmigrations{node="a"}`:                "metric compsc_vfmigrations has no label node",
		`compsc_vfmigration_state_bytes`:               "there is no metric compsc_vfmigration_state_bytes",
		`1 + 1`:                                        "it asks for no metric",
		`rate(compsc_vfmigration_state_bytes_sum[1h])`: "",
	} {
		if bad, err := wrong(expr, known); bad != want || err != nil {
			t.Errorf("%s: %q, %v, want %q", expr, bad, err, want)
		}
	}
}

// TestAlerts: each alert fires in its own situation and not in one beside it.
func TestAlerts(t *testing.T) {
	const (
		overdue    = `compsc_vfmigrations_overdue`
		incomplete = `compsc_vfmigration_rollbacks_total{result="incomplete",reason="Timeout"}`
		complete   = `compsc_vfmigration_rollbacks_total{result="complete",reason="Timeout"}`
		timeout    = `compsc_vfmigration_total{result="failed",reason="Timeout"}`
		aborted    = `compsc_vfmigration_total{result="failed",reason="Aborted"}`
		good       = `compsc_vfmigration_total{result="succeeded",reason="Succeeded"}`
		intact     = `compsc_agent_condition{type="Intact",status="False",pod="a"}`
		ready      = `compsc_agent_condition{type="Ready",status="True",pod="a"}`
		hooks      = `compsc_agent_condition{type="NodeHooks",status="False",pod="a"}`
		agentA     = `compsc_build_info{role="agent",version="v1",pod="a"}`
		agentB     = `compsc_build_info{role="agent",version="v1",pod="b"}`
		agentV2    = `compsc_build_info{role="agent",version="v2",pod="c"}`
		manager    = `compsc_build_info{role="manager",version="v1",pod="m"}`
	)
	const hour = time.Hour
	type situation struct {
		name   string
		series series
		want   bool
	}
	cases := map[string][]situation{
		"CompSCMigrationOverdue": {
			{"overdue for 3 minutes", series{overdue: then(0, 2*hour-3*time.Minute, 1)}, true},
			{"overdue for half a minute", series{overdue: then(0, 2*hour-30*time.Second, 1)}, false},
			{"none", series{overdue: always(0)}, false},
		},
		"CompSCRollbackIncomplete": {
			{"one in ten minutes", series{incomplete: then(0, 2*hour-10*time.Minute, 1)}, true},
			{"one long ago", series{incomplete: then(0, hour, 1)}, false},
			{"all undone", series{incomplete: always(0), complete: then(0, 2*hour-10*time.Minute, 5)}, false},
		},
		"CompSCMigrationsFailing": {
			{"five of seven", series{timeout: then(0, 2*hour-10*time.Minute, 5), good: then(3, 2*hour-10*time.Minute, 5)}, true},
			{"five of twelve", series{timeout: then(0, 2*hour-10*time.Minute, 5), good: then(3, 2*hour-10*time.Minute, 10)}, false},
			{"one of one", series{timeout: then(0, 2*hour-10*time.Minute, 1), good: always(3)}, false},
			{"five aborted", series{aborted: then(0, 2*hour-10*time.Minute, 5), timeout: always(0), good: always(3)}, false},
		},
		"CompSCVFReconfigured": {
			{"changed", series{intact: then(0, 2*hour-2*time.Minute, 1)}, true},
			{"intact", series{intact: always(0)}, false},
			{"another condition", series{intact: always(0), hooks: always(1)}, false},
		},
		"CompSCAgentNotReady": {
			{"for ten minutes", series{ready: then(1, 2*hour-10*time.Minute, 0)}, true},
			{"for two minutes", series{ready: then(1, 2*hour-2*time.Minute, 0)}, false},
			{"ready", series{ready: always(1), hooks: always(0)}, false},
		},
		"CompSCAgentMissing": {
			{"one of two", series{agentA: always(1), agentB: then(1, 2*hour-30*time.Minute, gone)}, true},
			{"one of two, just now", series{agentA: always(1), agentB: then(1, 2*hour-10*time.Minute, gone)}, false},
			{"all of two", series{agentA: then(1, 2*hour-30*time.Minute, gone), agentB: then(1, 2*hour-30*time.Minute, gone)}, true},
			{"there were none", series{manager: always(1)}, false},
			{"a manager", series{agentA: always(1), manager: then(1, 2*hour-30*time.Minute, gone)}, false},
			{"removed long ago", series{agentA: always(1), agentB: then(1, 30*time.Minute, gone)}, false},
		},
		"CompSCNoManager": {
			{"none for long", series{overdue: then(0, hour, gone), manager: always(1)}, true},
			{"one", series{overdue: always(0)}, false},
			{"elected anew", series{overdue: then(0, 2*hour-4*time.Minute, gone)}, false},
		},
		"CompSCVersionSkew": {
			{"two agents", series{manager: always(1), agentA: always(1), agentV2: always(1)}, true},
			{"for half an hour", series{manager: always(1), agentA: always(1), agentV2: then(gone, 90*time.Minute, 1)}, false},
			{"none", series{manager: always(1), agentA: always(1), agentB: always(1)}, false},
		},
	}
	all := alerts(t)
	for name := range all {
		if cases[name] == nil {
			t.Errorf("alert %s has no test", name)
		}
	}
	for name, situations := range cases {
		r, ok := all[name]
		if !ok {
			t.Errorf("there is no alert %s", name)
			continue
		}
		for _, s := range situations {
			if got := firing(t, r.Expr, time.Duration(r.For), s.series, 2*hour); got != s.want {
				t.Errorf("%s: %s: fires: %t, want %t", name, s.name, got, s.want)
			}
		}
	}
}
