package stream

import (
	"bytes"
	"encoding/binary"
)

// sequence is an endless pseudo-random sequence of bytes of which any part can
// be had without what precedes it: 64-bit little-endian words, each of them
// the SplitMix64 output function (Steele, Lea, Flood, OOPSLA 2014) of the
// word's index. Both directions of a stream use different seeds, so that an
// echo of one's own bytes is not taken for the peer's.
type sequence struct{ seed uint64 }

const wordSize = 8

func (q sequence) word(i uint64) uint64 {
	z := q.seed + (i+1)*0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// fill puts the bytes from offset on into p.
func (q sequence) fill(p []byte, offset uint64) {
	if skip := offset % wordSize; skip != 0 && len(p) > 0 {
		var head [wordSize]byte
		binary.LittleEndian.PutUint64(head[:], q.word(offset/wordSize))
		n := copy(p, head[skip:])
		p, offset = p[n:], offset+uint64(n)
	}
	i := offset / wordSize
	for ; len(p) >= wordSize; p, i = p[wordSize:], i+1 {
		binary.LittleEndian.PutUint64(p, q.word(i))
	}
	if len(p) > 0 {
		var tail [wordSize]byte
		binary.LittleEndian.PutUint64(tail[:], q.word(i))
		copy(p, tail[:])
	}
}

// firstDifference is the first index at which got and want, equally long,
// differ, or -1.
func firstDifference(got, want []byte) int {
	if bytes.Equal(got, want) {
		return -1
	}
	for i := range got {
		if got[i] != want[i] {
			return i
		}
	}
	return -1
}
