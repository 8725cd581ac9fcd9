// Package sidecar starts device processes of tests as KubeVirt starts its
// sidecars: as the virt-launcher's user, without privileges and without the
// means to get any, and looks whether they are.
package sidecar

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/procstatus"
)

const (
	// User is KubeVirt's user for virt-launchers that are not root, and its group.
	User = 107
	// Memlock is how many bytes a process may lock that can map no guest's RAM of
	// these tests. What a container may is a matter of its node.
	Memlock = 64 << 10
)

// Dir makes a directory in which the process may make its own, with a path that
// is short enough for sockets. The caller removes it.
func Dir() (string, error) {
	dir, err := os.MkdirTemp("", "pod")
	if err != nil {
		return "", err
	}
	return dir, os.Chown(dir, User, User)
}

// Start starts a command so, which takes root. What it may lock is the caller's
// to [Limit].
func Start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: User, Gid: User}}
	started := make(chan error)
	go func() {
		// What a child may get is its thread's: that of the rest of this process
		// stays as it is, and the thread ends with the goroutine. A signal at the
		// parent's death would come with that of the thread.
		runtime.LockOSThread()
		err := giveUp()
		if err == nil {
			err = cmd.Start()
		}
		started <- err
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("%s as user %d without privileges: %w", filepath.Base(cmd.Path), User, err)
	}
	return nil
}

// giveUp takes from what the calling thread starts all means to get privileges.
func giveUp() error {
	for c := range uintptr(64) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the kernel knows no more
		}
		if err != nil {
			return fmt.Errorf("capability %d: %w", c, err)
		}
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// Limit has a process lock no more memory than this many bytes, or as much as
// it has for RLIM_INFINITY, which takes CAP_SYS_RESOURCE.
func Limit(pid int, bytes uint64) error {
	if err := unix.Prlimit(pid, unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: bytes, Max: bytes}, nil); err != nil {
		return fmt.Errorf("limit on locked memory of process %d: %w", pid, err)
	}
	return nil
}

// Check tells whether a process has, or could get, a privilege, or is of another
// user.
func Check(pid int) error {
	user := fmt.Sprint(User, User, User, User)
	return procstatus.Check(pid, procstatus.Unprivileged(map[string]string{"Uid": user, "Gid": user, "Groups": ""}))
}
