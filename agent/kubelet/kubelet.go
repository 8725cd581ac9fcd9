// Package kubelet asks the node's kubelet which devices it gave to a pod.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	podresources "k8s.io/kubelet/pkg/apis/podresources/v1"
)

// Socket is where a kubelet serves its pod resources API.
const Socket = "/var/lib/kubelet/pod-resources/kubelet.sock"

const (
	// callTimeout bounds a question.
	callTimeout = 5 * time.Second
	// maxAnswer bounds an answer: a node has some hundred pods.
	maxAnswer = 16 << 20
)

// ErrUnknown is what VFs wraps when there is no kubelet to ask.
var ErrUnknown = errors.New("no kubelet serves the pod resources API here")

var pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// VFs returns the devices of the node that some pod has, by PCI address. Device
// plugins that name their devices otherwise have none here.
func VFs(ctx context.Context, socket string) (map[string]Device, error) {
	if _, err := os.Stat(socket); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrUnknown, err)
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithDisableServiceConfig(), grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, fmt.Errorf("kubelet at %s: %w", socket, err)
	}
	defer conn.Close()
	list, err := podresources.NewPodResourcesListerClient(conn).List(ctx, &podresources.ListPodResourcesRequest{})
	if err != nil {
		return nil, fmt.Errorf("pod resources of the kubelet at %s: %w", socket, err)
	}
	out := map[string]Device{}
	for _, p := range list.GetPodResources() {
		for _, c := range p.GetContainers() {
			for _, d := range c.GetDevices() {
				for _, id := range d.GetDeviceIds() {
					if id = strings.ToLower(id); pciAddress.MatchString(id) {
						out[id] = Device{Resource: d.GetResourceName(), Namespace: p.GetNamespace(), Pod: p.GetName()}
					}
				}
			}
		}
	}
	return out, nil
}

// Device is one device that the kubelet gave away.
type Device struct {
	// Resource is the device plugin's, such as intel.com/sriov.
	Resource string
	// Namespace and Pod name whose it is.
	Namespace, Pod string
}

// Check refuses a VF that the kubelet gave to another pod, or to none while it
// gave this one others. It returns the VF's resource, which is empty where the
// device plugin does not name its devices by PCI address.
func Check(devices map[string]Device, namespace, pod, vf string) (resource string, err error) {
	if d, ok := devices[vf]; ok {
		if d.Namespace != namespace || d.Pod != pod {
			return "", fmt.Errorf("the kubelet gave VF %s, of resource %s, to pod %s/%s, not to %s/%s", vf, d.Resource, d.Namespace, d.Pod, namespace, pod)
		}
		return d.Resource, nil
	}
	var own []string
	for address, d := range devices {
		if d.Namespace == namespace && d.Pod == pod {
			own = append(own, address+" of "+d.Resource)
		}
	}
	if len(own) == 0 {
		return "", nil
	}
	slices.Sort(own)
	return "", fmt.Errorf("the kubelet did not give VF %s to pod %s/%s, but %s", vf, namespace, pod, strings.Join(own, ", "))
}
