// Package agent is the node agent. It keeps the node's inventory of VFs, has
// every virt-launcher pod's VFs leased and handed to the pod's device process,
// and plays the source's or the target's part in the migrations that name its
// node, together with the agent of the other node.
//
// It remembers nothing that it could not ask for again: leases say who holds a
// VF, device processes say how far a migration has come, VFMigrations say what
// is wanted. Restarting it at any moment is harmless.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubelet"
	"compsc.io/compsc/agent/kubevirt/cluster"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/api/v1alpha1"
)

// Host is what the agent needs of its node's VFs. It must be safe for
// concurrent use.
type Host interface {
	// Inventory returns the node's PFs and VFs.
	Inventory(ctx context.Context) ([]host.PF, error)
	// Prepare makes a VF ready to be handed to a device process. Repeating it
	// is harmless. It refuses a MAC that another prepared VF has. A VF that is
	// prepared in silence does not answer to its MAC before Answer says so.
	Prepare(ctx context.Context, r host.Request) (*host.Prepared, error)
	// Answer has the VF's network deliver frames to it for the MAC that it was
	// prepared with, or no more. It must be quick: a VM stands still meanwhile.
	Answer(ctx context.Context, address string, on bool) error
	// Release takes back what Prepare did; it must work in any state.
	Release(ctx context.Context, address string) error
	// Settings returns what the administrator has set for a VF, nil where
	// there is no such thing.
	Settings(ctx context.Context, address string) (*host.Settings, error)
	// Held lists the VFs that were prepared and not released, also by an agent
	// before this one, as far as that needs to be known.
	Held(ctx context.Context) ([]string, error)
	// Settle finishes what Release had to leave for the moment.
	Settle(ctx context.Context) error
	// Damage says in words what has happened to prepared VFs behind compsc's
	// back, such as a PF that was given another number of VFs.
	Damage(ctx context.Context) ([]host.Damage, error)
	// Announce transmits a frame on the VF's network through its PF.
	Announce(ctx context.Context, address string, frame []byte) error
}

// Options of an agent.
type Options struct {
	// NodeName is the Kubernetes node; required.
	NodeName string
	// Config reaches the API server; required.
	Config *rest.Config
	// Namespace holds the leases; default v1alpha1.SystemNamespace.
	Namespace string
	// PodsDir is the kubelet's directory of pods; default /var/lib/kubelet/pods.
	PodsDir string
	// PodResources is the socket of the kubelet's pod resources API; default
	// kubelet.Socket. Without a kubelet there the pods' annotations decide about
	// VFs that are models; VFs of NICs are not attached.
	PodResources string
	// PeerListen is where other agents reach this one, host:port; required.
	PeerListen string
	// PeerAdvertise is that address as seen from other nodes; default the one
	// that is listened at, which must not be a wildcard then.
	PeerAdvertise string
	// TLS names the node's certificate, its key, and the authorities trusted.
	TLS peer.Files
	// TLSSigner is the signer that the agent asks for that certificate, usually
	// v1alpha1.CertificateSigner; the agent writes the files then. Empty if the
	// files are somebody else's.
	TLSSigner string
	// DrainTimeout is how long an agent that is to end goes on for the
	// migrations of its node that are under way; 0 for not at all.
	DrainTimeout time.Duration
	// HealthAddress is where /healthz and /readyz are served, host:port; empty
	// or "0" for nowhere.
	HealthAddress string
	// Host serves the node's VFs; required.
	Host Host
	// HookSocket is where KubeVirt's node hooks are served, usually
	// nodehook.Socket; empty for nowhere.
	HookSocket string
	// ProcDir is the node's process file system, where virt-launcher's QEMU is
	// looked for; default /proc, which shows it to an agent in the node's process
	// namespace only.
	ProcDir string
	// MetricsAddress serves Prometheus metrics, host:port; empty for none.
	MetricsAddress string
	// Version is the build's version.
	Version string
	// Log takes what the agent reports; default slog.Default().
	Log *slog.Logger
}

