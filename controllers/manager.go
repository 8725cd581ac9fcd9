package controllers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/go-logr/logr"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"compsc.io/compsc/agent/kubevirt"
	kubecluster "compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/api/v1alpha1"
)

// Options are the manager's settings.
type Options struct {
	// Config reaches the API server; required.
	Config *rest.Config
	// Namespace holds the agents' leases and the manager's own; required.
	Namespace string
	// CARotate has the manager make and renew the authority of the agents'
	// certificates; without it somebody else, such as cert-manager, writes the
	// Secret v1alpha1.AuthoritySecret.
	CARotate bool
	// CAOverlap is how long a new authority is known before it signs.
	CAOverlap time.Duration
	// LeaderElection lets only one of several managers act. Without it there
	// must be only one.
	LeaderElection bool
	// MetricsAddress is where metrics are served over HTTP, such as ":8080";
	// "0" or empty serves none.
	MetricsAddress string
	// HealthAddress is where /healthz and /readyz are served, such as
	// ":8081"; "0" or empty serves none.
	HealthAddress string
	// Logger takes the log.
	Logger logr.Logger
}

// leaderElectionID names the lease by which managers elect their leader.
const leaderElectionID = "manager.compsc.io"

// Run runs the manager until ctx is done, and returns nil then. It returns an
// error when it could not start, or lost its leadership: the process must end
// then, another manager is acting.
func Run(ctx context.Context, o Options) error {
	serveMetrics()
	mgr, err := newManager(o)
	if err != nil {
		return err
	}
	if err := mgr.Start(ctx); err != nil {
		return fmt.Errorf("run manager: %w", err)
	}
	return nil
}

// newManager sets everything up that Run runs.
func newManager(o Options) (ctrl.Manager, error) {
	if o.Config == nil || o.Namespace == "" {
		return nil, errors.New("manager options: Config and Namespace must be set")
	}
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	cacheOptions, err := newCacheOptions(o.Namespace)
	if err != nil {
		return nil, err
	}
	off := func(address string) string {
		if address == "" {
			return "0"
		}
		return address
	}
	mgr, err := ctrl.NewManager(o.Config, ctrl.Options{
		Scheme:                        scheme,
		Logger:                        o.Logger,
		Cache:                         cacheOptions,
		Metrics:                       metricsserver.Options{BindAddress: off(o.MetricsAddress)},
		HealthProbeBindAddress:        off(o.HealthAddress),
		LeaderElection:                o.LeaderElection,
		LeaderElectionID:              leaderElectionID,
		LeaderElectionNamespace:       o.Namespace,
		LeaderElectionReleaseOnCancel: true,
		// Managers may follow one another in one process.
		Controller: config.Controller{SkipNameValidation: new(true)},
	})
	if err != nil {
		return nil, fmt.Errorf("set up manager: %w", err)
	}
	for _, add := range []func(string, healthz.Checker) error{mgr.AddHealthzCheck, mgr.AddReadyzCheck} {
		if err := add("ping", healthz.Ping); err != nil {
			return nil, fmt.Errorf("set up health check: %w", err)
		}
	}
	recorder := mgr.GetEventRecorder("compsc-manager")
	r := &VFMigrationReconciler{
		Client:    mgr.GetClient(),
		Live:      mgr.GetAPIReader(),
		Recorder:  recorder,
		Clock:     clock.RealClock{},
		Namespace: o.Namespace,
	}
	for _, c := range []interface{ SetupWithManager(ctrl.Manager) error }{
		r,
		&AdoptionReconciler{Client: mgr.GetClient(), Live: mgr.GetAPIReader(), Recorder: recorder},
		&GuardReconciler{VFMigrationReconciler: r},
		&TrustReconciler{Client: mgr.GetClient(), Recorder: recorder, Clock: r.Clock, Namespace: o.Namespace, Rotate: o.CARotate, Overlap: o.CAOverlap},
		&CertificateReconciler{Client: mgr.GetClient(), Clock: r.Clock, Namespace: o.Namespace},
	} {
		if err := c.SetupWithManager(mgr); err != nil {
			return nil, fmt.Errorf("set up controller: %w", err)
		}
	}
	return mgr, nil
}

// newScheme registers the types that the manager handles.
func newScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, kubecluster.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register API types: %w", err)
		}
	}
	return scheme, nil
}

// newCacheOptions keeps the cache small in a cluster with many VMs: of pods
// only those that receive a VM, and of pods and VMIs only what is looked at.
// Everything else is read from the API server when it is needed; a read that
// would start to cache another kind fails.
func newCacheOptions(namespace string) (cache.Options, error) {
	receiving, err := labels.NewRequirement(kubevirt.LabelMigrationJobUID, selection.Exists, nil)
	if err != nil {
		return cache.Options{}, fmt.Errorf("select target pods: %w", err)
	}
	return cache.Options{
		DefaultTransform:            cache.TransformStripManagedFields(),
		ReaderFailOnMissingInformer: true,
		ByObject: map[client.Object]cache.ByObject{
			&corev1.Pod{}: {
				Label:     labels.NewSelector().Add(*receiving),
				Transform: trimPod,
			},
			&virtv1.VirtualMachineInstance{}: {Transform: trimVMI},
			&corev1.Secret{}:                 only(namespace, v1alpha1.AuthoritySecret),
			&corev1.ConfigMap{}:              only(namespace, v1alpha1.TrustConfigMap),
			&certificatesv1.CertificateSigningRequest{}: {
				Field: fields.OneTermEqualSelector("spec.signerName", v1alpha1.CertificateSigner),
			},
		},
	}, nil
}

// only has one object cached, which is all that RBAC lets the manager read of
// its kind.
func only(namespace, name string) cache.ByObject {
	return cache.ByObject{Namespaces: map[string]cache.Config{
		namespace: {FieldSelector: fields.OneTermEqualSelector("metadata.name", name)},
	}}
}

// trimPod keeps of a pod what scope looks at.
func trimPod(in any) (any, error) {
	pod, ok := in.(*corev1.Pod)
	if !ok {
		return in, nil
	}
	return &corev1.Pod{
		TypeMeta:   pod.TypeMeta,
		ObjectMeta: trimMeta(&pod.ObjectMeta),
		Spec:       corev1.PodSpec{NodeName: pod.Spec.NodeName},
		Status:     corev1.PodStatus{Phase: pod.Status.Phase},
	}, nil
}

// trimVMI keeps of a VMI what is looked at: of its spec only the interfaces
// with a VF, of its annotations only ours.
func trimVMI(in any) (any, error) {
	vmi, ok := in.(*virtv1.VirtualMachineInstance)
	if !ok {
		return in, nil
	}
	out := &virtv1.VirtualMachineInstance{
		TypeMeta:   vmi.TypeMeta,
		ObjectMeta: trimMeta(&vmi.ObjectMeta),
		Status: virtv1.VirtualMachineInstanceStatus{
			Phase: vmi.Status.Phase, NodeName: vmi.Status.NodeName, MigrationState: vmi.Status.MigrationState,
		},
	}
	for _, name := range kubevirt.BoundInterfaces(vmi) {
		out.Spec.Domain.Devices.Interfaces = append(out.Spec.Domain.Devices.Interfaces,
			virtv1.Interface{Name: name, Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}})
	}
	if why, ok := vmi.Annotations[kubevirt.AnnotationMigrationBlocked]; ok {
		out.Annotations = map[string]string{kubevirt.AnnotationMigrationBlocked: why}
	}
	return out, nil
}

func trimMeta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, Labels: m.Labels,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp,
	}
}
