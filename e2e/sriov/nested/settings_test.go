//go:build e2enested

package nested

import (
	"reflect"

	"github.com/vishvananda/netlink"

	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/e2e/sriov/card"
)

// settings are what the PFs' drivers have set for the VFs, and the VFs' own
// drivers, by PF.
func (r *rig) settings(pfs []host.PF) map[string]vfSettings {
	r.Helper()
	all := map[string]vfSettings{}
	for _, pf := range pfs {
		link, err := netlink.LinkByName(pf.Name)
		r.must(err)
		vf := link.Attrs().Vfs[0]
		driver, err := card.VF{Address: pf.VFs[0].Address}.Driver()
		r.must(err)
		all[pf.Name] = vfSettings{vf.Mac.String(), vf.Vlan, vf.Qos, vf.Spoofchk, vf.Trust, vf.LinkState, driver}
	}
	return all
}

// vfSettings are those of one VF.
type vfSettings struct {
	mac       string
	vlan, qos int
	spoof     bool
	trust     uint32
	linkState uint32
	driver    string
}

// restored checks that the VFs are as they were, and that nothing holds them.
func (r *rig) restored(pfs []host.PF, before map[string]vfSettings) {
	r.Helper()
	if after := r.settings(pfs); !reflect.DeepEqual(before, after) {
		r.Errorf("the VFs' settings were %+v and are %+v", before, after)
	}
	held, err := r.host.Held(r.ctx)
	r.must(err)
	if len(held) != 0 {
		r.Errorf("the journal still holds %q", held)
	}
}
