package twin

import (
	"encoding/binary"
	"math/rand/v2"
)

// program is a source of random numbers: two bytes decide each, for as long as
// there are any.
type program struct {
	rest []byte
	// others are the bits that bytes do not decide, and the numbers after the end.
	others rand.PCG
}

// Uint64 has the bytes at both ends, where a choice among few is taken from.
func (p *program) Uint64() uint64 {
	other := p.others.Uint64()
	if p.ended() {
		return other
	}
	n := uint64(binary.BigEndian.Uint16(p.rest))
	p.rest = p.rest[2:]
	return n<<48 | other>>16&^0xffff | n
}

func (p *program) ended() bool { return len(p.rest) < 2 }
