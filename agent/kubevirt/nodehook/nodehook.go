// Package nodehook serves KubeVirt's node hooks (the Plugin API
// plugin.kubevirt.io/v1alpha1, KubeVirt 1.9 with the feature gate Plugins):
// virt-handler calls a unix socket of its node at points of a VM's life, and
// does not go on while the answer is an error. It calls again, for as long as it
// takes, and may repeat a call that was answered well; a worker of virt-handler
// waits during each call. So each call here is short, and its answer depends on
// nothing but what can be observed.
//
// KubeVirt does not say who calls. Only processes of uid 0 are served.
package nodehook

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	"golang.org/x/sync/singleflight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
	pluginv1alpha1 "kubevirt.io/api/plugin/v1alpha1"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/nodehook/hookpb"
)

// Socket is where the agent serves the hooks, on the node and, because KubeVirt
// mounts the directory there, inside of virt-handler. The Plugin object names it.
const Socket = "/var/run/kubevirt/plugins/compsc.sock"

const (
	// callLimit bounds one call; the Plugin object's timeout is longer.
	callLimit = 5 * time.Second
	// callGrace is how much later a handler is given up that ignores its bound.
	callGrace = time.Second
	// maxMessage bounds a request. A VMI is an object of the API server, whose
	// own bound is smaller.
	maxMessage = 4 << 20
	// maxStreams bounds the calls under way on one connection; virt-handler
	// makes one on each.
	maxStreams = 16
	// maxPoint and maxName bound what is logged of a caller's names.
	maxPoint, maxName = 63, 253
)

// Point is a point of a VM's life.
type Point = pluginv1alpha1.NodeHookPoint

// The points that virt-handler 1.9 calls hooks at.
const (
	// PreVMStart: before each attempt to start the VM here.
	PreVMStart = pluginv1alpha1.NodeHookPreVMStart
	// PostVMStart: once the VM runs.
	PostVMStart = pluginv1alpha1.NodeHookPostVMStart
	// PreVMStop: before each attempt to stop the VM.
	PreVMStop = pluginv1alpha1.NodeHookPreVMStop
	// PostVMStop: once the VM has ended for good.
	PostVMStop = pluginv1alpha1.NodeHookPostVMStop
	// PreMigrationTarget: before each attempt to prepare the target's pod.
	PreMigrationTarget = pluginv1alpha1.NodeHookPreMigrationTarget
	// PreMigrationSource: before libvirt is told to migrate.
	PreMigrationSource = pluginv1alpha1.NodeHookPreMigrationSource
	// PostMigrationTarget: once the VM runs on the target, and before KubeVirt
	// calls the migration complete.
	PostMigrationTarget = pluginv1alpha1.NodeHookPostMigrationTarget
)

// Points are all points that are served.
var Points = []Point{PreVMStart, PostVMStart, PreVMStop, PostVMStop, PreMigrationTarget, PreMigrationSource, PostMigrationTarget}

// migrationPoints are the points that belong to one migration.
var migrationPoints = map[Point]bool{PreMigrationTarget: true, PreMigrationSource: true, PostMigrationTarget: true}

// Call is one call of a hook, for a VMI that has an interface with the compsc
// network binding.
type Call struct {
	// Point is one of Points.
	Point Point
	// VMI is the VMI as virt-handler knows it, which may lag behind.
	VMI *virtv1.VirtualMachineInstance
	// Migration is the UID of the VirtualMachineInstanceMigration that a point
	// of a migration is about; never empty there, always empty elsewhere.
	Migration types.UID
}

// Handler decides about calls. It must be safe for concurrent use; calls of the
// same point for the same migration, or for the same VMI outside of one, are
// made one at a time and share their answer.
type Handler interface {
	// NodeHook returns nil when KubeVirt may go on. An error with a gRPC status
	// goes to KubeVirt as it is, which shows its text in an event on the VMI:
	// codes.Unavailable for what will come to be, codes.FailedPrecondition for
	// what will not.
	NodeHook(ctx context.Context, c *Call) error
}

// Server serves one node's hooks.
type Server struct {
	hookpb.UnimplementedNodeHookServiceServer
	node    string
	handler Handler
	log     *slog.Logger
	grpc    *grpc.Server
	flights singleflight.Group
	limit   time.Duration
}

