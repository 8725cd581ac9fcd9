//go:build e2e

package standin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"libvirt.org/go/libvirtxml"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/gate"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/hook/callbackspb"
	"compsc.io/compsc/agent/kubevirt/hook/infopb"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/cluster"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/lab"
)

// TestMain lets the test binary be its own sidecar: the stand-in is tested
// with VMs that have no VF, whose sidecar is a gate and nothing else.
func TestMain(m *testing.M) {
	if kubevirt.IsSidecarName(os.Getenv(kubevirt.EnvContainerName)) {
		if err := sidecar(kubevirt.SidecarDeviceDir()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// gatekeeper lets everything pass. A file called veto-flush or veto-read
// makes it refuse.
type gatekeeper struct{ dir string }

func (g gatekeeper) Flush(context.Context) error            { return g.check("veto-flush") }
func (g gatekeeper) Read(context.Context, int64, int) error { return g.check("veto-read") }
func (g gatekeeper) check(file string) error {
	if _, err := os.Stat(filepath.Join(g.dir, file)); err == nil {
		return fmt.Errorf("%s is there", file)
	}
	return nil
}

// hooks adds the gate to a domain.
type hooks struct {
	infopb.UnimplementedInfoServer
	callbackspb.UnimplementedCallbacksServer
}

func (hooks) Info(context.Context, *infopb.InfoParams) (*infopb.InfoResult, error) {
	return &infopb.InfoResult{Name: "gate", Versions: []string{"v1alpha3"}, HookPoints: []*infopb.HookPoint{{Name: "OnDefineDomain"}}}, nil
}

func (hooks) OnDefineDomain(_ context.Context, r *callbackspb.OnDefineDomainParams) (*callbackspb.OnDefineDomainResult, error) {
	d := &libvirtxml.Domain{}
	if err := d.Unmarshal(string(r.DomainXML)); err != nil {
		return nil, err
	}
	d.MemoryBacking = &libvirtxml.DomainMemoryBacking{
		MemorySource: &libvirtxml.DomainMemorySource{Type: "memfd"}, MemoryAccess: &libvirtxml.DomainMemoryAccess{Mode: "shared"},
	}
	socket := filepath.Join(kubevirt.ComputeDeviceDir(os.Getenv(kubevirt.EnvContainerName)), "gate.sock")
	for _, a := range []string{
		"-blockdev", fmt.Sprintf(`{"driver":"nbd","node-name":"n","export":"","server":{"type":"unix","path":%q}}`, socket),
		"-blockdev", `{"driver":"qcow2","node-name":"q","file":"n"}`,
	} {
		d.QEMUCommandline.Args = append(d.QEMUCommandline.Args, libvirtxml.DomainQEMUCommandlineArg{Value: a})
	}
	out, err := d.Marshal()
	return &callbackspb.OnDefineDomainResult{DomainXML: []byte(out)}, err
}

func sidecar(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	hook, err := net.Listen("unix", filepath.Join(filepath.Dir(dir), "gate.sock"))
	if err != nil {
		return err
	}
	k := grpc.NewServer()
	infopb.RegisterInfoServer(k, hooks{})
	callbackspb.RegisterCallbacksServer(k, hooks{})
	go k.Serve(hook)
	ln, err := net.Listen("unix", filepath.Join(dir, "gate.sock"))
	if err != nil {
		return err
	}
	control, err := net.Listen("unix", filepath.Join(dir, "control.sock"))
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	h := health.NewServer()
	h.SetServingStatus(readyService, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(s, h)
	go s.Serve(control)
	return gate.New(gatekeeper{dir}, nil).Serve(context.Background(), ln)
}

type fixture struct {
	*StandIn
	c   client.Client
	key client.ObjectKey
	lab *lab.Lab
}

func start(t *testing.T, changes ...func(*Config)) *fixture {
	t.Helper()
	set, err := artifacts.Find("")
	if err != nil {
		t.Fatal(err)
	}
	l, err := lab.New(t.Context(), "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	cl, err := cluster.Start(t.Context(), l, cluster.Options{Binaries: set.ControlPlane, ConfigDir: set.Config, KubeVirtCRDs: set.KubeVirtCRDs})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cl.Close(); err != nil {
			t.Error(err)
		}
	})
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	cfg := Config{
		Lab: l, REST: cl.Config, Client: cl.Client, Compsc: func() string { return os.Args[0] },
		QEMUTree: set.QEMU, Kernel: set.Kernel, Initrd: set.Initrd,
		PodsDir: func(node string) string { return filepath.Join(l.Dir, node, "pods") },
		Log:     log,
	}
	for _, change := range changes {
		change(&cfg)
	}
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{StandIn: s, c: cl.Client, lab: l, key: client.ObjectKey{Namespace: "default", Name: "vm"}}
	f.boot(t)
	return f
}

func (f *fixture) boot(t *testing.T) {
	t.Helper()
	v := &kubevirtv1.VirtualMachineInstance{
		ObjectMeta: metav1.ObjectMeta{Name: f.key.Name, Namespace: f.key.Namespace},
	}
	v.Spec.Domain.Firmware = &kubevirtv1.Firmware{KernelBoot: &kubevirtv1.KernelBoot{KernelArgs: "console=ttyS0 panic=-1 mitigations=off"}}
	if err := f.c.Create(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	f.until(t, "the VMI to run", func() bool {
		return f.vmi(t).Status.Phase == kubevirtv1.Running
	})
	f.alive(t)
}

func (f *fixture) vmi(t *testing.T) *kubevirtv1.VirtualMachineInstance {
	t.Helper()
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := f.c.Get(t.Context(), f.key, v); err != nil {
		t.Fatal(err)
	}
	return v
}

// alive checks that the guest answers where the VMI says it is, and returns
// its age.
func (f *fixture) alive(t *testing.T) time.Duration {
	t.Helper()
	path, err := f.AgentSocket(t.Context(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := proto.NewClient(conn)
	defer g.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		info, err := g.Info(ctx)
		if err == nil {
			return info.Uptime
		}
		// A guest that has not opened its port yet echoes the request.
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}

func (f *fixture) migrate(t *testing.T, name string) *kubevirtv1.VirtualMachineInstanceMigration {
	t.Helper()
	m := &kubevirtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: f.key.Namespace},
		Spec:       kubevirtv1.VirtualMachineInstanceMigrationSpec{VMIName: f.key.Name},
	}
	if err := f.c.Create(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	return m
}

func (f *fixture) awaitPhase(t *testing.T, m *kubevirtv1.VirtualMachineInstanceMigration, want kubevirtv1.VirtualMachineInstanceMigrationPhase) {
	t.Helper()
	f.until(t, "migration "+m.Name+" to be "+string(want), func() bool {
		if err := f.c.Get(t.Context(), client.ObjectKeyFromObject(m), m); err != nil {
			t.Fatal(err)
		}
		if m.IsFinal() && m.Status.Phase != want {
			t.Fatalf("migration %s is %s: %+v", m.Name, m.Status.Phase, f.vmi(t).Status.MigrationState)
		}
		return m.Status.Phase == want
	})
}

func (f *fixture) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// TestMigrate: VMs without VFs move as KubeVirt moves them, there and back,
// fail as KubeVirt's fail, and can be cancelled as KubeVirt's can.
func TestMigrate(t *testing.T) {
	f := start(t)
	age := f.alive(t)
	stays := func(t *testing.T) {
		t.Helper()
		node := f.vmi(t).Status.NodeName
		now := f.alive(t)
		if now <= age {
			t.Errorf("the guest is %s old after %s: it was started anew", now, age)
		}
		age = now
		pods := &corev1.PodList{}
		if err := f.c.List(t.Context(), pods, client.MatchingLabels{kubevirtv1.CreatedByLabel: string(f.vmi(t).UID)}); err != nil {
			t.Fatal(err)
		}
		running := 0
		for _, p := range pods.Items {
			if p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
				running++
				if p.Spec.NodeName != node {
					t.Errorf("pod %s runs on %s, the VMI on %s", p.Name, p.Spec.NodeName, node)
				}
			}
		}
		if running != 1 {
			t.Errorf("%d virt-launcher pods run, want 1", running)
		}
	}

	for _, name := range []string{"there", "back"} {
		t.Run(name, func(t *testing.T) {
			from := f.vmi(t).Status.NodeName
			m := f.migrate(t, name)
			f.awaitPhase(t, m, kubevirtv1.MigrationSucceeded)
			v := f.vmi(t)
			if v.Status.NodeName == from || !v.Status.MigrationState.Completed || v.Status.MigrationState.Failed {
				t.Errorf("VMI on %s, state %+v", v.Status.NodeName, v.Status.MigrationState)
			}
			timing, ok := f.Timing(m.UID)
			if d := timing.Resumed.Sub(timing.Stopped); !ok || d <= 0 || d > 10*time.Second {
				t.Errorf("the VM stood still for %s", d)
			} else {
				t.Logf("the VM stood still for %s", d)
			}
			stays(t)
		})
	}

	for _, veto := range []string{"flush", "read"} {
		t.Run("veto-"+veto, func(t *testing.T) {
			// The gate's image is read when the target starts, too: only the
			// read that starts the VM is to be refused.
			at, phase := InTargetReady, kubevirtv1.MigrationTargetReady
			if veto == "read" {
				at, phase = BeforeFinish, kubevirtv1.MigrationRunning
			}
			release := f.Hold(at)
			defer release()
			before := f.vmi(t)
			m := f.migrate(t, "veto-"+veto)
			f.awaitPhase(t, m, phase)
			source, err := f.activePod(before)
			if err != nil {
				t.Fatal(err)
			}
			var target *pod
			f.until(t, "the target", func() bool {
				for uid := range f.vmi(t).Status.ActivePods {
					if uid != source.uid {
						target = f.podOf(uid)
					}
				}
				if veto == "flush" {
					return target != nil
				}
				_, ok := f.Loaded(m.UID)
				return ok
			})
			p := source
			if veto == "read" {
				p = target
			}
			file := filepath.Join(p.deviceDir(), "veto-"+veto)
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			release()
			f.awaitPhase(t, m, kubevirtv1.MigrationFailed)
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			now := f.vmi(t)
			if now.Status.NodeName != before.Status.NodeName || !now.Status.MigrationState.Failed {
				t.Errorf("VMI on %s, state %+v", now.Status.NodeName, now.Status.MigrationState)
			}
			want := map[string]string{"flush": "Input/output error", "read": "Input/output error"}[veto]
			if why := now.Status.MigrationState.FailureReason; !strings.Contains(why, want) {
				t.Errorf("failed for %q, want %q", why, want)
			}
			if _, ended := target.state(); ended != corev1.PodFailed {
				t.Errorf("the target pod is %q", ended)
			}
			stays(t)
		})
	}

	for _, at := range []Point{InPending, InScheduling, InScheduled, InTargetReady, InPreSwitchover} {
		t.Run("delete-"+string(at), func(t *testing.T) {
			release := f.Hold(at)
			defer release()
			phase := kubevirtv1.VirtualMachineInstanceMigrationPhase(at)
			if at == InPreSwitchover {
				phase = kubevirtv1.MigrationRunning
			}
			source, err := f.activePod(f.vmi(t))
			if err != nil {
				t.Fatal(err)
			}
			from := source.activeDomain().mark()
			m := f.migrate(t, "delete-"+strings.ToLower(string(at)))
			f.awaitPhase(t, m, phase)
			if at == InPreSwitchover {
				f.until(t, "the VM to stop", func() bool {
					_, stopped := source.activeDomain().last(from, "STOP")
					return stopped
				})
			}
			if err := f.c.Delete(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			if at == InTargetReady {
				// Not honoured before the migration runs.
				release()
			}
			f.until(t, "the migration to be gone", func() bool {
				return apierrors.IsNotFound(f.c.Get(t.Context(), client.ObjectKeyFromObject(m), m))
			})
			f.until(t, "the target pod to be gone or to end", func() bool {
				o := &corev1.Pod{}
				err := f.c.Get(t.Context(), client.ObjectKey{Namespace: m.Namespace, Name: launcherName(f.vmi(t), m)}, o)
				return apierrors.IsNotFound(err) || err == nil && podDown(o)
			})
			if v := f.vmi(t); at != InTargetReady && v.Status.Phase != kubevirtv1.Running {
				t.Errorf("VMI is %s", v.Status.Phase)
			}
			stays(t)
		})
	}
}

// here are machines that are none: they run in the lab's nodes.
type here struct{ lab *lab.Lab }

func (h here) Start(node string, c lab.Command, dirs ...string) (*lab.Process, error) {
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	c.NS = h.lab.Nodes[node].NS
	return h.lab.Start(c)
}

func (here) Allocated(string, []Allocation) error { return nil }

func (here) Forward(context.Context, string, string) error { return nil }

// TestDirect: VMs move without libvirt too, and go on where they are when the
// move is refused.
func TestDirect(t *testing.T) {
	f := start(t, func(c *Config) { c.Machines = here{c.Lab} })
	age := f.alive(t)
	older := func() {
		t.Helper()
		now := f.alive(t)
		if now <= age {
			t.Errorf("the guest is %s old after %s: it was started anew", now, age)
		}
		age = now
	}
	from := f.vmi(t).Status.NodeName
	f.awaitPhase(t, f.migrate(t, "there"), kubevirtv1.MigrationSucceeded)
	if v := f.vmi(t); v.Status.NodeName == from || !v.Status.MigrationState.Completed || v.Status.MigrationState.Failed {
		t.Errorf("VMI on %s, state %+v", v.Status.NodeName, v.Status.MigrationState)
	}
	older()
	source, err := f.activePod(f.vmi(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(source.deviceDir(), "veto-flush"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f.awaitPhase(t, f.migrate(t, "refused"), kubevirtv1.MigrationFailed)
	if v := f.vmi(t); v.Status.NodeName == from || !v.Status.MigrationState.Failed {
		t.Errorf("VMI on %s, state %+v", v.Status.NodeName, v.Status.MigrationState)
	}
	older()
}
