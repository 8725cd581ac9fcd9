package standin

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubevirtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/e2e/lab"
)

const (
	// probePeriod is shorter than a kubelet's least, a second, so that the
	// demonstration's steps are not hidden by it.
	probePeriod  = 200 * time.Millisecond
	probeTimeout = time.Second
	// connectTimeout bounds a connection, to a machine that is slow too.
	connectTimeout = 10 * time.Second
	// readyService is what the sidecar's readiness probe asks about.
	readyService = "compsc.Ready"
	// shutdownGrace is what a sidecar gets to end by itself.
	shutdownGrace = 5 * time.Second
)

// pod is what runs of a virt-launcher pod on its node.
type pod struct {
	uid       types.UID
	name      string
	namespace string
	node      string
	started   time.Time
	// hooks is the volume shared by sidecar and compute, where a kubelet would
	// make it; dir is a place for everything else.
	hooks, dir string
	compute    compute
	launcher   *launcher // that is compute, if it has a libvirt
	probing    context.CancelFunc
	forwarding context.CancelFunc // of sockets, if it runs on a machine of its own
	// vmi is the UID of the VMI that it was made for.
	vmi string
	// bound is the stand-in's.
	bound func(time.Duration) time.Duration

	mu         sync.Mutex
	sidecar    *lab.Process
	hookSocket string // empty until it was found
	domain     *domain
	job        *job // the last migration that it took part in
	ready      bool
	ended      corev1.PodPhase // empty while it runs
}

// sidecarDir is the part of the volume that the sidecar sees.
func (p *pod) sidecarDir() string { return filepath.Join(p.hooks, sidecarContainer) }

// deviceDir holds the device process's sockets.
func (p *pod) deviceDir() string {
	return filepath.Join(p.sidecarDir(), filepath.Base(kubevirt.SidecarDeviceDir()))
}

func (s *StandIn) podOf(uid types.UID) *pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pods[uid]
}

// startPod starts the pod's containers: virt-launcher's libvirtd, which does
// nothing before it is told to, and the sidecar.
func (s *StandIn) startPod(o *corev1.Pod) (*pod, error) {
	p := &pod{
		vmi: o.Labels[kubevirtv1.CreatedByLabel], bound: s.bound,
		uid: o.UID, name: o.Name, namespace: o.Namespace, node: o.Spec.NodeName, started: time.Now(),
		hooks: filepath.Join(s.cfg.PodsDir(o.Spec.NodeName), string(o.UID),
			"volumes/kubernetes.io~empty-dir/hook-sidecar-sockets"),
		// Sockets live below: sun_path holds 107 bytes.
		dir: filepath.Join(s.cfg.Lab.Dir, "p", string(o.UID[:8])),
	}
	for _, d := range []string{p.sidecarDir(), p.dir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	role := "primary"
	if o.Labels[kubevirtv1.MigrationJobLabel] != "" {
		role = "target"
	}
	if s.cfg.Machines != nil {
		if err := s.cfg.Machines.Allocated(p.node, s.allocations(o)); err != nil {
			return nil, err
		}
	}
	if err := s.startSidecar(p); err != nil {
		return nil, err
	}
	var forward context.Context
	forward, p.forwarding = context.WithCancel(context.WithoutCancel(s.ctx))
	start := s.startLauncher
	if s.cfg.Machines != nil {
		start = func(p *pod) error { return s.startDirect(forward, p) }
	}
	if err := start(p); err != nil {
		p.forwarding()
		p.sidecar.Stop(0)
		return nil, err
	}
	ctx, cancel := context.WithCancel(s.ctx)
	p.probing = cancel
	go s.probe(ctx, p)
	go func() {
		<-p.compute.ended()
		s.finishPod(p, corev1.PodFailed)
	}()
	s.mu.Lock()
	s.pods[p.uid] = p
	s.mu.Unlock()
	s.log.Info("pod started", "pod", p.name, "node", p.node, "role", role)
	return p, nil
}

// startSidecar starts the sidecar as virt-controller renders a binding's,
// without arguments, unless a test has some.
func (s *StandIn) startSidecar(p *pod) error {
	var args []string
	if s.cfg.DeviceArgs != nil {
		if more := s.cfg.DeviceArgs(p.node); len(more) > 0 {
			args = append([]string{"device"}, more...)
		}
	}
	x, err := s.start(p.node, lab.Command{
		Name: "device process of " + p.name, Path: s.cfg.Compsc(), Args: args,
		Env:    append(os.Environ(), kubevirt.EnvContainerName+"="+sidecarContainer),
		Mounts: []lab.Mount{{Target: "/run"}, {Source: p.sidecarDir(), Target: kubevirt.HooksDir}},
		Log:    filepath.Join(s.cfg.Lab.Dir, "log", p.name+"-device.log"),
	}, p.sidecarDir())
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.sidecar = x
	p.mu.Unlock()
	go func() {
		<-x.Done()
		s.pokePod(p)
	}()
	return nil
}

// start starts a process on a node, after having made the directories.
func (s *StandIn) start(node string, c lab.Command, dirs ...string) (*lab.Process, error) {
	if s.cfg.Machines != nil {
		return s.cfg.Machines.Start(node, c, dirs...)
	}
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	c.NS = s.cfg.Lab.Nodes[node].NS
	return s.cfg.Lab.Start(c)
}

// probe is the kubelet's readiness probe of the sidecar.
func (s *StandIn) probe(ctx context.Context, p *pod) {
	conn, err := dialDevice(p.deviceDir())
	if err != nil {
		s.log.Error("probe", "pod", p.name, "error", err)
		return
	}
	defer conn.Close()
	health := healthpb.NewHealthClient(conn)
	t := time.NewTicker(s.bound(probePeriod))
	defer t.Stop()
	for {
		call, cancel := context.WithTimeout(ctx, s.bound(probeTimeout))
		r, err := health.Check(call, &healthpb.HealthCheckRequest{Service: readyService})
		cancel()
		ready := err == nil && r.Status == healthpb.HealthCheckResponse_SERVING
		p.mu.Lock()
		changed := ready != p.ready
		p.ready = ready
		p.mu.Unlock()
		if changed {
			s.log.Info("sidecar", "pod", p.name, "ready", ready)
			s.pokePod(p)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// dialDevice reaches the control socket of a device process.
func dialDevice(dir string) (*grpc.ClientConn, error) { return dialSocket(dir, device.ControlSocket) }

// dialSocket reaches a process through a socket in a directory whose full path
// is longer than a unix socket's address may be.
func dialSocket(dir, name string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///device",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// A kubelet dials anew for each probe.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: probePeriod / 2, Multiplier: 1, MaxDelay: probePeriod / 2},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			f, err := os.Open(dir)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			var d net.Dialer
			return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", f.Fd(), name))
		}))
}

func (s *StandIn) pokePod(p *pod) {
	s.poke(s.pokePods, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.name, Namespace: p.namespace}})
}

