// Package kubevirt holds what the node agent and the manager must know of
// KubeVirt's conventions: the labels and annotations of virt-launcher pods,
// where a pod's VFs are told, and where its hook sockets are on the node.
// It talks to nobody.
package kubevirt

import (
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	virtv1 "kubevirt.io/api/core/v1"
)

// Conventions of KubeVirt and Multus.
const (
	// BindingName is the network binding plugin that a VMI's interface names
	// to get a VF that moves with the VM.
	BindingName = "compsc"

	// LabelApp is carried by every pod of KubeVirt, AppLauncher is its value
	// on the pods that run VMs.
	LabelApp    = virtv1.AppLabel
	AppLauncher = "virt-launcher"
	// LabelCreatedBy holds the VMI's UID on a virt-launcher pod.
	LabelCreatedBy = virtv1.CreatedByLabel
	// LabelMigrationJobUID holds the VirtualMachineInstanceMigration's UID on
	// a virt-launcher pod that was made to receive a VM. It stays after the
	// migration.
	LabelMigrationJobUID = virtv1.MigrationJobLabel
	// LabelVMIName holds the VMI's name on a virt-launcher pod.
	LabelVMIName = "vm.kubevirt.io/name"
	// AnnotationVMIName holds it too, and is not cut to a label's length.
	AnnotationVMIName = virtv1.DomainAnnotation
	// LabelHostname is the label that a node selector names a node by.
	LabelHostname = corev1.LabelHostname

	// AnnotationNetworkStatus is where Multus tells a pod's networks and the
	// devices behind them.
	AnnotationNetworkStatus = "k8s.v1.cni.cncf.io/network-status"
	// AnnotationNetworkInfo is virt-controller's digest of it, keyed by the
	// VMI's network; a target pod has it only after it became ready.
	AnnotationNetworkInfo = "kubevirt.io/network-info"
)

// What CompSC writes on objects of KubeVirt's.
const (
	// LabelVFMigrationUID is set on the VirtualMachineInstanceMigration that
	// serves a VFMigration and holds that VFMigration's UID.
	LabelVFMigrationUID = "compsc.io/vfmigration-uid"
	// AnnotationVFMigration is set on a VirtualMachineInstanceMigration that
	// was adopted and holds its VFMigration's name.
	AnnotationVFMigration = "compsc.io/vfmigration"
	// AnnotationFailure is set on a VirtualMachineInstanceMigration that was
	// adopted and is refused or undone: the reason, a colon, and what was wrong.
	AnnotationFailure = "compsc.io/failure"
	// LabelVF marks, with the value "true", a VMI that has an interface with
	// the compsc network binding; policies select by it.
	LabelVF = "compsc.io/vf"
	// AnnotationMigrationBlocked is set on such a VMI while it cannot be moved:
	// the reason, a colon, and what to do about it.
	AnnotationMigrationBlocked = "compsc.io/migration-blocked"
)

// LabelMigrationUID is set on a VFMigration that was made for somebody else's
// VirtualMachineInstanceMigration and holds that one's UID.
const LabelMigrationUID = "compsc.io/migration-uid"

// Where the files of a hook sidecar are, KubeVirt 1.8 and 1.9
// (pkg/virt-controller/services/template.go, pkg/hooks). An emptyDir volume of
// the pod has one directory for each sidecar, named like its container. A
// sidecar sees its own at HooksDir; the compute container, and so QEMU, sees the
// volume there.
const (
	// HooksDir is the mount point.
	HooksDir = "/var/run/kubevirt-hooks"
	// PluginDir is where virt-launcher 1.9 looks for what a Plugin object of
	// CompSC's name calls, and where the policy of config/kubevirt/plugin mounts
	// the same directory into the sidecar. Without Plugins it is not there.
	PluginDir = "/var/run/kubevirt-plugin/compsc"
	// PluginSocket is the name of the domain hook's socket there.
	PluginSocket = "domain.sock"
	// EnvContainerName tells a sidecar its container's name. Nothing else is
	// told to a network binding's sidecar: it gets no command and no arguments.
	EnvContainerName = "CONTAINER_NAME"
	// MaxSidecars is how many sidecars of a pod are looked at.
	MaxSidecars = 16

	hookSockets   = "volumes/kubernetes.io~empty-dir/hook-sidecar-sockets"
	sidecarPrefix = "hook-sidecar-"
	// deviceDir is the directory of the device process's sockets below the
	// sidecar's own. virt-launcher takes everything that lies directly in the
	// latter for a hook socket, and gives up if it does not answer as one.
	deviceDir = "compsc"
)

