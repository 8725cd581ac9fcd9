package rules

import (
	"context"
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

// interval is how often metrics are scraped, and rules evaluated.
const interval = 30 * time.Second

// begin is when series begin: a time that is not zero, to which nothing is equal.
var begin = time.Unix(1_700_000_000, 0)

// gone is the value of a series while it is not there.
var gone = math.NaN()

// series tells the value of each series, by its text, at a time since begin.
type series map[string]func(time.Duration) float64

func always(v float64) func(time.Duration) float64 {
	return func(time.Duration) float64 { return v }
}

// then is before up to a time, and after from it on.
func then(before float64, at time.Duration, after float64) func(time.Duration) float64 {
	return func(t time.Duration) float64 {
		if t < at {
			return before
		}
		return after
	}
}

type sample struct {
	t int64
	v float64
}

func (s sample) T() int64                      { return s.t }
func (s sample) ST() int64                     { return 0 }
func (s sample) F() float64                    { return s.v }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return nil }
func (s sample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s sample) Copy() chunks.Sample           { return s }

// set is a list of series, read one after another.
type set struct {
	list []storage.Series
	at   int
}

func (s *set) Next() bool                        { s.at++; return s.at < len(s.list) }
func (s *set) At() storage.Series                { return s.list[s.at] }
func (s *set) Err() error                        { return nil }
func (s *set) Warnings() annotations.Annotations { return nil }

// database is what the series are for a length of time.
func database(t *testing.T, all series, length time.Duration) storage.Queryable {
	t.Helper()
	var list []storage.Series
	for text, value := range all {
		lset, err := parser.NewParser(parser.Options{}).ParseMetric(text)
		if err != nil {
			t.Fatalf("series %s: %v", text, err)
		}
		var samples []chunks.Sample
		for d := time.Duration(0); d <= length; d += interval {
			if v := value(d); !math.IsNaN(v) {
				samples = append(samples, sample{begin.Add(d).UnixMilli(), v})
			}
		}
		list = append(list, storage.NewListSeries(lset, samples))
	}
	slices.SortFunc(list, func(a, b storage.Series) int { return labels.Compare(a.Labels(), b.Labels()) })
	return &storage.MockQueryable{MockQuerier: &storage.MockQuerier{
		SelectMockFunction: func(_ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
			s := &set{at: -1}
			for _, one := range list {
				if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(one.Labels().Get(m.Name)) }) {
					s.list = append(s.list, one)
				}
			}
			return s
		},
	}}
}

// engine evaluates as a Prometheus of default settings does.
func engine() *promql.Engine {
	return promql.NewEngine(promql.EngineOpts{
		MaxSamples: 1_000_000, Timeout: time.Minute, LookbackDelta: 5 * time.Minute,
		EnableAtModifier: true, EnableNegativeOffset: true, Parser: parser.NewParser(parser.Options{}),
		NoStepSubqueryIntervalFn: func(int64) int64 { return interval.Milliseconds() },
	})
}

// firing tells whether an alert with the expression fires at the end of a
// length of time: the expression has had a result for as long as its For asks.
func firing(t *testing.T, expr string, hold time.Duration, all series, length time.Duration) bool {
	t.Helper()
	db, e := database(t, all, length), engine()
	for d := max(length-hold, 0); d <= length; d += interval {
		v, err := results(e, db, expr, begin.Add(d))
		if err != nil {
			t.Fatal(err)
		}
		if len(v) == 0 {
			return false
		}
	}
	return true
}

func results(e *promql.Engine, db storage.Queryable, expr string, at time.Time) (promql.Vector, error) {
	q, err := e.NewInstantQuery(context.Background(), db, nil, expr, at)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", expr, err)
	}
	defer q.Close()
	v, err := q.Exec(context.Background()).Vector()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", expr, err)
	}
	return slices.Clone(v), nil
}
