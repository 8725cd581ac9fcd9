package compsc

import (
	"slices"

	"compsc.io/compsc/agent/family"
)

// openPackets are the places where packets go on that have begun but not
// ended, in a shadow ring that is read from its start.
type openPackets []uint32

// read takes the next descriptor, i, which the device has written back. It
// tells whether no packet is open after it. Of packets that are coalesced the
// descriptors may come in turns, and the device says where each goes on.
func (o *openPackets) read(f family.Descriptors, format, i uint32, d []byte) (whole bool) {
	*o = slices.DeleteFunc(*o, func(at uint32) bool { return at == i })
	if !f.EndOfPacket(family.RX, format, d) {
		next, ok := f.Next(format, d)
		if !ok {
			next = i + 1
		}
		*o = append(*o, next)
	}
	return len(*o) == 0
}