func (o *Options) complete() error {
	if o.Namespace == "" {
		o.Namespace = v1alpha1.SystemNamespace
	}
	if o.PodsDir == "" {
		o.PodsDir = "/var/lib/kubelet/pods"
	}
	if o.ProcDir == "" {
		o.ProcDir = "/proc"
	}
	if o.PodResources == "" {
		o.PodResources = kubelet.Socket
	}
	if o.MetricsAddress == "" {
		o.MetricsAddress = "0" // controller-runtime's word for none
	}
	if o.HealthAddress == "" {
		o.HealthAddress = "0"
	}
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if problems := validation.IsValidLabelValue(o.NodeName); o.NodeName == "" || len(problems) > 0 {
		return fmt.Errorf("node name %q cannot be a label's value: %v", o.NodeName, problems)
	}
	switch {
	case o.Config == nil:
		return errors.New("no API server given")
	case o.Host == nil:
		return errors.New("no host given")
	case o.PeerListen == "":
		return errors.New("no address to listen at for other agents given")
	}
	return nil
}

// limits are the bounds of the agent's waits; tests shorten them.
type limits struct {
	// retry is how long something that ought to work is tried again before
	// it counts as failed.
	retry time.Duration
	// pause lies between two attempts of the same thing.
	pause time.Duration
	// call bounds a call to a device process or peer that does not wait for
	// anybody else.
	call time.Duration
	// look lies between two looks at the node's VFs.
	look time.Duration
	// watch is how long one waiting call to a device process lasts before it
	// is made anew.
	watch time.Duration
}

var defaultLimits = limits{retry: 10 * time.Second, pause: 250 * time.Millisecond, call: 10 * time.Second, look: 10 * time.Second, watch: 5 * time.Minute}

// agent is what all parts of one node's agent share.
type agent struct {
	node      string
	namespace string
	version   string
	advertise string
	// client reads from the cache, live from the API server.
	client  client.Client
	live    client.Reader
	host    Host
	peers   *peer.Client
	devices *devices
	// podResources is the socket of the kubelet's pod resources API.
	podResources string
	events       events.EventRecorder
	log          *slog.Logger
	limits       limits
	work         *workers
	tries        *tries
	creds        *peer.Credentials
	refused      refusals
	// draining says that the agent is to end, drainTold that its VFNode says so.
	draining, drainTold atomic.Bool
	// pokes has the VFNode brought up to date.
	pokes chan event.GenericEvent
	// known holds the []kubevirt.Interface of pods, by UID.
	known sync.Map
	// paths holds the vfPath of VFs, by PCI address. Losing it costs a VFNode
	// that does not tell.
	paths sync.Map
	// hooked says that KubeVirt's node hooks are served.
	hooked bool
	// found is what is known of KubeVirt and its QEMU here.
	found found
}

// newScheme returns a scheme with all that the agent reads and writes.
func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, coordinationv1.AddToScheme, certificatesv1.AddToScheme, virtv1.AddToScheme, nadv1.AddToScheme, cluster.AddToScheme, v1alpha1.AddToScheme,
	} {
		if err := add(s); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// advertised returns the address that other agents are told.
func advertised(advertise string, listen net.Addr) (string, error) {
	if advertise != "" {
		// An IPv4 address may be in brackets too, as where the address comes from
		// a variable that may hold either.
		host, port, err := net.SplitHostPort(advertise)
		if err == nil && host == "" {
			err = fmt.Errorf("%q names no host", advertise)
		}
		if err != nil {
			return "", fmt.Errorf("advertised address: %w", err)
		}
		return net.JoinHostPort(host, port), nil
	}
	if tcp, ok := listen.(*net.TCPAddr); ok && tcp.IP.IsUnspecified() {
		return "", fmt.Errorf("listening at %s does not tell which address other agents can use: advertise one", listen)
	}
	return listen.String(), nil
}

func logSink(l *slog.Logger) logr.Logger { return logr.FromSlogHandler(l.Handler()) }