// NewServer returns a server for the node's hooks that asks handler.
func NewServer(node string, handler Handler, log *slog.Logger) *Server {
	s := &Server{node: node, handler: handler, log: log, limit: callLimit}
	s.grpc = grpc.NewServer(
		grpc.Creds(rootOnly{}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(callLimit),
	)
	hookpb.RegisterNodeHookServiceServer(s.grpc, s)
	return s
}

// Serve accepts connections on l until ctx ends, then closes l, lets calls
// under way finish, which they do within seconds, and returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		kill := time.AfterFunc(s.limit, s.grpc.Stop)
		defer kill.Stop()
		s.grpc.GracefulStop()
	})
	err := s.grpc.Serve(l)
	if stop() {
		s.grpc.Stop()
		return fmt.Errorf("node hooks: %w", err)
	}
	<-stopped
	return nil
}

// ExecuteNodeHook implements KubeVirt's service.
func (s *Server) ExecuteNodeHook(ctx context.Context, r *hookpb.ExecuteNodeHookRequest) (*hookpb.ExecuteNodeHookResponse, error) {
	c, err := s.parse(r)
	if err != nil {
		s.log.Warn("node hook not understood", "hook", cut(r.GetHookPoint(), maxPoint), "error", err)
		return nil, err
	}
	if c == nil {
		return &hookpb.ExecuteNodeHookResponse{}, nil
	}
	key := string(c.Point) + "/" + string(c.VMI.UID) + "/" + string(c.Migration)
	answer := s.flights.DoChan(key, func() (any, error) {
		// Not the caller's context: others may wait for this answer too.
		ctx, cancel := context.WithTimeout(context.Background(), s.limit)
		defer cancel()
		return nil, s.ask(ctx, c)
	})
	select {
	case a := <-answer:
		err = a.Err
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	case <-time.After(s.limit + callGrace): // a handler that ignores its context
		err = status.Errorf(codes.Unavailable, "compsc has not answered in %s", s.limit)
	}
	if err != nil {
		s.log.Info("node hook holds", "hook", c.Point, "vmi", c.VMI.Namespace+"/"+c.VMI.Name, "migration", c.Migration, "why", err)
		return nil, err
	}
	return &hookpb.ExecuteNodeHookResponse{}, nil
}

// ask has the handler decide, and survives it.
func (s *Server) ask(ctx context.Context, c *Call) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in a node hook", "hook", c.Point, "panic", p, "stack", string(debug.Stack()))
			err = status.Error(codes.Internal, "compsc: internal error, see the log of the node's compsc agent")
		}
	}()
	err = s.handler.NodeHook(ctx, c)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return status.Errorf(codes.Unavailable, "compsc could not tell in %s: %v", s.limit, err)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return status.Error(codes.Unavailable, err.Error())
}

// parse reads a request. It returns nil for a VMI that is none of CompSC's
// concern: no other VM is ever held, whatever the Plugin object says.
func (s *Server) parse(r *hookpb.ExecuteNodeHookRequest) (*Call, error) {
	vmi := &virtv1.VirtualMachineInstance{}
	if err := json.Unmarshal(r.GetVmi(), vmi); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "the VMI is not the expected JSON: %v", err)
	}
	if len(kubevirt.BoundInterfaces(vmi)) == 0 {
		return nil, nil
	}
	if vmi.UID == "" || vmi.Name == "" || vmi.Namespace == "" {
		return nil, status.Error(codes.InvalidArgument, "the VMI has no name, namespace or UID")
	}
	c := &Call{Point: Point(r.GetHookPoint()), VMI: vmi}
	known := false
	for _, p := range Points {
		known = known || p == c.Point
	}
	if !known {
		return nil, status.Errorf(codes.Unimplemented,
			"compsc does not know the hook point %q; correct permittedHooks of its Plugin object", cut(r.GetHookPoint(), maxPoint))
	}
	if node := r.GetNodeContext().GetNodeName(); node != s.node {
		return nil, status.Errorf(codes.FailedPrecondition, "this is the compsc agent of node %s, not of %q", s.node, cut(node, maxName))
	}
	if migrationPoints[c.Point] {
		if st := vmi.Status.MigrationState; st != nil {
			c.Migration = st.MigrationUID
		}
		if c.Migration == "" {
			return nil, status.Errorf(codes.InvalidArgument, "hook point %s, but the VMI has no status.migrationState.migrationUid", c.Point)
		}
	}
	return c, nil
}

func cut(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
