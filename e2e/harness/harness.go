// Package harness puts a whole installation on one machine: a lab, a control
// plane, the product's manager and agents as processes, and the stand-in for
// the rest of Kubernetes and KubeVirt. The demonstration and the end-to-end
// tests work with it.
package harness

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/cluster"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/pki"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

const (
	// Namespace is where VMs and migrations live.
	Namespace = "default"
	// VMI is the name of the VM under load, Interface that of its interface.
	VMI, Interface = "vm", "net1"
	// MAC is the VM's address.
	MAC = "52:54:00:c0:5c:01"
	// NodeA and NodeB are the nodes; the VM starts on NodeA.
	NodeA, NodeB = "a", "b"
	// VFsPerNode is how many VFs each node's one PF has.
	VFsPerNode = 2

	peerPort  = "9443"
	stopGrace = 10 * time.Second
	// inventoryTimeout bounds the start of an agent, on a machine that is slow too.
	inventoryTimeout = 3 * time.Minute
)

// Options of a Harness.
type Options struct {
	// Artifacts say what to run with.
	Artifacts artifacts.Set
	// Log gets what the stand-in and the harness do.
	Log *slog.Logger
	// Progress, if set, is told what is about to be done.
	Progress func(string)
	// DeviceArgs, if set, are further arguments of a node's device processes.
	DeviceArgs func(node string) []string
	// PFSettings, if set, are further settings of a node's modelled PF, such
	// as "trust=true", for the agents that start from now on.
	PFSettings func(node string) string
	// Binary, if set, is asked for the product's binary when a process is
	// started: ManagerName, AgentName of a node, or DeviceName. Without it
	// that is the one of Artifacts.
	Binary func(process string) string
	// HugePages has the VMs' memory in pages of 2 MiB.
	HugePages bool
	// Machines, if set, makes machines of the lab's nodes, which agents and pods
	// then run on. The Harness closes them.
	Machines func(context.Context, *lab.Lab) (Machines, error)
	// Install, if set, installs the product into the cluster, which has nothing
	// of it. Without it the harness does, in its own way.
	Install func(context.Context, *Harness) (Installation, error)
}

// Machines are nodes that are machines of their own.
type Machines interface {
	standin.Machines
	// Configure says what of the stand-in is different with them.
	Configure(*standin.Config)
	// Compsc is the path of the product's binary there.
	Compsc() string
	// Copy copies files to a node, to the same paths.
	Copy(node string, files ...string) error
	// Close ends them.
	Close() error
}

// Installation says how the product's processes are started, as a kubelet would
// start the containers of their pods.
type Installation interface {
	// Manager returns the arguments of a new manager's process.
	Manager(context.Context) ([]string, error)
	// Agent returns the arguments of a new process of the node's agent.
	Agent(ctx context.Context, node string) ([]string, error)
}

// Harness is a running installation. Its methods are safe for concurrent use.
type Harness struct {
	Lab     *lab.Lab
	Cluster *cluster.Cluster
	StandIn *standin.StandIn

	o         Options
	machines  Machines
	certs     map[string]pki.Files
	installed Installation

	mu    sync.Mutex
	procs map[string]*lab.Process
}

// Start brings everything up but the VM. The caller must Close it.
func Start(ctx context.Context, o Options) (_ *Harness, err error) {
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	ctrl.SetLogger(logr.FromSlogHandler(o.Log.Handler()))
	h := &Harness{o: o, certs: map[string]pki.Files{}, procs: map[string]*lab.Process{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.Close())
		}
	}()
	o.Progress("two nodes and a hub: network namespaces")
	if h.Lab, err = lab.New(ctx, NodeA, NodeB); err != nil {
		return nil, err
	}
	if o.Machines != nil {
		if h.machines, err = o.Machines(ctx, h.Lab); err != nil {
			return nil, err
		}
	}
	o.Progress("control plane: etcd and kube-apiserver, CRDs, RBAC")
	h.Cluster, err = cluster.Start(ctx, h.Lab, cluster.Options{
		Binaries: o.Artifacts.ControlPlane, ConfigDir: o.Artifacts.Config, KubeVirtCRDs: o.Artifacts.KubeVirtCRDs,
		Bare: o.Install != nil,
	})
	if err != nil {
		return nil, err
	}
	if o.Install != nil {
		o.Progress("the product's installation")
		if h.installed, err = o.Install(ctx, h); err != nil {
			return nil, err
		}
	}
	ca, err := pki.New()
	if err != nil {
		return nil, err
	}
	for _, n := range h.Lab.Nodes {
		if h.certs[n.Name], err = ca.Issue(filepath.Join(h.Lab.Dir, "tls", n.Name), n.Name, n.IP); err != nil {
			return nil, err
		}
	}
	o.Progress("compsc manager, and compsc agent on both nodes")
	if err := h.StartManager(); err != nil {
		return nil, err
	}
	for name := range h.Lab.Nodes {
		if err := h.StartAgent(name, VFsPerNode); err != nil {
			return nil, err
		}
	}
	for name := range h.Lab.Nodes {
		if err := h.AwaitInventory(ctx, name, VFsPerNode); err != nil {
			return nil, err
		}
	}
	played := standin.Config{
		Lab: h.Lab, REST: h.Cluster.Config, Client: h.Cluster.Client, Compsc: func() string { return h.binary(DeviceName) },
		QEMUTree: o.Artifacts.QEMU, Kernel: o.Artifacts.Kernel, Initrd: o.Artifacts.Initrd,
		PodsDir: h.podsDir, DeviceArgs: o.DeviceArgs, Log: o.Log,
	}
	if h.machines != nil {
		played.Machines = h.machines
		h.machines.Configure(&played)
	}
	h.StandIn, err = standin.Start(ctx, played)
	return h, err
}

