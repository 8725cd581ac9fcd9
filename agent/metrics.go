package agent

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/api/v1alpha1"
)

// The agent's metrics. hack/gendocs reads the literals to write the reference.
var (
	pins = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "compsc_agent_pins",
		Help: "VFs of this node that are leased to a pod.",
	})
	vfs = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "compsc_agent_vfs",
		Help: "VFs of this node, by state: free, leased, or unusable (status.pfs.vfs.obstacle of its VFNode says why).",
	}, []string{"state"})
	conditions = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "compsc_agent_condition",
		Help: "1 for the status (True, False, Unknown) that each condition of the node's VFNode has, 0 for those that it has not.",
	}, []string{"type", "status"})
	nodeHooks = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "compsc_agent_node_hooks_total",
		Help: "KubeVirt's calls of a node hook for a VM with VFs, by hook and by answer: go, or hold.",
	}, []string{"hook", "answer"})
)

// The answers to a node hook.
const answerGo, answerHold = "go", "hold"

// serveMetrics has this process serve the agent's metrics, which other processes
// of the same program do not.
var serveMetrics = sync.OnceFunc(func() {
	metrics.Registry.MustRegister(pins, vfs, conditions, nodeHooks)
	// Those that were never called are to be seen too.
	for _, p := range nodehook.Points {
		nodeHooks.WithLabelValues(string(p), answerGo)
		nodeHooks.WithLabelValues(string(p), answerHold)
	}
})

// observeHook counts a call of a node hook, and how it was answered.
func observeHook(p nodehook.Point, answer error) {
	a := answerGo
	if answer != nil {
		a = answerHold
	}
	nodeHooks.WithLabelValues(string(p), a).Inc()
}

// observeNode tells what the node's VFNode reports.
func observeNode(st *v1alpha1.VFNodeStatus) {
	number := map[string]int{"free": 0, "leased": 0, "unusable": 0}
	for _, pf := range st.PFs {
		for _, v := range pf.VFs {
			switch {
			case v.Holder != "":
				number["leased"]++
			case v.Obstacle != "":
				number["unusable"]++
			default:
				number["free"]++
			}
		}
	}
	pins.Set(float64(number["leased"]))
	for state, n := range number {
		vfs.WithLabelValues(state).Set(float64(n))
	}
	for _, c := range st.Conditions {
		for _, status := range []metav1.ConditionStatus{metav1.ConditionTrue, metav1.ConditionFalse, metav1.ConditionUnknown} {
			value := 0.0
			if c.Status == status {
				value = 1
			}
			conditions.WithLabelValues(c.Type, string(status)).Set(value)
		}
	}
}
