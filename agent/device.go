package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/apimachinery/pkg/types"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/kubevirt"
)

// Names of a device process's sockets, as package device has them.
const (
	controlSocket = "control.sock"
	handoffSocket = "handoff.sock"
	// maxDeviceMessage bounds a reply of a device process: the states of
	// eight VFs of a few KiB each.
	maxDeviceMessage = 4 << 20
)

// devices reaches the device processes of this node's pods. Each has one
// connection, for as long as anybody holds a share of it. Safe for concurrent
// use.
type devices struct {
	podsDir string

	mu    sync.Mutex
	conns map[types.UID]*deviceConn
}

type deviceConn struct {
	conn  *grpc.ClientConn
	users int
}

// device is somebody's share of the connection to a device process.
type device struct {
	controlpb.DeviceClient
	podsDir string
	pod     types.UID
	once    sync.Once
	close   func()
}

func newDevices(podsDir string) *devices {
	return &devices{podsDir: podsDir, conns: map[types.UID]*deviceConn{}}
}

// get returns the device process of a pod. It does not connect: calls fail
// with code Unavailable as long as the process is not there.
func (d *devices) get(pod types.UID) (*device, error) {
	if pod == "" {
		return nil, errors.New("the pod is not known")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.conns[pod]
	if c == nil {
		conn, err := grpc.NewClient("passthrough:///device",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return dialSocket(ctx, d.podsDir, pod, controlSocket)
			}),
			grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithAuthority("localhost"),
			grpc.WithIdleTimeout(0),
			grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{
				BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 500 * time.Millisecond}}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxDeviceMessage)))
		if err != nil {
			return nil, err
		}
		c = &deviceConn{conn: conn}
		d.conns[pod] = c
	}
	c.users++
	return &device{DeviceClient: controlpb.NewDeviceClient(c.conn), podsDir: d.podsDir, pod: pod, close: func() { d.put(pod, c) }}, nil
}

func (d *devices) put(pod types.UID, c *deviceConn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.users--; c.users > 0 {
		return
	}
	delete(d.conns, pod)
	c.conn.Close()
}

// Close gives the share up. It may be called more than once.
func (d *device) Close() { d.once.Do(d.close) }

// gone tells whether the device process has ended for good, or never began:
// the kernel refuses connections to a socket whose owner has ended, and the
// kubelet removes the directory only after the pod's processes ended. An
// error means that it cannot be told.
func (d *device) gone(ctx context.Context) (bool, error) {
	c, err := dialSocket(ctx, d.podsDir, d.pod, controlSocket)
	if err == nil {
		c.Close()
		return false, nil
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ECONNREFUSED) {
		return true, nil
	}
	return false, err
}

// handOver passes a VF to the device process.
func (d *device) handOver(ctx context.Context, h handoff.Handoff, files []*os.File) error {
	path, done, err := openSocket(d.podsDir, d.pod, handoffSocket)
	if err != nil {
		return err
	}
	defer done()
	return handoff.Send(ctx, path, h, files)
}

// unlimitMemlock lets the device process lock as much memory as it has: all of
// the guest's, for each VF, or the kernel maps none of it for DMA. Nothing is
// lost by that, for what it locks counts against the pod's memory anyhow. The
// agent must see the process, which takes the host's PID namespace.
func (d *device) unlimitMemlock(ctx context.Context) error {
	c, err := dialSocket(ctx, d.podsDir, d.pod, controlSocket)
	if err != nil {
		return err
	}
	defer c.Close()
	rc, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) {
		cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || cerr != nil {
		return errors.Join(err, cerr)
	}
	if cred.Pid == 0 {
		return errors.New("it is in a PID namespace that the agent does not see: run the agent with hostPID")
	}
	pid := int(cred.Pid)
	limit := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	err = unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, &limit, nil)
	if errors.Is(err, unix.EPERM) { // without CAP_SYS_RESOURCE as far as its hard limit
		if err = unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, nil, &limit); err == nil {
			limit.Cur = limit.Max
			err = unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, &limit, nil)
		}
	}
	if err != nil {
		return fmt.Errorf("limit on locked memory of process %d: %w", pid, err)
	}
	return nil
}

func dialSocket(ctx context.Context, podsDir string, pod types.UID, name string) (net.Conn, error) {
	path, done, err := openSocket(podsDir, pod, name)
	if err != nil {
		return nil, err
	}
	defer done()
	var d net.Dialer
	return d.DialContext(ctx, "unix", path)
}

// openSocket returns a path to a socket of a pod's device process, valid until
// done is called. The real one is longer than a unix address may be, and lies
// in a volume that a pod's containers can write to: below it no symbolic link
// is followed, so that a pod cannot lead the agent to a socket of the node.
func openSocket(podsDir string, pod types.UID, name string) (path string, done func(), err error) {
	for n := range kubevirt.MaxSidecars {
		var nerr error
		path, done, nerr = openSocketBelow(kubevirt.DeviceDir(podsDir, pod, n), name)
		if nerr == nil {
			return path, done, nil
		}
		// Another sidecar of the pod has no such directory.
		if err == nil || !errors.Is(nerr, unix.ENOENT) {
			err = nerr
		}
	}
	return "", nil, err
}

// openSocketBelow opens a socket in the directory of one sidecar's device
// process, which need not be there.
func openSocketBelow(dir, name string) (path string, done func(), err error) {
	full := filepath.Join(dir, name)
	sidecar := filepath.Dir(dir)
	at, err := unix.Open(filepath.Dir(sidecar), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", filepath.Dir(sidecar), err)
	}
	defer func() { unix.Close(at) }()
	for _, part := range []string{filepath.Base(sidecar), filepath.Base(dir)} {
		next, err := unix.Openat(at, part, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", nil, fmt.Errorf("%s of %s: %w", part, full, err)
		}
		unix.Close(at)
		at = next
	}
	fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", full, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		unix.Close(fd)
		return "", nil, fmt.Errorf("%s is not a socket (%v)", full, err)
	}
	return fmt.Sprintf("/proc/self/fd/%d", fd), func() { unix.Close(fd) }, nil
}
