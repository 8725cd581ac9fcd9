package controllers

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

func TestAccept(t *testing.T) {
	to := func(target v1alpha1.VFMigrationTarget) func(*fixture) {
		return func(f *fixture) { f.vfm.Spec.Target = &target }
	}
	for name, arrange := range map[string]func(*fixture){
		"any target":              func(*fixture) {},
		"named interface":         func(f *fixture) { f.vfm.Spec.Interfaces = []string{"fast"} },
		"target by name":          to(v1alpha1.VFMigrationTarget{NodeName: "node-b"}),
		"target by label":         to(v1alpha1.VFMigrationTarget{NodeSelector: map[string]string{"zone": "z-node-b"}}),
		"target without a Node":   func(f *fixture) { delete(f.nodes, "node-b"); to(v1alpha1.VFMigrationTarget{NodeName: "node-b"})(f) },
		"one of two has free VFs": func(f *fixture) { f.addNode("node-c"); f.vfnodes["node-b"].Status.PFs = nil },
		"newer agents that speak the manager's version": func(f *fixture) {
			for _, n := range f.vfnodes {
				n.Status.Protocols = &v1alpha1.ProtocolRange{Oldest: 1, Newest: 2}
			}
		},
		"younger one waits": func(f *fixture) { f.others = append(f.others, otherVFM("later", time.Minute)) },
		"older one is over": func(f *fixture) {
			o := otherVFM("earlier", -time.Minute)
			setCondition(&o.Status, v1alpha1.ConditionSucceeded, metav1.ConditionTrue, "Succeeded", "", 0)
			f.others = append(f.others, o)
		},
		"other VM's migration": func(f *fixture) {
			o := otherVFM("earlier", -time.Minute)
			o.Spec.VMIName = "vm2"
			f.others = append(f.others, o, otherVMIM("other", "vm2", virtv1.MigrationRunning))
		},
		"KubeVirt's is over": func(f *fixture) { f.others = append(f.others, otherVMIM("other", "vm", virtv1.MigrationFailed)) },
		"source pod of an earlier hop is left over": func(f *fixture) {
			old := launcher("launcher-old", "node-a")
			old.CreationTimestamp, old.Status.Phase = at(time.Minute), corev1.PodSucceeded
			f.others = append(f.others, old)
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture()
			arrange(f)
			started := "Normal MigrationStarted: Moving VirtualMachineInstance vm with its VFs away from node node-a"
			f.check(t, expect{
				events: []string{"VMI " + started, "VFMigration " + started},
				status: func(st *v1alpha1.VFMigrationStatus) {
					now := at(time.Second)
					st.ObservedGeneration, st.Phase, st.StartTime = 3, v1alpha1.PhasePinning, &now
					st.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "node-a", PodName: "launcher-a", PodUID: "launcher-a-uid"}
					setCondition(st, v1alpha1.ConditionAccepted, metav1.ConditionTrue, v1alpha1.ConditionAccepted,
						"Everything known beforehand allows the migration.", time.Second)
					setCondition(st, v1alpha1.ConditionSucceeded, metav1.ConditionUnknown, v1alpha1.ReasonProgressing, "The migration is under way.", time.Second)
				},
			})
		})
	}
}

func otherVFM(name string, age time.Duration) *v1alpha1.VFMigration {
	m := newFixture().vfm
	m.Name, m.UID, m.CreationTimestamp = name, "uid-of-other", at(age)
	return m
}

func otherVMIM(name, vmi string, phase virtv1.VirtualMachineInstanceMigrationPhase) *virtv1.VirtualMachineInstanceMigration {
	return &virtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: name, UID: "uid-of-other"},
		Spec:       virtv1.VirtualMachineInstanceMigrationSpec{VMIName: vmi},
		Status:     virtv1.VirtualMachineInstanceMigrationStatus{Phase: phase},
	}
}

