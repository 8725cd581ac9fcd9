package device

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// countTimeout bounds the question for the number of queue pairs: what is lost
// on the way is sent twice, with a second's patience each.
const countTimeout = 4 * time.Second

// queueCount is an ixgbevf VF whose queues are not known yet: nothing but its
// mailbox is used, to ask the PF how many there are.
type queueCount struct {
	*ixgbevf.Family
	pairs int
}

// Queues lists none.
func (*queueCount) Queues() []family.Queue { return nil }

// Probe asks for the number of queues, and leaves the PF as after a reset.
func (*queueCount) Probe() [][]uint32 {
	return [][]uint32{
		{ixgbevf.MsgReset},
		{ixgbevf.MsgAPINegotiate, ixgbevf.API11, 0},
		{ixgbevf.MsgGetQueues, 0, 0, 0, 0},
		{ixgbevf.MsgReset},
	}
}

// Offer reads the number. A PF that does not know the question is older than
// any that has another mode than that of 64 pools.
func (c *queueCount) Offer(replies [][]uint32) (family.Offer, error) {
	c.pairs = ixgbevf.DefaultQueuePairs
	if reply := replies[2]; reply[0]&ixgbevf.MsgACK != 0 && len(reply) >= 3 {
		// The mode gives as many of each kind; of fewer a driver may be told,
		// when it shall use fewer than there are.
		for told := min(max(reply[1], reply[2]), ixgbevf.MaxQueuePairs); c.pairs < int(told); {
			c.pairs *= 2
		}
	}
	return family.Offer{}, nil
}

// withQueues returns the type with as many queues as the VF has. An ixgbevf VF
// has as many as the mode of its PF gives it, which only the PF knows: a PF of
// Linux tells its VFs of 4 pairs when it has up to 31 VFs, of 2 when it has
// more, and with traffic classes of up to 8. Nobody else may use the VF.
func (dt deviceType) withQueues(b compsc.Backend, log *slog.Logger) (deviceType, error) {
	if dt.family.Name() != ixgbevf.Name {
		return dt, nil
	}
	f, err := ixgbevf.ForDevice(dt.vendor, dt.device, 0)
	if err != nil {
		return dt, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), countTimeout)
	defer cancel()
	c := &queueCount{Family: f}
	if _, err := compsc.New(c, b, compsc.Options{VendorID: dt.vendor, DeviceID: dt.device, Logger: log}).Probe(ctx); err != nil {
		return dt, fmt.Errorf("asking the PF how many queues the VF has: %w: look whether the PF is up (ip link) and its driver works", err)
	}
	dt.family, err = ixgbevf.ForDevice(dt.vendor, dt.device, c.pairs)
	return dt, err
}

// fitQueues makes the state of a VF with another number of queue pairs that of
// one with as many as here, where the guest cannot tell: queues that it could
// not use there are as they come up here, and queues that are off there are
// left out. A guest that was told another number than this PF would tell it was
// refused before. A state that does not fit is left to VF.Check.
func (dt deviceType) fitQueues(s *compsc.State) {
	have, want := len(s.Queues)/2, len(dt.family.Queues())/2
	if s.Family != ixgbevf.Name || dt.family.Name() != ixgbevf.Name || have == want || have < 1 || have > ixgbevf.MaxQueuePairs {
		return
	}
	larger, err := ixgbevf.ForDevice(dt.vendor, dt.device, max(have, want))
	if err != nil {
		return
	}
	smaller, err := ixgbevf.ForDevice(dt.vendor, dt.device, min(have, want))
	if err != nil {
		return
	}
	beyond := func(q compsc.QueueState) bool { return q.Index >= min(have, want) }
	if have > want && slices.ContainsFunc(s.Queues, func(q compsc.QueueState) bool { return beyond(q) && q.Enabled }) {
		return
	}
	common := map[uint32]bool{}
	for _, r := range smaller.Registers() {
		common[r.Offset] = true
	}
	if have > want {
		s.Queues = slices.DeleteFunc(s.Queues, beyond)
		s.Registers = slices.DeleteFunc(s.Registers, func(r compsc.RegValue) bool { return !common[r.Offset] })
		return
	}
	tails := map[uint32]bool{}
	queues := make([]compsc.QueueState, 0, 2*want)
	for _, q := range larger.Queues() {
		tails[q.Tail] = true
		is := func(o compsc.QueueState) bool { return o.Direction == q.Direction && o.Index == q.Index }
		if at := slices.IndexFunc(s.Queues, is); at >= 0 {
			queues = append(queues, s.Queues[at])
		} else {
			queues = append(queues, compsc.QueueState{Direction: q.Direction, Index: q.Index})
		}
	}
	s.Queues = queues
	for _, r := range larger.Registers() {
		if r.Class == family.Copy && !common[r.Offset] && !tails[r.Offset] {
			s.Registers = append(s.Registers, compsc.RegValue{Offset: r.Offset})
		}
	}
	slices.SortFunc(s.Registers, func(a, b compsc.RegValue) int { return int(a.Offset) - int(b.Offset) })
}
