package main

import (
	"path/filepath"
	"strings"
	"testing"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/host"
)

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
