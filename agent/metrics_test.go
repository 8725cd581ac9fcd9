package agent

import (
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/api/v1alpha1"
)

// TestNodeHookCounted: a call is counted by its answer.
func TestNodeHookCounted(t *testing.T) {
	count := func(p nodehook.Point, answer string) float64 {
		t.Helper()
		out := &dto.Metric{}
		if err := nodeHooks.WithLabelValues(string(p), answer).Write(out); err != nil {
			t.Fatal(err)
		}
		return out.GetCounter().GetValue()
	}
	a := &agent{log: slog.New(slog.DiscardHandler)}
	for p, want := range map[nodehook.Point][2]float64{nodehook.PostVMStop: {1, 0}, "Sometimes": {0, 1}} {
		before := [2]float64{count(p, answerGo), count(p, answerHold)}
		err := a.NodeHook(t.Context(), &nodehook.Call{Point: p, VMI: &virtv1.VirtualMachineInstance{}})
		if got := [2]float64{count(p, answerGo) - before[0], count(p, answerHold) - before[1]}; got != want {
			t.Errorf("%s answers %v and counts %v, want %v", p, err, got, want)
		}
	}
}

func TestObserveNode(t *testing.T) {
	value := func(g prometheus.Gauge) float64 {
		t.Helper()
		out := &dto.Metric{}
		if err := g.Write(out); err != nil {
			t.Fatal(err)
		}
		return out.GetGauge().GetValue()
	}
	condition := func(status metav1.ConditionStatus) []metav1.Condition {
		return []metav1.Condition{{Type: v1alpha1.ConditionIntact, Status: status}}
	}
	type seen struct{ Pins, Free, Leased, Unusable, True, False, Unknown float64 }
	for _, tc := range []struct {
		status v1alpha1.VFNodeStatus
		want   seen
	}{
		{v1alpha1.VFNodeStatus{Conditions: condition(metav1.ConditionFalse), PFs: []v1alpha1.PFStatus{
			{VFs: []v1alpha1.VFStatus{{Holder: "vms/a"}, {Holder: "vms/b", Obstacle: "gone"}, {}}},
			{VFs: []v1alpha1.VFStatus{{Obstacle: "no IOMMU"}, {}, {}}},
		}}, seen{Pins: 2, Free: 3, Leased: 2, Unusable: 1, False: 1}},
		{v1alpha1.VFNodeStatus{Conditions: condition(metav1.ConditionTrue)}, seen{True: 1}},
	} {
		observeNode(&tc.status)
		status := func(s string) float64 {
			return value(conditions.WithLabelValues(v1alpha1.ConditionIntact, s))
		}
		got := seen{Pins: value(pins), Free: value(vfs.WithLabelValues("free")), Leased: value(vfs.WithLabelValues("leased")),
			Unusable: value(vfs.WithLabelValues("unusable")), True: status("True"), False: status("False"), Unknown: status("Unknown")}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}
