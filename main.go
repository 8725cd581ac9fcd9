// Command compsc moves running KubeVirt VMs between nodes together with their
// pass-through SR-IOV VFs. One binary, several processes: see each subcommand.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/metrics"

	"compsc.io/compsc/agent"
	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/hook"
	"compsc.io/compsc/agent/kubevirt/nodehook"
	"compsc.io/compsc/agent/privilege"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers"
	"compsc.io/compsc/controllers/binding"
	"compsc.io/compsc/controllers/kubectl"
)

// version is set by the build.
var version = "devel"

// buildInfo is of the processes that serve metrics: manager and agent.
var buildInfo = prometheus.NewGaugeVec(prometheus.GaugeOpts{
	Name: "compsc_build_info",
	Help: "1, with the build's version and the process's role (manager, agent) as labels.",
}, []string{"version", "role"})

func init() { metrics.Registry.MustRegister(buildInfo) }

// extras are added by builds with more than what is shipped: the demo.
var extras []func(root *cobra.Command)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c := kubectl.Plugin(os.Args, version)
	if c == nil {
		c = rootCommand()
	}
	if err := c.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, c.CommandPath()+":", err)
		os.Exit(1)
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "compsc",
		Short:         "Live migration of KubeVirt VMs with their pass-through SR-IOV VFs",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	var level string
	root.PersistentFlags().StringVar(&level, "log-level", "info", "debug, info, warn or error")
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		var l slog.Level
		if err := l.UnmarshalText([]byte(level)); err != nil {
			return fmt.Errorf("--log-level: %w", err)
		}
		h := slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: l})
		slog.SetDefault(slog.New(h))
		ctrl.SetLogger(logr.FromSlogHandler(h))
		return nil
	}
	device := deviceCommand()
	root.AddCommand(managerCommand(), agentCommand(), device, readyCommand(), bindingCommand(), kubectl.Command())
	if isSidecar() {
		root.RunE = device.RunE
	}
	for _, extra := range extras {
		extra(root)
	}
	if c, _, err := root.Find([]string{"demo"}); err != nil || c == root {
		root.AddCommand(&cobra.Command{
			Use:   "demo",
			Short: "Show a migration on this machine (only in the build that `make demo` makes)",
			RunE: func(*cobra.Command, []string) error {
				return errors.New("this build has no demo, which needs a laboratory that is not shipped: run `make demo` in the source tree")
			},
		})
	}
	return root
}

// restConfig reaches the API server: by the file if one is given, else as the
// pod's service account.
func restConfig(kubeconfig string) (*rest.Config, error) {
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	return c, nil
}

func managerCommand() *cobra.Command {
	var kubeconfig string
	o := controllers.Options{}
	c := &cobra.Command{
		Use:   "manager",
		Short: "Reconcile VFMigrations (runs as a Deployment)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Config, err = restConfig(kubeconfig); err != nil {
				return err
			}
			o.Logger = ctrl.Log
			buildInfo.WithLabelValues(version, "manager").Set(1)
			return controllers.Run(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "file that reaches the API server; default: the pod's service account")
	f.StringVar(&o.Namespace, "namespace", v1alpha1.SystemNamespace, "namespace of the leases")
	f.BoolVar(&o.CARotate, "ca-rotate", true, "make and renew the authority of the agents' certificates; false if somebody else writes Secret "+v1alpha1.AuthoritySecret)
	f.DurationVar(&o.CAOverlap, "ca-overlap", time.Minute, "how long a new authority is known to the agents before it signs")
	f.BoolVar(&o.LeaderElection, "leader-elect", true, "let one of several managers act")
	f.StringVar(&o.MetricsAddress, "metrics-bind-address", ":8080", "where to serve metrics, 0 for nowhere")
	f.StringVar(&o.HealthAddress, "health-probe-bind-address", "0", "where to serve /healthz and /readyz, 0 for nowhere")
	return c
}

