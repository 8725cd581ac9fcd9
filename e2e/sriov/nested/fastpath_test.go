//go:build e2enested

package nested

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/e2e/guest/proto"
)

// TestNestedFastPath: QEMU maps the pages with the doorbells into a guest, whose
// own igbvf uses the VF by them.
func TestNestedFastPath(t *testing.T) {
	r := newRig(t)
	pfs := r.makeVFs()
	before := r.settings(pfs)
	p := r.startPodWith("fast", handoff.RolePrimary, pfs[0].VFs[0].Address, 1, true)
	p.startQEMU(false)
	p.guest(bootTimeout, func(ctx context.Context, c *proto.Client) error {
		for {
			if _, err := c.WaitUp(ctx, 1); err == nil || ctx.Err() != nil {
				return err
			}
		}
	})
	if n := p.mappings(); n != 2 {
		t.Errorf("QEMU has %d mappings of the VF, want the pages with the rings", n)
	}
	ping, s := r.load()
	was := p.health()
	r.flow(s)
	r.must(ping.Await(r.ctx, 5))
	here, err := s.Stop(r.ctx)
	r.must(err)
	is := p.health()
	if n := is.resets.Count - was.resets.Count; n != 0 {
		t.Errorf("the guest's driver was reset %d times: %q", n, is.resets.Lines)
	}
	for _, name := range []string{"rx_packets", "tx_packets"} {
		if is.stats.Driver[name] <= was.stats.Driver[name] {
			t.Errorf("counter %s was %d and is %d with more traffic", name, was.stats.Driver[name], is.stats.Driver[name])
		}
	}
	if !here.Intact || here.Received == 0 {
		t.Errorf("the stream is damaged: %+v", here)
	}
	st := call(p, p.ctl.Status, &pb.StatusRequest{})
	if i := st.Interfaces[0]; !i.FastPath || i.Immovable == "" {
		t.Errorf("the device process says %v", i)
	}
	p.end()
	r.restored(pfs, before)
}

// mappings counts how often QEMU has something of the VF mapped.
func (p *pod) mappings() int {
	p.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.qemu.PID()))
	p.must(err)
	return strings.Count(string(maps), "[vfio-device]")
}
