package agent

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	"google.golang.org/grpc"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/host"
)

type fakeKubelet struct {
	podresources.UnimplementedPodResourcesListerServer
	pod, vf string
}

func (k *fakeKubelet) List(context.Context, *podresources.ListPodResourcesRequest) (*podresources.ListPodResourcesResponse, error) {
	return &podresources.ListPodResourcesResponse{PodResources: []*podresources.PodResources{{Namespace: ns, Name: k.pod,
		Containers: []*podresources.ContainerResources{{Devices: []*podresources.ContainerDevices{{ResourceName: "intel.com/sriov", DeviceIds: []string{k.vf}}}}}}}}, nil
}

// serveKubelet serves the kubelet's answer that this pod has this VF.
func serveKubelet(t *testing.T, socket, pod, vf string) {
	t.Helper()
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	podresources.RegisterPodResourcesListerServer(s, &fakeKubelet{pod: pod, vf: vf})
	go s.Serve(listener)
	t.Cleanup(s.Stop)
}

// A pod gets the VF that the kubelet gave it, and no other that its
// annotations may name.
func TestKubeletDecides(t *testing.T) {
	for name, c := range map[string]struct{ pod, vf, backend, resource, want string }{
		"the VF":                 {"launcher-given", vfA, host.BackendVFIO, "intel.com/sriov", ""},
		"another VF":             {"launcher-given", vfB, host.BackendVFIO, "", "did not give VF " + vfA},
		"another pod's":          {"launcher-x", vfA, host.BackendVFIO, "", "to pod " + ns + "/launcher-x"},
		"unknown here":           {"launcher-x", vfB, host.BackendVFIO, "", ""},
		"another resource":       {"launcher-given", vfA, host.BackendVFIO, "intel.com/other", "of resource intel.com/sriov, and network " + ns + "/fast is of resource intel.com/other"},
		"no resource":            {"launcher-given", vfA, host.BackendVFIO, "", ""},
		"no kubelet, of a NIC":   {"", vfA, host.BackendVFIO, "", "is not known"},
		"no kubelet, of a model": {"", vfA, host.BackendModel, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.vmi(nil)
			n := l.nodes["a"]
			n.start()
			n.kill() // what it does is done by hand here
			a := n.agent
			a.devices, a.client = newDevices(n.podsDir), l.client
			a.podResources = filepath.Join(t.TempDir(), "k.sock")
			if c.pod != "" {
				serveKubelet(t, a.podResources, c.pod, c.vf)
			}
			n.host.backend = c.backend
			nad := &nadv1.NetworkAttachmentDefinition{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "fast"}}
			if c.resource != "" {
				nad.Annotations = map[string]string{annotationResource: c.resource}
			}
			if err := l.client.Create(t.Context(), nad); err != nil {
				t.Fatal(err)
			}

			p := l.pod("launcher-given", "a", vfA, "")
			d, _ := startDevice(t, n.podsDir, p.UID)
			_, err := a.pin(t.Context(), p, handoff.RolePrimary)
			if c.want == "" && (err != nil || !d.is(pb.Phase_PHASE_RUNNING)) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || n.host.has(vfA)) {
				t.Errorf("%v, want %q; VF prepared: %v", err, c.want, n.host.has(vfA))
			}
		})
	}
}
