package standin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"libvirt.org/go/libvirtxml"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/hook"
	"compsc.io/compsc/e2e/lab"
)

// migrationPort is where the target's QEMU listens.
const migrationPort = "49152"

// direct is a compute container on a machine of its own, in which QEMU runs
// without libvirt: by a command line that has of the domain what a guest with
// nothing but a VF needs, with the arguments that the sidecar added to it, and by
// QMP commands in the order of libvirt's.
type direct struct {
	standIn *StandIn
	pod     *pod
	// end is closed when the container has ended, gone when QEMU has, which it
	// outlives, or when there will be none.
	end, gone chan struct{}

	mu     sync.Mutex
	qemu   *lab.Process // nil until a VM is started
	doc    string       // its domain
	moved  bool
	killed bool
}

// startDirect makes the compute container of a pod, and has the pod's sockets
// appear here until ctx ends.
func (s *StandIn) startDirect(ctx context.Context, p *pod) error {
	p.compute = &direct{standIn: s, pod: p, end: make(chan struct{}), gone: make(chan struct{})}
	own := filepath.Join(p.dir, ownDir)
	for _, path := range []string{
		filepath.Join(p.sidecarDir(), hook.Socket), filepath.Join(p.deviceDir(), device.ControlSocket),
		filepath.Join(own, agentSocket), filepath.Join(own, observerSocket),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := s.cfg.Machines.Forward(ctx, p.node, path); err != nil {
			return err
		}
	}
	return nil
}

func (x *direct) ended() <-chan struct{} { return x.end }

func (x *direct) silent() <-chan struct{} { return x.gone }

func (x *direct) kill() {
	x.mu.Lock()
	q, first := x.qemu, !x.killed
	x.killed = true
	x.mu.Unlock()
	if !first {
		return
	}
	close(x.end)
	if q != nil {
		q.Stop(0)
	} else {
		close(x.gone)
	}
}

func (x *direct) log() string {
	return filepath.Join(x.standIn.cfg.Lab.Dir, "log", x.pod.name+"-qemu.log")
}

func (x *direct) console(*pod) string { return x.log() }

func (x *direct) start(_ context.Context, doc string, paused bool) error {
	var more []string
	if paused {
		more = []string{"-S"}
	}
	return x.run(doc, more...)
}

// run starts QEMU.
func (x *direct) run(doc string, more ...string) error {
	cfg, p := x.standIn.cfg, x.pod
	args, err := directArguments(doc, cfg.KVM)
	if err != nil {
		return err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.killed || x.qemu != nil {
		return fmt.Errorf("pod %s has ended, or has a VM", p.name)
	}
	in := func(path string) string { return filepath.Join(cfg.QEMUTree, path) }
	own := filepath.Join(p.dir, ownDir)
	q, err := x.standIn.start(p.node, lab.Command{
		Name: "QEMU of " + p.name, Path: "/usr/bin/qemu-system-x86_64", Args: append(args, more...),
		Env: []string{"PATH=/usr/bin"}, Chroot: cfg.QEMUTree,
		Mounts: []lab.Mount{
			{Target: in("run")},
			{Source: "/dev", Target: in("dev")},
			{Source: p.hooks, Target: in(filepath.Join("run", strings.TrimPrefix(kubevirt.HooksDir, "/var/run")))},
			{Source: own, Target: in(ownDir)},
			{Source: cfg.Kernel, Target: in(filepath.Join("run", bootDir, "kernel")), ReadOnly: true},
			{Source: cfg.Initrd, Target: in(filepath.Join("run", bootDir, "initrd")), ReadOnly: true},
		},
		Log: x.log(),
	}, own)
	if err != nil {
		return err
	}
	x.qemu, x.doc = q, doc
	go func() {
		<-q.Done()
		close(x.gone)
	}()
	return nil
}

// directArguments are QEMU's for a domain: of the domain's own devices those that
// have a console, a guest's agent and a monitor, and what the sidecar added.
func directArguments(doc string, kvm bool) ([]string, error) {
	d := &libvirtxml.Domain{}
	if err := d.Unmarshal(doc); err != nil {
		return nil, err
	}
	b := d.MemoryBacking
	if b == nil || b.MemorySource == nil || b.MemorySource.Type != "memfd" || b.MemoryAccess == nil || b.MemoryAccess.Mode != "shared" {
		return nil, errors.New("the sidecar did not ask for memory in a shared memfd")
	}
	size := fmt.Sprintf("%d%c", d.Memory.Value, d.Memory.Unit[0])
	cmdline := strings.Replace(d.OS.Cmdline, "console=ttyS0", "console=ttyS0 quiet nokaslr tsc=reliable no_timer_check random.trust_cpu=on "+
		"cryptomgr.notests audit=0 apparmor=0 selinux=0 nowatchdog rcupdate.rcu_expedited=1", 1)
	ram := "memory-backend-memfd,id=ram,share=on,size=" + size
	if b.MemoryHugePages != nil {
		ram += ",hugetlb=on,hugetlbsize=2M"
	}
	accel, cpu := "tcg", "qemu64"
	if kvm {
		// Without what a guest of this guest would need.
		accel, cpu = "kvm", "host,-svm"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35,memory-backend=ram", "-accel", accel, "-cpu", cpu,
		"-smp", fmt.Sprint(d.VCPU.Value), "-m", size,
		"-object", ram,
		"-kernel", d.OS.Kernel, "-initrd", d.OS.Initrd, "-append", cmdline,
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-serial", "unix:" + filepath.Join(ownDir, agentSocket) + ",server=on,wait=off",
	}
	for _, a := range d.QEMUCommandline.Args {
		args = append(args, a.Value)
	}
	return args, nil
}

// migrate does what two libvirts do for a migration from peer to peer
// (src/qemu/qemu_migration.c: prepare, perform, finish, confirm), with pause
// before the switchover on the source and late activation of block devices on the
// target, as libvirt always has.
func (x *direct) migrate(ctx context.Context, j *job, src *domain) error {
	target, ok := j.target.compute.(*direct)
	if !ok {
		return errors.New("the target has a libvirt")
	}
	uri := "tcp:" + net.JoinHostPort(j.address, migrationPort)
	dst, err := target.prepare(ctx, j, x.domain(), uri)
	if err == nil {
		err = x.perform(ctx, src, uri)
	}
	if err == nil {
		err = reached(ctx, dst, 0, "completed")
	}
	if err == nil {
		// Held by the gate until the target's VF has the state.
		err = dst.run(ctx, "cont", nil, nil)
	}
	if err != nil {
		target.kill()
		return errors.Join(err, resume(ctx, src))
	}
	x.mu.Lock()
	x.moved = true
	x.mu.Unlock()
	x.qemu.Stop(0)
	return nil
}

func (x *direct) domain() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.doc
}

