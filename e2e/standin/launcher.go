package standin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/e2e/lab"
)

// What virt-launcher's own configuration of libvirt says
// (cmd/virt-launcher/qemu.conf of KubeVirt), but for the first four: there is
// one user, one log file, and no security module here, and a test may stop a
// libvirtd for longer than its peer's patience.
const qemuConf = `user = "root"
group = "root"
stdio_handler = "file"
security_driver = "none"
keepalive_interval = -1
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
`

// libvirtTimeout bounds a call of libvirt that does not migrate.
const libvirtTimeout = 30 * time.Second

// launcher is the compute container: libvirtd, which is started again when it
// is killed, as virt-launcher does, and what it starts.
type launcher struct {
	standIn *StandIn
	proc    *lab.Process
	// dir is what it has as /run, seen from outside.
	dir string
}

// startLauncher starts the compute container of a pod.
func (s *StandIn) startLauncher(p *pod) error {
	tree := s.cfg.QEMUTree
	x := &launcher{standIn: s, dir: filepath.Join(p.dir, "run")}
	etc := filepath.Join(p.dir, "etc")
	dirs := map[string]string{
		"/etc/libvirt": etc,
		// QEMU's capabilities, which take a second to find out.
		"/var/cache/libvirt": filepath.Join(s.cfg.Lab.Dir, "libvirt-cache"),
		"/var/lib/libvirt":   filepath.Join(p.dir, "lib"),
		"/var/log/libvirt":   filepath.Join(s.cfg.Lab.Dir, "log", p.name+"-libvirt"),
	}
	mounts := []lab.Mount{
		{Source: x.dir, Target: filepath.Join(tree, "run")},
		{Source: "/dev", Target: filepath.Join(tree, "dev")},
		{Source: "/sys", Target: filepath.Join(tree, "sys"), ReadOnly: true},
		// The tree's /var/run is a link to its /run, which this process
		// would follow to its own.
		{Source: p.hooks, Target: filepath.Join(tree, "run", strings.TrimPrefix(kubevirt.HooksDir, "/var/run"))},
		{Source: s.cfg.Kernel, Target: filepath.Join(tree, "run", bootDir, "kernel"), ReadOnly: true},
		{Source: s.cfg.Initrd, Target: filepath.Join(tree, "run", bootDir, "initrd"), ReadOnly: true},
	}
	for target, source := range dirs {
		if err := os.MkdirAll(source, 0o700); err != nil {
			return err
		}
		mounts = append(mounts, lab.Mount{Source: source, Target: filepath.Join(tree, target)})
	}
	for _, d := range []string{x.private(p), filepath.Join(x.dir, proxyDir), filepath.Join(p.dir, ownDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	for name, content := range map[string]string{
		"qemu.conf":     qemuConf,
		"libvirtd.conf": fmt.Sprintf("auth_unix_rw = \"none\"\nhost_uuid = %q\nlog_outputs = \"2:stderr\"\n", p.uid),
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	var err error
	x.proc, err = s.cfg.Lab.Start(lab.Command{
		Name: "libvirtd of " + p.name,
		Path: "/bin/sh",
		// A signal ends it with a status above 128.
		Args:   []string{"-c", "mount -t proc proc /proc && until libvirtd; do [ $? -gt 128 ] || exit 1; done"},
		Env:    []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		NS:     s.cfg.Lab.Nodes[p.node].NS,
		Chroot: tree,
		Mounts: mounts,
		Init:   true,
		Log:    filepath.Join(s.cfg.Lab.Dir, "log", p.name+"-libvirtd.log"),
	})
	if err != nil {
		return err
	}
	p.launcher, p.compute = x, x
	return nil
}

// private is the directory of a VM's own sockets.
func (x *launcher) private(p *pod) string {
	return filepath.Join(x.dir, strings.TrimPrefix(privateDir(p.vmi), "/var/run"))
}

// call has libvirt do something. It waits for a libvirtd that is starting.
func (x *launcher) call(ctx context.Context, do func(*libvirt.Libvirt) error) error {
	conn, err := x.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The library knows no contexts. Its calls end with the connection.
	l := libvirt.NewWithDialer(dialers.NewAlreadyConnected(conn))
	done := make(chan error, 1)
	go func() {
		err := l.Connect()
		if err == nil {
			err = do(l)
			_ = l.Disconnect() // it may be gone
		}
		done <- err
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		return fmt.Errorf("libvirt: %w", ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("libvirt: %w", err)
	}
	return nil
}

func (x *launcher) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, libvirtTimeout)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", filepath.Join(x.dir, "libvirt", "libvirt-sock"))
		if err == nil {
			return conn, nil
		}
		select {
		case <-t.C:
		case <-x.proc.Done():
			return nil, errors.Join(errors.New("libvirtd does not run"), logTail(x.proc))
		case <-ctx.Done():
			return nil, fmt.Errorf("libvirtd: %w", err)
		}
	}
}

// processes returns the container's processes of that name, by their numbers
// here.
func (x *launcher) processes(name string) ([]int, error) {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", x.proc.PID()))
	if err != nil {
		return nil, err
	}
	all, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []int
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if strings.TrimSpace(string(comm)) != name {
			continue
		}
		if theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil && theirs == ns {
			out = append(out, pid)
		}
	}
	return out, nil
}

