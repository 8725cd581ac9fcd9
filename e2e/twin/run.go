package twin

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
)

// Options of a run.
type Options struct {
	// Seed decides everything, unless there is a Program.
	Seed uint64
	// Program takes the place of the seed for what the guest does: it ends with
	// it. Nothing is left then to when which goroutine gets the processor, as
	// relays and moves of a device that is at work leave it.
	Program []byte
	// Operations is how many a guest's program has, at most. Default 120.
	Operations int
	// Lose is what every move leaves out; nil for nothing.
	Lose *Loss
}

// Report counts what a run did.
type Report struct {
	// Moves that were made, Vetoes after which the guest went on at the
	// source, and Refusals, for which there was a reason.
	Moves, Vetoes, Refusals int
	// Parts are moves that were not begun, because the guest had been told of a
	// part of a packet.
	Parts int
	// Met counts the moves with which something was the case: see met.
	Met map[string]int
	// Coalesced are frames that became part of another on their way to a guest
	// that stays.
	Coalesced uint64
	// LargestState is the size of the largest encoded state, in bytes.
	LargestState int
}

// Add adds what another run did.
func (r *Report) Add(o Report) {
	r.Moves += o.Moves
	r.Vetoes += o.Vetoes
	r.Parts += o.Parts
	if r.Met == nil {
		r.Met = make(map[string]int)
	}
	for name, n := range o.Met {
		r.Met[name] += n
	}
	r.Refusals += o.Refusals
	r.Coalesced += o.Coalesced
	r.LargestState = max(r.LargestState, o.LargestState)
}

// A DifferenceError tells what told the twins apart.
type DifferenceError struct {
	// Seed of the run, 0 if it had a program.
	Seed uint64
	// What differed, and the last of what was done before.
	What, Log string
}

// Error tells what differed and how to have it again.
func (e *DifferenceError) Error() string {
	if e.Seed == 0 {
		return e.What
	}
	return fmt.Sprintf("seed %d: %s\n(again: make twin SEED=%d)", e.Seed, e.What, e.Seed)
}

// describe tells how the VF stands, for a person who looks for the cause.
func (t *twin) describe() string {
	var b strings.Builder
	fmt.Fprintf(&b, "  %s: %+v\n  rings as the guest sees them and as the device has them:\n", t.vf.name, t.vf.Stats())
	for _, q := range t.vf.fleet.family.Queues() {
		fmt.Fprintf(&b, "    %s %d:", q.Direction, q.Index)
		for _, off := range []uint32{q.Ctl, q.LEN, q.Head, q.Tail} {
			fmt.Fprintf(&b, " %#x/%#x", t.engine.GuestRead(off), t.vf.Read(off))
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// tailLength is how much of the log a DifferenceError has.
const tailLength = 120

// Run runs the guest of a seed on its twins. The error is a *DifferenceError
// when they could be told apart. It may be called concurrently.
func Run(ctx context.Context, o Options) (report Report, err error) {
	if o.Operations <= 0 {
		o.Operations = 120
	}
	var source rand.Source = rand.NewPCG(o.Seed, 0x82599)
	var p *program
	if o.Program != nil {
		p = &program{rest: o.Program}
		source = p
	}
	r := rand.New(source)
	f := newFleet(r)
	if p != nil {
		f.steady()
	}
	m := &mover{ctx: ctx, rng: rand.New(rand.NewPCG(o.Seed, 0x10ed)), fleet: f, lose: o.Lose, report: Report{Met: make(map[string]int)}}
	defer func() {
		for _, s := range m.all {
			s.Close()
		}
	}()
	var g *guest
	defer func() {
		thrown := recover()
		if thrown == nil {
			return
		}
		failed, ok := thrown.(failure)
		if !ok {
			panic(thrown)
		}
		d := &DifferenceError{Seed: o.Seed, What: failed.text}
		if g != nil {
			d.Log = g.log.tail(tailLength)
			for _, t := range g.twins {
				d.Log += t.describe()
			}
		}
		report, err = m.report, d
	}()
	a, b := m.newTwin(), m.newTwin()
	g = newGuest(r, f, a, b)
	m.guest = g
	g.before, g.during, g.around = m.maybe, m.maybeInFlight, m.aroundEvent
	if o.Lose != nil {
		g.unread, g.relayLimit = o.Lose.Unread, relayLimitLost
	}
	if p != nil {
		g.during = nil
	}
	for range o.Operations {
		if p != nil && p.ended() {
			break
		}
		if err := ctx.Err(); err != nil {
			return m.report, err
		}
		g.operate()
		g.compare()
	}
	m.report.Coalesced = a.vf.Stats().RXCoalesced
	return m.report, nil
}
