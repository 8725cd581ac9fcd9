package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubelet"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// waiting is an error that says that something has not happened yet that is
// somebody else's to do, or that the API server is away; it is no failure.
type waiting struct {
	err error
	// again is when to look again.
	again time.Duration
}

func (w *waiting) Error() string { return w.err.Error() }
func (w *waiting) Unwrap() error { return w.err }

// seldom is how often to look for what announces itself by an event.
const seldom = 5 * time.Second

func wait(again time.Duration, format string, args ...any) error {
	return &waiting{fmt.Errorf(format, args...), again}
}

// pinned is a VF that is leased to a pod and attached to its device process.
type pinned struct {
	iface string
	// network is that of the interface, namespace/name.
	network string
	ref     v1alpha1.VFReference
	// slot is the VF's device number in the guest, of how many VFs the VM has.
	slot, of int
	// fast tells that the guest is to reach its doorbells by itself.
	fast bool
}

// interfaces returns what the pod's VMI has of interfaces with a VF. It does not
// change for a pod, so the API server is asked once.
func (a *agent) interfaces(ctx context.Context, pod *corev1.Pod) ([]kubevirt.Interface, error) {
	if known, ok := a.known.Load(pod.UID); ok {
		return known.([]kubevirt.Interface), nil
	}
	name := kubevirt.VMIName(pod)
	if name == "" {
		return nil, fmt.Errorf("pod %s/%s does not tell its VMI", pod.Namespace, pod.Name)
	}
	vmi := &virtv1.VirtualMachineInstance{}
	err := a.live.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: name}, vmi)
	if apierrors.IsNotFound(err) {
		return nil, wait(seldom, "VMI %s of pod %s/%s does not exist", name, pod.Namespace, pod.Name)
	}
	if err != nil {
		return nil, wait(a.limits.pause*4, "VMI %s: %w", name, err)
	}
	ifaces, err := kubevirt.Interfaces(pod, vmi)
	if errors.Is(err, kubevirt.ErrNotYet) {
		return nil, &waiting{err, seldom}
	}
	if err == nil {
		a.known.Store(pod.UID, ifaces)
	}
	return ifaces, err
}

// inventory returns the node's VFs with their PFs, by PCI address.
func (a *agent) inventory(ctx context.Context) (map[string]host.PF, map[string]host.VF, error) {
	pfs, err := a.host.Inventory(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("inventory of VFs: %w", err)
	}
	of, vfs := map[string]host.PF{}, map[string]host.VF{}
	for _, p := range pfs {
		for _, v := range p.VFs {
			of[v.Address], vfs[v.Address] = p, v
		}
	}
	return of, vfs, nil
}

