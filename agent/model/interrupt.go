package model

import "compsc.io/compsc/agent/family/ixgbevf"

// cause records causes and raises their vectors where unmasked.
func (v *VF) cause(vectors uint32) {
	v.regs[ixgbevf.VTEICR/4] |= vectors & ixgbevf.VectorMask
	v.deliver(vectors)
}

// deliver raises those of vectors that have a cause and are not masked. A
// masked one keeps its cause, so that unmasking raises it. What was raised is
// cleared and masked as VTEIAC and VTEIAM say.
func (v *VF) deliver(vectors uint32) {
	cause, mask := &v.regs[ixgbevf.VTEICR/4], &v.regs[ixgbevf.VTEIMS/4]
	due := vectors & *cause & *mask & ixgbevf.VectorMask
	if due == 0 || v.closed {
		return
	}
	for n := range ixgbevf.MSIXVectors {
		if due&(1<<n) != 0 {
			v.stats.Interrupts[n]++
		}
	}
	v.fire |= due
	*cause &^= due & v.regs[ixgbevf.VTEIAC/4]
	*mask &^= due & v.regs[ixgbevf.VTEIAM/4]
}

// queueCause is an event of a queue, sent to the vector VTIVAR gives it.
func (v *VF) queueCause(q int, tx bool) {
	shift := 16 * uint(q%2)
	if tx {
		shift += 8
	}
	v.vectorCause(v.regs[ixgbevf.VTIVAR(q/2)/4] >> shift)
}

// mailboxCause is an event of the mailbox, sent to VTIVAR_MISC's vector.
func (v *VF) mailboxCause() {
	v.vectorCause(v.regs[ixgbevf.VTIVARMisc/4])
}

func (v *VF) vectorCause(entry uint32) {
	if entry&ixgbevf.IVARValid != 0 {
		v.cause(1 << (entry & ixgbevf.IVARVector))
	}
}