func (p *pod) state() (ready bool, ended corev1.PodPhase) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ready, p.ended
}

func (p *pod) activeDomain() *domain {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended != "" {
		return nil
	}
	return p.domain
}

// setDomain makes d the pod's, unless the pod ended meanwhile. A domain that
// ends takes the pod along.
func (s *StandIn) setDomain(p *pod, d *domain) error {
	p.mu.Lock()
	ended := p.ended
	if ended == "" {
		p.domain = d
	}
	p.mu.Unlock()
	if ended != "" {
		d.close()
		return fmt.Errorf("pod %s has ended", p.name)
	}
	go func() {
		<-d.gone()
		p.mu.Lock()
		j := p.job
		p.mu.Unlock()
		if j != nil {
			<-j.performed // libvirt is to have its say first
		}
		s.finishPod(p, d.compute.fate(s.ctx, d))
	}()
	return nil
}

// sidecarEnded tells whether the sidecar has ended, which the pod survives:
// nobody starts a container again that is RestartPolicy Never's.
func (p *pod) sidecarEnded() bool {
	select {
	case <-p.currentSidecar().Done():
		return true
	default:
		return false
	}
}

func (p *pod) currentSidecar() *lab.Process {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sidecar
}

// RestartSidecar kills a pod's device process and starts another, as a kubelet
// would where the pod's restart policy lets it.
func (s *StandIn) RestartSidecar(pod types.UID) error {
	if err := s.KillSidecar(pod); err != nil {
		return err
	}
	return s.startSidecar(s.podOf(pod))
}

// KillSidecar kills a pod's device process, as the kernel does when memory is
// short.
func (s *StandIn) KillSidecar(pod types.UID) error {
	p := s.podOf(pod)
	if p == nil {
		return fmt.Errorf("no pod %s runs", pod)
	}
	p.currentSidecar().Stop(0)
	return nil
}

// DevicePhase is what a pod's device process says of itself.
func (s *StandIn) DevicePhase(ctx context.Context, pod types.UID) (controlpb.Phase, error) {
	p := s.podOf(pod)
	if p == nil {
		return 0, fmt.Errorf("no pod %s runs", pod)
	}
	conn, err := dialDevice(p.deviceDir())
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	r, err := controlpb.NewDeviceClient(conn).Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return 0, fmt.Errorf("device process of pod %s: %w", p.name, err)
	}
	return r.Phase, nil
}

// finishPod ends the pod in the given phase, if it has not ended: QEMU first,
// then the sidecar, which KubeVirt tells to shut down when compute has ended.
func (s *StandIn) finishPod(p *pod, phase corev1.PodPhase) {
	if p == nil {
		return
	}
	p.mu.Lock()
	first := p.ended == ""
	if first {
		p.ended = phase
	}
	p.mu.Unlock()
	if !first {
		return
	}
	p.stop()
	s.log.Info("pod ended", "pod", p.name, "phase", phase)
	s.pokePod(p)
}

// endPod stops what runs of a pod that was deleted, and forgets it.
func (s *StandIn) endPod(p *pod) {
	if p == nil {
		return
	}
	p.mu.Lock()
	if p.ended == "" {
		p.ended = corev1.PodFailed
	}
	p.mu.Unlock()
	p.stop()
	s.mu.Lock()
	delete(s.pods, p.uid)
	s.mu.Unlock()
}

func (p *pod) stop() {
	p.mu.Lock()
	d := p.domain
	p.mu.Unlock()
	p.compute.kill()
	if d != nil {
		d.close()
	}
	p.probing()
	// A sidecar that does not listen any more is stopped all the same.
	_ = p.shutdown()
	p.currentSidecar().Stop(p.bound(shutdownGrace))
	p.forwarding()
}
