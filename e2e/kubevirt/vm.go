package kubevirt

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/guest/proto"
)

const (
	// guestImage holds the kernel and the initramfs of hack/guest.
	guestImage = "localhost/guest:1"
	// Binding is the name under which our network binding is registered, and
	// Network the network of VFs.
	Binding, Network = "compsc", Namespace + "/fast"
	// Interface is the name of a VM's first interface with a VF; the others'
	// names are it and their number.
	Interface = "fast"
	// VFsPerNode is how many VFs each node has (see deploy).
	VFsPerNode = 2

	guestMemory = 192 << 20

	runTimeout  = 4 * time.Minute
	bootTimeout = 3 * time.Minute
	// answerTimeout is how long a console may stay silent before it is opened
	// anew.
	answerTimeout = 10 * time.Second
)

// VMOptions describe a virtual machine.
type VMOptions struct {
	// MACs of its VFs; none for a virtual machine without.
	MACs []string
	// Address of the first VF, such as 198.18.0.100/24.
	Address string
	// Node that it must run on; empty for any.
	Node string
	// Paused has it never run: it only holds its VF.
	Paused bool
}

// VMI is the object of a virtual machine as a user writes it.
func VMI(name string, o VMOptions) *kubevirtv1.VirtualMachineInstance {
	v := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: name}}
	s := &v.Spec
	s.TerminationGracePeriodSeconds = new(int64)
	s.EvictionStrategy = new(kubevirtv1.EvictionStrategyLiveMigrate)
	s.Domain.Machine = &kubevirtv1.Machine{Type: "q35"}
	// A model that QEMU can emulate in full.
	s.Domain.CPU = &kubevirtv1.CPU{Model: "Nehalem", Cores: 1}
	s.Domain.Memory = &kubevirtv1.Memory{Guest: resource.NewQuantity(guestMemory, resource.BinarySI)}
	// KubeVirt gives a VM one serial port, on which commands are served.
	args := []string{"console=tty0", "panic=-1", "mitigations=off", "compsc.port=ttyS0"}
	s.Domain.Devices.Interfaces = []kubevirtv1.Interface{*kubevirtv1.DefaultMasqueradeNetworkInterface()}
	s.Networks = []kubevirtv1.Network{*kubevirtv1.DefaultPodNetwork()}
	for n, mac := range o.MACs {
		s.Domain.Devices.Interfaces = append(s.Domain.Devices.Interfaces, kubevirtv1.Interface{
			Name: interfaceName(n), Binding: &kubevirtv1.PluginBinding{Name: Binding}, MacAddress: mac,
		})
		s.Networks = append(s.Networks, kubevirtv1.Network{
			Name: interfaceName(n), NetworkSource: kubevirtv1.NetworkSource{Multus: &kubevirtv1.MultusNetwork{NetworkName: Network}},
		})
	}
	if o.Address != "" {
		args = append(args, "compsc.ip="+o.Address)
	}
	s.Domain.Firmware = &kubevirtv1.Firmware{KernelBoot: &kubevirtv1.KernelBoot{
		KernelArgs: strings.Join(args, " "),
		Container: &kubevirtv1.KernelBootContainer{
			Image: guestImage, KernelPath: "/boot/vmlinuz", InitrdPath: "/boot/initramfs.gz", ImagePullPolicy: corev1.PullIfNotPresent,
		},
	}}
	if o.Node != "" {
		s.NodeSelector = map[string]string{corev1.LabelHostname: o.Node}
	}
	if o.Paused {
		s.StartStrategy = new(kubevirtv1.StartStrategyPaused)
	}
	return v
}

// interfaceName is the name of a VM's n-th interface with a VF, from 0.
func interfaceName(n int) string {
	if n == 0 {
		return Interface
	}
	return fmt.Sprintf("%s%d", Interface, n+1)
}

// CreateVM creates a virtual machine and waits until KubeVirt says that it runs.
func (s *Stack) CreateVM(ctx context.Context, name string, o VMOptions) error {
	ctx, cancel := context.WithTimeoutCause(ctx, runTimeout, errors.New("it took too long"))
	defer cancel()
	v := VMI(name, o)
	if err := s.Client().Create(ctx, v); err != nil {
		return fmt.Errorf("VMI %s: %w", name, err)
	}
	err := s.Kube.Until(ctx, "VMI "+name+" to run", func(ctx context.Context) (bool, error) {
		if err := s.Client().Get(ctx, client.ObjectKeyFromObject(v), v); err != nil {
			return false, err
		}
		if v.IsFinal() {
			return false, fmt.Errorf("VMI %s is %s: %s", name, v.Status.Phase, v.Status.Reason)
		}
		return v.IsRunning(), nil
	})
	if err != nil {
		return fmt.Errorf("%w; the VMI is %q with %+v", err, v.Status.Phase, v.Status.Conditions)
	}
	return nil
}