// SidecarName returns the name of the n-th hook sidecar's container, from 0.
func SidecarName(n int) string { return sidecarPrefix + strconv.Itoa(n) }

// IsSidecarName tells whether a container of that name is a hook sidecar.
func IsSidecarName(name string) bool {
	n, err := strconv.Atoi(strings.TrimPrefix(name, sidecarPrefix))
	return err == nil && n >= 0 && n < MaxSidecars && SidecarName(n) == name
}

// DeviceDir returns the directory of the device process in the n-th sidecar of
// the pod with this UID, below the kubelet's directory of pods, usually
// /var/lib/kubelet/pods.
func DeviceDir(podsDir string, podUID types.UID, n int) string {
	return filepath.Join(podsDir, string(podUID), hookSockets, SidecarName(n), deviceDir)
}

// SidecarDeviceDir is the directory of the device process as its own container
// sees it.
func SidecarDeviceDir() string { return filepath.Join(HooksDir, deviceDir) }

// ComputeDeviceDir is that directory as the compute container sees it, for the
// sidecar of that name.
func ComputeDeviceDir(sidecar string) string { return filepath.Join(HooksDir, sidecar, deviceDir) }

// IsLauncher tells whether pod runs a VM, or is about to.
func IsLauncher(pod *corev1.Pod) bool { return pod.Labels[LabelApp] == AppLauncher }

// IsTarget tells whether pod was made to receive a VM. It stays true once the
// VM runs there.
func IsTarget(pod *corev1.Pod) bool { return pod.Labels[LabelMigrationJobUID] != "" }

// MigrationUID returns the UID of the VirtualMachineInstanceMigration that
// pod was made for, empty if none.
func MigrationUID(pod *corev1.Pod) types.UID {
	return types.UID(pod.Labels[LabelMigrationJobUID])
}

// VMIUID returns the UID of the VMI that pod was made for, empty if none.
func VMIUID(pod *corev1.Pod) types.UID { return types.UID(pod.Labels[LabelCreatedBy]) }

// VMIName returns the name of the VMI that pod was made for, empty if pod
// does not tell.
func VMIName(pod *corev1.Pod) string {
	if o := metav1.GetControllerOf(pod); o != nil && o.Kind == "VirtualMachineInstance" {
		return o.Name
	}
	if n := pod.Annotations[AnnotationVMIName]; n != "" {
		return n
	}
	return pod.Labels[LabelVMIName]
}

// Finished tells whether all containers of pod have ended for good.
func Finished(pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
}

// BoundInterfaces returns the names of the VMI's interfaces that use the
// compsc network binding, in the VMI's order.
func BoundInterfaces(vmi *virtv1.VirtualMachineInstance) []string {
	var names []string
	for i := range vmi.Spec.Domain.Devices.Interfaces {
		if bound(&vmi.Spec.Domain.Devices.Interfaces[i]) {
			names = append(names, vmi.Spec.Domain.Devices.Interfaces[i].Name)
		}
	}
	return names
}

func bound(i *virtv1.Interface) bool { return ours(i) && i.State != virtv1.InterfaceStateAbsent }

func ours(i *virtv1.Interface) bool { return i.Binding != nil && i.Binding.Name == BindingName }
