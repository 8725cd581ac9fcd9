package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	virtv1 "kubevirt.io/api/core/v1"
	"libvirt.org/go/libvirtxml"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/hook/callbackspb"
	"compsc.io/compsc/agent/kubevirt/hook/domainpb"
	"compsc.io/compsc/agent/kubevirt/hook/infopb"
)

// launcher plays virt-launcher: it finds the hook sockets as pkg/hooks of
// KubeVirt does, and has a connection to ours.
type launcher struct {
	infopb.InfoClient
	callbackspb.CallbacksClient
	domainpb.DomainHookServiceClient
	dir  string
	down chan struct{}
	done chan error
	stop context.CancelFunc
}

func start(t *testing.T, change func(*Options)) *launcher {
	t.Helper()
	x := &launcher{dir: t.TempDir(), down: make(chan struct{}, 2), done: make(chan error, 1)}
	o := Options{
		Sidecar: "hook-sidecar-1", Gate: "gate.sock", Monitor: "qmp.sock",
		VF: func(slot int) string { return fmt.Sprintf("%x.sock", slot) },
		Await: func(context.Context) ([]kubevirt.Interface, error) {
			return []kubevirt.Interface{
				{Name: "net1", Slot: 0x10, VFAddress: "0000:03:10.0", MAC: "52:54:00:00:00:01"},
				{Name: "net2", Slot: 0x11, VFAddress: "0000:03:10.2"},
			}, nil
		},
		NetworkInfo: filepath.Join(x.dir, "network-info"),
		Shutdown:    func() { x.down <- struct{}{} },
		Log:         slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	plugin := t.TempDir()
	ls, err := Listen(x.dir, plugin)
	if err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, x.stop = context.WithCancel(context.Background())
	go func() { x.done <- s.Serve(ctx, ls...) }()
	t.Cleanup(x.stop)
	cc, err := grpc.NewClient("unix:"+filepath.Join(x.dir, Socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	x.InfoClient, x.CallbacksClient = infopb.NewInfoClient(cc), callbackspb.NewCallbacksClient(cc)
	pc, err := grpc.NewClient("unix:"+filepath.Join(plugin, kubevirt.PluginSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	x.DomainHookServiceClient = domainpb.NewDomainHookServiceClient(pc)
	return x
}

func domainXML(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile("../domain/testdata/kernel-boot.xml")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func vmiJSON(t *testing.T, interfaces ...string) []byte {
	t.Helper()
	vmi := &virtv1.VirtualMachineInstance{}
	vmi.Name, vmi.Namespace = "vm", "default"
	for _, name := range interfaces {
		vmi.Spec.Domain.Devices.Interfaces = append(vmi.Spec.Domain.Devices.Interfaces,
			virtv1.Interface{Name: name, Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}})
	}
	b, err := json.Marshal(vmi)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (x *launcher) define(t *testing.T, interfaces ...string) ([]byte, error) {
	t.Helper()
	r, err := x.OnDefineDomain(t.Context(), &callbackspb.OnDefineDomainParams{DomainXML: domainXML(t), Vmi: vmiJSON(t, interfaces...)})
	return r.GetDomainXML(), err
}

// TestServesVirtLauncher: what virt-launcher does from a pod's start to its
// end, once more of each where it may.
func TestServesVirtLauncher(t *testing.T) {
	x := start(t, nil)
	for range 2 {
		info, err := x.Info(t.Context(), &infopb.InfoParams{})
		if err != nil {
			t.Fatal(err)
		}
		var points []string
		for _, p := range info.HookPoints {
			points = append(points, p.Name)
		}
		if d := cmp.Diff([]string{"compsc", "v1alpha3", "OnDefineDomain", "Shutdown"}, append([]string{info.Name, strings.Join(info.Versions, ",")}, points...)); d != "" {
			t.Error(d)
		}
	}
	once, err := x.define(t, "net1", "net2")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`path=/var/run/kubevirt-hooks/hook-sidecar-1/compsc/qmp.sock`,
		`/var/run/kubevirt-hooks/hook-sidecar-1/compsc/gate.sock`,
		`/var/run/kubevirt-hooks/hook-sidecar-1/compsc/10.sock`,
		`/var/run/kubevirt-hooks/hook-sidecar-1/compsc/11.sock`,
		`<mac address="52:54:00:00:00:01">`, `<alias name="ua-net1">`, `<alias name="ua-net2">`,
	} {
		if !bytes.Contains(once, []byte(want)) {
			t.Errorf("the domain has no %s:\n%s", want, once)
		}
	}
	// Another sidecar may have changed the domain before, or a retry may bring ours.
	again, err := x.OnDefineDomain(t.Context(), &callbackspb.OnDefineDomainParams{DomainXML: once, Vmi: vmiJSON(t, "net1", "net2")})
	if err != nil || !bytes.Equal(once, again.DomainXML) {
		t.Errorf("the second time: %v\n%s", err, cmp.Diff(string(once), string(again.GetDomainXML())))
	}
	if _, err := x.PreCloudInitIso(t.Context(), &callbackspb.PreCloudInitIsoParams{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("PreCloudInitIso, which was not asked for: %v", err)
	}
	for range 2 {
		if _, err := x.CallbacksClient.Shutdown(t.Context(), &callbackspb.ShutdownParams{}); err != nil {
			t.Fatal(err)
		}
	}
	if len(x.down) != 1 {
		t.Errorf("shut down %d times, want once", len(x.down))
	}
	x.stop()
	if err := <-x.done; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// TestOnlyHookSocketsAreSeen: virt-launcher takes each file directly in the
// sidecar's directory for a hook socket.
func TestOnlyHookSocketsAreSeen(t *testing.T) {
	x := start(t, nil)
	files, err := os.ReadDir(x.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 || files[0].Name() != Socket {
		t.Errorf("in the directory: %v", files)
	}
	if rel, err := filepath.Rel(kubevirt.HooksDir, kubevirt.SidecarDeviceDir()); err != nil || rel == "." || strings.Contains(rel, "/") {
		t.Errorf("the device process's directory is %s", kubevirt.SidecarDeviceDir())
	}
}

func TestRefusals(t *testing.T) {
	waits := func(ctx context.Context) ([]kubevirt.Interface, error) {
		<-ctx.Done()
		return nil, errors.New("no VF is attached yet")
	}
	for name, c := range map[string]struct {
		change     func(*Options)
		interfaces []string
		info, want string
	}{
		"no interface":        {want: "no interface of the VMI has the network binding compsc"},
		"no VF in time":       {change: func(o *Options) { o.Await, o.Wait = waits, 20*time.Millisecond }, interfaces: []string{"net1"}, want: "no VF is attached yet"},
		"unknown interface":   {interfaces: []string{"net1"}, want: "interface net2: a VF is attached, but the VMI has no such interface"},
		"interface without":   {interfaces: []string{"net1", "net2", "net3"}, want: "interface net3: no VF is attached"},
		"another order":       {interfaces: []string{"net2", "net1"}, want: "its VF is attached as device 0x1"},
		"KubeVirt's other VF": {interfaces: []string{"net1", "net2"}, info: `{"interfaces":[{"network":"net2","deviceInfo":{"pci":{"pci-address":"0000:03:10.4"}}}]}`, want: "interface net2: VF 0000:03:10.4, but"},
		"not the information": {interfaces: []string{"net1", "net2"}, info: `{"interfaces":3}`, want: "network-info: not the expected JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			x := start(t, c.change)
			if c.info != "" {
				if err := os.WriteFile(filepath.Join(x.dir, "network-info"), []byte(c.info), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			doc, err := x.define(t, c.interfaces...)
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "compsc: ") {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if doc != nil {
				t.Error("a domain in spite of the error")
			}
		})
	}
	x := start(t, nil)
	if _, err := x.OnDefineDomain(t.Context(), &callbackspb.OnDefineDomainParams{DomainXML: domainXML(t), Vmi: []byte("{")}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a broken VMI: %v", err)
	}
	// What cannot work is said at once.
	x = start(t, func(o *Options) { o.Await, o.Wait = waits, time.Hour })
	if _, err := x.OnDefineDomain(t.Context(), &callbackspb.OnDefineDomainParams{DomainXML: []byte("<domain/>"), Vmi: vmiJSON(t, "net1")}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a domain without a machine: %v", err)
	}
	for _, name := range []string{"", "compute", "hook-sidecar-x"} {
		if _, err := New(Options{Sidecar: name}); err == nil || !strings.Contains(err.Error(), "CONTAINER_NAME") {
			t.Errorf("in container %q: %v", name, err)
		}
	}
}

// TestNetworkInfoAgrees: what KubeVirt says of the VFs may be there or not.
func TestNetworkInfoAgrees(t *testing.T) {
	x := start(t, nil)
	for _, info := range []string{"", `{"interfaces":[{"network":"net1","deviceInfo":{"pci":{"pci-address":"0000:03:10.0"}},"mac":"52:54:00:00:00:01"},{"network":"net2"}]}`} {
		if err := os.WriteFile(filepath.Join(x.dir, "network-info"), []byte(info), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := x.define(t, "net1", "net2"); err != nil {
			t.Errorf("with %q: %v", info, err)
		}
	}
}

// TestStaleSocket: a process that was killed leaves its socket behind.
func TestStaleSocket(t *testing.T) {
	dir := t.TempDir()
	plugin := filepath.Join(dir, "plugin")
	for _, sockets := range []int{1, 2} {
		if err := os.WriteFile(filepath.Join(dir, Socket), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		ls, err := Listen(dir, plugin)
		if err != nil || len(ls) != sockets {
			t.Fatalf("%d sockets, want %d: %v", len(ls), sockets, err)
		}
		for _, l := range ls {
			l.Close()
		}
		// KubeVirt has plugins from now on.
		if err := os.Mkdir(plugin, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(plugin, kubevirt.PluginSocket), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDomainHook: what virt-launcher 1.9 drops of the domain, where there are
// plugins, is there again after the domain hook: QEMU's arguments, and what the
// interfaces are connected to.
func TestDomainHook(t *testing.T) {
	x := start(t, nil)
	want, err := x.define(t, "net1", "net2")
	if err != nil {
		t.Fatal(err)
	}
	dropped := regexp.MustCompile(`(?s)<commandline .*</commandline>|<source address="127.*?</source>`).ReplaceAll(want, nil)
	if bytes.Contains(dropped, []byte("compsc-")) || bytes.Contains(dropped, []byte("127.86.70")) || !bytes.Contains(dropped, []byte("ua-net1")) {
		t.Fatalf("not what virt-launcher would leave:\n%s", dropped)
	}
	for _, doc := range [][]byte{dropped, want} {
		r, err := x.MutateDomain(t.Context(), &domainpb.MutateDomainRequest{DomainType: "libvirt", Domain: doc, Vmi: vmiJSON(t, "net1", "net2")})
		if err != nil {
			t.Fatal(err)
		}
		var is, was libvirtxml.Domain
		if err := errors.Join(is.Unmarshal(string(r.Domain)), was.Unmarshal(string(want))); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(was, is); d != "" {
			t.Errorf("the domain (-OnDefineDomain +MutateDomain):\n%s", d)
		}
	}
	_, err = x.MutateDomain(t.Context(), &domainpb.MutateDomainRequest{DomainType: "libvirt", Domain: dropped, Vmi: vmiJSON(t, "other")})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("VFs that are not the VM's: %v", err)
	}
}

// TestNamesOnTheWire: the names on the wire are KubeVirt's.
func TestNamesOnTheWire(t *testing.T) {
	if d := cmp.Diff([]string{"/kubevirt.hooks.info.Info/Info", "/kubevirt.hooks.v1alpha3.Callbacks/OnDefineDomain", "/kubevirt.hooks.v1alpha3.Callbacks/Shutdown",
		"/kubevirt.hooks.plugins.v1alpha1.DomainHookService/MutateDomain"},
		[]string{infopb.Info_Info_FullMethodName, callbackspb.Callbacks_OnDefineDomain_FullMethodName, callbackspb.Callbacks_Shutdown_FullMethodName,
			domainpb.DomainHookService_MutateDomain_FullMethodName}); d != "" {
		t.Error(d)
	}
}
