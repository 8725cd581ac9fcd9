package device

import (
	"fmt"

	pb "compsc.io/compsc/agent/device/controlpb"
)

// wanted is called when the kernel wants an interface's VF back: it is being
// removed, or taken from vfio-pci, and whoever does that stands still until it
// is closed. It is called again while that lasts. The VF is given up at once,
// whatever is under way; the guest goes on with its link down. A target that
// has lost a VF can take no VM any more.
func (p *process) wanted(i *iface) {
	address, ok := i.giveUp()
	if !ok {
		return
	}
	why := fmt.Sprintf("interface %s: the node took VF %s away (its PF was given another number of VFs, or its driver was unbound); "+
		"the guest's link is down, and stays so until the VM is restarted on a node with a VF", i.cfg.Name, address)
	p.log.Error("a VF was lost", "interface", i.cfg.Name, "vf", address)
	p.switchMu.Lock()
	defer p.switchMu.Unlock()
	p.set(func() { p.lastError = why })
	switch phase, _ := p.current(); phase {
	case pb.Phase_PHASE_TARGET_SILENT, pb.Phase_PHASE_TARGET_PREPARED, pb.Phase_PHASE_TARGET_LOADED, pb.Phase_PHASE_TARGET_HELD:
		p.cancelTarget(why)
	}
}

// giveUp gives the VF back to the kernel and takes the guest's link down. It
// is false if there is none, or it was given up before. A VF that is wanted
// while it is being attached is wanted again soon.
func (i *iface) giveUp() (address string, ok bool) {
	i.dma.Lock()
	defer i.dma.Unlock()
	vf := i.get()
	if vf == nil || i.lost.Load() {
		return "", false
	}
	vf.engine.Lose(func() {
		if vf.handoff.FastPath {
			// QEMU has the VF open too: closing it here does not stop it.
			vf.silicon.FLR()
		}
		vf.silicon.GiveUp()
	})
	i.lost.Store(true)
	i.setRunning(true) // nobody need wait for it
	i.kick()           // drivers look at their link on the mailbox's interrupt
	return vf.handoff.VF, true
}
