// Package standin stands in for what a single machine cannot run of
// Kubernetes and KubeVirt: kube-scheduler, kubelet, device plugin, Multus,
// virt-controller, virt-handler and virt-launcher. It is not shipped.
//
// It is real at its edges: KubeVirt's own CRDs and API types through a real
// API server, real `compsc device` processes as sidecars, called through
// KubeVirt's hook API, and for each pod a stock libvirt that runs stock QEMU and
// migrates it, peer to peer, with the domain, the flags and the parameters that
// virt-launcher has for it. What it leaves out is everything in between (images,
// the conversion of a VMI to a domain, virt-launcher's RPC) and every feature
// that a migration with a VF does not touch.
//
// Where nodes are machines of their own (Machines), QEMU runs without libvirt: by a
// command line with little of the domain but all that the sidecar put into it, and
// by QMP commands in libvirt's order, from one node to the other without
// KubeVirt's proxies.
//
// The order of things follows the sources of KubeVirt v1.9:
//
//   - pkg/virt-controller/watch/migration/migration.go: phases of a
//     VirtualMachineInstanceMigration, the target pod (label
//     kubevirt.io/migrationJobUID), network-info when leaving Scheduling,
//     the hand-off to the target (vmi.status.migrationState), finalizer and
//     deletion;
//
//   - pkg/controller/controller.go, IsPodReady: every container but compute
//     must be ready, which lets a sidecar hold a migration in Scheduling;
//
//   - pkg/virt-handler/migration-target.go: targetNodeAddress and ports, later
//     vmi.status.nodeName, and only then completed;
//
//   - pkg/virt-handler/migration-source.go: startTimestamp, abort;
//
//   - pkg/hooks/manager.go, pkg/virt-launcher/virtwrap/live-migration-target.go and
//     live-migration-source.go: the sidecar's calls, libvirt's;
//
//   - pkg/virt-handler/migration-proxy: what leads from one pod to the other;
//
// and of Multus and the kubelet: network-status with device-info before the
// containers start, a readiness probe by gRPC health, device-plugin
// allocations that last until the pod has ended.
package standin
