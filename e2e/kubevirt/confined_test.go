//go:build e2ekubevirt

package kubevirt

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"compsc.io/compsc/e2e/procstatus"
)

// confined checks the running device process of a pod as the kernel has it: no
// user of the host's, no capability within reach, a filter of system calls, and
// nothing to write to but what it is given.
func confined(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	dir := deviceProcess(t, pod)
	pid, err := strconv.Atoi(filepath.Base(dir))
	if err != nil {
		t.Fatal(err)
	}
	if err := procstatus.Check(pid, procstatus.Unprivileged(map[string]string{
		"Uid": "107 107 107 107", "Seccomp": "2", // KubeVirt's user; SECCOMP_MODE_FILTER
	})); err != nil {
		t.Errorf("the device process: %v", err)
	}
	mounts, err := os.ReadFile(filepath.Join(dir, "mounts"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[1] == "/" {
			if !slices.Contains(strings.Split(f[3], ","), "ro") {
				t.Errorf("the device process may write to its root: %s", line)
			}
			return
		}
	}
	t.Errorf("the device process has no root file system:\n%s", mounts)
}

// deviceProcess returns the directory in /proc of the pod's device process, which
// is on this machine as the nodes are.
func deviceProcess(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, name := range cmdlines {
		dir := filepath.Dir(name)
		cmdline, _ := os.ReadFile(name) // It may have ended since.
		cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		if bytes.HasPrefix(cmdline, []byte("/compsc\x00")) && bytes.Contains(cgroup, []byte(pod.UID)) {
			found = append(found, dir)
		}
	}
	if len(found) != 1 {
		t.Fatalf("pod %s has %d device processes, want one: %v", pod.Name, len(found), found)
	}
	return found[0]
}
