// Package kubelet stands in for the one thing that agents ask a node's kubelet:
// its pod resources API.
package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"

	"compsc.io/compsc/agent/kubelet"
)

// File holds the node's pods with devices, a list of Pod, as JSON. It may be
// replaced at any time.
const File = "/run/pods-with-devices.json"

// Pod is one with devices.
type Pod struct {
	// Namespace and Name are its, and Container the name of that with the devices.
	Namespace, Name, Container string
	// Resource is the device plugin's, Devices are PCI addresses.
	Resource string
	Devices  []string
}

// Start serves what File says where a kubelet does, until ctx ends.
func Start(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Dir(kubelet.Socket), 0o755); err != nil {
		return err
	}
	l, err := net.Listen("unix", kubelet.Socket)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	podresources.RegisterPodResourcesListerServer(s, &lister{file: File})
	context.AfterFunc(ctx, s.Stop)
	go func() { _ = s.Serve(l) }() // whoever asks notices its end
	return nil
}

type lister struct {
	podresources.UnimplementedPodResourcesListerServer
	file string
}

// List implements the API.
func (l *lister) List(context.Context, *podresources.ListPodResourcesRequest) (*podresources.ListPodResourcesResponse, error) {
	content, err := os.ReadFile(l.file)
	if errors.Is(err, fs.ErrNotExist) {
		return &podresources.ListPodResourcesResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	var pods []Pod
	if err := json.Unmarshal(content, &pods); err != nil {
		return nil, err
	}
	r := &podresources.ListPodResourcesResponse{}
	for _, p := range pods {
		r.PodResources = append(r.PodResources, &podresources.PodResources{
			Namespace: p.Namespace, Name: p.Name, Containers: []*podresources.ContainerResources{{
				Name: p.Container, Devices: []*podresources.ContainerDevices{{ResourceName: p.Resource, DeviceIds: p.Devices}},
			}},
		})
	}
	return r, nil
}
