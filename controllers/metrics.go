package controllers

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"compsc.io/compsc/api/v1alpha1"
)

// The manager's metrics. Labels take documented phases and reasons and known
// steps only, never names of VMs or nodes. hack/gendocs reads the literals
// below to write the reference.
var (
	migrations = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "compsc_vfmigration_total",
		Help: "VFMigrations that came to their end, by result (succeeded, failed) and reason.",
	}, []string{"result", "reason"})
	duration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_duration_seconds",
		Help:    "From the acceptance of a VFMigration to its end, by result (succeeded, failed). Whole seconds.",
		Buckets: longBuckets,
	}, []string{"result"})
	phaseDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "compsc_vfmigration_phase_duration_seconds",
		Help: "How long each phase of a VFMigration that succeeded lasted. Whole seconds, from the times of its conditions, " +
			"which several nodes' clocks gave.",
		Buckets: longBuckets,
	}, []string{"phase"})
	stepDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_step_duration_seconds",
		Help:    "How long each step of a switchover that succeeded took (status.steps); a step that is not known counts as other.",
		Buckets: stepBuckets,
	}, []string{"step"})
	gateHold = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_gate_hold_seconds",
		Help:    "How long QEMU was held in the switchover gate of each side (source, target) in a VFMigration that succeeded.",
		Buckets: stopBuckets,
	}, []string{"side"})
	vmStopped = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_vm_stopped_seconds",
		Help:    "How long the VM stood still in a VFMigration that succeeded.",
		Buckets: stopBuckets,
	})
	deviceStopped = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_device_stopped_seconds",
		Help:    "How long the VFs stood still in a VFMigration that succeeded.",
		Buckets: stopBuckets,
	})
	linkGap = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "compsc_vfmigration_link_gap_seconds",
		Help: "How long the VFs passed no frames, from their stop on the source to the first frames on the target, in a VFMigration that succeeded. " +
			"A VM without traffic in its first second on the target is not counted.",
		Buckets: stopBuckets,
	})
	stateBytes = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_state_bytes",
		Help:    "Size of the state of one VF as it was sent, for each VF of a VFMigration that succeeded.",
		Buckets: prometheus.ExponentialBuckets(256, 2, 10),
	})
	pagesMarked = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "compsc_vfmigration_pages_marked",
		Help:    "Guest pages that one VF had written and that were marked for QEMU to send again, for each VF of a VFMigration that succeeded.",
		Buckets: prometheus.ExponentialBuckets(1, 4, 10),
	})
	rollbacks = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "compsc_vfmigration_rollbacks_total",
		Help: "VFMigrations that failed after they were accepted, by result (complete: all was undone and confirmed; " +
			"incomplete: the message of condition Succeeded says what was not) and reason.",
	}, []string{"result", "reason"})

	longBuckets = []float64{1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600}
	stepBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	stopBuckets = []float64{.01, .025, .05, .1, .2, .3, .5, .75, 1, 2.5, 5, 10}
)

// otherStep stands for steps that are not among these.
const otherStep = "other"

// steps are the names that the agents and device processes give to the steps
// of a switchover.
var steps = map[string]bool{
	"source/drain": true, "source/quiesce": true, "source/capture": true, "source/deliver": true, "source/mark": true, "source/hold": true,
	"target/arm": true, "target/load": true, "target/commit": true, "target/restore": true, "target/hold": true, "target/resume": true,
}

// phases are those that a migration that goes well passes through, with the
// conditions that end them.
var phases = []struct {
	phase v1alpha1.VFMigrationPhase
	end   string
}{
	{v1alpha1.PhasePinning, v1alpha1.ConditionTargetPinned},
	{v1alpha1.PhasePreparing, v1alpha1.ConditionPrepared},
	{v1alpha1.PhaseCopying, v1alpha1.ConditionCaptured},
	{v1alpha1.PhaseSwitching, v1alpha1.ConditionRestored},
	{v1alpha1.PhaseVerifying, v1alpha1.ConditionSucceeded},
}

