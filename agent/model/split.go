package model

import "encoding/binary"

// Fields of the advanced receive descriptor's dword 0 that tell of a split.
const (
	rxHeaderShift = 21 // HDR_LEN, 10 bits
	rxSPH         = 1 << 31
	// maxHeader is the longest header that HDR_LEN can tell.
	maxHeader = 1<<10 - 1
)

// placement is where the bytes of one frame go.
type placement struct {
	need   int // descriptors
	header int // bytes in the header buffer of the first of them
	// length is what HDR_LEN of the first says; split and overflow are its SPH
	// and HBO.
	length          int
	split, overflow bool
}

// place decides how a frame is laid out. With DESCTYPE 010b only a header that
// was found, and that fits, goes to the header buffer. With 101b that buffer
// is always used: for the header alone if it was found and fits, else for as
// much of the frame as it holds.
func (l layout) place(f *rxFrame) placement {
	var p placement
	if (l.format == descSplit || l.format == descSplitAlways) && l.header > 0 {
		p = l.split(len(f.data), f.h.splitAt(l.splits))
	}
	p.need = max(1, (len(f.data)-p.header+l.buffer-1)/l.buffer)
	return p
}

// split places a frame of length bytes whose header ends at header, which is 0
// if none was found (82599 datasheet, 7.1.10).
func (l layout) split(length, header int) (p placement) {
	always := l.format == descSplitAlways
	switch {
	case always && length <= l.header:
		return placement{header: length, length: length}
	case header == 0 && always:
		return placement{header: l.header, length: l.header}
	case header == 0:
		return placement{}
	case header <= l.header:
		return placement{header: header, length: header, split: true}
	case always:
		return placement{header: l.header, length: header, split: true, overflow: true}
	}
	return placement{length: header, split: true, overflow: true}
}

// splitAt is where the header ends that a frame is split after: that of the
// highest layer it has which is among VFPSRTYPE's bits, 0 for none. A fragment
// has no layer above IP here.
func (h headers) splitAt(kinds uint32) int {
	at := 0
	switch {
	case h.l4End > 0 && (h.proto == protoTCP && kinds&psrtypeTCP != 0 || h.proto == protoUDP && kinds&psrtypeUDP != 0):
		at = h.l4End
	case h.ip > 0 && (h.v6 && kinds&psrtypeIPv6 != 0 || !h.v6 && kinds&psrtypeIPv4 != 0):
		at = h.ipEnd
	case kinds&psrtypeL2 != 0 && h.tagged:
		at = ethHeader + vlanTag
	case kinds&psrtypeL2 != 0:
		at = ethHeader
	}
	if at > maxHeader {
		return 0
	}
	return at
}

// mark notes the split in the first descriptor of a frame.
func (p placement) mark(s *rxSlot) {
	if p.length == 0 {
		return
	}
	info := binary.LittleEndian.Uint32(s.desc[0:]) | uint32(p.length)<<rxHeaderShift
	if p.split {
		info |= rxSPH
	}
	binary.LittleEndian.PutUint32(s.desc[0:], info)
	if p.overflow {
		binary.LittleEndian.PutUint32(s.desc[8:], binary.LittleEndian.Uint32(s.desc[8:])|rxHBO)
	}
}
