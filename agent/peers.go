package agent

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/api/v1alpha1"
)

// service answers other nodes' agents.
type service struct {
	peerpb.UnimplementedPeerServer
	*agent
}

// Authorize implements peer.Authorizer: the VFMigration must exist under that
// UID and name the caller's node and this one in the roles that go with the
// method, and must not be over, except for what takes back.
func (a *agent) Authorize(ctx context.Context, caller string, method peer.Method, named *peerpb.Migration) error {
	if err := a.authorize(ctx, a.client, caller, method, named); err == nil {
		return nil
	}
	// The cache may be behind the caller's.
	return a.authorize(ctx, a.live, caller, method, named)
}

func (a *agent) authorize(ctx context.Context, r client.Reader, caller string, method peer.Method, named *peerpb.Migration) error {
	m := &vfMigration{}
	err := r.Get(ctx, client.ObjectKey{Namespace: named.GetNamespace(), Name: named.GetName()}, m)
	refuse := func(format string, args ...any) error {
		return status.Errorf(codes.PermissionDenied, "node %s may not call %s for migration %s/%s: %s", caller, method, named.GetNamespace(), named.GetName(), fmt.Sprintf(format, args...))
	}
	switch {
	case apierrors.IsNotFound(err), err == nil && string(m.UID) != named.GetUid():
		return refuse("node %s knows no such VFMigration with UID %s", a.node, named.GetUid())
	case err != nil:
		return status.Errorf(codes.Unavailable, "VFMigration: %v", err)
	case m.Status.Source == nil || m.Status.Target == nil:
		return refuse("it has no source and target yet")
	}
	from, to := m.Status.Source.NodeName, m.Status.Target.NodeName
	if method.FromTarget() {
		from, to = to, from
	}
	switch {
	case from != caller || to != a.node:
		return refuse("that is for node %s to call at node %s", from, to)
	case over(m) && method != peer.MethodWithdraw:
		return status.Errorf(codes.FailedPrecondition, "migration %s/%s is over", m.Namespace, m.Name)
	}
	return nil
}

// migration returns a migration that Authorize has allowed; forward refuses
// one that is being undone.
func (s *service) migration(ctx context.Context, named *peerpb.Migration, forward bool) (*vfMigration, error) {
	key := client.ObjectKey{Namespace: named.GetNamespace(), Name: named.GetName()}
	for _, r := range []client.Reader{s.client, s.live} {
		m := &vfMigration{}
		if err := r.Get(ctx, key, m); err != nil || string(m.UID) != named.GetUid() || m.Status.Source == nil || m.Status.Target == nil {
			continue
		}
		if forward && m.Status.Failure != nil {
			return nil, status.Errorf(codes.FailedPrecondition, "the migration is being undone: %s", why(m))
		}
		return m, nil
	}
	return nil, status.Errorf(codes.Unavailable, "VFMigration %s cannot be read", key)
}

// deviceCall is a peer's call on its way to the device process of a pod of the
// migration.
type deviceCall struct {
	m      *vfMigration
	d      *device
	ctx    context.Context // ends in time
	cancel context.CancelFunc
}

// begin finds the migration of a call that takes it forward, and the device
// process of one of its pods. Whoever began ends.
func (s *service) begin(ctx context.Context, named *peerpb.Migration, pod func(*vfMigration) *v1alpha1.VFMigrationEndpoint) (*deviceCall, error) {
	m, err := s.migration(ctx, named, true)
	if err != nil {
		return nil, err
	}
	d, err := s.devices.get(podUID(pod(m)))
	if err != nil {
		return nil, err
	}
	c := &deviceCall{m: m, d: d}
	c.ctx, c.cancel = inTime(ctx)
	return c, nil
}

func (c *deviceCall) end() {
	c.cancel()
	c.d.Close()
}

// inTime ends a call to the device process a little before the caller gives
// up, so that the caller hears what was wrong and not just that time passed.
func inTime(ctx context.Context) (context.Context, context.CancelFunc) {
	if end, ok := ctx.Deadline(); ok {
		return context.WithDeadline(ctx, end.Add(-time.Until(end)/5))
	}
	return context.WithCancel(ctx)
}

// misunderstands tells which of those that a migration needs this node's agent,
// the target's, does not understand.
func (s *service) misunderstands(ctx context.Context, m *vfMigration, d *device, source *controlpb.Protocols) (*failure, error) {
	if f := s.understands(source, "the agent of node "+m.Status.Source.NodeName); f != nil {
		return f, nil
	}
	st, err := s.status(ctx, d)
	if err != nil {
		return nil, err
	}
	return s.understands(st.GetProtocols(), "the device process of pod "+m.Status.Target.PodName), nil
}

