//go:build apiserver

package agent

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/api/v1alpha1"
)

// virtHandler is KubeVirt's own caller of node hooks, with CompSC's Plugin object.
type virtHandler struct {
	t       *testing.T
	node    string
	calls   io.WriteCloser
	answers *json.Decoder
	stop    func()
}

// startVirtHandler runs the caller of a node, which calls the hooks at socket.
func startVirtHandler(t *testing.T, node, socket string) *virtHandler {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(assets(t, "COMPSC_KUBEVIRT_HOOKS", "kubevirt-hooks"), "kubevirt-hooks"),
		filepath.Join("..", "config", "kubevirt", "plugin", "plugin.yaml"), socket)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h := &virtHandler{t: t, node: node, calls: in, answers: json.NewDecoder(out)}
	h.stop = func() {
		in.Close()
		cancel()
		_ = cmd.Wait() // it was killed
		h.stop = func() {}
	}
	t.Cleanup(func() { h.stop() })
	return h
}

// call has the hooks of a point called, and returns what virt-handler would
// report, empty for nothing.
func (h *virtHandler) call(point pluginv1alpha1.NodeHookPoint, vmi *virtv1.VirtualMachineInstance) string {
	h.t.Helper()
	if err := json.NewEncoder(h.calls).Encode(map[string]any{"hookPoint": point, "node": h.node, "vmi": vmi}); err != nil {
		h.t.Fatal(err)
	}
	var answer struct {
		Error string `json:"error"`
	}
	if err := h.answers.Decode(&answer); err != nil {
		h.t.Fatal(err)
	}
	return answer.Error
}

func (h *virtHandler) expect(point pluginv1alpha1.NodeHookPoint, vmi *virtv1.VirtualMachineInstance, want string) {
	h.t.Helper()
	if got := h.call(point, vmi); want == "" && got != "" || !strings.Contains(got, want) {
		h.t.Fatalf("%s: virt-handler reports %q, want %q", point, got, want)
	}
}

// passes repeats a call as virt-handler does while it fails.
func (h *virtHandler) passes(point pluginv1alpha1.NodeHookPoint, vmi *virtv1.VirtualMachineInstance) {
	h.t.Helper()
	eventually(h.t, string(point), func() bool {
		got := h.call(point, vmi)
		if got != "" && !strings.Contains(got, "Unavailable") {
			h.t.Fatalf("%s: virt-handler reports %q", point, got)
		}
		return got == ""
	})
}

// contract is a scene whose nodes have KubeVirt's callers.
type contract struct {
	*scene
	source, target *virtHandler
	stopHooks      func()
	sourceSock     string
	vmi            *virtv1.VirtualMachineInstance
}

func newContract(t *testing.T) *contract {
	s := boot(t)
	dir := t.TempDir()
	c := &contract{scene: s, sourceSock: filepath.Join(dir, "a.sock"), vmi: &virtv1.VirtualMachineInstance{}}
	c.stopHooks = s.from.listenForHooks(c.sourceSock)
	s.to.listenForHooks(filepath.Join(dir, "b.sock"))
	c.source, c.target = startVirtHandler(t, "a", c.sourceSock), startVirtHandler(t, "b", filepath.Join(dir, "b.sock"))
	if err := s.client.Get(t.Context(), keyOf("vm"), c.vmi); err != nil {
		t.Fatal(err)
	}
	return c
}

func keyOf(name string) types.NamespacedName { return types.NamespacedName{Namespace: ns, Name: name} }

// handedOff is the VMI once virt-controller handed the migration to the target.
func (c *contract) handedOff() {
	c.vmi.Status.MigrationState = &virtv1.VirtualMachineInstanceMigrationState{MigrationUID: "vmim-uid", SourceNode: "a", TargetNode: "b",
		VMIMConfigurationOptions: &virtv1.VMIMConfigurationOptions{AllowPostCopy: new(false)}}
}

// TestContract goes through a VM's life with KubeVirt 1.9's own caller: its
// client, its evaluation of the Plugin object's conditions, its order. Calls come
// too early, are repeated, and either side is restarted.
func TestContract(t *testing.T) {
	c := newContract(t)
	c.source.passes(nodehook.PreVMStart, c.vmi)
	c.source.expect(nodehook.PostVMStart, c.vmi, "")
	c.handedOff()
	c.target.expect(nodehook.PreMigrationTarget, c.vmi, "Unavailable: compsc: not yet: VirtualMachineInstanceMigration vmim-uid has no VFMigration")
	c.begin()
	c.follow()
	c.target.passes(nodehook.PreMigrationTarget, c.vmi)
	c.target.expect(nodehook.PreMigrationTarget, c.vmi, "")
	if c.dst.is(pb.Phase_PHASE_TARGET_SILENT) || !c.src.is(pb.Phase_PHASE_SOURCE_PREPARED) {
		t.Fatal("KubeVirt prepares the target before both ends are prepared")
	}

	// Our side is away, and comes back.
	c.stopHooks()
	c.from.kill()
	c.source.expect(nodehook.PreMigrationSource, c.vmi, "failed to dial plugin compsc")
	c.from.start()
	c.from.listenForHooks(c.sourceSock)
	c.source.passes(nodehook.PreMigrationSource, c.vmi)
	// Their side is started anew, and calls once more.
	c.source.stop()
	c.source = startVirtHandler(t, "a", c.sourceSock)
	c.source.expect(nodehook.PreMigrationSource, c.vmi, "")

	c.switchOver()
	c.source.expect(nodehook.PreMigrationSource, c.vmi, "")
	c.target.expect(nodehook.PostMigrationTarget, c.vmi, "")
	c.succeed()
	c.target.expect(nodehook.PostMigrationTarget, c.vmi, "")
	c.target.expect(nodehook.PreVMStop, c.vmi, "")
	c.target.expect(nodehook.PostVMStop, c.vmi, "")
}