func bindingCommand() *cobra.Command {
	var kubeconfig string
	o := binding.Options{}
	c := &cobra.Command{
		Use:   "register-binding",
		Short: "Tell KubeVirt of the network binding (runs as a Job, if the chart is to do that)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Image == "" {
				return errors.New("--image is missing: the image that VMs' sidecars are to have")
			}
			if o.Config, err = restConfig(kubeconfig); err != nil {
				return err
			}
			o.Log = slog.Default()
			return binding.Run(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "file that reaches the API server; default: the pod's service account")
	f.StringVar(&o.KubeVirt.Namespace, "kubevirt-namespace", "kubevirt", "namespace of the KubeVirt object")
	f.StringVar(&o.KubeVirt.Name, "kubevirt-name", "kubevirt", "its name")
	f.StringVar(&o.Image, "image", "", "image of the sidecar: this program's")
	return c
}

func agentCommand() *cobra.Command {
	var kubeconfig string
	var backend string
	var models []string
	sriov := host.SRIOVOptions{Families: device.Families()}
	o := agent.Options{Version: version}
	c := &cobra.Command{
		Use:   "agent",
		Short: "Serve one node's VFs (runs as a DaemonSet)",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if err := privilege.Restrict(); err != nil {
				return err
			}
			slog.Debug("capabilities", "kept", privilege.Names())
			if o.Config, err = restConfig(kubeconfig); err != nil {
				return err
			}
			if o.Host, err = newHost(backend, models, sriov); err != nil {
				return err
			}
			o.Log = slog.Default()
			buildInfo.WithLabelValues(version, "agent").Set(1)
			return agent.Run(cmd.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "file that reaches the API server; default: the pod's service account")
	f.StringVar(&o.NodeName, "node-name", os.Getenv("NODE_NAME"), "this node; default: $NODE_NAME")
	f.StringVar(&o.Namespace, "namespace", v1alpha1.SystemNamespace, "namespace of the leases")
	f.StringVar(&o.PodsDir, "pods-dir", "/var/lib/kubelet/pods", "the kubelet's directory of pods")
	f.StringVar(&o.PodResources, "pod-resources", "", "socket of the kubelet's pod resources API; default: the kubelet's own")
	f.StringVar(&o.PeerListen, "peer-listen", ":9443", "where to listen for other agents")
	f.StringVar(&o.PeerAdvertise, "peer-advertise", "", "that address as other nodes see it")
	f.StringVar(&o.TLS.Cert, "tls-cert", "/etc/compsc/tls/tls.crt", "this node's certificate")
	f.StringVar(&o.TLS.Key, "tls-key", "/etc/compsc/tls/tls.key", "its key")
	f.StringVar(&o.TLS.CA, "tls-ca", "/etc/compsc/tls/ca.crt", "the authorities that other agents' certificates must come from")
	f.StringVar(&o.HookSocket, "hook-socket", "", "where to serve KubeVirt's node hooks, usually "+nodehook.Socket+"; empty for nowhere")
	f.StringVar(&o.TLSSigner, "tls-signer", "", "signer that is asked for the node's certificate, usually "+v1alpha1.CertificateSigner+"; the agent writes the three files then; empty if somebody else does")
	f.DurationVar(&o.DrainTimeout, "drain-timeout", 0, "how long an agent that is to end goes on for the migrations of its node; 0 for not at all")
	f.StringVar(&o.HealthAddress, "health-probe-bind-address", "0", "where to serve /healthz and /readyz, 0 for nowhere")
	f.StringVar(&o.MetricsAddress, "metrics-bind-address", ":8081", "where to serve metrics, 0 for nowhere")
	f.StringVar(&backend, "backend", "", "what the VFs are: vfio (the node's NICs) or model; default: model if --model-pf is given, else vfio")
	f.StringArrayVar(&models, "model-pf", nil, "a modelled PF, such as name=pf0,vfs=2,bridge=br0; may be repeated")
	f.StringArrayVar(&sriov.PFs, "pf", nil, "network interface of a PF whose VFs are served; may be repeated; default: all with VFs that compsc knows")
	f.StringVar(&sriov.Journal, "journal", "/var/lib/compsc/vfs", "directory that keeps how VFs were before compsc changed them; it must outlive the process")
	return c
}

// newHost returns what serves the node's VFs.
func newHost(backend string, models []string, sriov host.SRIOVOptions) (agent.Host, error) {
	switch {
	case backend == host.BackendModel, backend == "" && len(models) > 0:
		return modelHost(models)
	case backend != "" && backend != host.BackendVFIO:
		return nil, fmt.Errorf("--backend: %q is neither %s nor %s", backend, host.BackendVFIO, host.BackendModel)
	case len(models) > 0:
		return nil, fmt.Errorf("--model-pf: backend %s has no models", host.BackendVFIO)
	}
	return host.NewSRIOV(sriov)
}

func modelHost(flags []string) (*host.Model, error) {
	var pfs []host.ModelPF
	for _, s := range flags {
		pf, err := host.ParseModelPF(s)
		if err != nil {
			return nil, fmt.Errorf("--model-pf: %w", err)
		}
		pfs = append(pfs, pf)
	}
	return host.NewModel(pfs...)
}

// deviceOptions is for extras to change.
var deviceOptions device.Options

func deviceCommand() *cobra.Command {
	var sidecar, dir string
	c := &cobra.Command{
		Use:   "device",
		Short: "Mediate the VFs of one VM (runs as a sidecar in its pod)",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return runDevice(cmd.Context(), sidecar, dir) },
	}
	f := c.Flags()
	f.StringVar(&sidecar, "sidecar", os.Getenv(kubevirt.EnvContainerName), "name of the container it runs in; default: $"+kubevirt.EnvContainerName)
	f.StringVar(&dir, "hooks-dir", kubevirt.HooksDir, "where KubeVirt mounted the sidecar's directory")
	return c
}