// failureReasons are the reasons that status.failure may have.
var failureReasons = []string{
	v1alpha1.ReasonVMINotFound, v1alpha1.ReasonVMINotRunning, v1alpha1.ReasonInterfaceNotFound,
	v1alpha1.ReasonPostCopyAllowed, v1alpha1.ReasonDecentralized, v1alpha1.ReasonMigrationInProgress, v1alpha1.ReasonTargetNotFound,
	v1alpha1.ReasonAgentUnavailable, v1alpha1.ReasonNoFreeVF, v1alpha1.ReasonVersionMismatch, v1alpha1.ReasonIncompatible, v1alpha1.ReasonImmovable,
	v1alpha1.ReasonPinFailed,
	v1alpha1.ReasonPeerUnavailable, v1alpha1.ReasonDeviceUnavailable, v1alpha1.ReasonCaptureFailed, v1alpha1.ReasonStateRejected,
	v1alpha1.ReasonRestoreFailed, v1alpha1.ReasonMigrationFailed, v1alpha1.ReasonTimeout, v1alpha1.ReasonAborted, v1alpha1.ReasonDeleted,
	v1alpha1.ReasonPointOfNoReturn,
}

// serveMetrics has this process serve the manager's metrics, which other
// processes of the same program do not.
var serveMetrics = sync.OnceFunc(func() {
	startSeries()
	metrics.Registry.MustRegister(migrations, duration, phaseDuration, stepDuration, gateHold, vmStopped, deviceStopped, linkGap,
		stateBytes, pagesMarked, rollbacks, underWayNow)
})

// startSeries has every series be there from the start: of one that appears with
// its first migration, nobody could tell that it was increased.
func startSeries() {
	for _, result := range []string{"succeeded", "failed"} {
		duration.WithLabelValues(result)
	}
	for _, p := range phases {
		phaseDuration.WithLabelValues(string(p.phase))
	}
	for step := range steps {
		stepDuration.WithLabelValues(step)
	}
	stepDuration.WithLabelValues(otherStep)
	for _, side := range []string{"source", "target"} {
		gateHold.WithLabelValues(side)
	}
	migrations.WithLabelValues("succeeded", v1alpha1.ConditionSucceeded)
	for _, reason := range failureReasons {
		migrations.WithLabelValues("failed", reason)
		for _, result := range []string{"complete", "incomplete"} {
			rollbacks.WithLabelValues(result, reason)
		}
	}
}

// observeEnd counts a VFMigration that has just come to its end.
func observeEnd(s *scope) {
	st := &s.vfm.Status
	result, reason := "succeeded", v1alpha1.ConditionSucceeded
	if s.outcome == failed {
		result, reason = "failed", st.Failure.Reason
	}
	migrations.WithLabelValues(result, reason).Inc()
	if st.StartTime != nil && st.CompletionTime != nil {
		observeSpan(duration.WithLabelValues(result), st.StartTime.Time, st.CompletionTime.Time)
	}
	if s.outcome == failed {
		if s.is(v1alpha1.ConditionAccepted) {
			undone := "complete"
			if s.remark != "" {
				undone = "incomplete"
			}
			rollbacks.WithLabelValues(undone, reason).Inc()
		}
		return
	}
	observePhases(s)
	for _, step := range st.Steps {
		name := step.Name
		if !steps[name] {
			name = otherStep
		}
		stepDuration.WithLabelValues(name).Observe(step.Took.Seconds())
		switch name {
		case "source/hold":
			gateHold.WithLabelValues("source").Observe(step.Took.Seconds())
		case "target/hold":
			gateHold.WithLabelValues("target").Observe(step.Took.Seconds())
		}
	}
	for _, d := range st.Devices {
		stateBytes.Observe(float64(d.StateBytes))
		pagesMarked.Observe(float64(d.PagesMarked))
	}
	if d := st.Downtime; d != nil {
		vmStopped.Observe(d.VMStopped.Seconds())
		deviceStopped.Observe(d.DeviceStopped.Seconds())
		if d.LinkGap != nil {
			linkGap.Observe(d.LinkGap.Seconds())
		}
	}
}

