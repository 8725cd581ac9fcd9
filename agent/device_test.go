package agent

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/kubevirt"
)

func TestDeviceConnections(t *testing.T) {
	dir := t.TempDir()
	_, stop := startDevice(t, dir, "pod")
	ds := newDevices(dir)
	one, err := ds.get("pod")
	if err != nil {
		t.Fatal(err)
	}
	two, err := ds.get("pod")
	if err != nil {
		t.Fatal(err)
	}
	one.Close()
	one.Close()
	if _, err := two.Status(t.Context(), &pb.StatusRequest{}); err != nil {
		t.Errorf("closing one share closed the other: %v", err)
	}
	if gone, err := two.gone(t.Context()); gone || err != nil {
		t.Errorf("gone: %v, %v", gone, err)
	}
	stop()
	if gone, err := two.gone(t.Context()); !gone || err != nil {
		t.Errorf("after its end, gone: %v, %v", gone, err)
	}
	two.Close()
	if len(ds.conns) != 0 {
		t.Error("a closed connection is kept")
	}
	never, err := ds.get("never")
	if err != nil {
		t.Fatal(err)
	}
	defer never.Close()
	if gone, err := never.gone(t.Context()); !gone || err != nil {
		t.Errorf("never begun, gone: %v, %v", gone, err)
	}
	if _, err := ds.get(""); err == nil {
		t.Error("got the device process of no pod")
	}
}

// TestLinksAreNotFollowed: a pod cannot lead the agent to another socket.
func TestLinksAreNotFollowed(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), controlSocket)
	l, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, plant := range map[string]func(dir string) error{
		"socket": func(dir string) error {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			return os.Symlink(elsewhere, filepath.Join(dir, controlSocket))
		},
		"directory": func(dir string) error {
			if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
				return err
			}
			return os.Symlink(filepath.Dir(elsewhere), dir)
		},
		"sidecar's directory": func(dir string) error {
			volume := filepath.Dir(filepath.Dir(dir))
			if err := os.MkdirAll(volume, 0o755); err != nil {
				return err
			}
			to := filepath.Join(filepath.Dir(elsewhere), filepath.Base(dir))
			if err := os.Mkdir(to, 0o755); err != nil {
				return err
			}
			if err := os.Link(elsewhere, filepath.Join(to, controlSocket)); err != nil {
				return err
			}
			return os.Symlink(filepath.Dir(elsewhere), filepath.Dir(dir))
		},
		"file": func(dir string) error {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, controlSocket), nil, 0o644)
		},
	} {
		t.Run(name, func(t *testing.T) {
			pods := t.TempDir()
			if err := plant(kubevirt.DeviceDir(pods, "pod", 0)); err != nil {
				t.Fatal(err)
			}
			c, err := dialSocket(t.Context(), pods, "pod", controlSocket)
			if err == nil {
				c.Close()
				t.Fatal("connected")
			}
			if !strings.Contains(err.Error(), pods) {
				t.Errorf("error %v does not name the path", err)
			}
		})
	}
}
