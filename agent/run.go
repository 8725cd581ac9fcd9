package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	ctrlsource "sigs.k8s.io/controller-runtime/pkg/source"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/launcher"
	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/api/v1alpha1"
)

// stopTimeout bounds how long an ending agent waits for a switchover that is
// under way.
const stopTimeout = 25 * time.Second

// Run runs the agent of one node until ctx ends. It returns nil then, and an
// error when it cannot start or lost what it needs.
func Run(ctx context.Context, o Options) error {
	serveMetrics()
	if err := o.complete(); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	creds := peer.AwaitCredentials(o.NodeName, o.TLS)
	if err := creds.Check(time.Now()); err != nil && o.TLSSigner == "" {
		return fmt.Errorf("agent: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.PeerListen)
	if err != nil {
		return fmt.Errorf("agent: listening for other agents: %w", err)
	}
	defer l.Close()
	advertise, err := advertised(o.PeerAdvertise, l.Addr())
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	mgr, err := newManager(o)
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	a := &agent{
		node: o.NodeName, namespace: o.Namespace, version: o.Version, advertise: advertise,
		client: mgr.GetClient(), live: mgr.GetAPIReader(), host: o.Host,
		creds: creds, peers: peer.NewClient(creds), devices: newDevices(o.PodsDir), podResources: o.PodResources,
		events: mgr.GetEventRecorder("compsc-agent"), log: o.Log, limits: defaultLimits,
		work: newWorkers(o.Log), tries: newTries(), pokes: make(chan event.GenericEvent, 1),
		hooked: o.HookSocket != "", found: found{qemus: launcher.New(o.ProcDir)},
	}
	creds.OnRefused(a.peerRefused)
	if o.TLSSigner != "" {
		if err := a.certify(mgr, o); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	for name, check := range a.readyChecks(mgr) {
		if err := mgr.AddReadyzCheck(name, check); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	if err := a.setup(mgr); err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	host, _ := os.Hostname()
	instance := host + "_" + string(uuid.NewUUID())
	runnables := []manager.RunnableFunc{
		func(ctx context.Context) error { a.heartbeat(ctx, instance); return nil },
		func(ctx context.Context) error { a.recover(ctx); return nil },
		func(ctx context.Context) error {
			// Calls are answered from the cache where possible.
			if !mgr.GetCache().WaitForCacheSync(ctx) {
				return ctx.Err()
			}
			return peer.NewServer(&service{agent: a}, a, creds, o.Log.With("part", "peer")).Serve(ctx, l)
		},
	}
	if a.hooked {
		hooks, err := nodehook.Listen(o.HookSocket)
		if err != nil {
			return fmt.Errorf("agent: %w", err)
		}
		defer hooks.Close()
		runnables = append(runnables, func(ctx context.Context) error {
			if !mgr.GetCache().WaitForCacheSync(ctx) {
				return ctx.Err()
			}
			return nodehook.NewServer(a.node, a, o.Log.With("part", "hooks")).Serve(ctx, hooks)
		})
	}
	for _, r := range runnables {
		if err := mgr.Add(r); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	o.Log.Info("agent starts", "node", o.NodeName, "peers", advertise, "version", o.Version)
	drained, cancelDrained := a.untilDrained(ctx, o.DrainTimeout)
	defer cancelDrained()
	err = mgr.Start(drained)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if cerr := a.work.close(stop); cerr != nil {
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return fmt.Errorf("agent: %w", err)
	}
	return nil
}

// newManager returns a manager whose cache holds what concerns this node only.
func newManager(o Options) (manager.Manager, error) {
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	vfLeases, err := labels.Parse(labelNode + "=" + o.NodeName + ",!" + v1alpha1.LabelAgent)
	if err != nil {
		return nil, err
	}
	graceful := 10 * time.Second
	return manager.New(o.Config, manager.Options{
		Scheme:                  scheme,
		Logger:                  logSink(o.Log),
		Metrics:                 metricsserver.Options{BindAddress: o.MetricsAddress},
		HealthProbeBindAddress:  o.HealthAddress,
		LeaderElection:          false,
		GracefulShutdownTimeout: &graceful,
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				&corev1.Pod{}: {
					Field: fields.OneTermEqualSelector("spec.nodeName", o.NodeName),
					Label: labels.SelectorFromSet(labels.Set{kubevirt.LabelApp: kubevirt.AppLauncher}),
				},
				&coordinationv1.Lease{}: {Namespaces: map[string]cache.Config{o.Namespace: {LabelSelector: vfLeases}}},
				&corev1.ConfigMap{}: {Namespaces: map[string]cache.Config{
					o.Namespace: {FieldSelector: fields.OneTermEqualSelector("metadata.name", v1alpha1.TrustConfigMap)},
				}},
				&v1alpha1.VFNode{}: {Field: fields.OneTermEqualSelector("metadata.name", o.NodeName)},
			},
		},
	})
}

// setup registers the reconcilers.
func (a *agent) setup(mgr manager.Manager) error {
	skip := true // several agents may share a process
	options := func(parallel int) controller.Options {
		return controller.Options{MaxConcurrentReconciles: parallel, SkipNameValidation: &skip}
	}
	pods := ctrl.NewControllerManagedBy(mgr).Named("pod").For(&corev1.Pod{}).
		// A lease whose pod is gone brings that pod up.
		Watches(&coordinationv1.Lease{}, handler.EnqueueRequestsFromMapFunc(podOfLease)).
		WithOptions(options(4))
	if err := pods.Complete(reconcile.Func(a.reconcilePod)); err != nil {
		return err
	}
	migrations := ctrl.NewControllerManagedBy(mgr).Named("vfmigration").For(&vfMigration{}).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(a.migrationsOf)).
		WithOptions(options(4))
	if err := migrations.Complete(reconcile.Func(a.reconcileMigration)); err != nil {
		return err
	}
	one := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []ctrl.Request {
		return []ctrl.Request{{NamespacedName: types.NamespacedName{Name: a.node}}}
	})
	nodes := ctrl.NewControllerManagedBy(mgr).Named("vfnode").For(&v1alpha1.VFNode{}).
		Watches(&coordinationv1.Lease{}, one).WatchesRawSource(ctrlsource.Channel(a.pokes, one)).WithOptions(options(1))
	if err := nodes.Complete(reconcile.Func(a.reconcileNode)); err != nil {
		return err
	}
	// The node is reported also when there is neither a VFNode nor a lease.
	return mgr.Add(manager.RunnableFunc(func(ctx context.Context) error {
		for mgr.GetCache().WaitForCacheSync(ctx) {
			_, err := a.reconcileNode(ctx, ctrl.Request{})
			if err == nil {
				return nil
			}
			a.log.Warn("registering the node", "error", err)
			if !pauseFor(ctx, a.limits.pause*4) {
				return nil
			}
		}
		return nil
	}))
}

// certify has the node's certificate got and renewed.
func (a *agent) certify(mgr manager.Manager, o Options) error {
	c := &certifier{agent: a, signer: o.TLSSigner, files: o.TLS, now: time.Now}
	skip := true
	return ctrl.NewControllerManagedBy(mgr).Named("certificate").For(&corev1.ConfigMap{}).
		WatchesRawSource(ctrlsource.Func(c.start)).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1, SkipNameValidation: &skip}).
		Complete(reconcile.Func(c.reconcile))
}

// poke has the VFNode brought up to date soon.
func (a *agent) poke() {
	select {
	case a.pokes <- event.GenericEvent{Object: &v1alpha1.VFNode{}}:
	default: // as many are waiting as there can be
	}
}

// readyChecks are the conditions under which the agent serves migrations.
func (a *agent) readyChecks(mgr manager.Manager) map[string]healthz.Checker {
	return map[string]healthz.Checker{
		"certificate": func(*http.Request) error { return a.creds.Check(time.Now()) },
		"cache": func(r *http.Request) error {
			ctx, cancel := context.WithTimeout(r.Context(), time.Second)
			defer cancel()
			if !mgr.GetCache().WaitForCacheSync(ctx) {
				return errors.New("the API server has not been read yet")
			}
			return nil
		},
	}
}

func podOfLease(_ context.Context, o client.Object) []ctrl.Request {
	l, ok := o.(*coordinationv1.Lease)
	if !ok {
		return nil
	}
	h, ok := parseHolder(identity(l))
	if !ok {
		return nil
	}
	return []ctrl.Request{{NamespacedName: types.NamespacedName{Namespace: h.namespace, Name: h.name}}}
}