// TestContractAfterAbort aborts between the two gates, and after both.
func TestContractAfterAbort(t *testing.T) {
	for name, after := range map[string]bool{"before the source's gate": false, "after the source's gate": true} {
		t.Run(name, func(t *testing.T) {
			c := newContract(t)
			c.handedOff()
			c.begin()
			c.follow()
			c.target.passes(nodehook.PreMigrationTarget, c.vmi)
			if after {
				c.source.passes(nodehook.PreMigrationSource, c.vmi)
			}
			c.fail(v1alpha1.ReasonAborted, "spec.abort was set")
			c.source.expect(nodehook.PreMigrationSource, c.vmi, "FailedPrecondition: compsc: VFMigration m is being undone: Aborted: spec.abort was set")
			c.target.expect(nodehook.PreMigrationTarget, c.vmi, "is being undone")
			c.rolledBack(v1alpha1.ReasonAborted)
			if n := c.src.count("ReleaseSource") + c.src.count("Relinquish"); n != 0 {
				t.Errorf("%d calls that touch the guest", n)
			}
		})
	}
}

// TestContractTimeout has a device process that does not answer: the call ends
// within the Plugin's timeout, as one to be repeated, and frees virt-handler's worker.
func TestContractTimeout(t *testing.T) {
	c := newContract(t)
	c.handedOff()
	c.made("vmim-uid", func(m *vfMigration) {
		m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: "a", PodName: c.sPod.Name, PodUID: c.sPod.UID}
		m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: "b", PodName: "gone", PodUID: "gone"}
	})
	c.src.set(func() {
		c.src.before = func(string) error {
			<-t.Context().Done()
			return status.Error(codes.Unavailable, "the test has ended")
		}
	})
	begin := time.Now()
	c.source.expect(nodehook.PreMigrationSource, c.vmi, "Unavailable: compsc: not yet: the device process of pod launcher-source")
	if took := time.Since(begin); took > 8*time.Second {
		t.Errorf("the call took %s", took)
	}
}

// TestContractConditions checks whom the Plugin object's condition lets through:
// VMs without VFs never wait for CompSC, even where no agent runs.
func TestContractConditions(t *testing.T) {
	t.Parallel()
	none := startVirtHandler(t, "a", filepath.Join(t.TempDir(), "none.sock"))
	vmi := func(ifaces ...virtv1.Interface) *virtv1.VirtualMachineInstance {
		v := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "other", UID: "other"}}
		v.Spec.Domain.Devices.Interfaces = ifaces
		return v
	}
	pod := virtv1.Interface{Name: "default", InterfaceBindingMethod: virtv1.InterfaceBindingMethod{Masquerade: &virtv1.InterfaceMasquerade{}}}
	bound := func(name string) virtv1.Interface {
		return virtv1.Interface{Name: "fast", Binding: &virtv1.PluginBinding{Name: name}}
	}
	for name, tc := range map[string]struct {
		vmi  *virtv1.VirtualMachineInstance
		held bool
	}{
		"no interface":    {vmi(), false},
		"no binding":      {vmi(pod), false},
		"another binding": {vmi(pod, bound("passt")), false},
		"ours":            {vmi(pod, bound(kubevirt.BindingName)), true},
		"ours among":      {vmi(bound("passt"), pod, bound(kubevirt.BindingName)), true},
	} {
		for _, p := range nodehook.Points {
			want := ""
			if gate := p == nodehook.PreVMStart || p == nodehook.PreMigrationTarget || p == nodehook.PreMigrationSource; gate && tc.held {
				want = "failed to dial plugin compsc"
			}
			if got := none.call(p, tc.vmi); want == "" && got != "" || !strings.Contains(got, want) {
				t.Errorf("%s at %s: %q, want %q", name, p, got, want)
			}
		}
	}
	// A point that KubeVirt admits but that CompSC does not serve is not called.
	none.expect("PostMigrationSource", vmi(bound(kubevirt.BindingName)), "")
}
