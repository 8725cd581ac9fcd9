package host

// VFs that a process uses.

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/vfio"
)

// A VF that a process uses is left alone, whatever interface that has it by.
func TestSRIOVPrepareInUse(t *testing.T) {
	n := newFakeNode(t)
	p, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA})
	n.must(err)
	p.Close()
	before := n.picture(vf0, 0)
	n.used[vf0] = true
	if _, err := n.host().Prepare(t.Context(), Request{Address: vf0, Silent: true, VLAN: 7}); !errors.Is(err, vfio.ErrBusy) {
		t.Errorf("prepared while in use: %v", err)
	}
	n.useError = unix.EACCES
	if _, err := n.host().Prepare(t.Context(), Request{Address: vf0, Silent: true, VLAN: 7}); !errors.Is(err, unix.EACCES) {
		t.Errorf("prepared while perhaps in use: %v", err)
	}
	if is := n.picture(vf0, 0); is != before {
		t.Errorf("was %s\nis  %s", before, is)
	}
}

// The driver comes back once the process that used the VF is gone.
func TestSRIOVReleaseUnderAProcess(t *testing.T) {
	n := newFakeNode(t)
	before := n.picture(vf0, 0)
	p, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA})
	n.must(err)
	p.Close()
	n.used[vf0] = true
	n.must(n.host().Release(t.Context(), vf0))
	if got := n.pfs["eth0"].vfs[0].MAC; got != noMAC {
		t.Errorf("the PF still has MAC %s for it", got)
	}
	n.must(n.host().Settle(t.Context()))
	if d, _ := n.host().sys.link(n.path("bus/pci/devices/" + vf0 + "/driver")); d != vfioPCI {
		t.Errorf("bound to %q under a process that uses it", d)
	}
	if held, err := n.host().Held(t.Context()); err != nil || len(held) > 0 {
		t.Errorf("held: %v (%v)", held, err)
	}
	delete(n.used, vf0)
	// Nor when nobody can tell.
	n.useError = unix.EACCES
	if err := n.host().Settle(t.Context()); !errors.Is(err, unix.EACCES) {
		t.Errorf("settled with %v", err)
	}
	if d, _ := n.host().sys.link(n.path("bus/pci/devices/" + vf0 + "/driver")); d != vfioPCI {
		t.Errorf("bound to %q, perhaps under a process that uses it", d)
	}
	n.useError = nil
	n.must(n.host().Settle(t.Context()))
	if after := n.picture(vf0, 0); after != before {
		t.Errorf("was %s\nis  %s", before, after)
	}
}

// Where the kernel has no groups, the cdev tells whether a process uses a VF,
// and where neither is there it is not taken for unused.
func TestSRIOVInUse(t *testing.T) {
	n := newFakeNode(t)
	with, without := t.TempDir(), t.TempDir()
	cdev := filepath.Join(with, "bus/pci/devices", vf0, "vfio-dev/vfio4")
	n.must(os.MkdirAll(cdev, 0o755))
	n.must(os.WriteFile(filepath.Join(cdev, "dev"), []byte("511:4\n"), 0o644))
	for name, c := range map[string]struct {
		sysfs       string
		group, cdev error
		used        bool
		want        string
	}{
		"group, unused":        {without, nil, nil, false, ""},
		"group, used":          {without, fmt.Errorf("x: %w", vfio.ErrBusy), nil, true, ""},
		"group, not viable":    {with, errors.New("not viable"), nil, false, "not viable"},
		"cdev, unused":         {with, unix.ENOENT, nil, false, ""},
		"cdev, used":           {with, unix.ENOENT, fmt.Errorf("x: %w", vfio.ErrBusy), true, ""},
		"cdev without iommufd": {with, unix.ENOENT, unix.ENOENT, false, "cannot be told"},
		"neither":              {without, unix.ENOENT, nil, false, "no device cdev either"},
	} {
		used, err := probeUse(VF{Address: vf0, IOMMUGroup: 20}, newSysfs(c.sysfs),
			func(int, string) ([]*os.File, error) { return nil, c.group },
			func(cdev string) error {
				if cdev != "vfio4" {
					t.Errorf("%s: cdev %q", name, cdev)
				}
				return c.cdev
			})
		if used != c.used || (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: used %v (%v), want %v with %q", name, used, err, c.used, c.want)
		}
	}
}
