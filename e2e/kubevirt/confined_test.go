//go:build e2ekubevirt

package kubevirt

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// confined checks the running device process of a pod as the kernel has it: no
// user of the host's, no capability within reach, a filter of system calls, and
// nothing to write to but what it is given.
func confined(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	pid := deviceProcess(t, pod)
	status := fields(t, filepath.Join(pid, "status"))
	for field, want := range map[string]string{
		"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000",
		"CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		"NoNewPrivs": "1", "Seccomp": "2", // SECCOMP_MODE_FILTER
	} {
		if status[field] != want {
			t.Errorf("the device process has %s %q, want %q", field, status[field], want)
		}
	}
	if uid := strings.Fields(status["Uid"]); slices.Contains(uid, "0") || len(uid) != 4 {
		t.Errorf("the device process has the users %q, one of them root", uid)
	}
	mounts, err := os.ReadFile(filepath.Join(pid, "mounts"))
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

// fields reads lines of a name, a colon and a value.
func fields(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(fmt.Errorf("the device process has ended: %w", err))
	}
	m := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		m[name] = strings.TrimSpace(value)
	}
	return m
}
