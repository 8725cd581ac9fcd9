package standin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/lab"
)

// BindingName is the network binding whose interfaces get a VF.
const BindingName = "compsc"

// retryInterval is how soon something is tried again that no event announces.
const retryInterval = 200 * time.Millisecond

// Config is what a StandIn works with.
type Config struct {
	// Lab has the nodes.
	Lab *lab.Lab
	// REST and Client reach the API server with all rights; Client must not cache.
	REST   *rest.Config
	Client client.Client
	// Compsc returns the product's binary for a device process that starts.
	Compsc func() string
	// QEMUTree is a root directory with usr/bin/qemu-system-x86_64, at least
	// version 10.1, and empty directories run, dev and pod.
	QEMUTree string
	// Kernel and Initrd are what guests boot.
	Kernel, Initrd string
	// Machines, if set, are the nodes: Lab's are only their places in its network.
	// Compsc, QEMUTree, Kernel and Initrd are paths of theirs then, and QEMU runs
	// without libvirt.
	Machines Machines
	// KVM has VMs run under the machines' KVM.
	KVM bool
	// Slow is what bounds are multiplied with where all is emulated; 0 is 1.
	Slow int
	// PodsDir is the directory of a node's pods, as the kubelet's.
	PodsDir func(node string) string
	// DeviceArgs, if set, are further arguments of the device processes on
	// the node. Tests inject faults with it.
	DeviceArgs func(node string) []string
	// Log gets what the stand-in does.
	Log *slog.Logger
}

// Machines are nodes that are machines of their own.
type Machines interface {
	// Start starts a process on the node, after having made the directories there.
	Start(node string, c lab.Command, dirs ...string) (*lab.Process, error)
	// Allocated tells the node which of its VFs its pods have.
	Allocated(node string, pods []Allocation) error
	// Forward makes a socket of the node appear at the same path of this machine,
	// once it is there, until ctx ends.
	Forward(ctx context.Context, node, path string) error
}

// Allocation are the VFs that a device plugin gave to a pod.
type Allocation struct {
	Namespace, Pod, Container string
	VFs                       []string
}

// StandIn plays a cluster's nodes and KubeVirt. Its methods are safe for
// concurrent use.
type StandIn struct {
	cfg    Config
	client client.Client
	log    *slog.Logger

	pokePods, pokeVMIs, pokeMigrations chan event.GenericEvent

	mu        sync.Mutex
	pods      map[types.UID]*pod
	allocated map[string]map[string]types.UID // node, VF: pod
	jobs      map[types.UID]*job              // by migration
	holds     map[Point]chan struct{}
	bandwidth int64

	cancel context.CancelFunc
	ctx    context.Context
	done   chan error
}

// warnings passes on what is at least a warning: controller-runtime says a
// lot about itself.
type warnings struct{ slog.Handler }

func (w warnings) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && w.Handler.Enabled(ctx, l)
}

func (w warnings) WithAttrs(a []slog.Attr) slog.Handler { return warnings{w.Handler.WithAttrs(a)} }

func (w warnings) WithGroup(name string) slog.Handler { return warnings{w.Handler.WithGroup(name)} }

// Start runs a stand-in until Close.
func Start(ctx context.Context, cfg Config) (*StandIn, error) {
	s := &StandIn{
		cfg: cfg, client: cfg.Client, log: cfg.Log,
		pokePods:       make(chan event.GenericEvent, 64),
		pokeVMIs:       make(chan event.GenericEvent, 64),
		pokeMigrations: make(chan event.GenericEvent, 64),
		pods:           map[types.UID]*pod{},
		allocated:      map[string]map[string]types.UID{},
		jobs:           map[types.UID]*job{},
		holds:          map[Point]chan struct{}{},
		done:           make(chan error, 1),
	}
	off := false
	m, err := ctrl.NewManager(cfg.REST, ctrl.Options{
		Scheme:                 cfg.Client.Scheme(),
		Logger:                 logr.FromSlogHandler(warnings{cfg.Log.Handler()}),
		Metrics:                metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress: "0",
		// Several stand-ins in one test process.
		Controller: config.Controller{SkipNameValidation: new(true), UsePriorityQueue: &off},
	})
	if err != nil {
		return nil, err
	}
	poked := &handler.EnqueueRequestForObject{}
	if err := errors.Join(
		ctrl.NewControllerManagedBy(m).Named("node").For(&corev1.Pod{}).
			WatchesRawSource(source.Channel(s.pokePods, poked)).
			WithOptions(controller.Options{MaxConcurrentReconciles: 4}).
			Complete(reconcile.Func(s.reconcilePod)),
		ctrl.NewControllerManagedBy(m).Named("vmi").For(&kubevirtv1.VirtualMachineInstance{}).
			Owns(&corev1.Pod{}, builder.MatchEveryOwner).
			WatchesRawSource(source.Channel(s.pokeVMIs, poked)).
			Complete(reconcile.Func(s.reconcileVMI)),
		ctrl.NewControllerManagedBy(m).Named("migration").For(&kubevirtv1.VirtualMachineInstanceMigration{}).
			Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(migrationOfPod)).
			WatchesRawSource(source.Channel(s.pokeMigrations, poked)).
			Complete(reconcile.Func(s.reconcileMigration)),
	); err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go func() { s.done <- m.Start(s.ctx) }()
	if !m.GetCache().WaitForCacheSync(ctx) {
		return nil, errors.Join(errors.New("the stand-in's watches did not start"), s.Close())
	}
	return s, nil
}

