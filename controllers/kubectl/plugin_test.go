package kubectl

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/agent/kubevirt"
	kubecluster "compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/api/v1alpha1"
)

// began is when everything in these tests was created.
var began = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// kubectlCluster is a cluster of two nodes with VM db on node-a.
func kubectlCluster() []client.Object {
	vmi := &virtv1.VirtualMachineInstance{
		ObjectMeta: metav1.ObjectMeta{Namespace: "vms", Name: "db", UID: "vmi"},
		Status:     virtv1.VirtualMachineInstanceStatus{Phase: virtv1.Running, NodeName: "node-a"},
	}
	vmi.Spec.Domain.Devices.Interfaces = []virtv1.Interface{{Name: "fast", Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}}}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "vms", Name: "launcher", UID: "pod",
			Labels: map[string]string{kubevirt.LabelApp: kubevirt.AppLauncher, kubevirt.LabelCreatedBy: "vmi"}},
		Spec: corev1.PodSpec{NodeName: "node-a"}, Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	objects := []client.Object{vmi, pod, &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: "vms", Name: "plain"}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "vms"}}}
	for i, name := range []string{"node-a", "node-b"} {
		vf := v1alpha1.VFStatus{Address: "0000:01:10.0", DeviceID: "8086:10ed"}
		if i == 0 {
			vf.Holder = "vms/launcher"
		}
		seconds, renewed := int32(10), metav1.NewMicroTime(began)
		objects = append(objects, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}},
			&v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: name},
				Status: v1alpha1.VFNodeStatus{PFs: []v1alpha1.PFStatus{{Name: "pf0", Backend: "model", VFs: []v1alpha1.VFStatus{vf}}}}},
			&coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: v1alpha1.AgentLeaseName(name)},
				Spec: coordinationv1.LeaseSpec{HolderIdentity: &name, LeaseDurationSeconds: &seconds, RenewTime: &renewed}})
	}
	return objects
}

// stage is a status that a migration comes to.
func stage(m *v1alpha1.VFMigration, phase v1alpha1.VFMigrationPhase, after time.Duration, typ string, status metav1.ConditionStatus, reason, message string) {
	m.Status.Phase = phase
	meta.SetStatusCondition(&m.Status.Conditions, metav1.Condition{
		Type: typ, Status: status, Reason: reason, Message: message, LastTransitionTime: metav1.NewTime(began.Add(after)),
	})
}

func moving() *v1alpha1.VFMigration {
	m := &v1alpha1.VFMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: "vms", Name: "move", UID: "vfm", CreationTimestamp: metav1.NewTime(began)},
		Spec:       v1alpha1.VFMigrationSpec{VMIName: "db"},
	}
	m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "node-a"}
	stage(m, v1alpha1.PhasePinning, time.Second, v1alpha1.ConditionAccepted, metav1.ConditionTrue, "Accepted", "all well")
	stage(m, v1alpha1.PhasePinning, time.Second, v1alpha1.ConditionSucceeded, metav1.ConditionUnknown, "Progressing", "under way")
	return m
}

func moved() *v1alpha1.VFMigration {
	m := moving()
	took := func(d time.Duration) metav1.Duration { return metav1.Duration{Duration: d} }
	m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "node-b"}
	m.Status.MigrationRef = &v1alpha1.MigrationReference{Name: "kubevirts"}
	stage(m, v1alpha1.PhaseVerifying, 9*time.Second, v1alpha1.ConditionVerified, metav1.ConditionTrue, "Verified", "seen")
	stage(m, v1alpha1.PhaseVerifying, 9*time.Second, v1alpha1.ConditionCaptured, metav1.ConditionTrue, "Captured", "read")
	stage(m, v1alpha1.PhaseSucceeded, 10*time.Second, v1alpha1.ConditionSucceeded, metav1.ConditionTrue, "Succeeded", "there")
	m.Status.Steps = []v1alpha1.StepStatus{{Name: "source/capture", Took: took(60123 * time.Nanosecond)}, {Name: "source/hold", Took: took(123456789)}}
	m.Status.Downtime = &v1alpha1.Downtime{VMStopped: took(180123456), DeviceStopped: took(1180123456), LinkGap: new(took(1190123456))}
	m.Status.Devices = []v1alpha1.DeviceStatus{{Interface: "fast", StateBytes: 900, PagesMarked: 70, ReplayedOperations: 3, HeadsStrategy: "write",
		Source: &v1alpha1.VFReference{VF: "0000:01:10.0", MAC: "52:54:00:c0:5c:01"}}}
	return m
}