// observePhases takes the phases' lengths from the conditions that end them. A
// condition that nobody wrote ends no phase.
func observePhases(s *scope) {
	begin := s.vfm.Status.StartTime
	for _, p := range phases {
		c := s.condition(p.end)
		if c.Status != metav1.ConditionTrue {
			begin = nil
			continue
		}
		if begin != nil {
			observeSpan(phaseDuration.WithLabelValues(string(p.phase)), begin.Time, c.LastTransitionTime.Time)
		}
		begin = &c.LastTransitionTime
	}
}

// observeSpan observes the seconds from begin to end, none if the clocks that
// they are from disagree about their order.
func observeSpan(o prometheus.Observer, begin, end time.Time) {
	o.Observe(max(end.Sub(begin), 0).Seconds())
}

// underWayNow tells of the VFMigrations under way, from the cache of the
// manager that acts; one that only waits to be elected has no cache and tells
// nothing.
var underWayNow = &inProgress{
	number: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "compsc_vfmigrations",
		Help: "VFMigrations under way, by phase.",
	}, []string{"phase"}),
	oldest: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "compsc_vfmigration_oldest_age_seconds",
		Help: "How long ago the oldest VFMigration under way was accepted, 0 when there is none.",
	}),
	overdue: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "compsc_vfmigrations_overdue",
		Help: "VFMigrations under way for longer than their own timeouts and the bounds of the rest together allow.",
	}),
}

// inProgress collects when metrics are asked for.
type inProgress struct {
	number          *prometheus.GaugeVec
	oldest, overdue prometheus.Gauge
	from            atomic.Pointer[snapshot]
}

// snapshot is where an inProgress reads.
type snapshot struct {
	client client.Reader
	clock  clock.PassiveClock
}

// collectTimeout bounds the wait for a cache that is being filled.
const collectTimeout = 2 * time.Second

// read has the metrics come from c from now on.
func (p *inProgress) read(c client.Reader, k clock.PassiveClock) { p.from.Store(&snapshot{c, k}) }

// Describe implements prometheus.Collector.
func (p *inProgress) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range []prometheus.Collector{p.number, p.oldest, p.overdue} {
		c.Describe(ch)
	}
}

// Collect implements prometheus.Collector. What cannot be read is left out.
func (p *inProgress) Collect(ch chan<- prometheus.Metric) {
	from := p.from.Load()
	if from == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	var list v1alpha1.VFMigrationList
	if err := from.client.List(ctx, &list); err != nil {
		return
	}
	now := from.clock.Now()
	number := map[v1alpha1.VFMigrationPhase]float64{}
	for _, phase := range []v1alpha1.VFMigrationPhase{
		v1alpha1.PhasePending, v1alpha1.PhasePinning, v1alpha1.PhasePreparing, v1alpha1.PhaseCopying,
		v1alpha1.PhaseSwitching, v1alpha1.PhaseVerifying, v1alpha1.PhaseRollingBack,
	} {
		number[phase] = 0
	}
	var oldest time.Duration
	overdue := 0
	for i := range list.Items {
		m := &list.Items[i]
		if isTerminal(m) {
			continue
		}
		phase := m.Status.Phase
		if phase == "" {
			phase = v1alpha1.PhasePending
		}
		number[phase]++
		if start := m.Status.StartTime; start != nil {
			age := now.Sub(start.Time)
			oldest = max(oldest, age)
			if age > longest(m) {
				overdue++
			}
		}
	}
	for phase, n := range number {
		ch <- prometheus.MustNewConstMetric(desc(p.number), prometheus.GaugeValue, n, string(phase))
	}
	ch <- prometheus.MustNewConstMetric(p.oldest.Desc(), prometheus.GaugeValue, oldest.Seconds())
	ch <- prometheus.MustNewConstMetric(p.overdue.Desc(), prometheus.GaugeValue, float64(overdue))
}

// longest is how long a VFMigration can take until all its bounds are over: to
// prepare and to migrate, or to finish, and then to be undone.
func longest(m *v1alpha1.VFMigration) time.Duration {
	t := &m.Spec.Timeouts
	return t.PrepareTimeout() + t.MigrateTimeout() + FinishTimeout + RollbackTimeout
}

// desc is the description of a vector's metrics.
func desc(c prometheus.Collector) *prometheus.Desc {
	ch := make(chan *prometheus.Desc, 1)
	c.Describe(ch)
	return <-ch
}
