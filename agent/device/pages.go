package device

import (
	"maps"
	"math/bits"
	"slices"
	"sync"
)

const (
	pageShift  = 12
	chunkPages = 4096 // pages in one chunk of the bitmap: 16 MiB of guest RAM
)

// pageSet records which guest pages the device has written. It costs 512
// bytes for each 16 MiB of guest RAM in use. Safe for concurrent use.
type pageSet struct {
	mu     sync.Mutex
	on     bool
	chunks map[uint64]*[chunkPages / 64]uint64
}

// start empties the set and begins to record.
func (s *pageSet) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on = true
	s.chunks = map[uint64]*[chunkPages / 64]uint64{}
}

// stop ends recording and forgets the set.
func (s *pageSet) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on = false
	s.chunks = nil
}

// add records that n bytes at addr were written.
func (s *pageSet) add(addr uint64, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.on || n == 0 {
		return
	}
	for p := addr >> pageShift; p <= (addr+uint64(n)-1)>>pageShift; p++ {
		c := s.chunks[p/chunkPages]
		if c == nil {
			c = new([chunkPages / 64]uint64)
			s.chunks[p/chunkPages] = c
		}
		c[p%chunkPages/64] |= 1 << (p % 64)
	}
}

// addresses lists the start of every page recorded, ascending.
func (s *pageSet) addresses() []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []uint64
	for _, i := range slices.Sorted(maps.Keys(s.chunks)) {
		for w, word := range s.chunks[i] {
			for ; word != 0; word &= word - 1 {
				p := i*chunkPages + uint64(w*64+bits.TrailingZeros64(word))
				out = append(out, p<<pageShift)
			}
		}
	}
	return out
}
