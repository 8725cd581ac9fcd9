package rules

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// columns are those of Grafana's grid. screen is how many of its rows, of 38
// pixels each, there is room for on a screen of 1080 below the browser's and
// Grafana's own bars.
const columns, screen = 24, 24

type panel struct {
	ID          int
	Title, Type string
	GridPos     struct{ X, Y, W, H int }
	Targets     []struct {
		Expr    string
		Instant bool
	}
}

func dashboard(t *testing.T) []panel {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, "charts/compsc/files/dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var board struct{ Panels []panel }
	if err := json.Unmarshal(text, &board); err != nil {
		t.Fatal(err)
	}
	if len(board.Panels) == 0 {
		t.Fatal("the dashboard has no panels")
	}
	return board.Panels
}

// shown is the time that the dashboard shows unless its user asks for another.
const shown = 6 * time.Hour

// variables are Grafana's, for such a time. $__rate_interval is not among them:
// migrations are rare, and within so short a time there is mostly none.
var variables = strings.NewReplacer("$__range", "6h")

// TestDashboardNamesWhatExists: also that no panel lies upon another one, and
// that all are on one screen.
func TestDashboardNamesWhatExists(t *testing.T) {
	known, ids, cells := metrics(t), map[int]string{}, map[[2]int]string{}
	for _, p := range dashboard(t) {
		if ids[p.ID] != "" || len(p.Targets) == 0 {
			t.Errorf("panel %q has the ID of %q, or no query", p.Title, ids[p.ID])
		}
		ids[p.ID] = p.Title
		for _, q := range p.Targets {
			if bad, err := wrong(variables.Replace(q.Expr), known); bad != "" || err != nil {
				t.Errorf("panel %q: %s: %s%v", p.Title, q.Expr, bad, err)
			}
		}
		if bottom := p.GridPos.Y + p.GridPos.H; bottom > screen {
			t.Errorf("panel %q ends in row %d, a screen has %d", p.Title, bottom, screen)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := cells[[2]int{x, y}]; other != "" || x >= columns {
					t.Fatalf("panel %q lies upon %q, or beyond the edge", p.Title, other)
				}
				cells[[2]int{x, y}] = p.Title
			}
		}
	}
}

// add adds a histogram that was 0 and has got these observations in time.
func (s series) add(name, labels string, observations map[time.Duration]float64) {
	for _, le := range []float64{.0001, .001, .01, .1, .25, 1, 5, 30, 600, 4096, 65536, math.Inf(1)} {
		bound := fmt.Sprintf("%g", le)
		text := fmt.Sprintf("%s_bucket{%s,le=%q}", name, labels, bound)
		if labels == "" {
			text = fmt.Sprintf("%s_bucket{le=%q}", name, bound)
		}
		s[text] = func(at time.Duration) (n float64) {
			for when, v := range observations {
				if when <= at && v <= le {
					n++
				}
			}
			return n
		}
	}
}

