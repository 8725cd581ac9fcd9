package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/hook"
	"compsc.io/compsc/agent/kubevirt/hook/callbackspb"
)

// TestEntryPoint: KubeVirt gives a sidecar no arguments, and others get help.
func TestEntryPoint(t *testing.T) {
	for name, want := range map[string]bool{"hook-sidecar-0": true, "compute": false, "": false} {
		t.Setenv(kubevirt.EnvContainerName, name)
		if got := rootCommand().RunE != nil; got != want {
			t.Errorf("in container %q the program without arguments is a sidecar: %v", name, got)
		}
	}
}

// TestDevice: the sidecar's sockets are there, and it ends well when
// virt-launcher says so, so that the pod does too.
func TestDevice(t *testing.T) {
	dir := t.TempDir()
	root := rootCommand()
	root.SetArgs([]string{"device", "--sidecar", "hook-sidecar-0", "--hooks-dir", dir, "--log-level", "error"})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- root.ExecuteContext(ctx) }()
	cc, err := grpc.NewClient("unix:"+filepath.Join(dir, hook.Socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	if _, err := callbackspb.NewCallbacksClient(cc).Shutdown(ctx, &callbackspb.ShutdownParams{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || ctx.Err() != nil {
		t.Errorf("it ended with %v (%v)", err, ctx.Err())
	}
	if _, err := os.Stat(filepath.Join(dir, filepath.Base(kubevirt.SidecarDeviceDir()))); err != nil {
		t.Error(err)
	}
}

func TestNewHost(t *testing.T) {
	real := host.SRIOVOptions{Journal: filepath.Join(t.TempDir(), "journal"), Families: device.Families()}
	if real.Families["8086:10ed"] != "ixgbevf" || real.Families["8086:10ca"] != "igbvf" {
		t.Errorf("families %v", real.Families)
	}
	models := []string{"name=pf0,vfs=2,bridge=br0"}
	for _, backend := range []string{"", host.BackendModel} {
		if h, err := newHost(backend, models, real); err != nil {
			t.Error(err)
		} else if _, ok := h.(*host.Model); !ok {
			t.Errorf("backend %q with a model: %T", backend, h)
		}
	}
	for _, backend := range []string{"", host.BackendVFIO} {
		if h, err := newHost(backend, nil, real); err != nil {
			t.Error(err)
		} else if _, ok := h.(*host.SRIOV); !ok {
			t.Errorf("backend %q: %T", backend, h)
		}
	}
	for want, call := range map[string]func() error{
		"is neither vfio nor model": func() error { _, err := newHost("dpdk", nil, real); return err },
		"has no models":             func() error { _, err := newHost(host.BackendVFIO, models, real); return err },
		"model PF":                  func() error { _, err := newHost("", []string{"x"}, real); return err },
		"journal":                   func() error { _, err := newHost("", nil, host.SRIOVOptions{}); return err },
	} {
		if err := call(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q in it", err, want)
		}
	}
}
