package twin

import (
	"errors"
	"flag"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
)

var (
	oneSeed = flag.Uint64("seed", 0, "run this seed alone")
	seeds   = flag.Uint64("seeds", 400, "run seeds 1 to this")
)

// show fails the test with what told the twins apart.
func show(t *testing.T, err error) {
	t.Helper()
	var d *DifferenceError
	if errors.As(err, &d) {
		t.Errorf("%v\n%s", d, d.Log)
		return
	}
	t.Error(err)
}

// TestTwin runs many seeds, or one.
func TestTwin(t *testing.T) {
	first, last := uint64(1), *seeds
	if *oneSeed != 0 {
		first, last = *oneSeed, *oneSeed
	}
	var (
		next   atomic.Uint64
		failed atomic.Uint64
		mu     sync.Mutex
		total  Report
		group  sync.WaitGroup
	)
	next.Store(first)
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for {
				seed := next.Add(1) - 1
				if seed > last || failed.Load() > 3 {
					return
				}
				report, err := Run(t.Context(), Options{Seed: seed})
				mu.Lock()
				total.Add(report)
				mu.Unlock()
				if err != nil {
					failed.Add(1)
					show(t, err)
				}
			}
		})
	}
	group.Wait()
	t.Logf("%d seeds: %+v", last-first+1, total)
	if !t.Failed() && *oneSeed == 0 && (total.Moves < int(last) || total.Vetoes == 0 || total.Refusals == 0 || total.Coalesced < last) {
		t.Errorf("the twins hardly moved: %+v", total)
	}
}
