package agent

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	pb "compsc.io/compsc/agent/device/controlpb"
)

type fakeKubelet struct {
	podresources.UnimplementedPodResourcesListerServer
	pod, vf string
}

func (k *fakeKubelet) List(context.Context, *podresources.ListPodResourcesRequest) (*podresources.ListPodResourcesResponse, error) {
	return &podresources.ListPodResourcesResponse{PodResources: []*podresources.PodResources{{Namespace: ns, Name: k.pod,
		Containers: []*podresources.ContainerResources{{Devices: []*podresources.ContainerDevices{{ResourceName: "intel.com/sriov", DeviceIds: []string{k.vf}}}}}}}}, nil
}

// A pod gets the VF that the kubelet gave it, and no other that its
// annotations may name.
func TestKubeletDecides(t *testing.T) {
	for name, c := range map[string]struct{ pod, vf, want string }{
		"the VF":        {"launcher-given", vfA, ""},
		"another VF":    {"launcher-given", vfB, "did not give VF " + vfA},
		"another pod's": {"launcher-x", vfA, "to pod " + ns + "/launcher-x"},
		"unknown here":  {"launcher-x", vfB, ""},
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
			listener, err := net.Listen("unix", a.podResources)
			if err != nil {
				t.Fatal(err)
			}
			s := grpc.NewServer()
			podresources.RegisterPodResourcesListerServer(s, &fakeKubelet{pod: c.pod, vf: c.vf})
			go s.Serve(listener)
			t.Cleanup(s.Stop)

			p := l.pod("launcher-given", "a", vfA, "")
			d, _ := startDevice(t, n.podsDir, p.UID)
			_, err = a.reconcilePod(t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(p)})
			if c.want == "" && (err != nil || !d.is(pb.Phase_PHASE_RUNNING)) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || n.host.has(vfA)) {
				t.Errorf("%v, want %q; VF prepared: %v", err, c.want, n.host.has(vfA))
			}
		})
	}
}