// Close takes everything down. It may be called again.
func (h *Harness) Close() error {
	var errs []error
	if h.StandIn != nil {
		errs = append(errs, h.StandIn.Close())
		h.StandIn = nil
	}
	h.mu.Lock()
	procs := h.procs
	h.procs = map[string]*lab.Process{}
	h.mu.Unlock()
	var wg sync.WaitGroup
	for _, p := range procs {
		wg.Go(func() { p.Stop(stopGrace) })
	}
	wg.Wait()
	if h.machines != nil {
		errs = append(errs, h.machines.Close())
		h.machines = nil
	}
	if h.Cluster != nil {
		errs = append(errs, h.Cluster.Close())
		h.Cluster = nil
	}
	if h.Lab != nil {
		errs = append(errs, h.Lab.Close())
	}
	return errors.Join(errs...)
}

// podsDir is where the node's kubelet would have the volumes of pods.
func (h *Harness) podsDir(node string) string {
	return filepath.Join(h.Lab.Dir, "nodes", node, "pods")
}

// Client reaches the API server with all rights.
func (h *Harness) Client() client.Client { return h.Cluster.Client }

// LogDir holds the logs of all processes.
func (h *Harness) LogDir() string { return filepath.Join(h.Lab.Dir, "log") }

// ManagerName and DeviceName are names of the product's processes.
const (
	ManagerName = "manager"
	DeviceName  = "device"
)

// AgentName is the name of the process of the node's agent.
func AgentName(node string) string { return "agent-" + node }

// binary is the program of a process that is started now.
func (h *Harness) binary(process string) string {
	if h.o.Binary != nil {
		return h.o.Binary(process)
	}
	return h.o.Artifacts.Compsc
}

// Manager is the manager's process, Agent that of a node's agent; nil while
// it is stopped.
func (h *Harness) Manager() *lab.Process { return h.process(ManagerName) }

// Agent is the process of the node's agent, nil while it is stopped.
func (h *Harness) Agent(node string) *lab.Process { return h.process(AgentName(node)) }

func (h *Harness) process(name string) *lab.Process {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.procs[name]
}

// StartManager starts the manager.
func (h *Harness) StartManager() error {
	if h.installed != nil {
		args, err := h.installed.Manager(context.Background())
		if err != nil {
			return err
		}
		return h.start(ManagerName, nil, args...)
	}
	return h.start(ManagerName, nil,
		"manager", "--kubeconfig", h.Cluster.ManagerKubeconfig, "--namespace", v1alpha1.SystemNamespace,
		"--leader-elect=false", "--metrics-bind-address", "0")
}

// StopManager kills the manager, as a node's failure would.
func (h *Harness) StopManager() { h.kill(ManagerName) }

// StartAgent starts the node's agent with a PF that has that many VFs.
func (h *Harness) StartAgent(node string, vfs int) error {
	n := h.Lab.Nodes[node]
	listen := n.IP.String() + ":" + peerPort
	c := h.certs[node]
	pf := fmt.Sprintf("name=pf0,vfs=%d,bridge=%s", vfs, lab.NodeBridge)
	if h.o.PFSettings != nil {
		if more := h.o.PFSettings(node); more != "" {
			pf += "," + more
		}
	}
	if h.installed != nil {
		args, err := h.installed.Agent(context.Background(), node)
		if err != nil {
			return err
		}
		return h.start(AgentName(node), n.NS, append(args, "--pods-dir", h.podsDir(node), "--model-pf", pf)...)
	}
	args := []string{
		"agent", "--node-name", node, "--kubeconfig", h.Cluster.AgentKubeconfig, "--namespace", v1alpha1.SystemNamespace,
		"--pods-dir", h.podsDir(node), "--peer-listen", listen, "--peer-advertise", listen,
		"--tls-cert", c.Cert, "--tls-key", c.Key, "--tls-ca", c.CA,
		"--metrics-bind-address", "0",
	}
	if h.machines != nil {
		return h.startFarAgent(node, args, h.Cluster.AgentKubeconfig, c.Cert, c.Key, c.CA)
	}
	return h.start(AgentName(node), n.NS, append(args, "--model-pf", pf)...)
}

