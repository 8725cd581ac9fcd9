package agent

import (
	"context"
	"slices"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/api/v1alpha1"
)

// vfPath is what a device process says of how its guest reaches a VF.
type vfPath struct {
	epoch     int64
	fast      bool
	immovable string
}

// notePaths takes down how the guest reaches the VFs of a device process, and
// whether they can be moved, for the VFNode to tell. The manager then refuses a
// migration that the device process would refuse later.
func (a *agent) notePaths(ctx context.Context, d *device, vfs []pinned) {
	if !slices.ContainsFunc(vfs, func(p pinned) bool { return p.fast }) {
		return
	}
	st, err := a.status(ctx, d)
	if err != nil {
		a.log.Warn("not known which VFs can be moved", "pod", string(d.pod), "error", err)
		return
	}
	for _, i := range st.GetInterfaces() {
		if old, ok := a.paths.Swap(i.GetVf(), pathOf(i)); !ok || old != pathOf(i) {
			a.poke()
		}
	}
}

func pathOf(i *controlpb.InterfaceStatus) vfPath {
	return vfPath{int64(i.GetEpoch()), i.GetFastPath(), i.GetImmovable()}
}

// showPath fills in what is known of a VF that is held.
func (a *agent) showPath(vf *v1alpha1.VFStatus) {
	p, ok := a.paths.Load(vf.Address)
	if !ok || vf.Holder == "" || p.(vfPath).epoch != vf.Epoch {
		return
	}
	vf.FastPath, vf.Immovable = p.(vfPath).fast, cut(p.(vfPath).immovable, maxMessage)
}