// signal sends a signal to libvirtd itself.
func (x *launcher) signal(sig unix.Signal) error {
	pids, err := x.processes("libvirtd")
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return errors.New("no libvirtd runs")
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal libvirtd: %w", err)
		}
	}
	return nil
}

// logTail is the end of a process's output as an error, nil if it said nothing.
func logTail(p *lab.Process) error {
	b := p.Tail(2000)
	if b == "" {
		return nil
	}
	return fmt.Errorf("its last words: %s", b)
}

// Pod is the pod that the VMI's VM runs in.
func (s *StandIn) Pod(ctx context.Context, key client.ObjectKey) (types.UID, error) {
	p, _, err := s.running(ctx, key)
	if err != nil {
		return "", err
	}
	return p.uid, nil
}

// RestartLibvirt kills the libvirtd of a pod, and returns once another, which
// takes the VM over, answers.
func (s *StandIn) RestartLibvirt(ctx context.Context, pod types.UID) error {
	p := s.podOf(pod)
	if p == nil {
		return fmt.Errorf("no pod %s runs", pod)
	}
	old, err := p.launcher.processes("libvirtd")
	if err != nil {
		return err
	}
	if err := p.launcher.signal(unix.SIGKILL); err != nil {
		return err
	}
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for {
		now, err := p.launcher.processes("libvirtd")
		if err == nil && len(now) > 0 && !slices.Equal(now, old) {
			break
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("no libvirtd in place of the killed one: %w", errors.Join(err, ctx.Err()))
		}
	}
	return p.launcher.call(ctx, func(l *libvirt.Libvirt) error {
		_, err := l.ConnectGetLibVersion()
		return err
	})
}

// Virsh runs virsh in a pod, and returns what it says.
func (s *StandIn) Virsh(ctx context.Context, pod types.UID, args ...string) (string, error) {
	p := s.podOf(pod)
	if p == nil {
		return "", fmt.Errorf("no pod %s runs", pod)
	}
	tree := s.cfg.QEMUTree
	out, err := os.CreateTemp(p.dir, "virsh")
	if err != nil {
		return "", err
	}
	defer out.Close()
	defer os.Remove(out.Name())
	v, err := s.cfg.Lab.Start(lab.Command{
		Name: "virsh", Path: "/usr/bin/virsh", Args: append([]string{"-c", "qemu:///system"}, args...),
		Env: []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}, Chroot: tree,
		Mounts: []lab.Mount{{Source: p.launcher.dir, Target: filepath.Join(tree, "run")}},
		Log:    out.Name(),
	})
	if err != nil {
		return "", err
	}
	select {
	case <-v.Done():
	case <-ctx.Done():
		v.Stop(0)
		return v.Tail(1000), fmt.Errorf("virsh: %w", ctx.Err())
	}
	if err := v.Err(); err != nil {
		return v.Tail(1000), fmt.Errorf("%w: %s", err, v.Tail(1000))
	}
	return v.Tail(1000), nil
}
