package device

import (
	"context"
	"errors"
	"fmt"

	pb "compsc.io/compsc/agent/device/controlpb"
)

// Attached is an interface of the VM with the VF that the agent handed over.
type Attached struct {
	// Name is the VMI interface's name.
	Name string
	// Slot is the VF's device number on bus 0 of the guest, 1 to 31.
	Slot int
	// VF is the VF's PCI address on the node, MAC the address that it must
	// answer to, empty if that was left open.
	VF, MAC string
}

// Await blocks until QEMU may be started here: all of the VM's VFs are
// attached, and on the target of a migration the source's were judged too.
// It returns the VFs, ordered by the interfaces' names. The error, if ctx
// ends before, tells what is missing. Safe for concurrent use.
func (x *Process) Await(ctx context.Context) ([]Attached, error) {
	p := x.p
	var phase pb.Phase
	err := p.await(ctx, func() (bool, error) {
		phase = p.phase
		switch phase {
		case pb.Phase_PHASE_CANCELLED:
			return false, errors.New("the migration to this pod was cancelled: it takes no VM any more")
		case pb.Phase_PHASE_UNATTACHED, pb.Phase_PHASE_TARGET_SILENT:
			return false, nil
		}
		return true, nil
	})
	if err != nil && ctx.Err() == nil {
		return nil, err
	}
	var out []Attached
	for _, i := range p.interfaces() {
		h := i.get().handoff
		out = append(out, Attached{Name: h.Interface, Slot: h.Slot, VF: h.VF, MAC: h.MAC})
	}
	switch {
	case err == nil:
		return out, nil
	case phase == pb.Phase_PHASE_TARGET_SILENT:
		return nil, fmt.Errorf("the VFs are attached, but the source's were not judged yet: the agents of both nodes do that once there is a VFMigration; see its conditions: %w", err)
	case len(out) == 0:
		return nil, fmt.Errorf("no VF is attached yet: the compsc agent of this node does that; check that it runs, and its log: %w", err)
	}
	return nil, fmt.Errorf("only %d of %d VFs are attached yet, of interface %s and others: see the log of this node's compsc agent: %w",
		len(out), p.interfaces()[0].get().handoff.Of, out[0].Name, err)
}
