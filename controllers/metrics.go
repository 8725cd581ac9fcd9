package controllers

import (
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"compsc.io/compsc/api/v1alpha1"
)

// The manager's metrics. Labels take documented reasons only, never names of
// VMs or nodes.
var (
	migrations = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "compsc_vfmigration_total",
		Help: "VFMigrations that came to their end, by result (succeeded, failed) and reason.",
	}, []string{"result", "reason"})
	vmStopped = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_vm_stopped_seconds",
		Help:    "How long the VM stood still in a migration that succeeded.",
		Buckets: stopBuckets,
	})
	deviceStopped = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_device_stopped_seconds",
		Help:    "How long the VFs stood still in a migration that succeeded.",
		Buckets: stopBuckets,
	})
	stopBuckets = []float64{.01, .025, .05, .1, .2, .3, .5, .75, 1, 2.5, 5, 10}
)

func init() { metrics.Registry.MustRegister(migrations, vmStopped, deviceStopped) }

// observeEnd counts a VFMigration that has just come to its end.
func observeEnd(m *v1alpha1.VFMigration) {
	result := "succeeded"
	reason := v1alpha1.ConditionSucceeded
	if m.Status.Phase == v1alpha1.PhaseFailed {
		result, reason = "failed", m.Status.Failure.Reason
	}
	migrations.WithLabelValues(result, reason).Inc()
	if d := m.Status.Downtime; d != nil && result == "succeeded" {
		vmStopped.Observe(d.VMStopped.Seconds())
		deviceStopped.Observe(d.DeviceStopped.Seconds())
	}
}
