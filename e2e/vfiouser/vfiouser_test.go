//go:build e2e

package vfiouser

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/kubevirt"
)

const (
	bound = 30 * time.Second
	// rounds of all cases; memory and descriptors are compared over them, after
	// as many that bring the Go runtime's arenas to their size.
	rounds = 20
	// growth is how much the process may grow over the rounds, in KiB: less
	// than a message of the largest size in every round.
	growth = 4 << 10
)

// closing lists the cases after which the stream has no message boundary to
// go on from, or the server is entitled to distrust everything: the session
// must end. Every other case is answered with an error.
var closing = map[string]bool{
	"size-0": true, "size-below-header": true, "size-4GiB": true, "size-2MiB": true, "type-unknown": true,
	"half-a-header": true, "half-a-body": true, "too-many-descriptors": true,
}

// refused says which error is the answer where it is not EINVAL.
var refused = map[string]string{
	"io-fds": "EOPNOTSUPP", "unmap-dirty-pages": "EOPNOTSUPP", "unmap-unknown": "ENOENT",
}

func TestIndependentClient(t *testing.T) {
	dir := t.TempDir()
	client := buildClient(t, dir)
	d := startDevice(t, dir)
	talk := func() {
		t.Helper()
		if out := run(t, client, d.socket, "talk"); out != "ok" {
			t.Fatalf("the conversation ended with %q", out)
		}
	}
	talk()
	names := strings.Fields(run(t, client, "-", "cases"))
	if len(names) < 60 {
		t.Fatalf("the client knows only %d cases", len(names))
	}
	for name := range closing {
		if !strings.Contains(strings.Join(names, " "), name) {
			t.Errorf("the client does not know the case %s", name)
		}
	}
	bad := func() {
		for _, name := range names {
			want := "error EINVAL"
			if e, ok := refused[name]; ok {
				want = "error " + e
			}
			if closing[name] {
				want = "closed"
			}
			if name == "reply-unasked" { // it may be a late one, to a request given up
				want = "ignored"
			}
			if got := run(t, client, d.socket, "bad", name); got != want {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
	}
	many := func() {
		for range rounds {
			if bad(); t.Failed() {
				t.FailNow()
			}
		}
		d.idle(t)
	}
	many()
	// Those that take the server's patience, once.
	for _, name := range []string{"silent", "header", "body", "negotiated"} {
		if got := run(t, client, d.socket, "stall", name); got != "closed" {
			t.Errorf("stalled, %s: %s", name, got)
		}
	}
	d.idle(t)
	files, rss := d.files(t), d.rss(t)
	many()
	if got := d.files(t); got != files {
		t.Errorf("the device process has %d descriptors open after %d sessions, had %d", got, rounds*len(names), files)
	}
	if got := d.rss(t); got > rss+growth {
		t.Errorf("the device process has %d KiB resident after %d sessions, had %d", got, rounds*len(names), rss)
	} else {
		t.Logf("after %d broken sessions: %d KiB resident, before %d; %d descriptors", rounds*len(names), got, rss, files)
	}
	talk()
}

// deviceProcess is the product with a VF whose wire sends everything back.
type deviceProcess struct {
	socket string
	cmd    *exec.Cmd
	log    *bytes.Buffer
}

func startDevice(t *testing.T, dir string) *deviceProcess {
	t.Helper()
	binary := os.Getenv("COMPSC_BINARY")
	if binary == "" {
		binary = build(t, dir, "go", "build", "-o", filepath.Join(dir, "product"), "compsc.io/compsc")
	}
	const slot = 5
	sockets := filepath.Join(dir, filepath.Base(kubevirt.SidecarDeviceDir()))
	d := &deviceProcess{socket: filepath.Join(sockets, device.VFSocket(slot)), log: &bytes.Buffer{}}
	d.cmd = exec.Command(binary, "device", "--hooks-dir", dir, "--sidecar", "hook-sidecar-0")
	d.cmd.Stderr = d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.cmd.Wait() }()
	t.Cleanup(func() {
		_ = d.cmd.Process.Signal(syscall.SIGTERM) // an error: it has ended
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the device process ended with %v:\n%s", err, d.log)
			}
		case <-time.After(bound):
			t.Errorf("the device process does not end")
			_ = d.cmd.Process.Kill()
		}
	})
	// A datagram socket keeps frame boundaries as a tap does.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours := os.NewFile(uintptr(fds[0]), "wire"), os.NewFile(uintptr(fds[1]), "wire")
	defer theirs.Close()
	echoed := make(chan struct{})
	go func() {
		defer close(echoed)
		echo(ours)
	}()
	t.Cleanup(func() {
		ours.Close()
		<-echoed
	})
	h := handoff.Handoff{
		Interface: "net1", Slot: slot, Of: 1, VF: "0000:03:10.0", PF: "pf0", Family: "ixgbevf", DeviceID: "8086:10ed",
		Backend: handoff.BackendModel, MAC: "52:54:00:00:00:01", Epoch: 1, Role: "primary",
	}
	until(t, "the device process takes its VF", func() (bool, error) {
		err := handoff.Send(t.Context(), filepath.Join(sockets, device.HandoffSocket), h, []*os.File{theirs})
		return err == nil, err
	})
	return d
}

// echo sends every frame back to whom it came from.
func echo(wire *os.File) {
	frame := make([]byte, 1<<16)
	for {
		n, err := wire.Read(frame)
		if err != nil {
			return
		}
		if n < 12 {
			continue
		}
		var from [6]byte
		copy(from[:], frame[6:12])
		copy(frame[6:12], frame[:6])
		copy(frame[:6], from[:])
		if _, err := wire.Write(frame[:n]); err != nil {
			return
		}
	}
}

// idle waits until the process has ended the last session.
func (d *deviceProcess) idle(t *testing.T) {
	t.Helper()
	stable, last := 0, -1
	until(t, "the last session has ended", func() (bool, error) {
		n := d.files(t)
		if n == last {
			stable++
		} else {
			stable, last = 0, n
		}
		return stable == 10, nil
	})
}

func (d *deviceProcess) files(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func (d *deviceProcess) rss(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, ok := strings.Cut(string(status), "VmRSS:")
	if !ok {
		t.Fatalf("no VmRSS in %s", status)
	}
	kib, err := strconv.Atoi(strings.Fields(after)[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib
}

// run runs the client, bounded, and returns what it prints.
func run(t *testing.T, client string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	out, err := exec.CommandContext(ctx, client, args...).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		t.Fatalf("%s: %v: %s", strings.Join(args[1:], " "), err, exit.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func buildClient(t *testing.T, dir string) string {
	t.Helper()
	return build(t, dir, "cc", "-Wall", "-Wextra", "-Werror", "-O1", "-o", filepath.Join(dir, "client"),
		filepath.Join("client", "client.c"), filepath.Join("client", "serve.c"))
}

// build runs a compiler and returns its result, the argument after -o.
func build(t *testing.T, dir string, command ...string) string {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	for i, a := range command {
		if a == "-o" {
			return command[i+1]
		}
	}
	t.Fatal("no -o")
	return ""
}

// until polls a condition, bounded.
func until(t *testing.T, what string, condition func() (bool, error)) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	end := time.After(bound)
	for {
		ok, err := condition()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s: not within %v: %v", what, bound, err)
		}
	}
}
