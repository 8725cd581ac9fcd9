//go:build e2edrivers

package drivers

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/harness"
)

const (
	// scenarioTimeout bounds all that is done with one kernel and number of CPUs.
	scenarioTimeout = 10 * time.Minute
	// memory of the guests, in MiB.
	memory = 192
	// checkTimeout bounds each check that waits for something.
	checkTimeout = time.Minute
	// jumbo is the MTU of the PFs and of everything behind them.
	jumbo = 9000
)

var (
	product string
	begun   = time.Now()
	// interrupted ends when the tests are told to stop.
	interrupted context.Context
)

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	// A signal must end the tests with their processes and namespaces.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	interrupted = ctx
	dir, err := os.MkdirTemp("", "compsc-drivers-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	product = filepath.Join(dir, "compsc")
	build := exec.CommandContext(ctx, "go", "build", "-o", product, "compsc.io/compsc")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		return 1, fmt.Errorf("build the product: %w", err)
	}
	return m.Run(), nil
}

// progress tells what is about to be done.
func progress(t *testing.T, format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs  %s: %s\n", time.Since(begun).Seconds(), strings.TrimPrefix(t.Name(), "TestDrivers/"), fmt.Sprintf(format, args...))
}

// TestDrivers moves a guest with each kernel and number of CPUs.
func TestDrivers(t *testing.T) {
	for _, release := range []string{"bookworm", "trixie"} {
		for _, cores := range []uint32{1, 2} {
			t.Run(fmt.Sprintf("%s-%dcpu", release, cores), func(t *testing.T) { scenario(t, release, cores) })
		}
	}
}

// scenario is all that is done with one kernel and number of CPUs.
func scenario(t *testing.T, release string, cores uint32) {
	ctx, cancel := context.WithTimeout(interrupted, scenarioTimeout)
	defer cancel()
	t.Setenv("COMPSC_GUEST", release)
	set, err := artifacts.Find(product)
	check(t, err)
	var trusted atomic.Bool
	trusted.Store(true)
	progress(t, "two nodes, control plane, manager and agents; the PFs trust their VFs")
	h, err := harness.Start(ctx, harness.Options{
		Artifacts:  set,
		Log:        slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		PFSettings: func(string) string { return fmt.Sprintf("trust=%v,pf-mtu=%d", trusted.Load(), jumbo) },
	})
	check(t, err)
	defer func() {
		if t.Failed() {
			tails(t, h.LogDir())
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}()
	check(t, widen(h.Lab, jumbo))
	trunk, err := openTrunk(h.Lab)
	check(t, err)
	defer trunk.Close()

	withTrust(t, ctx, boot(t, ctx, h, trunk, cores, true))
	check(t, h.DeleteVM(ctx, harness.VMI))

	progress(t, "the agents start again: the PFs do not trust their VFs")
	trusted.Store(false)
	for name := range h.Lab.Nodes {
		check(t, h.AwaitFreeVFs(ctx, name, harness.VFsPerNode))
		h.StopAgent(name)
		check(t, h.StartAgent(name, harness.VFsPerNode))
	}
	for name := range h.Lab.Nodes {
		check(t, h.AwaitAgentLease(ctx, name, true))
	}
	withoutTrust(t, ctx, boot(t, ctx, h, trunk, cores, false))
}

// tails prints the ends of the logs.
func tails(t *testing.T, dir string) {
	const size = 3000
	logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	for _, log := range logs {
		if b, err := os.ReadFile(log); err == nil && len(b) > 0 && !strings.Contains(log, "etcd") && !strings.Contains(log, "apiserver") {
			t.Logf("%s ends:\n%s", filepath.Base(log), b[max(0, len(b)-size):])
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
