// Package intel has what the VFs of Intel's families have in common: the formats
// of descriptors, which the 82576 brought and the 82599 took over, and the shape
// of mailbox messages.
package intel

import (
	"encoding/binary"

	"compsc.io/compsc/agent/family"
)

const (
	// DescriptorSize is the size of every descriptor in bytes.
	DescriptorSize = 16
	// ContextSlots is how many offload contexts a transmit queue remembers.
	ContextSlots = 2
)

// Fields of descriptors: in dword 2 of transmit descriptors the command, in
// dword 3 their status; in dword 2 of advanced receive descriptors written
// back the status, which legacy ones have in byte 12.
const (
	txDEXT      = 1 << 29 // advanced format
	txEOP       = 1 << 24
	txRS        = 1 << 27
	txTypeMask  = 0xf << 20
	txContext   = 2 << 20
	txSlot      = 1 << 4 // dword 3 of context and data descriptors
	txData      = 3 << 20
	txVLE       = 1 << 30
	txTSE       = 1 << 31
	txPOPTS     = 0x3f << 8 // dword 3
	descDD      = 1 << 0
	rxEOP       = 1 << 1
	srrctlType  = 7 << 25 // DESCTYPE in SRRCTL
	macLenShift = 9       // MACLEN in dword 0 of a context descriptor
)

// Descriptors implements family.Descriptors for the legacy and the advanced
// formats (82576 datasheet 7.1.5 and 7.2.2, Linux igb/e1000_82575.h; of the
// 82599, Linux ixgbevf.h) without receive side coalescing, which the 82576 does
// not have.
type Descriptors struct{}

// Legacy tells whether a receive ring with that value of SRRCTL has descriptors
// of the legacy format.
func Legacy(format uint32) bool { return format&srrctlType == 0 }

// dword is the n-th of a descriptor.
func dword(d []byte, n int) uint32 { return binary.LittleEndian.Uint32(d[4*n:]) }

// ContextSlot tells which slot a context descriptor fills (IDX).
func (Descriptors) ContextSlot(d []byte) (slot int, ok bool) {
	if dword(d, 2)&(txDEXT|txTypeMask) != txDEXT|txContext {
		return 0, false
	}
	return int(dword(d, 3) / txSlot & (ContextSlots - 1)), true
}

// UsesContext looks for what a context is there for: a tag, segmentation,
// checksums or IPsec. Data descriptors that do without name a slot all the same.
func (Descriptors) UsesContext(d []byte) (slot int, ok bool) {
	command, options := dword(d, 2), dword(d, 3)
	if command&(txDEXT|txTypeMask) != txDEXT|txData || command&(txVLE|txTSE) == 0 && options&txPOPTS == 0 {
		return 0, false
	}
	return int(options / txSlot & (ContextSlots - 1)), true
}

// IdleContext is a context for plain IPv4 over Ethernet.
func (Descriptors) IdleContext() []byte {
	d := make([]byte, DescriptorSize)
	binary.LittleEndian.PutUint32(d, 14<<macLenShift|20)
	binary.LittleEndian.PutUint32(d[8:], txDEXT|txContext)
	return d
}

// Buffer has the packet buffer's address in the first quadword and the header
// buffer's in the second, of which the legacy format makes nothing.
func (Descriptors) Buffer(packet, header uint64) []byte {
	d := make([]byte, DescriptorSize)
	binary.LittleEndian.PutUint64(d, packet)
	binary.LittleEndian.PutUint64(d[8:], header)
	return d
}

// Done looks for DD.
func (Descriptors) Done(d family.Direction, format uint32, b []byte) bool {
	return status(d, format, b)&descDD != 0
}

// EndOfPacket looks for EOP.
func (Descriptors) EndOfPacket(d family.Direction, format uint32, b []byte) bool {
	if d == family.TX {
		return dword(b, 2)&txEOP != 0
	}
	return status(d, format, b)&rxEOP != 0
}

// Next is never told: there is no coalescing.
func (Descriptors) Next(uint32, []byte) (index uint32, ok bool) { return 0, false }

// SetNext has nothing to change.
func (Descriptors) SetNext(uint32, []byte, uint32) {}

// HandOver clears DD. Linux's driver keys on the length instead and leaves it;
// as a bit of a header buffer's address it is zero anyway.
func (Descriptors) HandOver(format uint32, b []byte) {
	if Legacy(format) {
		b[12] &^= descDD
	} else {
		b[8] &^= descDD
	}
}

// Reports looks for RS.
func (Descriptors) Reports(b []byte) bool { return dword(b, 2)&txRS != 0 }

// Packet is false for context descriptors alone.
func (f Descriptors) Packet(b []byte) bool {
	_, context := f.ContextSlot(b)
	return !context
}

// Fields of SRRCTL: the sizes of a packet's buffer in KiB and of a header's in
// units of 64 bytes (82576 datasheet 8.10.2).
const (
	srrctlPacket      = 0x7f
	srrctlHeader      = 0x3f
	srrctlHeaderShift = 8
	// What a packet's buffer has, in KiB, when SRRCTL gives none: the 82599's
	// reset value, and RCTL.BSIZE as PFs of the 82576 leave it.
	defaultBuffer = 2
)

// Buffers reads the addresses of advanced descriptors with and without header
// buffers; legacy ones have one buffer too.
func (Descriptors) Buffers(format uint32, d []byte) (packet, header family.Span) {
	packet = family.Span{Addr: binary.LittleEndian.Uint64(d), Size: format & srrctlPacket << 10}
	if packet.Size == 0 {
		packet.Size = defaultBuffer << 10
	}
	// DESCTYPE 0 and 1 have one buffer; in all others the second quadword is
	// the header's, its lowest bit being DD.
	if format&srrctlType > 1<<25 {
		header = family.Span{Addr: binary.LittleEndian.Uint64(d[8:]) &^ 1, Size: format >> srrctlHeaderShift & srrctlHeader << 6}
	}
	return packet, header
}

func status(d family.Direction, format uint32, b []byte) uint32 {
	if d == family.TX || Legacy(format) {
		return dword(b, 3)
	}
	return dword(b, 2)
}
