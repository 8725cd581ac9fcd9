//go:build apiserver

package hook

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"compsc.io/compsc/agent/kubevirt"
)

// virtLauncher is KubeVirt's own caller of sidecars.
type virtLauncher struct {
	t       *testing.T
	calls   io.WriteCloser
	answers *json.Decoder
}

// answer is what virt-launcher makes of a call.
type answer struct{ Error, Domain string }

// startVirtLauncher runs the caller of sidecars whose sockets are in directories
// below dir, and of a Plugin object if one is given.
func startVirtLauncher(t *testing.T, dir string, plugin ...string) *virtLauncher {
	t.Helper()
	tool := os.Getenv("COMPSC_CACHE")
	if tool == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		tool = filepath.Join(home, ".cache", "compsc")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, filepath.Join(tool, "kubevirt-hooks", "kubevirt-hooks"), append([]string{"sidecar", dir}, plugin...)...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: `make kubevirt-hooks` builds it", err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
	})
	return &virtLauncher{t, in, json.NewDecoder(out)}
}

func (l *virtLauncher) send(call string, interfaces ...string) {
	l.t.Helper()
	request := map[string]any{"call": call}
	if call == "OnDefineDomain" {
		request["domain"], request["vmi"] = string(domainXML(l.t)), json.RawMessage(vmiJSON(l.t, interfaces...))
	}
	if err := json.NewEncoder(l.calls).Encode(request); err != nil {
		l.t.Fatal(err)
	}
}

func (l *virtLauncher) receive() (a answer) {
	l.t.Helper()
	if err := l.answers.Decode(&a); err != nil {
		l.t.Fatal(err)
	}
	return a
}

// does makes a call that must work.
func (l *virtLauncher) does(call string, interfaces ...string) string {
	l.t.Helper()
	l.send(call, interfaces...)
	a := l.receive()
	if a.Error != "" {
		l.t.Fatalf("%s: virt-launcher reports %q", call, a.Error)
	}
	return a.Domain
}

// fails makes a call of OnDefineDomain that must not.
func (l *virtLauncher) fails(want string, interfaces ...string) {
	l.t.Helper()
	l.send("OnDefineDomain", interfaces...)
	if a := l.receive(); !strings.Contains(a.Error, want) {
		l.t.Fatalf("virt-launcher reports %q, want %q", a.Error, want)
	}
}

// sidecar is CompSC's, which can be started again in the same place.
type sidecar struct {
	dir string
	// plugin is the directory of the domain hook, which need not be there.
	plugin string
	down   atomic.Int32

	mu    sync.Mutex
	await func(context.Context) error
}

// becomes sets what waiting for the VFs leads to.
func (s *sidecar) becomes(await func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.await = await
}

// start runs it until stop is called.
func (s *sidecar) start(t *testing.T) (stop func()) {
	t.Helper()
	server, err := New(Options{
		Sidecar: "hook-sidecar-0", Gate: "gate.sock", Monitor: "qmp.sock", VF: func(int) string { return "vf.sock" },
		Await: func(ctx context.Context) ([]kubevirt.Interface, error) {
			s.mu.Lock()
			await := s.await
			s.mu.Unlock()
			if await != nil {
				if err := await(ctx); err != nil {
					return nil, err
				}
			}
			return []kubevirt.Interface{{Name: "net1", Slot: 0x10, VFAddress: "0000:03:10.0", MAC: "52:54:00:00:00:01"}}, nil
		},
		Wait: 200 * time.Millisecond, NetworkInfo: filepath.Join(s.dir, "none"),
		Shutdown: func() { s.down.Add(1) }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ls, err := Listen(s.dir, s.plugin)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, ls...) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// TestContract goes through a virt-launcher's life with KubeVirt 1.9's own caller
// of sidecars, its search for sockets, its client and its order, on a domain that
// its own types make: the sidecar comes late, is slow, refuses, is restarted, is
// asked again, and after an abort.
func TestContract(t *testing.T) {
	base := t.TempDir()
	s := &sidecar{dir: filepath.Join(base, "hook-sidecar-0"), plugin: filepath.Join(base, "none")}
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l := startVirtLauncher(t, base)

	// virt-launcher looks for the socket before there is one.
	l.send("Collect")
	stop := s.start(t)
	if a := l.receive(); a.Error != "" {
		t.Fatalf("Collect: virt-launcher reports %q", a.Error)
	}

	// The VFs are not there yet: the call ends long before virt-launcher's
	// minute, and is made again.
	s.becomes(func(ctx context.Context) error {
		<-ctx.Done()
		return errors.New("the VFs are not attached yet")
	})
	began := time.Now()
	l.fails("FailedPrecondition desc = compsc: the VFs are not attached yet", "net1")
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("a slow answer took %s", took)
	}
	s.becomes(nil)
	once := l.does("OnDefineDomain", "net1")
	for _, want := range []string{`gate.sock`, `qmp.sock`, `vf.sock`, `<alias name="ua-net1">`} {
		if !strings.Contains(once, want) {
			t.Errorf("the domain has no %s:\n%s", want, once)
		}
	}
	if again := l.does("OnDefineDomain", "net1"); again != once {
		t.Errorf("the second time the domain is\n%s\nwas\n%s", again, once)
	}
	l.fails("net2", "net1", "net2") // which has no VF

	// virt-launcher does not look for the socket a second time.
	stop()
	l.send("OnDefineDomain", "net1")
	if a := l.receive(); a.Error == "" {
		t.Error("a sidecar answers that is not there")
	}
	s.start(t)
	if again := l.does("OnDefineDomain", "net1"); again != once {
		t.Errorf("of the restarted sidecar the domain is\n%s\nwas\n%s", again, once)
	}

	// After an abort it is refused as often as it is asked, until the end.
	s.becomes(func(context.Context) error { return errors.New("the migration is being undone: Aborted") })
	for range 3 {
		l.fails("being undone: Aborted", "net1")
	}
	for range 2 {
		l.does("Shutdown")
	}
	if n := s.down.Load(); n != 1 {
		t.Errorf("shut down %d times, want once", n)
	}
}

// TestPluginContract: where there is a Plugin object, virt-launcher drops of a
// sidecar's domain what its types do not know. With ours, which KubeVirt admits, it
// gets that back from the sidecar's domain hook.
func TestPluginContract(t *testing.T) {
	base := filepath.Join(t.TempDir(), "hooks")
	s := &sidecar{dir: filepath.Join(base, "hook-sidecar-0"), plugin: filepath.Join(base+"-plugin", filepath.Base(kubevirt.PluginDir))}
	for _, dir := range []string{s.dir, s.plugin} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.start(t)
	l := startVirtLauncher(t, base, filepath.Join("..", "..", "..", "config", "kubevirt", "plugin", "plugin.yaml"))
	l.does("Collect")
	domain := l.does("OnDefineDomain", "net1")
	for _, want := range []string{`gate.sock`, `qmp.sock`, `vf.sock`, `<alias name="ua-net1">`, `<source address="127.`} {
		if strings.Count(domain, want) != 1 {
			t.Errorf("the domain has %d times %s:\n%s", strings.Count(domain, want), want, domain)
		}
	}
	s.becomes(func(context.Context) error { return errors.New("the VFs are not attached yet") })
	l.fails("not attached yet", "net1")
}
