// Package hook serves virt-launcher's calls of a network binding's sidecar:
// KubeVirt's hook API, version v1alpha3 (pkg/hooks of KubeVirt 1.8 and 1.9).
//
// virt-launcher looks for the sidecar's socket when it starts, asks Info once,
// and then calls OnDefineDomain when it is about to define the VM's domain: on
// the node where the VM starts, and on the target of a migration, before it
// tells anybody that it is ready to receive the VM. So an error, or an answer
// that takes its time, keeps both from happening, without any feature gate;
// virt-handler shows the error as an event of the VMI, and tries again.
//
// Where there is any Plugin object, virt-launcher 1.9 reads what OnDefineDomain
// returned into types of its own, which know neither QEMU's arguments nor what
// the VFs' interfaces are connected to, and calls the plugins' domain hooks with
// the rest. So the same is done once more there (MutateDomain).
package hook

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	virtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/domain"
	"compsc.io/compsc/agent/kubevirt/hook/callbackspb"
	"compsc.io/compsc/agent/kubevirt/hook/domainpb"
	"compsc.io/compsc/agent/kubevirt/hook/infopb"
)

// Socket is the name of the hook socket in the sidecar's directory. It must
// differ from those of the pod's other sidecars: virt-launcher counts names.
const Socket = "compsc.sock"

// NetworkInfo is where KubeVirt shows the sidecar of a binding with
// downwardAPI: device-info the annotation kubevirt.io/network-info of its pod.
const NetworkInfo = "/etc/podinfo/network-info"

const (
	name            = "compsc"
	version         = "v1alpha3"
	pointDomain     = "OnDefineDomain"
	pointShutdown   = "Shutdown"
	maxMessage      = 4 << 20
	maxNetworkInfo  = 256 << 10
	shutdownTimeout = 5 * time.Second
)

// DefaultWait is how long OnDefineDomain waits for the VFs: as long as attaching
// them usually takes. The call keeps one of virt-handler's few workers busy, and
// virt-handler, which gives virt-launcher 20 s for what leads to it
// (pkg/virt-handler/cmd-client of KubeVirt, longTimeout), tries again after an
// error, at once when the VMI changes.
const DefaultWait = 3 * time.Second

// Options of a Server.
type Options struct {
	// Sidecar is the name of the container that it runs in.
	Sidecar string
	// Gate and Monitor are the names of these sockets in the device process's
	// directory, VF that of the VF at a device number.
	Gate, Monitor string
	VF            func(slot int) string
	// Await blocks until QEMU may be started, and returns the VM's VFs.
	Await func(context.Context) ([]kubevirt.Interface, error)
	// Wait bounds Await; 0 stands for DefaultWait.
	Wait time.Duration
	// NetworkInfo is the file that KubeVirt tells the VFs in; it may be empty
	// or absent, as KubeVirt writes it only once the pod runs.
	NetworkInfo string
	// Shutdown is called when virt-launcher says that the VM has ended.
	Shutdown func()
	// Log takes what the server reports.
	Log *slog.Logger
}

// Server answers virt-launcher. It is safe for concurrent use.
type Server struct {
	infopb.UnimplementedInfoServer
	callbackspb.UnimplementedCallbacksServer
	domainpb.UnimplementedDomainHookServiceServer
	o    Options
	once sync.Once
}

// New makes a server.
func New(o Options) (*Server, error) {
	if !kubevirt.IsSidecarName(o.Sidecar) {
		return nil, fmt.Errorf("%q is not the name of a hook sidecar's container, such as %s: is $%s set, as KubeVirt does?",
			o.Sidecar, kubevirt.SidecarName(0), kubevirt.EnvContainerName)
	}
	if o.Wait == 0 {
		o.Wait = DefaultWait
	}
	return &Server{o: o}, nil
}

// Listen makes the hook socket in the sidecar's directory, and that of the domain
// hook if there is a directory for it, in place of those that an earlier process
// may have left.
func Listen(dir, plugin string) ([]net.Listener, error) {
	l, err := listen(filepath.Join(dir, Socket))
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(plugin); errors.Is(err, os.ErrNotExist) {
		return []net.Listener{l}, nil
	}
	p, err := listen(filepath.Join(plugin, kubevirt.PluginSocket))
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return []net.Listener{l, p}, nil
}

func listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("stale socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("hook socket: %w", err)
	}
	return l, nil
}

// Serve answers on all of ls until ctx ends. Calls under way then get some seconds.
func (s *Server) Serve(ctx context.Context, ls ...net.Listener) error {
	g := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	infopb.RegisterInfoServer(g, s)
	callbackspb.RegisterCallbacksServer(g, s)
	domainpb.RegisterDomainHookServiceServer(g, s)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		t := time.AfterFunc(shutdownTimeout, g.Stop)
		defer t.Stop()
		g.GracefulStop()
	})
	ended := make(chan error, len(ls))
	for _, l := range ls {
		go func() { ended <- g.Serve(l) }()
	}
	err := <-ended
	if !stop() {
		<-stopped
		return nil
	}
	g.Stop()
	return fmt.Errorf("hook socket: %w", err)
}