func TestRefuse(t *testing.T) {
	const busy = "VFMigration other is moving VirtualMachineInstance vm; wait for its end or abort it, then create a new VFMigration"
	for _, tc := range []struct {
		name, reason, message string
		arrange               func(*fixture)
	}{
		{"no VMI", v1alpha1.ReasonVMINotFound,
			"namespace vms has no VirtualMachineInstance vm; check spec.vmiName, and start the VM",
			func(f *fixture) { f.vmi = nil }},
		{"VMI not running", v1alpha1.ReasonVMINotRunning,
			`VirtualMachineInstance vm is in phase "Scheduled"; only a running VM can be moved`,
			func(f *fixture) { f.vmi.Status.Phase = virtv1.Scheduled }},
		{"VMI being deleted", v1alpha1.ReasonVMINotRunning,
			"VirtualMachineInstance vm is being deleted; only a running VM can be moved",
			func(f *fixture) { now := at(0); f.vmi.DeletionTimestamp, f.vmi.Finalizers = &now, []string{"x/y"} }},
		{"no pod", v1alpha1.ReasonVMINotRunning,
			"VirtualMachineInstance vm has no running virt-launcher pod on its node node-a; see the VMI's events",
			func(f *fixture) { f.sourcePod.Status.Phase = corev1.PodFailed }},
		{"no such interface", v1alpha1.ReasonInterfaceNotFound,
			`VirtualMachineInstance vm has no interface "default" with network binding "compsc"; those with it are: fast`,
			func(f *fixture) { f.vfm.Spec.Interfaces = []string{"fast", "default"} }},
		{"no interface at all", v1alpha1.ReasonInterfaceNotFound,
			`VirtualMachineInstance vm has no interface with network binding "compsc"; without one, use a VirtualMachineInstanceMigration`,
			func(f *fixture) { f.vmi.Spec.Domain.Devices.Interfaces = nil }},
		{"older VFMigration", v1alpha1.ReasonMigrationInProgress, busy,
			func(f *fixture) { f.others = append(f.others, otherVFM("other", -time.Minute)) }},
		{"VFMigration of the same second with lower UID", v1alpha1.ReasonMigrationInProgress, busy,
			func(f *fixture) { f.others = append(f.others, otherVFM("other", 0)) }},
		{"younger VFMigration that was accepted", v1alpha1.ReasonMigrationInProgress, busy,
			func(f *fixture) {
				o := otherVFM("other", time.Minute)
				setCondition(&o.Status, v1alpha1.ConditionAccepted, metav1.ConditionTrue, "Accepted", "", 0)
				f.others = append(f.others, o)
			}},
		{"KubeVirt's own migration", v1alpha1.ReasonMigrationInProgress,
			"VirtualMachineInstanceMigration drain is moving VirtualMachineInstance vm; wait for its end or delete it, then create a new VFMigration",
			func(f *fixture) { f.others = append(f.others, otherVMIM("drain", "vm", virtv1.MigrationRunning)) }},
		{"name taken", v1alpha1.ReasonMigrationInProgress,
			"a VirtualMachineInstanceMigration move exists that is not this VFMigration's; delete it, or create a VFMigration of another name",
			func(f *fixture) { f.others = append(f.others, otherVMIM("move", "vm", virtv1.MigrationSucceeded)) }},
		{"source without VFNode", v1alpha1.ReasonAgentUnavailable,
			"the source node node-a has no VFNode; see that the compsc agent runs there",
			func(f *fixture) { delete(f.vfnodes, "node-a") }},
		{"source agent dead", v1alpha1.ReasonAgentUnavailable,
			"the agent of the source node node-a is not available: lease compsc-system/agent-node-a does not exist; see that the compsc agent runs there",
			func(f *fixture) { delete(f.leases, "node-a") }},
		{"source agent too new", v1alpha1.ReasonVersionMismatch,
			"the agent of node node-a (v9) speaks version 2 to 3 of CompSC's protocol, the manager version 1; finish the upgrade of CompSC first",
			func(f *fixture) {
				f.vfnodes["node-a"].Status.AgentVersion = "v9"
				f.vfnodes["node-a"].Status.Protocols = &v1alpha1.ProtocolRange{Oldest: 2, Newest: 3}
			}},
		{"target agent too new", v1alpha1.ReasonVersionMismatch,
			"the agent of node node-b (v9) speaks version 2 of CompSC's protocol, the manager version 1; finish the upgrade of CompSC first",
			func(f *fixture) {
				f.vfnodes["node-b"].Status.AgentVersion = "v9"
				f.vfnodes["node-b"].Status.Protocols = &v1alpha1.ProtocolRange{Oldest: 2, Newest: 2}
			}},
		{"fast path of no interface", v1alpha1.ReasonInterfaceNotFound,
			`VirtualMachineInstance vm: annotation compsc.io/fast-path names interface "default", and the VMI's interfaces with network binding compsc are: fast; correct it and restart the VM`,
			func(f *fixture) { f.vmi.Annotations = map[string]string{v1alpha1.AnnotationFastPath: "default"} }},
		{"fast path without dirty bits", v1alpha1.ReasonImmovable,
			"VF 0000:01:10.0 on the source node node-a cannot be moved: nothing tells what it writes",
			func(f *fixture) {
				vf := &f.vfnodes["node-a"].Status.PFs[0].VFs[0]
				vf.FastPath, vf.Immovable = true, "nothing tells what it writes"
			}},
		{"source VF unknown", v1alpha1.ReasonDeviceUnavailable,
			`VFNode node-a lists 0 VFs held by pod vms/launcher-a, its VMI has 1 interfaces with network binding "compsc"; see the compsc agent's log on that node`,
			func(f *fixture) { f.vfnodes["node-a"].Status.PFs[0].VFs[0].Holder = "" }},
		{"target is the source", v1alpha1.ReasonTargetNotFound,
			"spec.target.nodeName node-a is the node that the VM runs on; name another node",
			func(f *fixture) { f.vfm.Spec.Target = &v1alpha1.VFMigrationTarget{NodeName: "node-a"} }},
		{"target does not exist", v1alpha1.ReasonTargetNotFound,
			"no node is named node-x; correct spec.target.nodeName in a new VFMigration",
			func(f *fixture) { f.vfm.Spec.Target = &v1alpha1.VFMigrationTarget{NodeName: "node-x"} }},
		{"target without VFNode", v1alpha1.ReasonAgentUnavailable,
			"node node-b has no VFNode; see that the compsc agent runs there",
			func(f *fixture) {
				delete(f.vfnodes, "node-b")
				f.vfm.Spec.Target = &v1alpha1.VFMigrationTarget{NodeName: "node-b"}
			}},
		{"selector matches the source only", v1alpha1.ReasonTargetNotFound,
			"no node but the source node-a has a VFNode and the labels zone=z-node-a; correct spec.target.nodeSelector in a new VFMigration",
			func(f *fixture) {
				f.vfm.Spec.Target = &v1alpha1.VFMigrationTarget{NodeSelector: map[string]string{"zone": "z-node-a"}}
			}},
		{"no other node", v1alpha1.ReasonTargetNotFound,
			"no node but the source node-a has a VFNode; see that the compsc agent runs on other nodes",
			func(f *fixture) { f.dropNode("node-b") }},
		{"target lease ended", v1alpha1.ReasonAgentUnavailable,
			"no agent of a possible target node is available (node-b: lease compsc-system/agent-node-b ended at 2026-01-02T03:04:06Z); see that the compsc agent runs there",
			func(f *fixture) { s := int32(1); f.leases["node-b"].Spec.LeaseDurationSeconds = &s }},
		{"target lease given back", v1alpha1.ReasonAgentUnavailable,
			"no agent of a possible target node is available (node-b: lease compsc-system/agent-node-b is not held); see that the compsc agent runs there",
			func(f *fixture) { f.leases["node-b"].Spec.HolderIdentity = new(string) }},
		{"target not ready", v1alpha1.ReasonAgentUnavailable,
			"no agent of a possible target node is available (node-b: its VFNode is not ready (NoPF: no PF found)); see that the compsc agent runs there",
			func(f *fixture) {
				f.vfnodes["node-b"].Status.Conditions = []metav1.Condition{
					{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: "NoPF", Message: "no PF found"}}
			}},
		{"no free VF", v1alpha1.ReasonNoFreeVF,
			"no node has enough free VFs (node-b: 0 free of 1 needed with device ID 8086:10ed); free some, or add VFs there; without an available agent: node-c: lease compsc-system/agent-node-c does not exist",
			func(f *fixture) {
				vfs := f.vfnodes["node-b"].Status.PFs[0].VFs
				vfs[0].DeviceID, vfs[1].Holder = "8086:10ca", "vms/other"
				f.other("node-b")
				f.addNode("node-c")
				delete(f.leases, "node-c")
			}},
		{"one free VF for two interfaces", v1alpha1.ReasonNoFreeVF,
			"no node has enough free VFs (node-b: 1 free of 2 needed with device ID 8086:10ed); free some, or add VFs there",
			func(f *fixture) {
				second := virtv1.Interface{Name: "second", Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}}
				f.vmi.Spec.Domain.Devices.Interfaces = append(f.vmi.Spec.Domain.Devices.Interfaces, second)
				f.vfnodes["node-a"].Status.PFs[0].VFs[1].Holder = "vms/launcher-a"
				f.vfnodes["node-b"].Status.PFs[0].VFs[1].Holder = "vms/other"
				f.other("node-b")
			}},
		{"abort", v1alpha1.ReasonAborted, "spec.abort was set; to move the VM, create a new VFMigration",
			func(f *fixture) { f.vfm.Spec.Abort = true }},
		{"deleted", v1alpha1.ReasonDeleted, "the VFMigration was deleted before its end",
			func(f *fixture) { now := at(0); f.vfm.DeletionTimestamp = &now }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture()
			tc.arrange(f)
			told := "Warning PreflightFailed: " + tc.reason + ": " + tc.message
			events := []string{"VMI " + told, "VFMigration " + told}
			if f.vmi == nil {
				events = events[1:]
			}
			if !f.vfm.DeletionTimestamp.IsZero() {
				f.checkDeleted(t, events)
				return
			}
			f.check(t, expect{
				events: events,
				status: func(st *v1alpha1.VFMigrationStatus) {
					now := at(time.Second)
					st.ObservedGeneration, st.Phase, st.CompletionTime = 3, v1alpha1.PhaseFailed, &now
					st.Failure = &v1alpha1.VFMigrationFailure{Reason: tc.reason, Message: tc.message, Time: now}
					setCondition(st, v1alpha1.ConditionAccepted, metav1.ConditionFalse, tc.reason, tc.message, time.Second)
					setCondition(st, v1alpha1.ConditionSucceeded, metav1.ConditionFalse, tc.reason, tc.message, time.Second)
				},
			})
		})
	}
}

