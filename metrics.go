package main

import (
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
)

// buildInfo is of the processes that serve metrics: manager and agent.
var buildInfo = prometheus.NewGaugeVec(prometheus.GaugeOpts{
	Name: "compsc_build_info",
	Help: "1, with the build's version and the process's role (manager, agent) as labels.",
}, []string{"version", "role"})

func init() { metrics.Registry.MustRegister(buildInfo) }
