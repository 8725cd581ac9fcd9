package device

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/vfiouser"
)

// checkFastPath tells why the VF cannot have the fast path that it is handed
// over with.
func (vf *attachedVF) checkFastPath() error {
	if !vf.handoff.FastPath {
		return nil
	}
	const noPath = "it cannot have the fast path: "
	file, _ := vf.silicon.BARFile()
	switch {
	case file == nil:
		return errors.New(noPath + "nothing can be mapped of the registers of a modelled VF, or of one whose BAR0 the kernel does not let be mapped; " +
			"take the interface out of the VMI's annotation and restart the VM")
	case os.Getpagesize() != family.PageSize:
		return errors.New(noPath + "it takes a host with pages of 4 KiB")
	}
	return nil
}

// fastPath is what QEMU is told to map into the guest, nil for nothing.
func (vf *attachedVF) fastPath() *vfiouser.RegionMap {
	if !vf.handoff.FastPath {
		return nil
	}
	file, offset := vf.silicon.BARFile()
	if file == nil {
		return nil // given up meanwhile
	}
	m := &vfiouser.RegionMap{File: file, Offset: uint64(offset)}
	for _, page := range family.DoorbellPages(vf.device.family) {
		m.Areas = append(m.Areas, vfiouser.Area{Offset: uint64(page), Size: family.PageSize})
	}
	return m
}

// immovable tells why the VF cannot be moved from here; empty if it can. Past
// the device process nothing tells what the VF writes but the IOMMU.
func (vf *attachedVF) immovable() string {
	if !vf.handoff.FastPath || vf.silicon.TellsWrites() {
		return ""
	}
	return "the VF has the fast path, and the IOMMU of its node does not record what memory it writes, so that nothing tells what to copy; " +
		"take the interface out of the VMI's annotation and restart the VM"
}

// Looks for doorbells that were rung past this process, the first and the later.
const (
	doorbellLook  = 5 * time.Millisecond
	doorbellLooks = time.Second
)

// watchDoorbells waits for the guest's next use of a VF with the fast path: that
// of a driver which polls may show in the doorbells only. It ends when a use was
// seen, here or by an access that passes this process.
func (i *iface) watchDoorbells(ctx context.Context) error {
	engine := i.get().engine
	before := engine.Tails()
	for pause := doorbellLook; i.watching.Load() && !i.lost.Load(); pause = min(2*pause, doorbellLooks) {
		if !slices.Equal(engine.Tails(), before) {
			i.noteDriver()
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
	return nil
}

// onOff says a bool in words.
func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}
