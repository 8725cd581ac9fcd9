// Package dirty records which pages of a guest's memory its devices write.
package dirty

import (
	"math/bits"
	"sync/atomic"
)

// Size of a page, and the bits of a page's number that each level of the tree
// below takes.
const (
	pageShift = 12
	chunkBits = 15 // 128 MiB of the guest's memory
	tableBits = 12 // 512 GiB
	dirBits   = 12 // 2 PiB
	rootBits  = 64 - pageShift - chunkBits - tableBits - dirBits
)

// The tree of a record: bitmaps at the leaves, made when they are needed.
type (
	chunk [1 << chunkBits / 64]atomic.Uint64
	table [1 << tableBits]atomic.Pointer[chunk]
	dir   [1 << dirBits]atomic.Pointer[table]
	root  [1 << rootBits]atomic.Pointer[dir]
)

// Set records which guest pages were written. Nothing in it waits: it lies in
// the way of every packet. While it records it takes 128 KiB, and 4 KiB for
// each 128 MiB of guest memory that are written to. The zero value does not
// record. Safe for concurrent use.
type Set struct {
	pages atomic.Pointer[root] // nil while nothing is recorded
}

// Start empties the set and begins to record.
func (s *Set) Start() { s.pages.Store(new(root)) }

// Stop ends recording and forgets the set.
func (s *Set) Stop() { s.pages.Store(nil) }

// Add records that n bytes at addr are written.
func (s *Set) Add(addr uint64, n int) {
	r := s.pages.Load()
	if r == nil || n == 0 {
		return
	}
	for p := addr >> pageShift; p <= (addr+uint64(n)-1)>>pageShift; p++ {
		r.add(p)
	}
}

func (r *root) add(page uint64) {
	d := child(&r[page>>(chunkBits+tableBits+dirBits)])
	t := child(&d[page>>(chunkBits+tableBits)%(1<<dirBits)])
	c := child(&t[page>>chunkBits%(1<<tableBits)])
	word, bit := &c[page%(1<<chunkBits)/64], uint64(1)<<(page%64)
	// Devices write the same pages over and over: looking leaves the cache line
	// with everybody who has it.
	if word.Load()&bit == 0 {
		word.Or(bit)
	}
}

// child is what p points to, made if need be.
func child[T any](p *atomic.Pointer[T]) *T {
	if c := p.Load(); c != nil {
		return c
	}
	p.CompareAndSwap(nil, new(T))
	return p.Load()
}

// Addresses lists the start of every page recorded, ascending. What is added
// meanwhile may be missing.
func (s *Set) Addresses() []uint64 {
	r := s.pages.Load()
	if r == nil {
		return nil
	}
	var out []uint64
	for i := range r {
		d := r[i].Load()
		if d == nil {
			continue
		}
		for j := range d {
			t := d[j].Load()
			if t == nil {
				continue
			}
			for k := range t {
				if c := t[k].Load(); c != nil {
					out = c.appendTo(out, (uint64(i)<<dirBits|uint64(j))<<tableBits|uint64(k))
				}
			}
		}
	}
	return out
}

// appendTo appends the addresses of the pages of the chunk of that number.
func (c *chunk) appendTo(out []uint64, number uint64) []uint64 {
	for w := range c {
		for word := c[w].Load(); word != 0; word &= word - 1 {
			page := number<<chunkBits | uint64(w*64+bits.TrailingZeros64(word))
			out = append(out, page<<pageShift)
		}
	}
	return out
}

// Memory is memory as a device reaches it. Both methods move all of p or fail.
type Memory interface {
	ReadAt(addr uint64, p []byte) error
	WriteAt(addr uint64, p []byte) error
}

// Tracked is memory with a record of what is written through it. It is as safe
// for concurrent use as its Memory.
type Tracked struct {
	Memory
	Pages *Set
}

// WriteAt writes memory at a guest-physical address, and records that.
func (t Tracked) WriteAt(addr uint64, p []byte) error {
	// Recorded first: a page recorded in vain costs a byte on the wire, one
	// missed costs the guest's data.
	t.Pages.Add(addr, len(p))
	return t.Memory.WriteAt(addr, p)
}