// pin leases the pod's VFs to it and has them attached to its device process,
// in the given role. What is done already is not done again; what the device
// process has attached is not touched. A *waiting error asks to come again.
func (a *agent) pin(ctx context.Context, pod *corev1.Pod, role string) ([]pinned, error) {
	ifaces, err := a.interfaces(ctx, pod)
	if err != nil || len(ifaces) == 0 {
		return nil, err
	}
	d, err := a.devices.get(pod.UID)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	if gone, err := d.gone(ctx); gone {
		return nil, wait(a.limits.pause, "the device process of pod %s/%s is not there yet", pod.Namespace, pod.Name)
	} else if err != nil {
		return nil, fmt.Errorf("device process of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	pfs, vfs, err := a.inventory(ctx)
	if err != nil {
		return nil, err
	}
	var out []pinned
	for _, i := range ifaces {
		if _, ok := vfs[i.VFAddress]; !ok {
			return nil, fmt.Errorf("interface %s of pod %s/%s: node %s has no VF %s that compsc knows", i.Name, pod.Namespace, pod.Name, a.node, i.VFAddress)
		}
		epoch, err := a.acquire(ctx, i.VFAddress, holderOf(pod))
		if err != nil {
			return nil, fmt.Errorf("interface %s: %w", i.Name, err)
		}
		out = append(out, pinned{i.Name, i.Network, v1alpha1.VFReference{PF: pfs[i.VFAddress].Name, VF: i.VFAddress, MAC: i.MAC, Epoch: epoch}, i.Slot, len(ifaces), i.FastPath})
	}

	st, err := a.status(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("device process of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	for n := range out {
		p := &out[n]
		attached, err := isAttached(st, *p)
		if err != nil {
			return nil, fmt.Errorf("pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		if attached {
			if p.ref.VLAN, err = a.portVLAN(ctx, p.ref.VF); err != nil {
				return nil, fmt.Errorf("interface %s: %w", p.iface, err)
			}
			continue
		}
		if err := a.checkGiven(ctx, pod, p, pfs[p.ref.VF].Backend); err != nil {
			return nil, fmt.Errorf("interface %s: %w", p.iface, err)
		}
		if err := a.attach(ctx, d, vfs[p.ref.VF], p, role); err != nil {
			return nil, fmt.Errorf("interface %s of pod %s/%s: %w", p.iface, pod.Namespace, pod.Name, err)
		}
		a.log.Info("VF attached", "vf", p.ref.VF, "interface", p.iface, "pod", pod.Namespace+"/"+pod.Name, "role", role, "epoch", p.ref.Epoch)
	}
	a.notePaths(ctx, d, out)
	return out, nil
}

// +kubebuilder:rbac:groups=k8s.cni.cncf.io,resources=network-attachment-definitions,verbs=get

// annotationResource of a NetworkAttachmentDefinition names the device plugin's
// resource that its pods get a device of.
const annotationResource = "k8s.v1.cni.cncf.io/resourceName"

// checkGiven asks the kubelet whether it gave the VF to the pod, of the resource
// that the interface's network is of: what the pod's annotations say comes from
// the network plugin.
func (a *agent) checkGiven(ctx context.Context, pod *corev1.Pod, p *pinned, backend string) error {
	given, err := kubelet.VFs(ctx, a.podResources)
	if errors.Is(err, kubelet.ErrUnknown) && backend != host.BackendVFIO {
		return nil
	}
	if err != nil {
		return wait(a.limits.pause*4, "whether the kubelet gave VF %s to pod %s/%s is not known: %w", p.ref.VF, pod.Namespace, pod.Name, err)
	}
	resource, err := kubelet.Check(given, pod.Namespace, pod.Name, p.ref.VF)
	if err != nil || resource == "" {
		return err
	}
	namespace, name, _ := strings.Cut(p.network, "/")
	nad := &nadv1.NetworkAttachmentDefinition{}
	err = a.live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, nad)
	switch {
	case apierrors.IsNotFound(err) || meta.IsNoMatchError(err):
		return nil // it went since the pod was given its network
	case err != nil:
		return wait(a.limits.pause*4, "NetworkAttachmentDefinition %s: %w", p.network, err)
	}
	if want := nad.Annotations[annotationResource]; want != "" && want != resource {
		return fmt.Errorf("the kubelet gave VF %s to pod %s/%s of resource %s, and network %s is of resource %s", p.ref.VF, pod.Namespace, pod.Name, resource, p.network, want)
	}
	return nil
}

// isAttached tells whether the device process has this VF at this epoch.
func isAttached(st *controlpb.StatusReply, p pinned) (bool, error) {
	for _, i := range st.GetInterfaces() {
		if i.GetName() != p.iface || i.GetVf() == "" {
			continue
		}
		if i.GetVf() != p.ref.VF || i.GetEpoch() != uint64(p.ref.Epoch) {
			return false, fmt.Errorf("interface %s: the device process has VF %s at epoch %d, but the pod's VF is %s at epoch %d; restart the pod",
				p.iface, i.GetVf(), i.GetEpoch(), p.ref.VF, p.ref.Epoch)
		}
		return true, nil
	}
	return false, nil
}

func (a *agent) attach(ctx context.Context, d *device, vf host.VF, p *pinned, role string) error {
	v, err := a.host.Prepare(ctx, host.Request{Address: p.ref.VF, MAC: p.ref.MAC, Silent: role == handoff.RoleTarget})
	if err != nil {
		return err
	}
	defer v.Close() // the device process has its own descriptors by then
	p.ref.VLAN = int32(v.VLAN)
	if v.Backend == host.BackendVFIO {
		if err := d.unlimitMemlock(ctx); err != nil {
			// What it may lock may be enough; it says so if it is not.
			a.log.Warn("the device process keeps its limit on locked memory", "pod", string(d.pod), "error", err)
		}
	}
	return d.handOver(ctx, handoff.Handoff{
		Interface: p.iface, Slot: p.slot, Of: p.of, VF: p.ref.VF, PF: p.ref.PF, Family: vf.Family, DeviceID: vf.DeviceID, Backend: v.Backend,
		MAC: p.ref.MAC, VLAN: v.VLAN, Trust: v.Trust, Epoch: uint64(p.ref.Epoch), Role: role, FastPath: p.fast,
		Model: handoff.Model{ReadOnlyRXHead: v.Model.ReadOnlyRXHead, ReadOnlyTXHead: v.Model.ReadOnlyTXHead, MulticastFilterType: v.Model.MulticastFilterType, MTU: v.Model.MTU},
		VFIO:  handoff.VFIO{API: v.API},
	}, v.Files)
}

// portVLAN returns the port VLAN that is set for a VF, 0 for none.
func (a *agent) portVLAN(ctx context.Context, vf string) (int32, error) {
	s, err := a.host.Settings(ctx, vf)
	if err != nil || s == nil {
		return 0, err
	}
	return int32(s.VLAN), nil
}

// status asks a device process where it stands.
func (a *agent) status(ctx context.Context, d *device) (*controlpb.StatusReply, error) {
	ctx, cancel := context.WithTimeout(ctx, a.limits.call)
	defer cancel()
	st, err := d.Status(ctx, &controlpb.StatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	return st, nil
}
