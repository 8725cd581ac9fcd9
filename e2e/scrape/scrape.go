// Package scrape reads the metrics of processes, as a Prometheus would.
package scrape

import (
	"context"
	"net"
	"net/http"
	"slices"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/wait"
)

// agentAddress is the chart's agent.metricsPort, on each node.
const agentAddress = "127.0.0.1:9444"

// limit is how long a process may take to answer, which may have just been
// started.
const limit = 30 * time.Second

// Metrics are those of a process, by name.
type Metrics map[string]*dto.MetricFamily

// Agent reads the metrics of the agent of a node, on that node.
func Agent(ctx context.Context, node *lab.NS) (Metrics, error) {
	return Process(ctx, agentAddress, func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = node.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	})
}

// Process reads the metrics that are served at an address, as dial reaches it.
func Process(ctx context.Context, address string, dial func(ctx context.Context, network, address string) (net.Conn, error)) (m Metrics, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	err = wait.Until(ctx, "metrics at "+address, func(ctx context.Context) (bool, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
		if err != nil {
			return false, err
		}
		answer, err := c.Do(r)
		if err != nil {
			return false, nil
		}
		defer answer.Body.Close()
		p := expfmt.NewTextParser(model.UTF8Validation)
		m, err = p.TextToMetricFamilies(answer.Body)
		return err == nil, err
	})
	return m, err
}

// Value is that of the series of a metric with these labels, in pairs; of a
// histogram the number of its observations. No such series is 0.
func (m Metrics) Value(name string, labels ...string) float64 {
	f := m[name]
	if f == nil {
		return 0
	}
	for _, s := range f.Metric {
		matches := len(s.Label)*2 == len(labels)
		for i := 0; matches && i < len(labels); i += 2 {
			matches = slices.ContainsFunc(s.Label, func(l *dto.LabelPair) bool { return l.GetName() == labels[i] && l.GetValue() == labels[i+1] })
		}
		if matches {
			return s.GetCounter().GetValue() + s.GetGauge().GetValue() + float64(s.GetHistogram().GetSampleCount())
		}
	}
	return 0
}