// isSidecar tells whether KubeVirt started this process as a hook sidecar,
// which it does without arguments.
func isSidecar() bool { return kubevirt.IsSidecarName(os.Getenv(kubevirt.EnvContainerName)) }

func runDevice(ctx context.Context, sidecar, dir string) error {
	ctx, shutdown := context.WithCancel(ctx)
	defer shutdown()
	own := filepath.Join(dir, filepath.Base(kubevirt.SidecarDeviceDir()))
	if err := os.MkdirAll(own, 0o700); err != nil {
		return err
	}
	o := deviceOptions
	o.Dir, o.QEMUDir, o.Log = own, kubevirt.ComputeDeviceDir(sidecar), slog.Default()
	process, err := device.New(o)
	if err != nil {
		return err
	}
	server, err := hook.New(hook.Options{
		Sidecar: sidecar, Gate: device.GateSocket, Monitor: device.MonitorSocket, VF: device.VFSocket,
		Await: func(ctx context.Context) ([]kubevirt.Interface, error) {
			vfs, err := process.Await(ctx)
			var out []kubevirt.Interface
			for _, v := range vfs {
				out = append(out, kubevirt.Interface{Name: v.Name, Slot: v.Slot, VFAddress: v.VF, MAC: v.MAC})
			}
			return out, err
		},
		NetworkInfo: hook.NetworkInfo, Shutdown: shutdown, Log: slog.Default().With("part", "hook"),
	})
	if err != nil {
		return err
	}
	ls, err := hook.Listen(dir, kubevirt.PluginDir)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return process.Run(ctx) })
	g.Go(func() error { return server.Serve(ctx, ls...) })
	return g.Wait()
}

// readyCommand is the sidecar's readiness probe: the kubelet's own gRPC probe
// reaches TCP ports only.
func readyCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:   "ready",
		Short: "Tell by the exit status whether the VM's device process is ready (readiness probe of the sidecar)",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return device.Ready(cmd.Context(), dir) },
	}
	c.Flags().StringVar(&dir, "dir", kubevirt.SidecarDeviceDir(), "directory of the device process's sockets")
	return c
}
