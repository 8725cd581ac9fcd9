//go:build e2enodes

package nodes_test

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/sriov/nodes"
	"compsc.io/compsc/e2e/stream"
	"compsc.io/compsc/e2e/traffic"
)

const (
	// testTimeout bounds the whole test.
	testTimeout = 28 * time.Minute
	// bootTimeout bounds the start of a guest, callTimeout an answer of one, whose
	// processor KVM has on an emulated one.
	bootTimeout, callTimeout = 8 * time.Minute, 2 * time.Minute
	// guestMemory is in MiB: little, as all of it is pinned, and sent.
	guestMemory = 128
	// rate is what the stream sends each way, in bytes per second; flow is how
	// many bytes each way prove that it is alive.
	rate, flow = 8 << 10, 16 << 10
	// maxGrowth is more than any counter grows during the move.
	maxGrowth = 1 << 28
	// pingInterval leaves the guest time for the stream: it answers some twenty a
	// second.
	pingInterval = time.Second
)

// rig is two nodes with a VM.
type rig struct {
	*testing.T
	ctx   context.Context
	h     *harness.Harness
	nodes *nodes.Nodes
	ip    netip.Addr
}

func newRig(t *testing.T) *rig {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	r := &rig{T: t, ctx: ctx}
	compsc := r.build("compsc", "compsc.io/compsc")
	member := r.build("member", "compsc.io/compsc/e2e/sriov/member")
	set, err := artifacts.Find(compsc)
	r.must(err)
	vm, err := artifacts.SRIOV(artifacts.StockNode)
	r.must(err)
	kvm, err := artifacts.SVMQEMU()
	r.must(err)
	r.h, err = harness.Start(ctx, harness.Options{
		Artifacts: set,
		Log:       slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Progress:  func(s string) { r.Log(s) },
		HugePages: true,
		Machines: func(ctx context.Context, l *lab.Lab) (harness.Machines, error) {
			n, err := nodes.Start(ctx, l, nodes.Options{
				Node: vm, KVM: kvm, Compsc: compsc, Member: member, Kernel: set.Kernel, Initrd: set.Initrd, VFs: harness.VFsPerNode,
			})
			if err != nil {
				return nil, err
			}
			r.nodes = n
			return n, nil
		},
	})
	r.must(err)
	t.Cleanup(func() {
		if t.Failed() {
			r.keepLogs(filepath.Join(filepath.Dir(set.Config), "out", "nodes-log"))
		}
		if err := r.h.Close(); err != nil {
			t.Error(err)
		}
	})
	r.ip = r.h.Lab.GuestIP().Addr()
	return r
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// build builds a program that runs in a node, which has no libc.
func (r *rig) build(name, pkg string) string {
	r.Helper()
	path := filepath.Join(r.TempDir(), name)
	c := exec.CommandContext(r.ctx, "go", "build", "-trimpath", "-o", path, pkg)
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := c.CombinedOutput()
	if err != nil {
		r.Fatalf("%s: %v: %s", pkg, err, out)
	}
	return path
}

// keepLogs copies the logs of all processes, which end with the lab.
func (r *rig) keepLogs(dir string) {
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.CopyFS(dir, os.DirFS(r.h.LogDir()))
	}
	r.Logf("the logs of all processes are in %s (%v)", dir, err)
}

// guest speaks to the guest where it runs now.
func (r *rig) guest(bound time.Duration, do func(context.Context, *proto.Client) error) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, bound)
	defer cancel()
	path, err := r.h.StandIn.AgentSocket(ctx, client.ObjectKey{Namespace: harness.Namespace, Name: harness.VMI})
	r.must(err)
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	r.must(err)
	c := proto.NewPatientClient(conn)
	defer c.Close()
	r.must(do(ctx, c))
}

// health asks the guest, whose one interface is the VF.
func (r *rig) health() (h traffic.Health) {
	r.Helper()
	r.guest(callTimeout, func(ctx context.Context, c *proto.Client) (err error) {
		h, err = traffic.Ask(ctx, c)
		return err
	})
	return h
}

// load starts pings and a stream to the guest.
func (r *rig) load() (*traffic.Pinger, *stream.Stream) {
	r.Helper()
	ping, err := traffic.PingEvery(r.h.Lab, r.ip, pingInterval)
	r.must(err)
	r.Cleanup(func() { ping.Close() })
	r.must(ping.Await(r.ctx, 3))
	s, err := traffic.OpenStream(context.WithoutCancel(r.ctx), r.h.Lab, r.ip, 4711, rate)
	r.must(err)
	return ping, s
}

// flow waits until data has come through, both ways.
func (r *rig) flow(s *stream.Stream) {
	r.Helper()
	sent := s.Stats().Sent
	r.must(traffic.AwaitProgress(r.ctx, s, flow))
	for again := time.NewTicker(50 * time.Millisecond); s.Stats().Sent < sent+flow; <-again.C {
		if r.ctx.Err() != nil {
			r.Fatalf("the stream to the guest stalls: %+v", s.Stats())
		}
	}
}
