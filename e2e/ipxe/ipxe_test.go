//go:build e2edrivers

package ipxe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

const (
	// hops while iPXE drives the VF, each during the download of one part.
	hops     = 6
	partSize = 16 << 20
	memory   = 256 << 20
	// flow is what must have been sent within a hop, and before and after it:
	// several times what socket buffers can hold back.
	flow = 256 << 10

	bound     = 12 * time.Minute
	stepBound = 2 * time.Minute
)

var key = client.ObjectKey{Namespace: harness.Namespace, Name: harness.VMI}

// lab is one installation with iPXE in the place of a kernel.
type lab struct {
	*testing.T
	ctx context.Context
	h   *harness.Harness
	s   *server
	set artifacts.Set
}

// start brings everything up but the VM. The VFs of both nodes have the
// settings.
func start(t *testing.T, settings string) *lab {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	t.Cleanup(cancel)
	dir := t.TempDir()
	binary := filepath.Join(dir, "compsc")
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "compsc.io/compsc")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		t.Fatalf("build the product: %v", err)
	}
	l := &lab{T: t, ctx: ctx}
	var err error
	l.set, err = artifacts.Find(binary)
	l.must(err)
	firmware := l.set
	firmware.Kernel, err = artifacts.IPXE()
	l.must(err)
	firmware.Initrd = filepath.Join(dir, "script")
	l.h, err = harness.Start(ctx, harness.Options{
		Artifacts: firmware,
		Log:       slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Progress:  func(s string) { t.Log(s) },

		PFSettings: func(string) string { return settings },
	})
	l.must(err)
	t.Cleanup(func() {
		if t.Failed() {
			l.tell()
		}
		if err := l.h.Close(); err != nil {
			t.Error(err)
		}
	})

	kernel, err := os.ReadFile(l.set.Kernel)
	l.must(err)
	initrd, err := os.ReadFile(l.set.Initrd)
	l.must(err)
	seed := rand.Uint64()
	t.Logf("seed of the parts: %d", seed)
	random := rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%032x", seed))))
	parts := make([][]byte, hops)
	for i := range parts {
		parts[i] = make([]byte, partSize)
		_, _ = random.Read(parts[i]) // never fails
	}
	var listener net.Listener
	l.must(l.h.Lab.Hub.Do(func() (err error) {
		listener, err = net.Listen("tcp4", net.JoinHostPort(l.h.Lab.HubIP().String(), "0"))
		return err
	}))
	l.s = serve(listener, parts, kernel, initrd)
	t.Cleanup(func() {
		if err := l.s.Close(); err != nil {
			t.Error(err)
		}
	})
	text, err := script(l.h.Lab.GuestIP(), l.s.base, hops,
		"console=ttyS0 panic=-1 mitigations=off compsc.ip="+l.h.Lab.GuestIP().String())
	l.must(err)
	l.must(os.WriteFile(firmware.Initrd, []byte(text), 0o600))
	return l
}

func (l *lab) must(err error) {
	l.Helper()
	if err != nil {
		l.Fatal(err)
	}
}

// tell prints what the VMs have said.
func (l *lab) tell() {
	consoles, err := l.h.StandIn.Consoles(4 << 10)
	for pod, text := range consoles {
		l.Logf("console in pod %s: %q", pod, text)
	}
	if err != nil {
		l.Log(err)
	}
}

// createVM creates a VM without kernel arguments, which iPXE would run instead
// of its script.
func (l *lab) createVM() {
	l.Helper()
	v := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Name: key.Name, Namespace: key.Namespace}}
	v.Spec.Domain.Memory = &kubevirtv1.Memory{Guest: resource.NewQuantity(memory, resource.BinarySI)}
	v.Spec.Domain.Devices.Interfaces = []kubevirtv1.Interface{{
		Name: harness.Interface, Binding: &kubevirtv1.PluginBinding{Name: standin.BindingName}, MacAddress: harness.MAC,
	}}
	v.Spec.Networks = []kubevirtv1.Network{{
		Name: harness.Interface,
		NetworkSource: kubevirtv1.NetworkSource{Multus: &kubevirtv1.MultusNetwork{
			NetworkName: harness.Namespace + "/vf-net",
		}},
	}}
	l.must(l.h.Client().Create(l.ctx, v))
}

