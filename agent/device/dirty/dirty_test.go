package dirty

import (
	"slices"
	"sync"
	"testing"
)

func TestSet(t *testing.T) {
	type write struct {
		addr uint64
		n    int
	}
	const chunk = 1 << (pageShift + chunkBits)
	for name, c := range map[string]struct {
		writes []write
		want   []uint64
	}{
		"nothing":                  {nil, nil},
		"empty write":              {[]write{{0x1000, 0}}, nil},
		"one byte":                 {[]write{{0x1fff, 1}}, []uint64{0x1000}},
		"whole page":               {[]write{{0x2000, 4096}}, []uint64{0x2000}},
		"across a page boundary":   {[]write{{0x2fff, 2}}, []uint64{0x2000, 0x3000}},
		"same page twice":          {[]write{{0x5000, 16}, {0x5800, 16}}, []uint64{0x5000}},
		"page zero":                {[]write{{0, 1}}, []uint64{0}},
		"ascending across chunks":  {[]write{{5 * chunk, 1}, {0x3000, 1}}, []uint64{0x3000, 5 * chunk}},
		"across a chunk boundary":  {[]write{{chunk - 1, 2}}, []uint64{chunk - 4096, chunk}},
		"across all levels":        {[]write{{1<<60 + chunk - 1, 2}, {1 << 50, 1}, {1 << 40, 1}}, []uint64{1 << 40, 1 << 50, 1<<60 + chunk - 4096, 1<<60 + chunk}},
		"last page of the address": {[]write{{^uint64(0) - 4095, 4096}}, []uint64{^uint64(0) - 4095}},
	} {
		t.Run(name, func(t *testing.T) {
			var s Set
			s.Start()
			for _, w := range c.writes {
				s.Add(w.addr, w.n)
			}
			if got := s.Addresses(); !slices.Equal(got, c.want) {
				t.Errorf("Addresses() = %#x, want %#x", got, c.want)
			}
		})
	}
}

func TestSetRecordsOnlyWhenStarted(t *testing.T) {
	var s Set
	s.Add(0x1000, 1)
	if got := s.Addresses(); got != nil {
		t.Errorf("before start: %#x", got)
	}
	s.Start()
	s.Add(0x1000, 1)
	s.Start()
	if got := s.Addresses(); got != nil {
		t.Errorf("a second start kept %#x", got)
	}
	s.Add(0x2000, 1)
	s.Stop()
	s.Add(0x3000, 1)
	if got := s.Addresses(); got != nil {
		t.Errorf("after stop: %#x", got)
	}
}

func TestSetConcurrent(t *testing.T) {
	var s Set
	s.Start()
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			for p := range uint64(1000) {
				s.Add((g*1000+p)<<pageShift, 1)
			}
		})
	}
	wg.Wait()
	if n := len(s.Addresses()); n != 4000 {
		t.Errorf("%d pages, want 4000", n)
	}
}

func BenchmarkSetAdd(b *testing.B) {
	var s Set
	s.Start()
	for i := 0; b.Loop(); i++ {
		s.Add(uint64(i%65536)<<pageShift, 1500)
	}
}
