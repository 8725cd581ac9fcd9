//go:build e2e

package lab

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func newLab(t *testing.T) *Lab {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	l, err := New(ctx, "a", "b")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// TestLeft: nothing is left of a lab that was closed, and what there is before is
// found.
func TestLeft(t *testing.T) {
	l := newLab(t)
	if _, err := l.NewCgroup("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Start(Command{Name: "tail", Path: "/usr/bin/tail", Args: []string{"-f", l.Dir + "/log"}, Log: filepath.Join(l.Dir, "log")}); err != nil {
		t.Fatal(err)
	}
	left, err := l.Left()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"directory ", "mount ", "network namespace ", "control group ", "link ", "process "} {
		if !slices.ContainsFunc(left, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("no %swas found: %q", want, left)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if left, err := l.Left(); err != nil || len(left) > 0 {
		t.Errorf("left of a closed lab: %q (%v)", left, err)
	}
}

// TestReach: every namespace reaches every other one, as the API server,
// agents and the prober need it.
func TestReach(t *testing.T) {
	l := newLab(t)
	places := []struct {
		name string
		do   func(func() error) error
		ip   string
	}{
		{"root", func(f func() error) error { return f() }, l.RootIP().String()},
		{"hub", l.Hub.Do, l.HubIP().String()},
		{"a", l.Nodes["a"].NS.Do, l.Nodes["a"].IP.String()},
		{"b", l.Nodes["b"].NS.Do, l.Nodes["b"].IP.String()},
	}
	for _, to := range places {
		var ln net.Listener
		if err := to.do(func() (err error) {
			ln, err = net.Listen("tcp", net.JoinHostPort(to.ip, "0"))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		for _, from := range places {
			if err := from.do(func() error {
				c, err := net.DialTimeout("tcp", ln.Addr().String(), 5*time.Second)
				if err == nil {
					c.Close()
				}
				return err
			}); err != nil {
				t.Errorf("%s does not reach %s: %v", from.name, to.name, err)
			}
		}
	}
}

// TestTwoLabs: labs side by side do not meet.
func TestTwoLabs(t *testing.T) {
	a, b := newLab(t), newLab(t)
	if a.Subnet == b.Subnet || a.ID == b.ID {
		t.Fatalf("two labs share subnet %s or name %s", a.Subnet, a.ID)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName(b.rootLink); err != nil {
		t.Errorf("closing one lab took the other's link along: %v", err)
	}
}

// TestClose: nothing is left, and a process with its own mounts is gone.
func TestClose(t *testing.T) {
	l := newLab(t)
	dir := filepath.Join(l.Dir, "shared")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(l.Dir, "log")
	p, err := l.Start(Command{
		Name: "sh", Path: "/bin/sh",
		Args:   []string{"-c", "ls /proc/self/fd >/dev/null; echo seen > /run/x/y/file; cat /sys/class/net/br0/address 2>/dev/null; ip -br addr show br0 2>/dev/null; exec sleep 600"},
		NS:     l.Nodes["a"].NS,
		Mounts: []Mount{{Target: "/run"}, {Source: dir, Target: "/run/x/y"}},
		Log:    log,
	})
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the bind mount", func() bool {
		_, err := os.Stat(filepath.Join(dir, "file"))
		return err == nil
	})
	if _, err := os.Stat("/run/x"); err == nil {
		t.Error("the process's mounts are seen outside of it")
	}
	start := time.Now()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(start); d > 10*time.Second {
		t.Errorf("Close took %s", d)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", p.PID())); err == nil {
		t.Error("the process outlived its lab")
	}
	if _, err := os.Stat(l.Dir); err == nil {
		t.Errorf("%s is left", l.Dir)
	}
	for _, n := range []string{"hub", "a", "b"} {
		if h, err := netns.GetFromName(l.ID + "-" + n); err == nil {
			h.Close()
			t.Errorf("namespace %s-%s is left", l.ID, n)
		}
	}
	if _, err := netlink.LinkByName(l.rootLink); err == nil {
		t.Errorf("link %s is left", l.rootLink)
	}
}

// TestCrash: a lab whose process was killed is removed by the next one, with
// a process that refuses to die with its parent.
func TestCrash(t *testing.T) {
	if os.Getenv("COMPSC_LAB_CRASH") != "" {
		crash(t)
		return
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestCrash$", "-test.v")
	cmd.Env = append(os.Environ(), "COMPSC_LAB_CRASH=1")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("the child did not crash: %s", out)
	}
	_, rest, ok := strings.Cut(string(out), "lab=")
	if !ok {
		t.Fatalf("the child made no lab: %s", out)
	}
	var id string
	var pid int
	if _, err := fmt.Sscanf(rest, "%s pid=%d", &id, &pid); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(nsDir, id+"-a")); err != nil {
		t.Fatalf("the crashed lab left no namespace: this test tests nothing: %v", err)
	}
	newLab(t)
	for _, n := range []string{"hub", "a", "b"} {
		if _, err := os.Stat(filepath.Join(nsDir, id+"-"+n)); err == nil {
			t.Errorf("namespace %s-%s is left", id, n)
		}
	}
	if _, err := os.Stat(filepath.Join(StateDir, id)); err == nil {
		t.Error("the crashed lab's directory is left")
	}
	waitFor(t, "the leftover process to end", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

func crash(t *testing.T) {
	l := newLab(t)
	// Not through the lab: like kube-apiserver and etcd, which outlive a
	// crash of the process that started them.
	cmd := exec.Command("/bin/sleep", "600")
	cmd.Args[0] = l.Dir + "/x"
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("lab=%s pid=%d\n", l.ID, cmd.Process.Pid)
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Kill(); err != nil {
		t.Fatal(err)
	}
	select {}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}