// DeleteVM deletes a virtual machine and waits until nothing of it is left.
func (s *Stack) DeleteVM(ctx context.Context, name string) error {
	v := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: name}}
	if err := s.Client().Delete(ctx, v); err != nil {
		return fmt.Errorf("VMI %s: %w", name, err)
	}
	return s.Kube.Until(ctx, "VMI "+name+" to be gone", func(ctx context.Context) (bool, error) {
		err := s.Client().Get(ctx, client.ObjectKeyFromObject(v), v)
		return err != nil && client.IgnoreNotFound(err) == nil, client.IgnoreNotFound(err)
	})
}

// NodeOf is where the virtual machine runs.
func (s *Stack) NodeOf(ctx context.Context, name string) (string, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := s.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: name}, v); err != nil {
		return "", err
	}
	if !v.IsRunning() {
		return "", fmt.Errorf("VMI %s is %s: %s", name, v.Status.Phase, v.Status.Reason)
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

// Guest calls do with a client of the guest, over the VM's serial console as
// `virtctl console` reaches it: through the API server, virt-api and
// virt-handler. A guest that does not answer yet is waited for.
func (s *Stack) Guest(ctx context.Context, name string, do func(context.Context, *proto.Client) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, errors.New("the guest took too long"))
	defer cancel()
	var client *proto.Client
	var last error
	err := s.Kube.Until(ctx, "the guest of VMI "+name, func(ctx context.Context) (bool, error) {
		client, last = s.dialGuest(ctx, name)
		return last == nil, nil
	})
	if err != nil {
		return fmt.Errorf("%w; the last answer: %w", err, last)
	}
	defer client.Close()
	return do(ctx, client)
}

// dialGuest returns a client that the guest has answered. A console belongs to
// one client at a time, and to none while the VM moves.
func (s *Stack) dialGuest(ctx context.Context, name string) (*proto.Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTimeout, errors.New("it took too long"))
	defer cancel()
	conn, err := s.console(ctx, name)
	if err != nil {
		return nil, err
	}
	c := proto.NewClient(conn)
	if _, err := c.Resets(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// console opens the VM's serial console.
func (s *Stack) console(ctx context.Context, name string) (*websocket.Conn, error) {
	tls, err := rest.TLSConfigFor(s.Kube.Config)
	if err != nil {
		return nil, err
	}
	host, err := url.Parse(s.Kube.Config.Host)
	if err != nil {
		return nil, err
	}
	location := fmt.Sprintf("wss://%s/apis/%s/%s/namespaces/%s/virtualmachineinstances/%s/console",
		host.Host, kubevirtv1.SubresourceGroupName, kubevirtv1.ApiStorageVersion, Namespace, name)
	config, err := websocket.NewConfig(location, s.Kube.Config.Host)
	if err != nil {
		return nil, err
	}
	config.TlsConfig = tls
	config.Protocol = []string{"plain.kubevirt.io"}
	conn, err := config.DialContext(ctx)
	if err != nil {
		return nil, fmt.Errorf("console of VMI %s: %w", name, err)
	}
	conn.PayloadType = websocket.BinaryFrame
	return conn, nil
}

// PodOf is the UID of the one pod that the virtual machine has; more than one
// is an error.
func (s *Stack) PodOf(ctx context.Context, name string) (types.UID, error) {
	v := &kubevirtv1.VirtualMachineInstance{}
	if err := s.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: name}, v); err != nil {
		return "", err
	}
	pods := &corev1.PodList{}
	if err := s.Client().List(ctx, pods, client.InNamespace(Namespace), client.MatchingLabels{kubevirtv1.CreatedByLabel: string(v.UID)}); err != nil {
		return "", err
	}
	var found []types.UID
	for _, p := range pods.Items {
		if p.Status.Phase == corev1.PodRunning || p.Status.Phase == corev1.PodPending {
			found = append(found, p.UID)
		}
	}
	if len(found) != 1 {
		return "", fmt.Errorf("VMI %s has %d pods", name, len(found))
	}
	return found[0], nil
}
