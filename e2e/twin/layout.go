package twin

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
)

const (
	descriptorSize = 16
	// shortRing is the longest ring of most guests, longRing that of a few: what
	// Linux's driver and DPDK's take at most.
	shortRing, longRing = 512, 4096
)

// Places in the guest's memory. Those of the rings follow, and the receive
// buffers come last. What a frame's length takes past the end of these wraps
// into the unused beginning.
const (
	atHeadWB = 0x08000
	atTX     = 0x10000
	txRoom   = 0x10000
	atRings  = 0x20000
	rxRoom   = 0x10000
)

// layout is where a guest has what in its memory, by how many rings of which
// length it may have.
type layout struct {
	// maxRing is the longest ring that fits its place in memory.
	maxRing uint32
	// ringStep is the distance between two rings, endOfRings the end of the last.
	ringStep, endOfRings uint64
	atRX, memorySize     uint64
	// scratchSize is that of the memory that engines work on rings with.
	scratchSize int
}

// newLayout has rings of any length that drivers use in an eighth of all cases.
func newLayout(r *rand.Rand, queuePairs int) layout {
	l := layout{maxRing: shortRing}
	if queuePairs <= 4 && chance(r, 1, 8) {
		l.maxRing = longRing
	}
	l.ringStep = uint64(l.maxRing) * descriptorSize
	l.endOfRings = atRings + 2*uint64(queuePairs)*l.ringStep
	l.memorySize = 1 << bits.Len64(l.endOfRings+rxRoom-1)
	l.atRX = l.memorySize - rxRoom
	l.scratchSize = 2 * queuePairs * (int(l.ringStep) + 8<<10)
	return l
}

func (l *layout) rxRing(q int) uint64 { return atRings + uint64(2*q)*l.ringStep }
func (l *layout) txRing(q int) uint64 { return atRings + uint64(2*q+1)*l.ringStep }

// long tells that the guest's rings may be as long as any driver's.
func (l *layout) long() bool { return l.maxRing == longRing }

// ringSize is a number of descriptors: any multiple of 8, often a short one,
// so that positions wrap, or the largest.
func (l *layout) ringSize(r *rand.Rand) uint32 {
	switch {
	case l.long() && chance(r, 1, 3):
		return l.maxRing
	case chance(r, 1, 4):
		return uint32(8 * (1 + r.IntN(int(l.maxRing)/8)))
	}
	return uint32(8 * (1 + r.IntN(6)))
}

// region names what is at an address.
func (l *layout) region(addr uint64) string {
	switch {
	case addr >= atHeadWB && addr < atTX:
		return "head write-back"
	case addr >= atTX && addr < atTX+txRoom:
		return "transmit buffers"
	case addr >= atRings && addr < l.endOfRings:
		i := (addr - atRings) / l.ringStep
		return fmt.Sprintf("%s ring %d, descriptor %d", [2]string{"receive", "transmit"}[i%2], i/2, (addr-atRings)%l.ringStep/descriptorSize)
	case addr >= l.atRX:
		return "receive buffers"
	}
	return "nothing's"
}