// day is what the processes serve while VMs move, each of the given times once.
// A migration that is under way now is overdue.
func day(moves ...time.Duration) series {
	observed := func(v float64) map[time.Duration]float64 {
		m := map[time.Duration]float64{}
		for i, at := range moves {
			m[at] = v * (1 + .1*float64(i%5))
		}
		return m
	}
	count := func(every int) func(time.Duration) float64 {
		return func(at time.Duration) (n float64) {
			for i, m := range moves {
				if m <= at && i%every == 0 {
					n++
				}
			}
			return n
		}
	}
	under := 0.0
	if len(moves) > 0 {
		under = 1
	}
	s := series{
		`compsc_build_info{role="manager",version="v1",pod="m"}`:                            always(1),
		`compsc_vfmigrations{phase="Copying",pod="m"}`:                                      then(0, shown-30*time.Minute, under),
		`compsc_vfmigrations{phase="Pinning",pod="m"}`:                                      always(0),
		`compsc_vfmigrations_overdue{pod="m"}`:                                              then(0, shown-5*time.Minute, under),
		`compsc_vfmigration_oldest_age_seconds{pod="m"}`:                                    func(at time.Duration) float64 { return under * max(0, (at-shown+30*time.Minute).Seconds()) },
		`compsc_vfmigration_total{result="succeeded",reason="Succeeded",pod="m"}`:           count(1),
		`compsc_vfmigration_total{result="failed",reason="Timeout",pod="m"}`:                count(3),
		`compsc_vfmigration_total{result="failed",reason="Aborted",pod="m"}`:                count(4),
		`compsc_vfmigration_total{result="failed",reason="NoFreeVF",pod="m"}`:               always(0),
		`compsc_vfmigration_rollbacks_total{result="incomplete",reason="Timeout",pod="m"}`:  count(7),
		`compsc_vfmigration_rollbacks_total{result="incomplete",reason="NoFreeVF",pod="m"}`: always(0),
	}
	const base = "compsc_vfmigration_"
	s.add(base+"duration_seconds", `result="succeeded"`, observed(9))
	s.add(base+"duration_seconds", `result="failed"`, nil)
	for i, phase := range []string{"Pinning", "Preparing", "Copying", "Switching", "Verifying"} {
		s.add(base+"phase_duration_seconds", fmt.Sprintf("phase=%q", phase), observed(float64(i+1)))
	}
	for i, step := range []string{"source/drain", "source/quiesce", "source/capture", "source/deliver", "source/mark", "source/hold",
		"target/arm", "target/load", "target/commit", "target/restore", "target/hold", "target/resume"} {
		s.add(base+"step_duration_seconds", fmt.Sprintf("step=%q", step), observed(float64(i+1)*.003))
	}
	for _, side := range []string{"source", "target"} {
		s.add(base+"gate_hold_seconds", fmt.Sprintf("side=%q", side), observed(.005))
	}
	for name, v := range map[string]float64{"vm_stopped_seconds": .077, "device_stopped_seconds": .076, "link_gap_seconds": .078, "state_bytes": 1043, "pages_marked": 566} {
		s.add(base+name, "", observed(v))
	}
	for i := range 3 {
		agent := fmt.Sprintf("pod=\"agent-%d\"", i)
		s[`compsc_build_info{role="agent",version="v1",`+agent+`}`] = always(1)
		s[`compsc_agent_pins{`+agent+`}`] = always(2)
		for state, n := range map[string]float64{"free": 5, "leased": 2, "unusable": 1} {
			s[fmt.Sprintf("compsc_agent_vfs{state=%q,%s}", state, agent)] = always(n)
		}
		for _, status := range []string{"True", "False", "Unknown"} {
			value := map[string]float64{"True": 1}[status]
			s[fmt.Sprintf("compsc_agent_condition{type=\"Ready\",status=%q,%s}", status, agent)] = always(value)
		}
	}
	return s
}

// TestDashboardShows: after a day on which a few VMs moved, hours apart, every
// panel shows something; on one without any, none shows what is no number.
func TestDashboardShows(t *testing.T) {
	quiet := []string{"Failed, by reason", "Standstill", "Whole migration and its phases", "Steps of the switchover, 95 %", "State of a VF, 95 %", "Pages marked, 95 %"}
	for _, test := range []struct {
		name  string
		all   series
		empty []string // panels that have nothing to show
	}{
		{"a few migrations", day(30*time.Minute, 2*time.Hour, 3*time.Hour, 5*time.Hour), nil},
		{"none", day(), quiet},
	} {
		db, e := database(t, test.all, shown), engine()
		for _, p := range dashboard(t) {
			n := 0
			for _, q := range p.Targets {
				v, err := results(e, db, variables.Replace(q.Expr), begin.Add(shown))
				if err != nil {
					t.Fatal(err)
				}
				n += len(v)
				for _, s := range v {
					if math.IsNaN(s.F) || math.IsInf(s.F, 0) {
						t.Errorf("%s: panel %q: %s is %v for %s", test.name, p.Title, q.Expr, s.F, s.Metric)
					}
				}
				if len(v) == 0 && !slices.Contains(test.empty, p.Title) {
					t.Errorf("%s: panel %q: nothing comes of %s", test.name, p.Title, q.Expr)
				}
			}
			if n > 0 && slices.Contains(test.empty, p.Title) {
				t.Errorf("%s: panel %q shows %d values", test.name, p.Title, n)
			}
		}
	}
}
