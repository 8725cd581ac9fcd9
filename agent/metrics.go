package agent

import (
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

var (
	pins = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "compsc_agent_pins",
		Help: "VFs of this node that are leased to a pod.",
	})
	buildInfo = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "compsc_build_info",
		Help: "1, with the build's version and the process's role as labels.",
	}, []string{"version", "role"})
)

func init() {
	metrics.Registry.MustRegister(pins, buildInfo)
}
