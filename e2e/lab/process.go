package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Command describes a process.
type Command struct {
	// Name is for messages.
	Name string
	// Path is the program; with Chroot, as seen inside it.
	Path string
	// Args are its arguments without the program's name.
	Args []string
	// Env is its environment; nil for this process's.
	Env []string
	// NS is its network namespace; nil for this process's.
	NS *NS
	// Mounts are made, in order, in a mount namespace of the process's own.
	// With neither Mounts nor Chroot it shares this process's.
	Mounts []Mount
	// Chroot is its root directory; empty for this process's.
	Chroot string
	// Init makes it the first process of a process namespace: whatever it
	// starts ends with it, and must be reaped by it.
	Init bool
	// Log is a file that its output is appended to.
	Log string
}

// Mount is one mount of a process's own.
type Mount struct {
	// Source is a file or directory to bind; empty for an empty tmpfs.
	Source string
	// Target is where, as seen from this process, not from within the
	// chroot. Directories that are missing are made, which is why a tmpfs
	// should come first.
	Target string
	// ReadOnly makes a bind read-only.
	ReadOnly bool
}

// Process is a running process. Its methods are safe for concurrent use.
type Process struct {
	name string
	pid  int
	log  string
	done chan struct{}
	err  error // valid once done is closed
}

// Start runs a process that dies with this one, whatever kills this one. The
// lab's Close stops it.
func (l *Lab) Start(c Command) (*Process, error) {
	p := &Process{name: c.Name, log: c.Log, done: make(chan struct{})}
	started := make(chan error, 1)
	// The goroutine keeps its thread until the process is gone: the kernel
	// sends the parent-death signal when the thread that forked ends, and the
	// thread must not run other goroutines in the process's namespaces.
	go func() {
		runtime.LockOSThread()
		cmd, err := c.start()
		if err == nil {
			p.pid = cmd.Process.Pid
			l.mu.Lock()
			l.procs[p] = struct{}{}
			l.mu.Unlock()
		}
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		l.mu.Lock()
		delete(l.procs, p)
		l.mu.Unlock()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	return p, nil
}

func (c Command) start() (*exec.Cmd, error) {
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = c.Env
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid:   true,
		Pdeathsig: syscall.SIGKILL,
		Chroot:    c.Chroot,
	}
	if c.Init {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID
	}
	if c.Log != "" {
		if err := os.MkdirAll(filepath.Dir(c.Log), 0o700); err != nil {
			return nil, err
		}
		f, err := os.OpenFile(c.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		cmd.Stdout, cmd.Stderr = f, f
	}
	if len(c.Mounts) > 0 || c.Chroot != "" {
		if err := ownMounts(c.Mounts); err != nil {
			return nil, err
		}
	}
	if c.NS != nil {
		if err := netns.Set(c.NS.handle); err != nil {
			return nil, fmt.Errorf("enter network namespace %s: %w", c.NS.Name, err)
		}
	}
	return cmd, cmd.Start()
}

// ownMounts gives the calling thread a mount namespace with the mounts.
func ownMounts(mounts []Mount) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("new mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// A source may lie below an earlier target, so all are opened first.
	sources := make([]*os.File, len(mounts))
	for i, m := range mounts {
		if m.Source == "" {
			continue
		}
		fd, err := unix.Open(m.Source, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Source, err)
		}
		sources[i] = os.NewFile(uintptr(fd), m.Source)
		defer sources[i].Close()
	}
	for i, m := range mounts {
		if err := m.mount(sources[i]); err != nil {
			return fmt.Errorf("mount %s: %w", m.Target, err)
		}
	}
	return nil
}

func (m Mount) mount(source *os.File) error {
	if source == nil {
		return unix.Mount("tmpfs", m.Target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=64m")
	}
	info, err := source.Stat()
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(m.Target, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(m.Target), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(m.Target, os.O_CREATE|os.O_RDONLY, 0o600); err == nil {
			f.Close()
		}
	}
	if err != nil {
		return err
	}
	from := fmt.Sprintf("/proc/self/fd/%d", source.Fd())
	if err := unix.Mount(from, m.Target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	if m.ReadOnly {
		return unix.Mount("", m.Target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}
	return nil
}

// PID is the process's number.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Tail is the end of the process's log, at most n bytes.
func (p *Process) Tail(n int) string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

// Err tells how the process ended; only valid once Done is closed.
func (p *Process) Err() error {
	select {
	case <-p.done:
	default:
		return errors.New(p.name + " is still running")
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w", p.name, p.err)
	}
	return nil
}

// Signal sends a signal to the process and those it started. A process that
// is gone already is no error.
func (p *Process) Signal(sig unix.Signal) error {
	select {
	case <-p.done:
		return nil // its number may belong to somebody else by now
	default:
	}
	if err := unix.Kill(-p.pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %s: %w", p.name, err)
	}
	return nil
}

// Stop asks the process to end and kills it after grace, and returns once it
// is gone. A grace of 0 kills at once.
func (p *Process) Stop(grace time.Duration) {
	if grace > 0 {
		// A stopped process would not notice.
		_ = p.Signal(unix.SIGTERM)
		_ = p.Signal(unix.SIGCONT)
		select {
		case <-p.done:
			return
		case <-time.After(grace):
		}
	}
	_ = p.Signal(unix.SIGKILL)
	<-p.done
}