func undone() *v1alpha1.VFMigration {
	m := moving()
	m.Status.Failure = &v1alpha1.VFMigrationFailure{Reason: v1alpha1.ReasonAborted, Message: "spec.abort was set"}
	stage(m, v1alpha1.PhaseFailed, 4*time.Second, v1alpha1.ConditionSucceeded, metav1.ConditionFalse, v1alpha1.ReasonAborted, "spec.abort was set")
	return m
}

// ran is what a command line came to.
type ran struct {
	out, err string
	failure  error
	client   client.Client
}

// kubectlRun runs the plugin in a cluster of the objects. Each time a migration
// is read, its status becomes the next of stages; nil stands for an API server
// that is away.
func kubectlRun(t *testing.T, objects []client.Object, stages []*v1alpha1.VFMigration, args ...string) ran {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, kubecluster.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	var reads atomic.Int32
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithInterceptorFuncs(interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			if err := c.Get(ctx, key, o, opts...); err != nil {
				return err
			}
			if m, ok := o.(*v1alpha1.VFMigration); ok && len(stages) > 0 {
				i := min(int(reads.Add(1))-1, len(stages)-1)
				if stages[i] == nil {
					return errors.New("connection refused")
				}
				m.Status, m.CreationTimestamp = stages[i].Status, metav1.NewTime(began)
			}
			return nil
		},
	}).Build()
	p := &plugin{
		connect: func() (client.Client, string, error) { return c, "vms", nil },
		clock:   clocktesting.NewFakePassiveClock(began.Add(5 * time.Second)), poll: time.Millisecond,
	}
	var out, errs bytes.Buffer
	cmd := p.command()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return ran{out.String(), errs.String(), err, c}
}

func (r ran) check(t *testing.T, wantOut, wantErr, wantFailure string) {
	t.Helper()
	if diff := cmp.Diff(wantOut, r.out); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(wantErr, r.err); diff != "" {
		t.Errorf("progress (-want +got):\n%s", diff)
	}
	failure := ""
	if r.failure != nil {
		failure = r.failure.Error()
	}
	if !strings.Contains(failure, wantFailure) || (failure == "") != (wantFailure == "") {
		t.Errorf("failed with %q, want %q", failure, wantFailure)
	}
}

func TestKubectlPreflight(t *testing.T) {
	kubectlRun(t, kubectlCluster(), nil, "preflight", "db").check(t, "VM vms/db can be moved away from node node-a.\n", "", "")
	kubectlRun(t, kubectlCluster(), nil, "preflight", "db", "--to-node", "node-b", "-o", "json").check(t,
		`{"accepted":true,"sourceNode":"node-a"}`+"\n", "", "")
	kubectlRun(t, kubectlCluster(), nil, "preflight", "db", "--to-node", "node-a").check(t, "", "",
		"VM vms/db cannot be moved: TargetNotFound: spec.target.nodeName node-a is the node that the VM runs on")
	// What somebody else asked for a moment ago is older than what is asked for
	// here, and comes first even if the manager has not looked at it.
	first := moving()
	first.Status = v1alpha1.VFMigrationStatus{}
	kubectlRun(t, append(kubectlCluster(), first), nil, "preflight", "db").check(t, "", "", "MigrationInProgress: VFMigration move")
	kubectlRun(t, kubectlCluster(), nil, "preflight", "db", "--system-namespace", "elsewhere").check(t, "", "", "AgentUnavailable")
	kubectlRun(t, kubectlCluster(), nil, "preflight", "db", "-o", "xml").check(t, "", "", `"xml" is neither json nor yaml`)
}