// Info implements KubeVirt's service.
func (s *Server) Info(context.Context, *infopb.InfoParams) (*infopb.InfoResult, error) {
	return &infopb.InfoResult{
		Name:       name,
		Versions:   []string{version},
		HookPoints: []*infopb.HookPoint{{Name: pointDomain}, {Name: pointShutdown}},
	}, nil
}

// OnDefineDomain implements KubeVirt's service.
func (s *Server) OnDefineDomain(ctx context.Context, r *callbackspb.OnDefineDomainParams) (*callbackspb.OnDefineDomainResult, error) {
	doc, err := s.define(ctx, r.GetDomainXML(), r.GetVmi())
	return &callbackspb.OnDefineDomainResult{DomainXML: doc}, err
}

// MutateDomain implements KubeVirt's service.
func (s *Server) MutateDomain(ctx context.Context, r *domainpb.MutateDomainRequest) (*domainpb.MutateDomainResponse, error) {
	doc, err := s.define(ctx, r.GetDomain(), r.GetVmi())
	return &domainpb.MutateDomainResponse{Domain: doc}, err
}

// define returns the domain with the VFs, or a status that says why not.
func (s *Server) define(ctx context.Context, doc, vmiJSON []byte) ([]byte, error) {
	doc, err := s.withVFs(ctx, doc, vmiJSON)
	if err != nil {
		s.o.Log.Error("the domain is refused", "error", err)
		return nil, status.Errorf(codes.FailedPrecondition, "compsc: %v", err)
	}
	return doc, nil
}

func (s *Server) withVFs(ctx context.Context, doc, vmiJSON []byte) ([]byte, error) {
	vmi, err := readVMI(vmiJSON)
	if err != nil {
		return nil, fmt.Errorf("the VMI that virt-launcher sent: %w", err)
	}
	// What it took is not needed again.
	defer debug.FreeOSMemory()
	slots, err := kubevirt.Slots(vmi)
	if err != nil {
		return nil, err
	}
	// What cannot work is refused at once, without waiting for a VF.
	c := s.config(slots)
	if _, err := domain.Define(doc, c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.o.Wait)
	defer cancel()
	have, err := s.o.Await(ctx)
	if err != nil {
		return nil, err
	}
	if err := kubevirt.CheckAttached(vmi, have); err != nil {
		return nil, err
	}
	info, err := s.networkInfo()
	if err != nil {
		return nil, err
	}
	if err := kubevirt.CheckNetworkInfo(info, have); err != nil {
		return nil, fmt.Errorf("%s: %w", s.o.NetworkInfo, err)
	}
	// KubeVirt is told the addresses too.
	for i := range c.VFs {
		for _, h := range have {
			if h.Name == c.VFs[i].Name {
				c.VFs[i].MAC = h.MAC
			}
		}
	}
	out, err := domain.Define(doc, c)
	if err != nil {
		return nil, err
	}
	s.o.Log.Info("domain defined", "vmi", vmi.Namespace+"/"+vmi.Name, "interfaces", len(have))
	return out, nil
}

// readVMI reads what of a VMI matters here; the rest would only take memory, in
// a process that there is one of for each VM.
func readVMI(b []byte) (*virtv1.VirtualMachineInstance, error) {
	var in struct {
		Metadata struct{ Name, Namespace string }
		Spec     struct {
			Domain struct {
				Devices struct{ Interfaces []virtv1.Interface }
			}
		}
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return nil, err
	}
	vmi := &virtv1.VirtualMachineInstance{}
	vmi.Name, vmi.Namespace = in.Metadata.Name, in.Metadata.Namespace
	vmi.Spec.Domain.Devices.Interfaces = in.Spec.Domain.Devices.Interfaces
	return vmi, nil
}

func (s *Server) config(slots map[string]int) domain.Config {
	dir := kubevirt.ComputeDeviceDir(s.o.Sidecar)
	c := domain.Config{Gate: filepath.Join(dir, s.o.Gate), Monitor: filepath.Join(dir, s.o.Monitor)}
	// In the order of the device numbers, whatever that of the interfaces is.
	for name, slot := range slots {
		c.VFs = append(c.VFs, domain.VF{Name: name, Slot: slot, Socket: filepath.Join(dir, s.o.VF(slot))})
	}
	slices.SortFunc(c.VFs, func(a, b domain.VF) int { return cmp.Compare(a.Slot, b.Slot) })
	return c
}

func (s *Server) networkInfo() (string, error) {
	f, err := os.Open(s.o.NetworkInfo)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxNetworkInfo+1))
	return string(b), err
}

// Shutdown implements KubeVirt's service.
func (s *Server) Shutdown(context.Context, *callbackspb.ShutdownParams) (*callbackspb.ShutdownResult, error) {
	s.o.Log.Info("virt-launcher says that the VM has ended")
	s.once.Do(s.o.Shutdown)
	return &callbackspb.ShutdownResult{}, nil
}
