package model

import "compsc.io/compsc/agent/family/ixgbevf"

// descriptorSize is the size of every descriptor in bytes.
const descriptorSize = 16

// ring is where a queue's registers place its descriptors.
type ring struct {
	base       uint64
	size       uint32 // in descriptors
	head, tail uint32
}

// ringAt reads the ring whose block of registers starts at block. VFRDBAL and
// the rest have the same inner offsets as VFTDBAL.
func (v *VF) ringAt(block uint32) ring {
	r := v.regs[block/4:]
	return ring{
		base: uint64(r[0]) | uint64(r[1])<<32,
		size: r[2] / descriptorSize,
		head: r[0x10/4],
		tail: r[0x18/4],
	}
}

// sane tells whether head and tail lie in the ring. What silicon does
// otherwise is not known; the model stands still.
func (r ring) sane() bool { return r.head < r.size && r.tail < r.size }

// available is the number of descriptors that hardware owns.
func (r ring) available() int {
	if !r.sane() {
		return 0
	}
	return int((r.tail + r.size - r.head) % r.size)
}

// at is the address of the descriptor n places after the head.
func (r ring) at(n int) uint64 {
	return r.base + uint64((r.head+uint32(n))%r.size)*descriptorSize
}

// after is the index n places after the head.
func (r ring) after(n int) uint32 { return (r.head + uint32(n)) % r.size }

// writeHead writes a head register, which silicon allows only while the queue
// is off.
func (v *VF) writeHead(head, ctl, val uint32, writable bool) {
	val &= 0xffff
	if v.regs[ctl/4]&ixgbevf.QueueEnable == 0 && (writable || val == 0) {
		v.regs[head/4] = val
	}
}
