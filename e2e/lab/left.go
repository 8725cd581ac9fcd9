package lab

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// Left tells in words what there is of the lab: after Close, nothing. It looks for
// its directory, mounts, network namespaces, control groups, link and processes.
func (l *Lab) Left() (left []string, err error) {
	if _, err := os.Lstat(l.Dir); err == nil {
		left = append(left, "directory "+l.Dir)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) > 4 && (f[4] == l.Dir || strings.HasPrefix(f[4], l.Dir+"/") || strings.HasPrefix(f[4], filepath.Join(nsDir, l.ID)+"-")) {
			left = append(left, "mount "+f[4])
		}
	}
	for what, pattern := range map[string]string{
		"network namespace": filepath.Join(nsDir, l.ID+"-*"),
		"control group":     filepath.Join(cgroupDir, "*", l.ID+"-*"),
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		for _, p := range paths {
			left = append(left, what+" "+p)
		}
	}
	if l.rootLink != "" {
		if _, err := netlink.LinkByName(l.rootLink); err == nil {
			left = append(left, "link "+l.rootLink)
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		if p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		// What cannot be read has just ended.
		args, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		groups, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		if bytes.Contains(args, []byte(l.Dir+"/")) || bytes.Contains(groups, []byte("/"+l.ID+"-")) {
			left = append(left, fmt.Sprintf("process %s: %s", filepath.Base(p), bytes.ReplaceAll(args, []byte{0}, []byte{' '})))
		}
	}
	return left, nil
}