// until waits until ok returns true; the VM's end is an error.
func (l *lab) until(what string, ok func(context.Context) (bool, error)) {
	l.Helper()
	ctx, cancel := context.WithTimeout(l.ctx, stepBound)
	defer cancel()
	polls := 0
	l.must(wait.Until(ctx, what, func(ctx context.Context) (bool, error) {
		done, err := ok(ctx)
		// The API server is asked now and then only: its client would make
		// this wait, and say so instead of what was waited for.
		if polls++; done || err != nil || polls%20 != 0 {
			return done, err
		}
		v := &kubevirtv1.VirtualMachineInstance{}
		if err := l.h.Client().Get(ctx, key, v); err != nil {
			return false, err
		}
		if v.IsFinal() {
			return false, fmt.Errorf("VMI %s is %s: %s", v.Name, v.Status.Phase, v.Status.Reason)
		}
		return false, nil
	}))
}

// resets is how often the VM has reset its VF since its device process, the
// one of the node it is on, began.
func (l *lab) resets() uint64 {
	l.Helper()
	r, err := l.h.StandIn.DeviceStatus(l.ctx, key)
	l.must(err)
	if len(r.Interfaces) != 1 {
		l.Fatalf("the device process has %d interfaces, want 1: %v", len(r.Interfaces), r)
	}
	return r.Interfaces[0].GuestResets
}

// progress of the download of the part, over one connection and no other.
func (l *lab) progress(part int) int {
	l.Helper()
	sent, asked, err := l.s.progress(part)
	l.must(err)
	if asked > 1 {
		l.Fatalf("part %d was asked for %d times: its download broke", part, asked)
	}
	return sent
}

func (l *lab) awaitSent(part, n int) {
	l.Helper()
	l.until(fmt.Sprintf("%d bytes of part %d to be sent", n, part), func(context.Context) (bool, error) {
		sent, _, err := l.s.progress(part)
		return sent >= n, err
	})
}

// inRAM waits until the guest asks for the check, and answers it if the VM's
// RAM holds the contents.
func (l *lab) inRAM(what string, contents ...[]byte) {
	l.Helper()
	l.until("iPXE to ask for the check of "+what, func(context.Context) (bool, error) { return l.s.awaits(what) })
	for i, c := range contents {
		ok, err := l.h.RAMHolds(l.ctx, key.Name, c)
		l.must(err)
		if !ok {
			l.Fatalf("check of %s: what was downloaded (%d of %d, %d bytes) is not in the VM's RAM", what, i+1, len(contents), len(c))
		}
	}
	l.s.approve(what)
}

// hop moves the VM to the other node.
func (l *lab) hop(name string) *v1alpha1.VFMigration {
	l.Helper()
	node, err := l.h.VMNode(l.ctx)
	l.must(err)
	m := harness.NewMigration(name, harness.Other(node))
	l.must(l.h.Client().Create(l.ctx, m))
	ctx, cancel := context.WithTimeout(l.ctx, stepBound)
	defer cancel()
	l.must(l.h.AwaitEnd(ctx, m, nil))
	if !meta.IsStatusConditionTrue(m.Status.Conditions, v1alpha1.ConditionSucceeded) {
		l.Fatalf("VFMigration %s failed: %s", m.Name, harness.Describe(m))
	}
	if now, err := l.h.VMNode(l.ctx); err != nil || now != m.Spec.Target.NodeName {
		l.Fatalf("the VM is on node %s (%v) after it moved to %s", now, err, m.Spec.Target.NodeName)
	}
	return m
}

// TestIPXE: a VM in which iPXE drives the VF is moved during each of its
// downloads. Each download must go on where it was, over the same connection,
// end with the right bytes, and without a reset of the VF. Then iPXE hands the
// VF to Linux, and the VM is moved once more.
func TestIPXE(t *testing.T) {
	// A head that happens to be 0 needs no other way than being written.
	for _, x := range []struct{ name, settings, heads string }{
		{"all heads writable", "", compsc.HeadsWriteVerify},
		{"transmit heads not writable", "tx-head-writable=false",
			"rx=" + compsc.HeadsWriteVerify + ",tx=" + compsc.HeadsDummyAdvance},
	} {
		t.Run(x.name, func(t *testing.T) {
			if heads := start(t, x.settings).run(); !heads[x.heads] {
				t.Errorf("ring heads were restored by %v, want %s among them", heads, x.heads)
			}
		})
	}
}

