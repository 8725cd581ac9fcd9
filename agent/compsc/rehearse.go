package compsc

import (
	"context"
	"errors"
	"fmt"
)

// Rights are what the VF's administrator will have set by the time the state
// comes, and what the PF goes by then.
type Rights struct {
	// Addressed: the guest's address is set on the PF.
	Addressed bool
	// Trusted: the PF trusts the VF.
	Trusted bool
}

// Record is the encoded record of what the guest has asked of the PF, for
// Rehearse on another VF.
func (v *VF) Record() []byte {
	v.mu.Lock()
	defer v.unlock()
	return v.log.Marshal()
}

// Rehearse has this VF's PF do all that another VF's record asks for, and
// takes it back: whether it has the filters, the mailbox version and the trust
// that it takes is then known before anything is stopped. It is only for a VF
// that nobody uses, and leaves it scrubbed. The error is, or wraps, an
// *IncompatibleError when the PF refuses or the record makes no sense.
//
// For as long as it takes, some milliseconds, the PF has the guest's address
// filters installed, and frames to the guest from this PF's own VFs are lost.
//
// The VF has no address set by its administrator yet: what only that makes the
// PF refuse is told from the rights (igb_set_vf_mac_filter,
// ixgbe_set_vf_macvlan_msg).
func (v *VF) Rehearse(ctx context.Context, record []byte, rights Rights) error {
	v.mu.Lock()
	defer v.unlock()
	log, err := v.f.RestoreLog(record)
	if err != nil {
		return incompatible(ReasonStateInvalid, "%v", err)
	}
	if n := log.Summary().FurtherAddresses; n > 0 && rights.Addressed && !rights.Trusted {
		return incompatible(ReasonMailboxRefused, "the guest has %d further MAC addresses, which a PF on which the VF's own is set "+
			"grants only if it trusts the VF: set trust on for it (ip link set PF vf N trust on), or choose another node", n)
	}
	err = v.scrub(ctx)
	if err == nil {
		_, err = v.replay(ctx, log.Replay())
	}
	undo, cancel := v.undoContext(ctx)
	defer cancel()
	if err = errors.Join(err, v.forgetMode(undo), v.scrub(undo)); err != nil {
		return fmt.Errorf("rehearsal: %w", err)
	}
	return nil
}

// forgetMode has the PF forget what a reset leaves of the VF's last user: the
// family's questions end with that, whatever is answered to them.
func (v *VF) forgetMode(ctx context.Context) error {
	if err := v.resetDevice(ctx); err != nil {
		return err
	}
	_, err := v.askAll(ctx)
	return err
}

// askAll sends the family's questions to the PF of a VF that was just reset,
// and returns the replies.
func (v *VF) askAll(ctx context.Context) (replies [][]uint32, err error) {
	err = v.talk(ctx, func() error {
		replies = nil
		for _, request := range v.f.Probe() {
			reply, err := v.ask(ctx, request)
			if err != nil {
				return fmt.Errorf("message %#x: %w", request[0], err)
			}
			replies = append(replies, reply)
		}
		return nil
	})
	return replies, err
}