func TestKubectlMigrate(t *testing.T) {
	r := kubectlRun(t, kubectlCluster(), nil, "migrate", "db", "--name", "move", "--to-nodes-with", "zone=b,rack=2")
	r.check(t, "vfmigration.compsc.io/move created\n", "", "")
	m, err := get(t.Context(), r.client, "vms", "move")
	if err != nil {
		t.Fatal(err)
	}
	want := v1alpha1.VFMigrationSpec{VMIName: "db", Target: &v1alpha1.VFMigrationTarget{NodeSelector: map[string]string{"zone": "b", "rack": "2"}}}
	if diff := cmp.Diff(want, m.Spec); diff != "" {
		t.Errorf("spec (-want +got):\n%s", diff)
	}
	kubectlRun(t, append(kubectlCluster(), moving()), nil, "migrate", "db", "--name", "move").check(t, "", "", "already exists")

	// Without a name it has the VM's, and a suffix.
	r = kubectlRun(t, kubectlCluster(), nil, "migrate", "db", "-o", "yaml")
	var made v1alpha1.VFMigration
	if err := yaml.Unmarshal([]byte(r.out), &made); err != nil || r.failure != nil {
		t.Fatalf("%v, %v:\n%s", r.failure, err, r.out)
	}
	if !strings.HasPrefix(made.Name, "db-") || made.Kind != "VFMigration" || made.Spec.VMIName != "db" || made.Spec.Target != nil {
		t.Errorf("made %+v", made)
	}
}

const timeline = `VFMigration:   vms/move
VM:            db, node-a -> node-b
Migration:     kubevirts
Phase:         Succeeded
Stood still:   VM 180.12ms, VFs 1.18s, traffic 1.19s

AFTER   CONDITION   STATUS   REASON      MESSAGE
1s      Accepted    True     Accepted    all well
9s      Captured    True     Captured    read
9s      Verified    True     Verified    seen
10s     Succeeded   True     Succeeded   there

STEP             TOOK
source/capture   60.1µs
source/hold      123.46ms

INTERFACE   MAC                 SOURCE VF      TARGET VF   STATE   PAGES   REPLAYED   HEADS
fast        52:54:00:c0:5c:01   0000:01:10.0   -           900 B   70      3          write
`

func TestKubectlWait(t *testing.T) {
	// A line for each change, not for each look.
	pending := &v1alpha1.VFMigration{}
	kubectlRun(t, kubectlCluster(), []*v1alpha1.VFMigration{pending, moving(), moving(), moved()}, "migrate", "db", "--name", "move", "--wait").check(t, timeline,
		"move: Pending      ? -> ?\nmove: Pinning      node-a -> ?\nmove: Succeeded    node-a -> node-b\n", "")
	// An API server that is away for a moment does not end it.
	kubectlRun(t, kubectlCluster(), []*v1alpha1.VFMigration{moving(), nil, nil, moved()}, "migrate", "db", "--name", "move", "--wait").check(t, timeline,
		"move: Pinning      node-a -> ?\nmove: Succeeded    node-a -> node-b\n", "")
	kubectlRun(t, kubectlCluster(), []*v1alpha1.VFMigration{nil}, "migrate", "db", "--name", "move", "--wait", "--timeout", "50ms").check(t, "", "",
		"no longer waited for: VFMigration vms/move: connection refused")
	r := kubectlRun(t, kubectlCluster(), []*v1alpha1.VFMigration{moving(), undone()}, "migrate", "db", "--name", "move", "--wait")
	r.check(t, r.out, "move: Pinning      node-a -> ?\nmove: Failed       node-a -> ?\n", "VFMigration vms/move failed: Aborted: spec.abort was set")
	if !strings.Contains(r.out, "Failure:       Aborted: spec.abort was set\n") {
		t.Errorf("the failure is not in\n%s", r.out)
	}
	kubectlRun(t, kubectlCluster(), []*v1alpha1.VFMigration{moving()}, "migrate", "db", "--name", "move", "--wait", "--timeout", "50ms").check(t, "",
		"move: Pinning      node-a -> ?\n", "vms/move goes on, in phase Pinning")
}

