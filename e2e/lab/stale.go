package lab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A lab's name says which process it belongs to. The start time, in clock
// ticks since boot, tells a process from a later one with the same number.
var idPattern = regexp.MustCompile(`^compsc-(\d+)-(\d+)-\d+$`)

func ownID(n int64) (string, error) {
	start, err := startTime(os.Getpid())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("compsc-%d-%d-%d", os.Getpid(), start, n), nil
}

// startTime is field 22 of /proc/PID/stat (proc_pid_stat(5)), in clock ticks
// since boot.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field, the command's name, may hold anything but ends with
	// the last parenthesis.
	_, rest, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')'):], []byte(") "))
	f := bytes.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat: unexpected form", pid)
	}
	return strconv.ParseUint(string(f[19]), 10, 64)
}

// alive tells whether the process that a lab's name speaks of still runs.
func alive(id string) bool {
	m := idPattern.FindStringSubmatch(id)
	if m == nil {
		return true // not a lab: not ours to remove
	}
	pid, err := strconv.Atoi(m[1])
	if err != nil {
		return true
	}
	start, err := startTime(pid)
	return err == nil && strconv.FormatUint(start, 10) == m[2]
}

// removeStale removes what labs of dead processes left: processes,
// namespaces, directories. Links between namespaces go with these.
func removeStale() error {
	entries, err := os.ReadDir(StateDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || alive(e.Name()) {
			continue
		}
		errs = append(errs, removeLab(e.Name()))
	}
	return errors.Join(errs...)
}

func removeLab(id string) error {
	dir := filepath.Join(StateDir, id)
	var names []string
	if entries, err := os.ReadDir(nsDir); err == nil {
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), id+"-") {
				names = append(names, e.Name())
			}
		}
	}
	if err := killLeftovers(dir, names); err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		// Removing the hub's end removes the veth of the root namespace,
		// but only once the kernel gets to it; a new lab looks at the root
		// namespace's addresses at once.
		errs = append(errs, dropLinks(n), netns.DeleteNamed(n))
	}
	return errors.Join(append(errs, removeCgroups(id), os.RemoveAll(dir))...)
}

func dropLinks(name string) error {
	return onThread(func() error {
		h, err := netns.GetFromName(name)
		if err != nil {
			return nil // an unfinished namespace: the file alone is left
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			return err
		}
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if l.Type() == "veth" {
				// Its other end may have taken it along already.
				_ = netlink.LinkDel(l)
			}
		}
		return nil
	})
}

// killLeftovers kills the processes of a dead lab: those in its namespaces,
// and those whose arguments name its directory, as every process of a lab
// has it.
func killLeftovers(dir string, names []string) error {
	inodes := map[uint64]bool{}
	for _, n := range names {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(nsDir, n), &st); err == nil {
			inodes[st.Ino] = true
		}
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var st unix.Stat_t
		in := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st) == nil && inodes[st.Ino]
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if in || bytes.Contains(args, []byte(dir+"/")) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("process %d of a dead lab: %w", pid, err)
			}
		}
	}
	return nil
}
