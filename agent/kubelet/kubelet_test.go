package kubelet

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"
)

type fakeKubelet struct {
	podresources.UnimplementedPodResourcesListerServer
	pods []*podresources.PodResources
}

func (k *fakeKubelet) List(context.Context, *podresources.ListPodResourcesRequest) (*podresources.ListPodResourcesResponse, error) {
	return &podresources.ListPodResourcesResponse{PodResources: k.pods}, nil
}

func pod(namespace, name, resource string, ids ...string) *podresources.PodResources {
	return &podresources.PodResources{Namespace: namespace, Name: name, Containers: []*podresources.ContainerResources{
		{Name: "other"}, {Name: "compute", Devices: []*podresources.ContainerDevices{{ResourceName: resource, DeviceIds: ids}}}}}
}

func TestVFs(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "k.sock")
	if _, err := VFs(t.Context(), socket); !errors.Is(err, ErrUnknown) {
		t.Errorf("without a kubelet: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	podresources.RegisterPodResourcesListerServer(s, &fakeKubelet{pods: []*podresources.PodResources{
		pod("vms", "a", "intel.com/sriov", "0000:01:10.0", "0000:01:10.2"), pod("vms", "b", "intel.com/other", "0000:02:1F.7"),
		pod("vms", "c", "devices.kubevirt.io/kvm", "kvm7"), {Namespace: "x", Name: "none"},
	}})
	go s.Serve(l)
	t.Cleanup(s.Stop)
	got, err := VFs(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Device{
		"0000:01:10.0": {"intel.com/sriov", "vms", "a"}, "0000:01:10.2": {"intel.com/sriov", "vms", "a"},
		"0000:02:1f.7": {"intel.com/other", "vms", "b"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("devices (-want +got):\n%s", d)
	}
	for _, c := range []struct{ pod, vf, resource, want string }{
		{"a", "0000:01:10.0", "intel.com/sriov", ""},
		{"a", "0000:01:10.4", "", "did not give VF 0000:01:10.4 to pod vms/a, but 0000:01:10.0 of intel.com/sriov, 0000:01:10.2 of intel.com/sriov"},
		{"a", "0000:02:1f.7", "", "gave VF 0000:02:1f.7, of resource intel.com/other, to pod vms/b, not to vms/a"},
		{"c", "0000:01:10.0", "", "to pod vms/a, not to vms/c"},
		{"c", "0000:01:10.4", "", ""}, // its plugin tells no PCI addresses
	} {
		resource, err := Check(got, "vms", c.pod, c.vf)
		if resource != c.resource || (c.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("pod %s, VF %s: %q, %v; want %q, %q", c.pod, c.vf, resource, err, c.resource, c.want)
		}
	}
	s.Stop()
	if _, err := VFs(t.Context(), socket); err == nil {
		t.Error("a kubelet that is away answered")
	}
}
