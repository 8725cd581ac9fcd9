//go:build e2e

package tests

import (
	"context"
	"errors"
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

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/harness"
)

// One installation and one VM, under traffic from the first test to the last:
// whatever a test does, the VM must not notice.
var (
	h  *harness.Harness
	vm *harness.VM
	// deviceArgs are those of the device processes that start from now on.
	deviceArgs atomic.Value // []string
	names      atomic.Int64
	// markedDir is where device processes tell which pages they marked.
	markedDir string
)

func TestMain(m *testing.M) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx, m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(ctx context.Context, m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "compsc-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	binary := os.Getenv("COMPSC_BINARY")
	if binary == "" {
		binary = filepath.Join(dir, "compsc")
		// Only a build with the tag demo can inject faults.
		build := exec.CommandContext(ctx, "go", "build", "-tags", "demo", "-o", binary, "compsc.io/compsc")
		build.Stdout, build.Stderr = os.Stderr, os.Stderr
		if err := build.Run(); err != nil {
			return 1, fmt.Errorf("build the product: %w", err)
		}
	}
	set, err := artifacts.Find(binary)
	if err != nil {
		return 1, err
	}
	markedDir = filepath.Join(dir, "marked")
	if err := os.Mkdir(markedDir, 0o700); err != nil {
		return 1, err
	}
	deviceArgs.Store(usualArgs())
	h, err = harness.Start(ctx, harness.Options{
		Artifacts:  set,
		Log:        slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Progress:   func(s string) { fmt.Fprintln(os.Stderr, s) },
		DeviceArgs: func(string) []string { return deviceArgs.Load().([]string) },
	})
	if err != nil {
		return 1, err
	}
	defer func() {
		if code != 0 || err != nil {
			keepLogs(filepath.Join(filepath.Dir(set.Config), "out", "e2e-log"))
		}
		if cerr := h.Close(); cerr != nil {
			code, err = 1, errors.Join(err, cerr)
		}
	}()
	if vm, err = h.Boot(ctx); err != nil {
		return 1, err
	}
	if err := vm.StartTraffic(ctx); err != nil {
		return 1, err
	}
	// A signal must end the tests with their processes and namespaces.
	done := make(chan int, 1)
	go func() { done <- m.Run() }()
	select {
	case code = <-done:
	case <-ctx.Done():
		return 1, ctx.Err()
	}
	if st, err := vm.StopTraffic(ctx); err != nil || !st.Intact {
		return 1, fmt.Errorf("the stream of all tests: %+v: %w", st, err)
	}
	return code, nil
}

// usualArgs are the arguments of device processes without a fault.
func usualArgs() []string { return []string{"--marked-pages", markedDir} }

// keepLogs copies the logs of all processes, which end with the lab.
func keepLogs(dir string) {
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.CopyFS(dir, os.DirFS(h.LogDir()))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "the logs are lost:", err)
		return
	}
	fmt.Fprintln(os.Stderr, "the logs of all processes are in", dir)
}

// within bounds a test.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// vmNode is where the VM runs.
func vmNode(t *testing.T, ctx context.Context) string {
	t.Helper()
	node, err := h.VMNode(ctx)
	check(t, err)
	return node
}

// newMigration names a VFMigration of the VM to the other node.
func newMigration(t *testing.T, ctx context.Context) *v1alpha1.VFMigration {
	t.Helper()
	return vm.NewMigration(uniqueName(t), harness.Other(vmNode(t, ctx)))
}

func uniqueName(t *testing.T) string {
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))
	return fmt.Sprintf("%s-%d", name, names.Add(1))
}

func create(ctx context.Context, m *v1alpha1.VFMigration) error { return h.Client().Create(ctx, m) }

func hop(t *testing.T, ctx context.Context) *harness.Hop {
	t.Helper()
	m := newMigration(t, ctx)
	r, err := vm.Hop(ctx, m, create, nil)
	check(t, err)
	if node := vmNode(t, ctx); node != m.Spec.Target.NodeName {
		t.Fatalf("the VM is on node %s after it moved to %s", node, m.Spec.Target.NodeName)
	}
	return r
}

// refused fails unless the VFMigration has ended in a failure with the reason
// and a message that says what to do, with the VM on the node it was on,
// undisturbed, and with the target's VFs free.
func refused(t *testing.T, ctx context.Context, m *v1alpha1.VFMigration, source string, freeOnTarget int, reason string, says ...string) {
	t.Helper()
	if err := h.AwaitEnd(ctx, m, nil); err != nil {
		t.Fatal(err)
	}
	c := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionSucceeded)
	if c.Status != metav1.ConditionFalse || c.Reason != reason {
		t.Errorf("Succeeded is %s for reason %s, want False for %s: %s", c.Status, c.Reason, reason, harness.Describe(m))
	}
	if f := m.Status.Failure; f == nil || f.Reason != reason {
		t.Errorf("failure is %+v, want reason %s", f, reason)
	}
	for _, s := range says {
		if !strings.Contains(c.Message, s) {
			t.Errorf("the message %q does not say %q", c.Message, s)
		}
	}
	// Once the source had been asked to prepare, it must say that it is back.
	if p := meta.FindStatusCondition(m.Status.Conditions, v1alpha1.ConditionPrepared); p != nil && p.Status == metav1.ConditionTrue {
		if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionRolledBack) {
			t.Errorf("the source was prepared and is not rolled back: %s", harness.Describe(m))
		}
	}
	undisturbed(t, ctx, source, freeOnTarget)
}

// undisturbed fails unless the VM is on the node, has noticed nothing, and
// the other node has that many free VFs.
func undisturbed(t *testing.T, ctx context.Context, node string, freeOnTarget int) {
	t.Helper()
	if now := vmNode(t, ctx); now != node {
		t.Fatalf("the VM is on node %s, want %s", now, node)
	}
	_, err := vm.CheckUndisturbed(ctx)
	check(t, err)
	check(t, h.AwaitFreeVFs(ctx, harness.Other(node), freeOnTarget))
	migrations := &kubevirtv1.VirtualMachineInstanceMigrationList{}
	check(t, h.Client().List(ctx, migrations, client.InNamespace(harness.Namespace)))
	for _, m := range migrations.Items {
		if !m.IsFinal() {
			t.Errorf("VirtualMachineInstanceMigration %s is still %s", m.Name, m.Status.Phase)
		}
	}
}