func TestKubectlStatus(t *testing.T) {
	kubectlRun(t, []client.Object{moved()}, nil, "status", "move").check(t, strings.ReplaceAll(timeline, "\r", ""), "", "")
	kubectlRun(t, nil, nil, "status", "move").check(t, "", "", `VFMigration vms/move: vfmigrations.compsc.io "move" not found`)
	r := kubectlRun(t, []client.Object{moved()}, nil, "status", "move", "-o", "json")
	if !strings.Contains(r.out, `"kind":"VFMigration"`) || !strings.Contains(r.out, `"apiVersion":"compsc.io/v1alpha1"`) || r.failure != nil {
		t.Errorf("%v:\n%s", r.failure, r.out)
	}
}

func TestKubectlAbort(t *testing.T) {
	r := kubectlRun(t, []client.Object{moving()}, nil, "abort", "move")
	r.check(t, "vfmigration.compsc.io/move is to be undone\n", "", "")
	if m, err := get(t.Context(), r.client, "vms", "move"); err != nil || !m.Spec.Abort {
		t.Errorf("%v, abort %t", err, m.Spec.Abort)
	}
	kubectlRun(t, []client.Object{moved()}, nil, "abort", "move").check(t, "", "", "has ended already: Succeeded")

	// That it was undone is what was wished; anything else is a failure.
	open, late := undone(), moved()
	stage(open, v1alpha1.PhaseFailed, 0, v1alpha1.ConditionSucceeded, metav1.ConditionFalse, v1alpha1.ReasonAborted, "spec.abort was set. Not undone: all of it")
	late.Status.Failure = undone().Status.Failure
	for name, tc := range map[string]struct {
		end     *v1alpha1.VFMigration
		failure string
	}{"undone": {undone(), ""}, "not undone": {open, "Not undone: all of it"}, "too late": {late, ""}} {
		t.Run(name, func(t *testing.T) {
			r := kubectlRun(t, []client.Object{moving()}, []*v1alpha1.VFMigration{moving(), moving(), tc.end}, "abort", "move", "--wait")
			r.check(t, r.out, r.err, tc.failure)
			if !strings.Contains(r.out, string("Phase:         "+tc.end.Status.Phase)) {
				t.Errorf("its end is not in\n%s", r.out)
			}
		})
	}
}

// TestKubectlCompletion: VMs with VFs, and of migrations those that the command
// can do something about.
func TestKubectlCompletion(t *testing.T) {
	over := moved()
	over.Name, over.UID = "over", types.UID("over")
	objects := append(kubectlCluster(), moving(), over)
	for line, want := range map[string]string{"migrate": "db\n:4\n", "preflight": "db\n:4\n", "status": "move\nover\n:4\n", "abort": "move\n:4\n"} {
		if r := kubectlRun(t, objects, nil, "__complete", line, ""); r.out != want {
			t.Errorf("%s is completed with %q, want %q", line, r.out, want)
		}
	}
	if r := kubectlRun(t, objects, nil, "__complete", "migrate", "db", ""); r.out != ":4\n" {
		t.Errorf("a second VM: %q", r.out)
	}
}

// TestPlugin: by which name the program is the plugin.
func TestPlugin(t *testing.T) {
	for name, want := range map[string]bool{
		"/usr/bin/compsc": false, "compsc-demo": false, "": false,
		"/home/me/bin/kubectl-vfmigration": true, "kubectl_complete-vfmigration": true,
	} {
		c := Plugin([]string{name}, "v1")
		if (c != nil) != want || want && c.CommandPath() != "kubectl vfmigration" {
			t.Errorf("%q is the plugin: %v, want %v", name, c != nil, want)
		}
	}
	if Plugin(nil, "v1") != nil {
		t.Error("a program without a name is the plugin")
	}
	var out bytes.Buffer
	c := Plugin([]string{completeName, "ab"}, "v1")
	c.SetOut(&out)
	if err := c.ExecuteContext(t.Context()); err != nil || !strings.HasPrefix(out.String(), "abort\t") {
		t.Errorf("%q is completed with %q, %v", "ab", out.String(), err)
	}
	// A cluster that cannot be reached is told of, and not taken for an answer.
	t.Setenv("KUBECONFIG", t.TempDir()+"/none")
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	c = Plugin([]string{pluginName, "status", "move"}, "v1")
	if err := c.ExecuteContext(t.Context()); err == nil || apierrors.IsNotFound(err) {
		t.Errorf("without a cluster: %v", err)
	}
}