// startFarAgent starts the agent of a node that is a machine of its own.
func (h *Harness) startFarAgent(node string, args []string, files ...string) error {
	if err := h.machines.Copy(node, files...); err != nil {
		return err
	}
	name := AgentName(node)
	return h.launch(name, func() (*lab.Process, error) {
		return h.machines.Start(node, lab.Command{
			Name: name, Path: h.machines.Compsc(), Args: args, Log: filepath.Join(h.LogDir(), name+".log"),
		})
	})
}

// StopAgent kills the node's agent, as a failure would.
func (h *Harness) StopAgent(node string) { h.kill(AgentName(node)) }

// EndAgent asks the node's agent to end, as a kubelet does, and returns its
// process; another one can be started once that has ended.
func (h *Harness) EndAgent(node string) (*lab.Process, error) { return h.end(AgentName(node)) }

// EndManager asks the manager to end, as a kubelet does, and returns its process.
func (h *Harness) EndManager() (*lab.Process, error) { return h.end(ManagerName) }

func (h *Harness) end(name string) (*lab.Process, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.procs[name]
	if p == nil {
		return nil, fmt.Errorf("%s does not run", name)
	}
	delete(h.procs, name)
	return p, p.Signal(unix.SIGTERM)
}

func (h *Harness) start(name string, ns *lab.NS, args ...string) error {
	return h.launch(name, func() (*lab.Process, error) {
		return h.Lab.Start(lab.Command{
			Name: name, Path: h.binary(name), Args: args, NS: ns, Log: filepath.Join(h.LogDir(), name+".log"),
		})
	})
}

func (h *Harness) launch(name string, start func() (*lab.Process, error)) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.procs[name] != nil {
		return fmt.Errorf("%s runs already", name)
	}
	p, err := start()
	if err != nil {
		return err
	}
	h.procs[name] = p
	return nil
}

func (h *Harness) kill(name string) {
	h.mu.Lock()
	p := h.procs[name]
	delete(h.procs, name)
	h.mu.Unlock()
	if p != nil {
		p.Stop(0)
	}
}

// FreeVFs counts the node's VFs that nobody holds, and all of them.
func (h *Harness) FreeVFs(ctx context.Context, node string) (free, all int, err error) {
	n := &v1alpha1.VFNode{}
	if err := h.Client().Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
		return 0, 0, err
	}
	for _, pf := range n.Status.PFs {
		for _, vf := range pf.VFs {
			all++
			if vf.Holder == "" {
				free++
			}
		}
	}
	return free, all, nil
}

// AwaitInventory waits until the node's agent has published so many VFs.
func (h *Harness) AwaitInventory(ctx context.Context, node string, vfs int) error {
	ctx, cancel := context.WithTimeout(ctx, inventoryTimeout)
	defer cancel()
	return wait.Until(ctx, "the inventory of node "+node, func(ctx context.Context) (bool, error) {
		if p := h.Agent(node); p != nil {
			select {
			case <-p.Done():
				return false, fmt.Errorf("the agent ended: %w: %s", p.Err(), p.Tail(1000))
			default:
			}
		}
		_, all, err := h.FreeVFs(ctx, node)
		return all == vfs, client.IgnoreNotFound(err)
	})
}

// AwaitFreeVFs waits until so many of the node's VFs are free.
func (h *Harness) AwaitFreeVFs(ctx context.Context, node string, want int) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return wait.Until(ctx, fmt.Sprintf("%d free VFs on node %s", want, node), func(ctx context.Context) (bool, error) {
		free, _, err := h.FreeVFs(ctx, node)
		return free == want, err
	})
}

// CreateVM creates a VMI with one VF and waits until it runs. A paused one
// holds its VF and never does anything.
func (h *Harness) CreateVM(ctx context.Context, name, mac string, memory int64, cores uint32, paused bool) error {
	return h.createVM(ctx, name, mac, h.Lab.GuestIP(), memory, cores, paused)
}

