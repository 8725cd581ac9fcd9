package model

import (
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// Interval of VTEITR: a field of units of 2 microseconds, as the Linux driver
// counts on, which writes four times the microseconds into the register.
const (
	eitrShift = 3
	eitrUnit  = 2 * time.Microsecond
)

// throttle is the moderation of one vector.
type throttle struct {
	// until is the end of the interval that runs, zero for none.
	until time.Time
	// due tells that the vector would have been raised but for the interval.
	due bool
	// stop takes back the timer for the end of the interval, nil for none.
	stop func()
}

// cause records causes and raises their vectors where unmasked.
func (v *VF) cause(vectors uint32) {
	v.regs[ixgbevf.VTEICR/4] |= vectors & ixgbevf.VectorMask
	v.deliver(vectors)
}

// deliver raises those of vectors that have a cause and are not masked. A
// masked one keeps its cause, so that unmasking raises it, and one whose
// interval runs keeps it until that ends. What was raised is cleared and
// masked as VTEIAC and VTEIAM say.
func (v *VF) deliver(vectors uint32) {
	cause, mask := &v.regs[ixgbevf.VTEICR/4], &v.regs[ixgbevf.VTEIMS/4]
	due := vectors & *cause & *mask & ixgbevf.VectorMask
	if due == 0 || v.closed {
		return
	}
	for n := range ixgbevf.MSIXVectors {
		if due&(1<<n) == 0 {
			continue
		}
		if v.throttled(n) {
			due &^= 1 << n
			v.throttles[n].due = true
			v.awaitInterval(n)
			continue
		}
		v.stats.Interrupts[n]++
		v.startInterval(n)
	}
	v.fire |= due
	*cause &^= due & v.regs[ixgbevf.VTEIAC/4]
	*mask &^= due & v.regs[ixgbevf.VTEIAM/4]
}

// throttled tells whether an interval of a vector runs.
func (v *VF) throttled(n int) bool {
	until := &v.throttles[n].until
	if until.IsZero() {
		return false
	}
	if until.After(v.cfg.Clock.Now()) {
		return true
	}
	*until = time.Time{}
	return false
}

// startInterval starts the interval of a vector that is raised.
func (v *VF) startInterval(n int) {
	interval := time.Duration(v.regs[ixgbevf.VTEITR(n)/4]&ixgbevf.EITRInterval>>eitrShift) * eitrUnit
	v.throttles[n].due = false
	if interval > 0 {
		v.throttles[n].until = v.cfg.Clock.Now().Add(interval)
	}
}

// awaitInterval has intervalEnds called at the end of the interval.
func (v *VF) awaitInterval(n int) {
	t := &v.throttles[n]
	if t.stop == nil {
		t.stop = v.cfg.Clock.AfterFunc(t.until.Sub(v.cfg.Clock.Now()), func() {
			v.mu.Lock()
			defer v.unlock()
			v.intervalEnds(n)
		})
	}
}

// intervalEnds raises what waited for the end of the interval, which may have
// become another one meanwhile.
func (v *VF) intervalEnds(n int) {
	t := &v.throttles[n]
	t.stop = nil
	switch {
	case v.closed:
	case v.throttled(n):
		v.awaitInterval(n)
	default:
		// One interrupt tells of what all queues have put together.
		vectors := uint32(0)
		for q := range v.rx {
			if len(v.rx[q].active) == 0 {
				continue
			}
			v.completeDue(q)
			if at := v.vectorOf(q, false); v.flushRX(q) && at >= 0 {
				vectors |= 1 << at
			}
		}
		v.regs[ixgbevf.VTEICR/4] |= vectors
		if t.due {
			t.due = false
			vectors |= 1 << n
		}
		v.deliver(vectors)
	}
}

// writeEITR sets the interval of a vector. Without CNT_WDIS the counter of the
// one that runs is written as well: with 0 here, whatever bits 27:21 say.
func (v *VF) writeEITR(n int, val uint32) {
	v.regs[ixgbevf.VTEITR(n)/4] = val & ixgbevf.EITRInterval
	if val&ixgbevf.EITRCountWDis == 0 {
		v.endInterval(n)
	}
}

// endInterval ends the interval of a vector now.
func (v *VF) endInterval(n int) {
	t := &v.throttles[n]
	if t.stop != nil {
		t.stop()
	}
	t.until = time.Time{}
	v.intervalEnds(n)
}

// dropIntervals ends all intervals without raising anything.
func (v *VF) dropIntervals() {
	for n := range v.throttles {
		if stop := v.throttles[n].stop; stop != nil {
			stop()
		}
		v.throttles[n] = throttle{}
	}
}

// queueEntry is what VTIVAR has for a queue.
func (v *VF) queueEntry(q int, tx bool) uint32 {
	shift := 16 * uint(q%2)
	if tx {
		shift += 8
	}
	return v.regs[ixgbevf.VTIVAR(q/2)/4] >> shift
}

// vectorOf is the vector of a queue, -1 for none.
func (v *VF) vectorOf(q int, tx bool) int {
	entry := v.queueEntry(q, tx)
	if n := int(entry & ixgbevf.IVARVector); entry&ixgbevf.IVARValid != 0 && n < ixgbevf.MSIXVectors {
		return n
	}
	return -1
}

// queueCause is an event of a queue, sent to the vector VTIVAR gives it.
func (v *VF) queueCause(q int, tx bool) { v.vectorCause(v.queueEntry(q, tx)) }

// mailboxCause is an event of the mailbox, sent to VTIVAR_MISC's vector.
func (v *VF) mailboxCause() {
	v.vectorCause(v.regs[ixgbevf.VTIVARMisc/4])
}

func (v *VF) vectorCause(entry uint32) {
	if entry&ixgbevf.IVARValid != 0 {
		v.cause(1 << (entry & ixgbevf.IVARVector))
	}
}
