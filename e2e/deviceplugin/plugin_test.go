package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const resource = "intel.com/intel_82599_vf"

// kubelet takes registrations.
type kubelet struct {
	api.UnimplementedRegistrationServer
	registered chan *api.RegisterRequest
}

func (k *kubelet) Register(_ context.Context, r *api.RegisterRequest) (*api.Empty, error) {
	k.registered <- r
	return &api.Empty{}, nil
}

// TestPlugin: as the kubelet sees it.
func TestPlugin(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "kubelet.sock"))
	if err != nil {
		t.Fatal(err)
	}
	k := &kubelet{registered: make(chan *api.RegisterRequest, 1)}
	s := grpc.NewServer()
	api.RegisterRegistrationServer(s, k)
	go func() { _ = s.Serve(l) }()
	defer s.Stop()

	told := map[string]string{}
	vfs := []string{"0000:03:10.0", "0000:03:10.2"}
	ended := make(chan error, 1)
	go func() {
		ended <- serve(ctx, options{resource: resource, vfs: vfs, dir: dir, tell: func(resource, vf string) error {
			if len(told) == 2 {
				return errors.New("disk full")
			}
			told[vf] = resource
			return nil
		}})
	}()
	var r *api.RegisterRequest
	select {
	case r = <-k.registered:
	case err := <-ended:
		t.Fatal(err)
	}
	if r.Version != "v1beta1" || r.ResourceName != resource {
		t.Errorf("registered %v", r)
	}
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, r.Endpoint), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := api.NewDevicePluginClient(conn)
	watch, err := c.ListAndWatch(ctx, &api.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := watch.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range list.Devices {
		if d.Health != "Healthy" {
			t.Errorf("device %v", d)
		}
		got = append(got, d.ID)
	}
	if diff := cmp.Diff(vfs, got); diff != "" {
		t.Error(diff)
	}

	allocate := func(ids ...string) (map[string]string, error) {
		r, err := c.Allocate(ctx, &api.AllocateRequest{ContainerRequests: []*api.ContainerAllocateRequest{{DevicesIds: ids}}})
		if err != nil {
			return nil, err
		}
		return r.ContainerResponses[0].Envs, nil
	}
	if _, err := allocate("0000:03:10.4"); status.Code(err) != codes.NotFound || len(told) != 0 {
		t.Errorf("a VF that there is not: %v; told of %v", err, told)
	}
	env, err := allocate(vfs...)
	if err != nil || env["PCIDEVICE_INTEL_COM_INTEL_82599_VF"] != "0000:03:10.0,0000:03:10.2" {
		t.Errorf("variables %v: %v", env, err)
	}
	if diff := cmp.Diff(map[string]string{vfs[0]: resource, vfs[1]: resource}, told); diff != "" {
		t.Error(diff)
	}
	if _, err := allocate(vfs[0]); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("a VF whose device information cannot be written: %v", err)
	}

	// A kubelet that starts removes all sockets.
	if err := os.Remove(filepath.Join(dir, r.Endpoint)); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "kubelet started anew") {
		t.Errorf("it ended with %v", err)
	}
}

func TestCNI(t *testing.T) {
	args := &skel.CmdArgs{
		IfName: "pod115dc3606fb", Netns: "/run/netns/x",
		StdinData: []byte(`{"cniVersion":"1.0.0","name":"fast","type":"sriov","deviceID":"0000:03:10.0"}`),
	}
	r, version, err := result(args)
	if err != nil || version != "1.0.0" {
		t.Fatalf("version %s: %v", version, err)
	}
	if r, err = r.GetAsVersion(version); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"cniVersion":"1.0.0","interfaces":[{"name":"pod115dc3606fb","sandbox":"/run/netns/x"}]}`
	if string(b) != want {
		t.Errorf("%s, want %s", b, want)
	}
	args.StdinData = []byte(`{"cniVersion":"1.0.0","name":"fast","type":"sriov"}`)
	if _, _, err := result(args); err == nil || !strings.Contains(err.Error(), "deviceID") {
		t.Errorf("without a VF: %v", err)
	}
}
