package model

import (
	"fmt"
	"sync"
)

// Scratch is memory of the host that the VF reaches by DMA at addresses the
// guest does not have, as an IOVA range of the host's would be. Its methods
// are safe for concurrent use.
type Scratch struct {
	addr uint64
	mu   sync.Mutex
	data []byte
}

// NewScratch returns size bytes of zeroed memory at addr, which is to lie
// beyond all that can be the guest's RAM. What is never touched costs nothing.
func NewScratch(addr uint64, size int) *Scratch {
	return &Scratch{addr: addr, data: make([]byte, size)}
}

// Range is where the VF finds it, and its size in bytes.
func (s *Scratch) Range() (addr uint64, size int) { return s.addr, len(s.data) }

// contains tells whether n bytes at addr are all in it.
func (s *Scratch) contains(addr uint64, n int) bool {
	return addr >= s.addr && addr-s.addr <= uint64(len(s.data)) && uint64(n) <= uint64(len(s.data))-(addr-s.addr)
}

// ReadAt fills p from addr; it fails when any of it lies outside.
func (s *Scratch) ReadAt(addr uint64, p []byte) error { return s.access(addr, p, false) }

// WriteAt writes p to addr; it fails when any of it would lie outside.
func (s *Scratch) WriteAt(addr uint64, p []byte) error { return s.access(addr, p, true) }

func (s *Scratch) access(addr uint64, p []byte, write bool) error {
	if !s.contains(addr, len(p)) {
		return fmt.Errorf("%d bytes at %#x are outside of the scratch memory", len(p), addr)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if at := s.data[addr-s.addr:]; write {
		copy(at, p)
	} else {
		copy(p, at)
	}
	return nil
}

// Over returns mem with the scratch memory laid over it: the Memory to make
// the VF with.
func (s *Scratch) Over(mem Memory) Memory { return overlay{s, mem} }

type overlay struct {
	scratch *Scratch
	mem     Memory
}

func (o overlay) at(addr uint64, p []byte) Memory {
	if o.scratch.contains(addr, len(p)) {
		return o.scratch
	}
	return o.mem
}

func (o overlay) ReadAt(addr uint64, p []byte) error  { return o.at(addr, p).ReadAt(addr, p) }
func (o overlay) WriteAt(addr uint64, p []byte) error { return o.at(addr, p).WriteAt(addr, p) }