func (h *Harness) createVM(ctx context.Context, name, mac string, ip netip.Prefix, memory int64, cores uint32, paused bool) error {
	v := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace}}
	guest := resource.NewQuantity(memory<<20, resource.BinarySI)
	v.Spec.Domain.Memory = &kubevirtv1.Memory{Guest: guest}
	if h.o.HugePages {
		v.Spec.Domain.Memory.Hugepages = &kubevirtv1.Hugepages{PageSize: "2Mi"}
	}
	v.Spec.Domain.CPU = &kubevirtv1.CPU{Cores: cores}
	v.Spec.Domain.Firmware = &kubevirtv1.Firmware{KernelBoot: &kubevirtv1.KernelBoot{
		KernelArgs: "console=ttyS0 panic=-1 mitigations=off compsc.ip=" + ip.String(),
	}}
	v.Spec.Domain.Devices.Interfaces = []kubevirtv1.Interface{{
		Name: Interface, Binding: &kubevirtv1.PluginBinding{Name: standin.BindingName}, MacAddress: mac,
	}}
	v.Spec.Networks = []kubevirtv1.Network{{
		Name:          Interface,
		NetworkSource: kubevirtv1.NetworkSource{Multus: &kubevirtv1.MultusNetwork{NetworkName: Namespace + "/vf-net"}},
	}}
	if paused {
		v.Spec.StartStrategy = new(kubevirtv1.StartStrategyPaused)
	}
	if err := h.Client().Create(ctx, v); err != nil {
		return fmt.Errorf("VMI %s: %w", name, err)
	}
	return wait.Until(ctx, "VMI "+name+" to run", func(ctx context.Context) (bool, error) {
		if err := h.Client().Get(ctx, client.ObjectKeyFromObject(v), v); err != nil {
			return false, err
		}
		if v.IsFinal() {
			return false, fmt.Errorf("VMI %s is %s: %s", name, v.Status.Phase, v.Status.Reason)
		}
		return v.IsRunning(), nil
	})
}

// DeleteVM deletes a VMI and waits until nothing of it is left.
func (h *Harness) DeleteVM(ctx context.Context, name string) error {
	v := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace}}
	if err := h.Client().Delete(ctx, v); err != nil {
		return fmt.Errorf("VMI %s: %w", name, err)
	}
	return wait.Until(ctx, "VMI "+name+" to be gone", func(ctx context.Context) (bool, error) {
		err := h.Client().Get(ctx, client.ObjectKeyFromObject(v), v)
		return err != nil && client.IgnoreNotFound(err) == nil, client.IgnoreNotFound(err)
	})
}

// VMNode is where the VM under load runs.
func (h *Harness) VMNode(ctx context.Context) (string, error) {
	return h.nodeOf(ctx, client.ObjectKey{Namespace: Namespace, Name: VMI})
}

func (h *Harness) nodeOf(ctx context.Context, vmi client.ObjectKey) (string, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := h.Client().Get(ctx, vmi, v); err != nil {
		return "", err
	}
	if !v.IsRunning() {
		return "", fmt.Errorf("VMI %s is %s: %s", v.Name, v.Status.Phase, v.Status.Reason)
	}
	return v.Status.NodeName, nil
}

// Other is the node that a VM on the given one can go to.
func Other(node string) string {
	if node == NodeA {
		return NodeB
	}
	return NodeA
}

// SetNodeSchedulable cordons a node, or takes that back.
func (h *Harness) SetNodeSchedulable(ctx context.Context, node string, ok bool) error {
	n := &corev1.Node{}
	if err := h.Client().Get(ctx, client.ObjectKey{Name: node}, n); err != nil {
		return err
	}
	before := n.DeepCopy()
	n.Labels[kubevirtv1.NodeSchedulable] = fmt.Sprint(ok)
	return h.Client().Patch(ctx, n, client.MergeFrom(before))
}

// AwaitAgentLease waits until the lease of the node's agent is valid, or is
// not any more.
func (h *Harness) AwaitAgentLease(ctx context.Context, node string, valid bool) error {
	return wait.Until(ctx, fmt.Sprintf("the lease of node %s's agent to be valid: %v", node, valid), func(ctx context.Context) (bool, error) {
		l := &coordinationv1.Lease{}
		if err := h.Client().Get(ctx, client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: "agent-" + node}, l); err != nil {
			return false, err
		}
		if l.Spec.RenewTime == nil || l.Spec.LeaseDurationSeconds == nil {
			return !valid, nil
		}
		end := l.Spec.RenewTime.Add(time.Duration(*l.Spec.LeaseDurationSeconds) * time.Second)
		return time.Now().Before(end) == valid, nil
	})
}
