package compsc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
)

// RestoreReport tells how a restore went.
type RestoreReport struct {
	// ReplayedOperations counts the messages sent to the PF.
	ReplayedOperations int
	// HeadsStrategy is one of the Heads constants, or, when the directions
	// differ, "rx=" with one and "tx=" with another.
	HeadsStrategy string
}

// restoration is one restore on its way.
type restoration struct {
	v      *VF
	s      *State
	log    family.Log
	report RestoreReport
	// sends tells that the PF lets the VF send: the replay did not end with a
	// reset.
	sends bool
	ways  map[family.Direction]string
}

// step is one step of a restore.
type step struct {
	name string
	run  func(*restoration, context.Context) error
}

// restoreSteps is the order in which the device is programmed. The replay
// comes before the registers because the PF's side of a RESET writes some of
// them; heads before the queues are on, tails only then; baselines of the
// counters while nothing can count; and interrupts last.
var restoreSteps = []step{
	{"reset", (*restoration).reset},
	{"replay", (*restoration).replay},
	{"registers", (*restoration).registers},
	{"contexts", (*restoration).contexts},
	{"heads", (*restoration).heads},
	{"counters", (*restoration).counters},
	{"enable", (*restoration).enable},
	{"tails", (*restoration).tails},
	{"mailbox", (*restoration).mailbox},
	{"interrupts", (*restoration).interrupts},
}

// Restore makes this VF what the captured one was: reset, mailbox operations
// replayed, registers written, heads verified, counters continued, queues
// on. The guest must not access the VF meanwhile. On error the VF is silent
// and clean, as after Scrub; the error is or wraps an *IncompatibleError when
// trying again would not help.
func (v *VF) Restore(ctx context.Context, s *State) (RestoreReport, error) {
	v.mu.Lock()
	defer v.unlock()
	if v.lost != nil {
		return RestoreReport{}, fmt.Errorf("restore: %w", ErrGone)
	}
	return v.restore(ctx, s, restoreSteps)
}

func (v *VF) restore(ctx context.Context, s *State, steps []step) (RestoreReport, error) {
	r := &restoration{v: v, s: s, report: RestoreReport{HeadsStrategy: HeadsNone}, ways: make(map[family.Direction]string)}
	log, err := v.validate(s)
	if err == nil {
		r.log = log
		for _, step := range steps {
			if err = step.run(r, ctx); err != nil {
				err = fmt.Errorf("%s: %w", step.name, err)
				break
			}
		}
	}
	if err == nil {
		return r.report, nil
	}
	err = fmt.Errorf("restore: %w", err)
	undo, cancel := v.undoContext(ctx)
	defer cancel()
	if scrubErr := v.scrub(undo); scrubErr != nil {
		err = errors.Join(err, fmt.Errorf("the VF may not be silent: %w", scrubErr))
	}
	return RestoreReport{}, err
}

func (r *restoration) reset(ctx context.Context) error {
	v := r.v
	v.forget()
	v.log = r.log
	return v.resetDevice(ctx)
}

func (r *restoration) replay(ctx context.Context) (err error) {
	messages := r.log.Replay()
	r.sends = len(messages) > 0 && len(messages[len(messages)-1].Words) > 0
	r.report.ReplayedOperations, err = r.v.replay(ctx, messages)
	return err
}

// registers writes all of class Copy but for what turns something on.
func (r *restoration) registers(context.Context) error {
	late := r.v.lateRegisters()
	for _, reg := range r.s.Registers {
		if !slices.Contains(late, reg.Offset) {
			r.v.b.Write(reg.Offset, restoring(r.v.regs[reg.Offset], reg.Value))
		}
	}
	return nil
}

