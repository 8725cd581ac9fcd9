package kubevirt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/e2e/guest/proto"
)

// syncTimeout is for virt-handler to look at a VMI again.
const syncTimeout = 30 * time.Second

// KubeVirt's own names (pkg/network/vmispec and pkg/virt-handler).
const (
	infoDomain, infoMultus = "domain", "multus-status"
	eventSyncFailed        = "SyncFailed"
)

// CheckContent fails unless KubeVirt is content with the virtual machine: it
// knows the interfaces by their addresses, in the domain and in the pod, and has
// nothing to do that fails; and unless the guest sees its VFs, and nothing that
// is there for KubeVirt alone.
func (s *Stack) CheckContent(ctx context.Context, name string, macs []string) error {
	within, cancel := context.WithTimeoutCause(ctx, syncTimeout, errors.New("it took too long"))
	defer cancel()
	v := &kubevirtv1.VirtualMachineInstance{}
	err := s.Kube.Until(within, "KubeVirt to be content with VMI "+name, func(ctx context.Context) (bool, error) {
		err := s.Client().Get(ctx, client.ObjectKey{Namespace: Namespace, Name: name}, v)
		known := 0
		for n, mac := range macs {
			if slices.ContainsFunc(v.Status.Interfaces, func(i kubevirtv1.VirtualMachineInstanceNetworkInterface) bool {
				return i.Name == interfaceName(n) && i.MAC == mac && strings.Contains(i.InfoSource, infoDomain) && strings.Contains(i.InfoSource, infoMultus)
			}) {
				known++
			}
		}
		return known == len(macs) && !slices.ContainsFunc(v.Status.Conditions, func(c kubevirtv1.VirtualMachineInstanceCondition) bool {
			return c.Type == kubevirtv1.VirtualMachineInstanceSynchronized && c.Status != corev1.ConditionTrue
		}), err
	})
	if err != nil {
		return fmt.Errorf("%w; its conditions are %+v, its interfaces %+v", err, v.Status.Conditions, v.Status.Interfaces)
	}
	failed, err := s.syncFailures(ctx, v)
	if err != nil {
		return err
	}
	if len(failed) != 0 {
		return fmt.Errorf("VMI %s: KubeVirt failed to synchronize it: %q", name, failed)
	}
	return s.Guest(ctx, name, func(ctx context.Context, c *proto.Client) error {
		i, err := c.Info(ctx)
		if err != nil {
			return err
		}
		for n := range macs {
			if a := fmt.Sprintf("0000:00:%02x.0", kubevirt.FirstSlot+n); !slices.Contains(i.PCI, a) {
				return fmt.Errorf("the guest of VMI %s has no device %s: %q", name, a, i.PCI)
			}
		}
		for _, a := range i.PCI {
			if strings.HasPrefix(a, "0000:00:18.") || strings.HasPrefix(a, "0000:00:19.") {
				return fmt.Errorf("the guest of VMI %s sees device %s", name, a)
			}
		}
		return nil
	})
}

// launcherGone is what virt-handler says when a virt-launcher has just ended, as
// the source's does in every migration, whether of a VM with VFs or without.
var launcherGone = []string{"the client connection is closing", "No command socket found"}

// syncFailures are what KubeVirt told of attempts to bring the virtual machine to
// what its object says, but for those.
func (s *Stack) syncFailures(ctx context.Context, v *kubevirtv1.VirtualMachineInstance) ([]string, error) {
	events := &corev1.EventList{}
	if err := s.Client().List(ctx, events, client.InNamespace(v.Namespace)); err != nil {
		return nil, err
	}
	var failed []string
	for _, e := range events.Items {
		if e.InvolvedObject.UID == v.UID && e.Reason == eventSyncFailed &&
			!slices.ContainsFunc(launcherGone, func(text string) bool { return strings.Contains(e.Message, text) }) {
			failed = append(failed, fmt.Sprintf("%d times: %s", e.Count, e.Message))
		}
	}
	return failed, nil
}