// Prepare implements the peer service, at the target.
func (s *service) Prepare(ctx context.Context, r *peerpb.PrepareRequest) (*peerpb.PrepareReply, error) {
	c, err := s.begin(ctx, r.GetMigration(), func(m *vfMigration) *v1alpha1.VFMigrationEndpoint { return m.Status.Target })
	if err != nil {
		return nil, err
	}
	defer c.end()
	f, err := s.misunderstands(c.ctx, c.m, c.d, r.GetProtocols())
	if err != nil {
		return nil, ofDevice(err)
	}
	if f != nil {
		return &peerpb.PrepareReply{Reason: f.reason, Message: f.Error()}, nil
	}
	st, err := s.status(c.ctx, c.d)
	if err != nil {
		return nil, ofDevice(err)
	}
	if f, err = s.checkAdministration(c.ctx, st, r.GetInterfaces()); err != nil {
		return nil, status.Error(codes.Unavailable, say(err))
	}
	if f != nil {
		return &peerpb.PrepareReply{Reason: f.reason, Message: f.Error()}, nil
	}
	reply, err := c.d.PrepareTarget(c.ctx, &controlpb.PrepareTargetRequest{MigrationUid: string(c.m.UID),
		Interfaces: r.GetInterfaces(), HoldTimeout: durationpb.New(c.m.Spec.Timeouts.HoldTimeout())})
	if err != nil {
		return nil, ofDevice(err)
	}
	if reply.GetAccepted() {
		s.startTarget(c.m)
	}
	return &peerpb.PrepareReply{Accepted: reply.GetAccepted(), Reason: reply.GetReason(), Message: reply.GetMessage(), Epochs: reply.GetEpochs()}, nil
}

// Deliver implements the peer service, at the target. The worker holds the
// connection to the device process open.
func (s *service) Deliver(ctx context.Context, r *peerpb.DeliverRequest) (*peerpb.DeliverReply, error) {
	c, err := s.begin(ctx, r.GetMigration(), func(m *vfMigration) *v1alpha1.VFMigrationEndpoint { return m.Status.Target })
	if err != nil {
		return nil, err
	}
	defer c.end()
	reply, err := c.d.AcceptState(c.ctx, &controlpb.AcceptStateRequest{MigrationUid: string(c.m.UID), States: r.GetStates(),
		VmStoppedFor: r.GetVmStoppedFor(), DeviceStoppedFor: r.GetDeviceStoppedFor()})
	if status.Code(err) == codes.FailedPrecondition && s.delivered(ctx, c.d, c.m) {
		return &peerpb.DeliverReply{Accepted: true}, nil
	}
	if err != nil {
		return nil, ofDevice(err)
	}
	return &peerpb.DeliverReply{Accepted: reply.GetAccepted(), Reason: reply.GetReason(), Message: reply.GetMessage()}, nil
}

// delivered tells whether the device process has used the state already that a
// restarted source delivers once more.
func (s *service) delivered(ctx context.Context, d *device, m *vfMigration) bool {
	st, err := s.status(ctx, d)
	if err != nil || st.GetMigrationUid() != string(m.UID) {
		return false
	}
	switch st.GetPhase() {
	case controlpb.Phase_PHASE_TARGET_HELD, controlpb.Phase_PHASE_TARGET_ACTIVE, controlpb.Phase_PHASE_RUNNING:
		return true
	}
	return false
}

// Commit implements the peer service, at the source: the point of no return.
func (s *service) Commit(ctx context.Context, r *peerpb.CommitRequest) (*peerpb.CommitReply, error) {
	c, err := s.begin(ctx, r.GetMigration(), func(m *vfMigration) *v1alpha1.VFMigrationEndpoint { return m.Status.Source })
	if err != nil {
		return nil, err
	}
	defer c.end()
	if _, err := c.d.Relinquish(c.ctx, &controlpb.RelinquishRequest{MigrationUid: string(c.m.UID)}); err != nil {
		return nil, ofDevice(err)
	}
	// Not before the target's VF is to answer, and not after.
	if err := s.answerAttached(c.ctx, c.d, false); err != nil {
		return nil, status.Errorf(codes.Unavailable, "the source's VFs still answer: %s", say(err))
	}
	return &peerpb.CommitReply{}, nil
}

// Withdraw implements the peer service, at the target.
func (s *service) Withdraw(ctx context.Context, r *peerpb.WithdrawRequest) (*peerpb.WithdrawReply, error) {
	m, err := s.migration(ctx, r.GetMigration(), false)
	if err != nil {
		return nil, err
	}
	if err := s.cancelTarget(ctx, m, r.GetReason()); err != nil {
		if status.Code(err) == codes.FailedPrecondition && !is(m, v1alpha1.ConditionVerified) {
			s.startTarget(m) // ended by cancelTarget, but the VM runs here
		}
		return nil, ofDevice(err)
	}
	return &peerpb.WithdrawReply{}, nil
}

// ofDevice keeps a device process's code and says whose it is.
func ofDevice(err error) error {
	return status.Errorf(status.Code(err), "the device process there: %s", say(err))
}