// bound is how long something may take that takes at most d at full speed.
func (s *StandIn) bound(d time.Duration) time.Duration { return d * time.Duration(max(s.cfg.Slow, 1)) }

// Close stops every VM, without any of the API's ceremony.
func (s *StandIn) Close() error {
	s.cancel()
	err := <-s.done
	s.mu.Lock()
	pods := make([]*pod, 0, len(s.pods))
	for _, p := range s.pods {
		pods = append(pods, p)
	}
	s.mu.Unlock()
	for _, p := range pods {
		p.stop()
	}
	return err
}

// Point is a place where a test can hold a migration.
type Point string

// The phases of a migration, in which it is kept, and two places within
// libvirt's part.
const (
	InPending         = Point(kubevirtv1.MigrationPending)
	InScheduling      = Point(kubevirtv1.MigrationScheduling)
	InScheduled       = Point(kubevirtv1.MigrationScheduled)
	InPreparingTarget = Point(kubevirtv1.MigrationPreparingTarget)
	InTargetReady     = Point(kubevirtv1.MigrationTargetReady)
	// InPreSwitchover is after QEMU stopped the VM and before its last pages
	// and device state go to the target.
	InPreSwitchover = Point("PreSwitchover")
	// BeforeFinish is after the target has loaded everything and before it
	// is told to run.
	BeforeFinish = Point("BeforeFinish")
)

// Hold keeps every migration that reaches the point there, until the
// returned function is called. A migration that is held can still be
// cancelled, as far as it could be in the real KubeVirt.
func (s *StandIn) Hold(p Point) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.holds[p] == nil {
		s.holds[p] = make(chan struct{})
	}
	c := s.holds[p]
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.holds[p] == c {
			delete(s.holds, p)
			close(c)
		}
	}
}

// held returns a channel that is closed when the point is not held.
func (s *StandIn) held(p Point) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.holds[p]; c != nil {
		return c
	}
	c := make(chan struct{})
	close(c)
	return c
}

func (s *StandIn) isHeld(p Point) bool {
	select {
	case <-s.held(p):
		return false
	default:
		return true
	}
}

// SetBandwidth limits the migrations that start from now on, in bytes per
// second, as KubeVirt's bandwidthPerMigration does. 0 is no limit.
func (s *StandIn) SetBandwidth(b int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bandwidth = b
}

// update applies mutate to the live object and writes it with write if that
// changed anything, until there is no conflict.
func update[T client.Object](ctx context.Context, c client.Client, o T, mutate func(T), write func(T) error) error {
	key := client.ObjectKeyFromObject(o)
	return retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if err := c.Get(ctx, key, o); err != nil {
			return err
		}
		before := o.DeepCopyObject()
		mutate(o)
		if equality.Semantic.DeepEqual(before, o) {
			return nil
		}
		return write(o)
	})
}

func (s *StandIn) updateVMI(ctx context.Context, v *kubevirtv1.VirtualMachineInstance, mutate func(*kubevirtv1.VirtualMachineInstance)) error {
	// KubeVirt's VMI CRD has no status subresource.
	err := update(ctx, s.client, v, mutate, func(v *kubevirtv1.VirtualMachineInstance) error { return s.client.Update(ctx, v) })
	if err != nil {
		return fmt.Errorf("VMI %s: %w", v.Name, err)
	}
	return nil
}

func (s *StandIn) updatePod(ctx context.Context, p *corev1.Pod, mutate func(*corev1.Pod)) error {
	err := update(ctx, s.client, p, mutate, func(p *corev1.Pod) error { return s.client.Update(ctx, p) })
	if err != nil {
		return fmt.Errorf("pod %s: %w", p.Name, err)
	}
	return nil
}

// poke asks for a reconciliation. The channel's reader lives as long as the
// context.
func (s *StandIn) poke(ch chan event.GenericEvent, o client.Object) {
	select {
	case ch <- event.GenericEvent{Object: o}:
	case <-s.ctx.Done():
	}
}

// freeVFs are the node's VFs that neither its agent nor its device plugin
// counts as used. The caller holds s.mu.
func (s *StandIn) freeVFs(n *v1alpha1.VFNode) []string {
	var free []string
	for _, pf := range n.Status.PFs {
		for _, vf := range pf.VFs {
			if _, used := s.allocated[n.Name][vf.Address]; !used && vf.Holder == "" {
				free = append(free, vf.Address)
			}
		}
	}
	return free
}
