package ixgbevf

import (
	"encoding/binary"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

// Of a frame coalesced from several: RSCCNT in dword 0 of each receive
// descriptor, NEXTP in dword 2 of all but the last, which has EOP.
const (
	rxCount     = 0xf << 17
	rxNext      = 0xffff << rxNextShift
	rxNextShift = 4
)

// descriptors are Intel's with receive side coalescing.
type descriptors struct{ intel.Descriptors }

// Descriptors gives the formats of the descriptors.
func (f *Family) Descriptors() family.Descriptors { return descriptors{} }

// Next has NEXTP where RSCCNT tells of coalescing, as Linux's ixgbe driver and
// DPDK's take it. Descriptors of the legacy format do not have it.
func (d descriptors) Next(format uint32, b []byte) (index uint32, ok bool) {
	if intel.Legacy(format) || binary.LittleEndian.Uint32(b)&rxCount == 0 || d.EndOfPacket(family.RX, format, b) {
		return 0, false
	}
	return binary.LittleEndian.Uint32(b[8:]) & rxNext >> rxNextShift, true
}

// SetNext replaces NEXTP.
func (descriptors) SetNext(_ uint32, b []byte, index uint32) {
	binary.LittleEndian.PutUint32(b[8:], binary.LittleEndian.Uint32(b[8:])&^rxNext|index<<rxNextShift)
}
