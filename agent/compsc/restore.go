package compsc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
)

// Strategies to bring the heads of rings to where they were.
const (
	// HeadsNone: no ring was in use.
	HeadsNone = "none"
	// HeadsWriteVerify: written while the queue was off, and read back before
	// and after it was turned on.
	HeadsWriteVerify = "write-verify"
)

// RestoreReport tells how a restore went.
type RestoreReport struct {
	// ReplayedOperations counts the messages sent to the PF.
	ReplayedOperations int
	// HeadsStrategy is one of the Heads constants.
	HeadsStrategy string
}

// restoration is one restore on its way.
type restoration struct {
	v      *VF
	s      *State
	log    family.Log
	report RestoreReport
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
	defer v.mu.Unlock()
	return v.restore(ctx, s, restoreSteps)
}

func (v *VF) restore(ctx context.Context, s *State, steps []step) (RestoreReport, error) {
	r := &restoration{v: v, s: s, report: RestoreReport{HeadsStrategy: HeadsNone}}
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
	v.held, v.heads, v.causes, v.mail = nil, nil, 0, mail{}
	v.log = r.log
	return v.resetDevice(ctx)
}

func (r *restoration) replay(ctx context.Context) (err error) {
	r.report.ReplayedOperations, err = r.v.replay(ctx, r.log.Replay())
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

// heads puts every head where it was. That of a queue which is off is a mere
// courtesy, for the driver programs it before it turns the queue on.
func (r *restoration) heads(context.Context) error {
	for i, q := range r.v.queues {
		err := r.v.setHead(q, r.s.Queues[i].Head)
		switch {
		case r.s.Queues[i].Enabled:
			r.report.HeadsStrategy = HeadsWriteVerify
			if err != nil {
				return err
			}
		case err != nil:
			r.v.o.Logger.Info("the head of a queue that is off stays different", "error", err)
		}
	}
	return nil
}

func (r *restoration) counters(context.Context) error {
	for i, c := range r.v.counters {
		r.v.rebase(c, r.s.Counters[i].Value)
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
		r.v.b.Write(q.Tail, r.s.Queues[i].Tail)
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
		v.b.Write(off, restoring(v.regs[off], r.s.Registers[at].Value))
	}
	v.causes = r.s.Causes
	v.raise()
	if v.b.Read(v.irq.MaskSet) == allOnes {
		return ErrGone
	}
	return nil
}
