package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	cgroupDir = "/sys/fs/cgroup"
	// cgroupTimeout bounds the removal of control groups, in which the kernel
	// may still be burying processes.
	cgroupTimeout = 20 * time.Second
)

// NewCgroup makes a control group for a node that starts containers, in each
// hierarchy of the first version of control groups, and returns their
// directories. Close kills what runs in them and removes them.
func (l *Lab) NewCgroup(name string) (dirs []string, err error) {
	hierarchies, err := filepath.Glob(filepath.Join(cgroupDir, "*", "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.cgroups = true
	l.mu.Unlock()
	for _, h := range hierarchies {
		h = filepath.Dir(h)
		if _, err := os.Stat(filepath.Join(h, "cgroup.controllers")); err == nil {
			continue // the second version, mounted beside the first
		}
		if fi, err := os.Lstat(h); err != nil || fi.Mode()&fs.ModeSymlink != 0 {
			continue // such as cpu,cpuacct by one of its names
		}
		dir := filepath.Join(h, l.ID+"-"+name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, fmt.Errorf("control groups: %w", err)
		}
		if err := inheritCPUs(h, dir); err != nil {
			return nil, fmt.Errorf("control groups: %w", err)
		}
		if err := weigh(dir); err != nil {
			return nil, fmt.Errorf("control groups: %w", err)
		}
		dirs = append(dirs, dir)
	}
	if len(dirs) == 0 {
		return nil, errors.New("control groups: no hierarchy of their first version is mounted below " + cgroupDir)
	}
	return dirs, nil
}

// nodeShares is how much a node counts where processors are short, in what a
// group counts by itself, which is as much as one process outside: nodes have
// many, and pods on them that are killed if they do not come up in time.
const nodeShares = 8 * 1024

// weigh gives a new group of the hierarchy of processor time its weight.
func weigh(dir string) error {
	path := filepath.Join(dir, "cpu.shares")
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // another hierarchy
	}
	return os.WriteFile(path, []byte(strconv.Itoa(nodeShares)), 0)
}

// inheritCPUs gives a new group of the hierarchy of cpusets what its parent
// has, and its children the same: a group has no processors of itself.
func inheritCPUs(parent, dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(parent, name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another hierarchy
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.clone_children"), []byte("1"), 0)
}

// removeCgroups kills what runs in the control groups of the lab and removes
// them.
func removeCgroups(id string) error {
	tops, err := filepath.Glob(filepath.Join(cgroupDir, "*", id+"-*"))
	if err != nil {
		return err
	}
	deadline := time.After(cgroupTimeout)
	// The kernel does not tell when a killed process is gone that is nobody's
	// child here.
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for _, top := range tops {
		for {
			err := removeCgroup(top)
			if err == nil {
				break
			}
			select {
			case <-again.C:
			case <-deadline:
				return fmt.Errorf("control groups: %w", err)
			}
		}
	}
	return nil
}

func removeCgroup(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, dir := range slices.Backward(dirs) {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		for _, s := range strings.Fields(string(b)) {
			pid, err := strconv.Atoi(s)
			if err != nil {
				return fmt.Errorf("%s: %w", dir, err)
			}
			// 0 is a process that this process namespace does not see.
			if pid > 0 {
				if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
					return err
				}
			}
		}
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	return nil
}