// run is the whole test. It returns the ways in which heads were restored.
func (l *lab) run() map[string]bool {
	heads := map[string]bool{}
	l.createVM()
	l.until("iPXE to open its interface", func(context.Context) (bool, error) {
		_, _, ok, err := l.s.opened()
		return ok, err
	})
	chip, mac, _, _ := l.s.opened()
	if want := strings.ReplaceAll(harness.MAC, ":", "-"); chip != "82599-vf" || mac != want {
		l.Fatalf("iPXE drives %q with address %s, want 82599-vf and %s", chip, mac, want)
	}
	// A reset when it finds the VF, and one when it opens it: the count that
	// must not change from here on does count.
	resets := l.resets()
	if resets < 2 {
		l.Fatalf("iPXE opened the VF after %d resets, want 2 at least", resets)
	}

	for i := range hops {
		l.awaitSent(i, flow)
		if n := l.resets(); n != resets {
			l.Fatalf("hop %d: %d resets of the VF before it, after %d", i+1, n, resets)
		}
		before := l.progress(i)
		m := l.hop(fmt.Sprintf("ipxe-%d", i+1))
		after := l.progress(i)
		if after-before < flow || after >= partSize {
			l.Fatalf("hop %d: of part %d %d bytes were sent before it and %d after it, want %d more and not all %d", i+1, i, before, after, flow, partSize)
		}
		// The new device process has seen nothing of the driver's start.
		if resets = l.resets(); resets != 0 {
			l.Fatalf("hop %d: iPXE reset the VF %d times after it", i+1, resets)
		}
		if len(m.Status.Devices) != 1 || m.Status.Devices[0].StateBytes == 0 || m.Status.Devices[0].PagesMarked == 0 || m.Status.Downtime == nil {
			l.Fatalf("hop %d moved nothing: %s", i+1, harness.Describe(m))
		}
		d := m.Status.Devices[0]
		heads[d.HeadsStrategy] = true
		l.Logf("hop %d: %d bytes sent meanwhile, device stopped %s, %d bytes of state, %d pages marked, heads restored by %s",
			i+1, after-before, m.Status.Downtime.DeviceStopped.Duration, d.StateBytes, d.PagesMarked, d.HeadsStrategy)
		l.s.end(i)
		l.inRAM(strconv.Itoa(i), l.s.parts[i])
		if n := l.progress(i); n != partSize {
			l.Fatalf("part %d is in the VM's RAM, but %d of its %d bytes were sent", i, n, partSize)
		}
		if n := l.resets(); n != 0 {
			l.Fatalf("hop %d: iPXE reset the VF %d times after it", i+1, n)
		}
	}

	l.inRAM(checkLinux, l.s.kernel, l.s.initrd)
	l.linux()
	return heads
}

// linux waits for Linux on the VF that iPXE drove, and moves it.
func (l *lab) linux() {
	l.Helper()
	vm, err := l.h.Attach(l.ctx, key.Name, l.h.Lab.GuestIP().Addr())
	l.must(err)
	l.must(vm.Call(l.ctx, func(ctx context.Context, c *proto.Client) error {
		info, err := c.Info(ctx)
		if err != nil {
			return err
		}
		if len(info.Interfaces) != 1 || info.Interfaces[0].Driver != "ixgbevf" || info.Interfaces[0].MAC != harness.MAC {
			return fmt.Errorf("the interfaces are %+v, want one of ixgbevf with %s", info.Interfaces, harness.MAC)
		}
		return nil
	}))
	if l.resets() == 0 {
		l.Fatal("the VF went from iPXE to ixgbevf without a reset")
	}
	l.must(vm.StartTraffic(l.ctx))
	node, err := l.h.VMNode(l.ctx)
	l.must(err)
	r, err := vm.Hop(l.ctx, harness.NewMigration("linux", harness.Other(node)),
		func(ctx context.Context, m *v1alpha1.VFMigration) error { return l.h.Client().Create(ctx, m) }, nil)
	l.must(err)
	if !r.StreamIntact || r.StreamBytes == 0 || r.DriverResets != 0 {
		l.Fatalf("Linux's hop: %+v", r)
	}
	if n := l.resets(); n != 0 {
		l.Fatalf("Linux reset the VF %d times after its hop", n)
	}
	st, err := vm.StopTraffic(l.ctx)
	if err != nil || !st.Intact {
		l.Fatal(errors.Join(err, fmt.Errorf("the stream: %+v", st)))
	}
}
