package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	nadutils "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/utils"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const (
	registerTimeout = 10 * time.Second
	// watchPeriod is how often the socket is looked for: a kubelet that starts
	// removes it, and expects a new registration.
	watchPeriod = time.Second
)

type options struct {
	resource string
	vfs      []string
	dir      string
	// tell writes the device information of a VF that is given away.
	tell func(resource, vf string) error
}

// writeInfo writes a VF's device information file.
func writeInfo(resource, vf string) error {
	// What is left from the last pod with this VF must not be believed.
	if err := nadutils.CleanDeviceInfoForDP(resource, vf); err != nil {
		return err
	}
	return nadutils.SaveDeviceInfoForDP(resource, vf, &nadv1.DeviceInfo{
		Type: nadv1.DeviceInfoTypePCI, Version: nadv1.DeviceInfoVersion, Pci: &nadv1.PciDevice{PciAddress: vf},
	})
}

// plugin is the kubelet's device plugin API. It is safe for concurrent use.
type plugin struct {
	api.UnimplementedDevicePluginServer
	o    options
	done <-chan struct{}
}

// serve announces the VFs until ctx ends or the kubelet starts anew, which is
// an error: whoever runs this runs it again.
func serve(ctx context.Context, o options) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	name := "compsc-e2e-" + strings.NewReplacer("/", "-", ".", "-").Replace(o.resource) + ".sock"
	path := filepath.Join(o.dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	api.RegisterDevicePluginServer(s, &plugin{o: o, done: ctx.Done()})
	failed := make(chan error, 1)
	go func() { failed <- s.Serve(l) }()
	defer s.Stop()
	if err := register(ctx, o, name); err != nil {
		return fmt.Errorf("registering with the kubelet: %w", err)
	}
	t := time.NewTicker(watchPeriod)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-t.C:
			if _, err := os.Stat(path); err != nil {
				return fmt.Errorf("the kubelet started anew: %w", err)
			}
		}
	}
}

func register(ctx context.Context, o options, endpoint string) error {
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix:"+filepath.Join(o.dir, filepath.Base(api.KubeletSocket)), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = api.NewRegistrationClient(conn).Register(ctx, &api.RegisterRequest{
		Version: api.Version, Endpoint: endpoint, ResourceName: o.resource, Options: &api.DevicePluginOptions{},
	}, grpc.WaitForReady(true))
	return err
}

// GetDevicePluginOptions asks for no further calls.
func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

// ListAndWatch tells the VFs once: they never fail.
func (p *plugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	r := &api.ListAndWatchResponse{}
	for _, vf := range p.o.vfs {
		r.Devices = append(r.Devices, &api.Device{ID: vf, Health: api.Healthy})
	}
	if err := stream.Send(r); err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-stream.Context().Done():
	}
	return nil
}

var notInNames = regexp.MustCompile(`[^A-Z0-9_]`)

// variable is the name of the environment variable that tells a container's
// VFs of a resource.
func variable(resource string) string {
	return "PCIDEVICE_" + notInNames.ReplaceAllString(strings.ToUpper(resource), "_")
}

// Allocate gives VFs to containers.
func (p *plugin) Allocate(_ context.Context, r *api.AllocateRequest) (*api.AllocateResponse, error) {
	out := &api.AllocateResponse{}
	for _, c := range r.ContainerRequests {
		for _, vf := range c.DevicesIds {
			if !slices.Contains(p.o.vfs, vf) {
				return nil, status.Errorf(codes.NotFound, "there is no VF %q", vf)
			}
			if err := p.o.tell(p.o.resource, vf); err != nil {
				return nil, status.Errorf(codes.Internal, "VF %s: device information: %v", vf, err)
			}
		}
		out.ContainerResponses = append(out.ContainerResponses, &api.ContainerAllocateResponse{
			Envs: map[string]string{variable(p.o.resource): strings.Join(c.DevicesIds, ",")},
		})
	}
	return out, nil
}
