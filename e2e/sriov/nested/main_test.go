//go:build e2enested

package nested

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/node"
)

const (
	// family and deviceID are those of 82576 VFs.
	family, deviceID = "igbvf", "8086:10ca"
	// testTimeout bounds the whole test, bootTimeout the start of a guest and
	// guestTimeout an answer of one, whose processor KVM has on an emulated one.
	testTimeout, bootTimeout, guestTimeout = 8 * time.Minute, 4 * time.Minute, time.Minute
)

// rig is the node: its network and its VFs.
type rig struct {
	*testing.T
	ctx  context.Context
	lab  *lab.Lab
	host *host.SRIOV
}

func newRig(t *testing.T) *rig {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	r := &rig{T: t, ctx: ctx}
	var err error
	r.lab, err = lab.New(ctx)
	r.must(err)
	t.Cleanup(func() {
		if err := r.lab.Close(); err != nil {
			t.Error(err)
		}
	})
	r.must(joinWire(r.lab))
	r.host, err = host.NewSRIOV(host.SRIOVOptions{
		Journal: filepath.Join(r.lab.Dir, "journal"), Families: map[string]string{deviceID: family},
	})
	r.must(err)
	return r
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// makeVFs gives each of the node's cards one VF, and returns what the
// inventory has of them.
func (r *rig) makeVFs() []host.PF {
	r.Helper()
	cards, err := card.List()
	r.must(err)
	for _, c := range cards {
		r.must(c.Up())
		_, err := c.MakeVFs(1)
		r.must(err)
	}
	pfs, err := r.host.Inventory(r.ctx)
	r.must(err)
	if len(pfs) != node.PFs {
		r.Fatalf("the inventory has %d PFs with VFs, want %d: %+v", len(pfs), node.PFs, pfs)
	}
	for i, pf := range pfs {
		if pf.Name != cards[i].Name || pf.Driver != "igb" || len(pf.VFs) != 1 || pf.VFs[0].Obstacle != "" {
			r.Fatalf("the inventory has PF %+v, want %s of igb with one VF that can be used", pf, cards[i].Name)
		}
	}
	return pfs
}

// joinWire makes the node's port to the cards' wire one of the hub's bridge,
// where the guest's peers are.
func joinWire(l *lab.Lab) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	hub, err := netns.GetFromName(l.Hub.Name)
	if err != nil {
		return err
	}
	defer hub.Close()
	for _, link := range links {
		if link.Attrs().HardwareAddr.String() != node.WireMAC {
			continue
		}
		if err := netlink.LinkSetNsFd(link, int(hub)); err != nil {
			return fmt.Errorf("%s: %w", link.Attrs().Name, err)
		}
		return l.Hub.Do(func() error {
			port, err := netlink.LinkByName(link.Attrs().Name)
			if err != nil {
				return err
			}
			bridge, err := netlink.LinkByName(lab.NodeBridge)
			if err != nil {
				return err
			}
			return errors.Join(netlink.LinkSetMaster(port, bridge), netlink.LinkSetUp(port))
		})
	}
	return fmt.Errorf("none of the node's %d interfaces is its port to the wire, %s", len(links), node.WireMAC)
}