// checkDeleted reconciles until the VFMigration is gone, which takes two rounds.
func (f *fixture) checkDeleted(t *testing.T, events []string) {
	t.Helper()
	c := f.start(t)
	for range 2 {
		if _, err := c.reconcile(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Get(t.Context(), client.ObjectKeyFromObject(f.vfm), &v1alpha1.VFMigration{}); client.IgnoreNotFound(err) != nil || err == nil {
		t.Errorf("the VFMigration keeps its finalizer (%v)", err)
	}
	if got, want := strings.Join(c.rec.events, "\n"), strings.Join(events, "\n"); got != want {
		t.Errorf("events:\n%s\nwant:\n%s", got, want)
	}
}

// An API server that does not answer is no reason to refuse.
func TestPreflightErrorIsRetried(t *testing.T) {
	for _, kind := range []string{
		"VirtualMachineInstance", "Lease", "Node", "VFMigrationList", "VirtualMachineInstanceMigrationList", "PodList", "VFNodeList",
	} {
		t.Run(kind, func(t *testing.T) {
			f := newFixture()
			f.vfm.Spec.Target = &v1alpha1.VFMigrationTarget{NodeSelector: map[string]string{"zone": "z-node-b"}}
			broken := errors.New("broken")
			typeName := func(o any) string {
				_, name, _ := strings.Cut(strings.TrimPrefix(typeString(o), "*"), ".")
				return name
			}
			f.funcs = interceptor.Funcs{
				Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
					if typeName(o) == kind {
						return broken
					}
					return c.Get(ctx, key, o, opts...)
				},
				List: func(ctx context.Context, c client.WithWatch, l client.ObjectList, opts ...client.ListOption) error {
					if typeName(l) == kind {
						return broken
					}
					return c.List(ctx, l, opts...)
				},
			}
			c := f.start(t)
			if _, err := c.reconcile(t.Context()); !errors.Is(err, broken) {
				t.Errorf("error %v, want %v", err, broken)
			}
			if m := c.vfm(t); m.Status.Failure != nil || isTerminal(m) {
				t.Errorf("the migration was ended: %+v", m.Status)
			}
		})
	}
}
