package intel

import (
	"encoding/binary"
	"fmt"
)

// Reader takes values, big-endian, off the front of the encoding of a record.
// After the first failure it returns zeros. Not safe for concurrent use.
type Reader struct {
	b   []byte
	err error
}

// NewReader reads b, which it does not change.
func NewReader(b []byte) *Reader { return &Reader{b: b} }

// Err is the first failure.
func (r *Reader) Err() error { return r.err }

// End is the first failure, and one if anything is left.
func (r *Reader) End() error {
	if len(r.b) > 0 {
		r.Fail("%d bytes too many", len(r.b))
	}
	return r.err
}

// Fail notes a failure if it is the first.
func (r *Reader) Fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

// Take takes n bytes.
func (r *Reader) Take(n int) []byte {
	if len(r.b) < n {
		r.Fail("ends %d bytes early", n-len(r.b))
	}
	if r.err != nil {
		return make([]byte, n)
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

// Byte takes one byte.
func (r *Reader) Byte() byte { return r.Take(1)[0] }

// Word takes 4 bytes.
func (r *Reader) Word() uint32 { return binary.BigEndian.Uint32(r.Take(4)) }

// Short takes 2 bytes.
func (r *Reader) Short() uint16 { return binary.BigEndian.Uint16(r.Take(2)) }

// MAC takes an address.
func (r *Reader) MAC() MAC { return MAC(r.Take(6)) }

// Flag takes a byte that is 0 or 1.
func (r *Reader) Flag() bool {
	b := r.Byte()
	if b > 1 {
		r.Fail("a flag is %d, want 0 or 1", b)
	}
	return b == 1
}

// Length takes the length of a list of at most limit entries, of 2 bytes; what
// names them.
func (r *Reader) Length(what string, limit int) int {
	n := int(r.Short())
	if n > limit {
		r.Fail("%d %s, at most %d are possible", n, what, limit)
	}
	if r.err != nil {
		return 0
	}
	return n
}

// Shorts takes a list as AppendShorts writes it, of at most limit entries.
func (r *Reader) Shorts(what string, limit int) []uint16 {
	list := make([]uint16, r.Length(what, limit))
	for i := range list {
		list[i] = r.Short()
	}
	return list
}

// AppendShorts appends a list with its length.
func AppendShorts(b []byte, list []uint16) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(list)))
	for _, v := range list {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return b
}
