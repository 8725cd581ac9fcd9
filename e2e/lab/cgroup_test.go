//go:build e2e

package lab

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// TestCgroups: a lab's control groups go with it, with what runs in groups
// below them.
func TestCgroups(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l, err := New(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := l.NewCgroup("a")
	if err != nil {
		t.Fatal(err, l.Close())
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err, l.Close())
	}
	pid := []byte(strconv.Itoa(cmd.Process.Pid))
	for _, dir := range dirs {
		below := filepath.Join(dir, "pods", "one")
		if err := os.MkdirAll(below, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(below, "cgroup.procs"), pid, 0); err != nil {
			t.Errorf("%s: %v", below, err)
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("what ran in them ended by itself")
		}
	case <-ctx.Done():
		t.Error("what ran in them still runs")
	}
	for _, dir := range dirs {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}