// contexts fills the context slots of the transmit queues, also of those that
// are off: the slots outlive that. A VF that cannot is one whose PF lets it
// send nothing, or that has no scratch memory: it still serves drivers that
// fill the slots for each packet anew, and no others.
func (r *restoration) contexts(ctx context.Context) error {
	v := r.v
	for i, q := range v.queues {
		ring := v.rings[q.Ctl]
		ring.slots, ring.relied = r.s.Queues[i].Contexts, r.s.Queues[i].Relied
		if len(ring.slots) == 0 {
			continue
		}
		err := errors.New("the guest has not asked the PF to let it send")
		if r.sends {
			err = v.loadContexts(ctx, ring, ring.slots)
		}
		if errors.Is(err, ErrGone) || ctx.Err() != nil {
			return err
		}
		switch {
		case err == nil:
		case ring.relied != 0:
			return incompatible(ReasonContextNotRestorable, "%s: the guest's driver sends packets with offload contexts that it has loaded before, "+
				"and this VF does not take them: %v", queueName(q), err)
		default:
			v.o.Logger.Warn("the contexts of a transmit queue are not restored; its driver has relied on none so far",
				"queue", q.Index, "error", err)
		}
	}
	return nil
}

// heads puts every head where it was. That of a queue which is off matters
// only once it is turned on; until then the guest is shown it. Causes that
// came up so far are those of the replay, which the guest did not send.
func (r *restoration) heads(ctx context.Context) error {
	for i, q := range r.v.queues {
		state := r.s.Queues[i]
		if !state.Enabled {
			if err := r.v.setHead(q, state.Head); err != nil {
				r.v.showHead(r.v.rings[q.Ctl], state.Head)
			}
			continue
		}
		way, err := r.v.bringHead(ctx, r.v.rings[q.Ctl], state.Head, state.Contexts)
		if err != nil {
			return err
		}
		r.ways[q.Direction] = worse(r.ways[q.Direction], way)
	}
	r.report.HeadsStrategy = headsReport(r.ways)
	r.v.b.Read(r.v.irq.Cause)
	return nil
}

func (r *restoration) counters(context.Context) error {
	for i, c := range r.v.counters {
		s := r.s.Counters[i]
		r.v.rebase(c, s.Value)
		if c.latched = s.Latched; c.latched {
			c.high = s.High
		}
	}
	return nil
}

func (r *restoration) enable(ctx context.Context) error {
	for _, q := range r.v.startOrder() {
		state, ctl := r.queue(q)
		if !state.Enabled {
			continue
		}
		if err := r.v.turnOn(ctx, q, ctl, state.Head, state.Tail); err != nil {
			return err
		}
	}
	return nil
}

// queue finds the state of a queue and its control register.
func (r *restoration) queue(q family.Queue) (QueueState, uint32) {
	i := slices.IndexFunc(r.v.queues, func(o family.Queue) bool { return o.Ctl == q.Ctl })
	at, _ := slices.BinarySearchFunc(r.s.Registers, q.Ctl, func(v RegValue, off uint32) int { return int(v.Offset) - int(off) })
	return r.s.Queues[i], r.s.Registers[at].Value
}

// tails rings every doorbell; a queue that runs goes to work with it.
func (r *restoration) tails(context.Context) error {
	for i, q := range r.v.queues {
		if state := r.s.Queues[i]; state.Enabled {
			ring := r.v.rings[q.Ctl]
			r.v.follow(ring, state.Head)
			r.v.handOver(ring, state.Tail)
		}
		r.v.ringTail(r.v.rings[q.Ctl], r.s.Queues[i].Tail)
	}
	return nil
}

func (r *restoration) mailbox(ctx context.Context) error {
	return r.v.showMailbox(ctx, r.s.Mailbox)
}

func (r *restoration) interrupts(context.Context) error {
	v := r.v
	for _, off := range v.lateRegisters() {
		at, _ := slices.BinarySearchFunc(r.s.Registers, off, func(v RegValue, off uint32) int { return int(v.Offset) - int(off) })
		value := restoring(v.regs[off], r.s.Registers[at].Value)
		if off == v.irq.MaskSet {
			v.mask = value
		}
		v.b.Write(off, value)
	}
	v.causes = r.s.Causes
	v.raise()
	if v.b.Read(v.irq.MaskSet) == allOnes {
		return ErrGone
	}
	return nil
}