// prepare starts the target's QEMU and has it listen.
func (x *direct) prepare(ctx context.Context, j *job, doc, uri string) (*domain, error) {
	ctx, cancel := context.WithTimeout(ctx, x.standIn.bound(time.Minute))
	defer cancel()
	if err := x.run(doc, "-incoming", "defer", "-S"); err != nil {
		return nil, err
	}
	select {
	case <-j.observed:
	case <-x.gone:
		return nil, fmt.Errorf("QEMU ended: %w", logTail(x.qemu))
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := capabilities(ctx, j.dst, "events", "return-path", "late-block-activate"); err != nil {
		return nil, err
	}
	return j.dst, j.dst.run(ctx, "migrate-incoming", map[string]any{"uri": uri}, nil)
}

// perform has QEMU send the VM.
func (x *direct) perform(ctx context.Context, src *domain, uri string) error {
	if err := capabilities(ctx, src, "events", "return-path", "pause-before-switchover"); err != nil {
		return err
	}
	limit := x.standIn.limit()
	if limit == 0 {
		limit = unlimited
	}
	if err := x.setSpeed(ctx, src, limit); err != nil {
		return err
	}
	from := src.mark()
	if err := src.run(ctx, "migrate", map[string]any{"uri": uri}, nil); err != nil {
		return err
	}
	if err := reached(ctx, src, from, "pre-switchover"); err != nil {
		return err
	}
	if err := src.run(ctx, "migrate-continue", map[string]any{"state": "pre-switchover"}, nil); err != nil {
		return err
	}
	return reached(ctx, src, from, "completed")
}

func capabilities(ctx context.Context, d *domain, names ...string) error {
	var list []map[string]any
	for _, n := range names {
		list = append(list, map[string]any{"capability": n, "state": true})
	}
	return d.run(ctx, "migrate-set-capabilities", map[string]any{"capabilities": list}, nil)
}

// reached waits until the migration has come so far.
func reached(ctx context.Context, d *domain, from int, status string) error {
	e, _, err := d.wait(ctx, from, migrationStatus(status, "failed", "cancelled"))
	if err != nil {
		return err
	}
	if got := e.Data["status"]; got != status {
		return fmt.Errorf("QEMU's migration: %v", got)
	}
	return nil
}

// resume has the VM of a migration that failed go on, if QEMU has not done that.
func resume(ctx context.Context, src *domain) error {
	ok, err := runsNow(ctx, src)
	if err == nil && !ok {
		err = src.run(ctx, "cont", nil, nil)
	}
	return err
}

func (x *direct) abort(ctx context.Context, d *domain) error {
	return d.run(ctx, "migrate_cancel", nil, nil)
}

func (x *direct) setSpeed(ctx context.Context, d *domain, limit uint64) error {
	return d.run(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": limit << 20}, nil)
}

func (x *direct) running(ctx context.Context, d *domain) (bool, error) { return runsNow(ctx, d) }

func runsNow(ctx context.Context, d *domain) (bool, error) {
	var status struct{ Running bool }
	err := d.run(ctx, "query-status", nil, &status)
	return status.Running, err
}

func (x *direct) fate(context.Context, *domain) corev1.PodPhase {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.moved {
		return corev1.PodSucceeded
	}
	return corev1.PodFailed
}

func (x *direct) pid() (int, error) { return 0, errors.New("QEMU runs on another machine") }
