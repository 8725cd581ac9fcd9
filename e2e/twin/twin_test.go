package twin

import (
	"errors"
	"flag"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"compsc.io/compsc/agent/family/ixgbevf"
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
	if *oneSeed != 0 || last < enough {
		return // few seeds need not meet everything
	}
	all(t, total)
	if !t.Failed() && (total.Moves < int(last) || total.Vetoes == 0 || total.Refusals == 0 || total.Coalesced < last) {
		t.Errorf("the twins hardly moved: %+v", total)
	}
}

// all fails the test unless the twins have moved with all that there is, so
// that no change of the guest can take it away unseen.
func all(t *testing.T, total Report) {
	t.Helper()
	want := []string{
		"heads write-verify", "heads dummy-advance", "heads shadow-ring",
		"heads rx=dummy-advance", "heads rx=shadow-ring", "heads tx=dummy-advance", "heads tx=shadow-ring",
		"queue pairs 1", "queue pairs 2", "queue pairs 4", "queue pairs 8", "longest ring", "link down",
	}
	for _, m := range ixgbevf.Members() {
		want = append(want, m.Name)
	}
	for _, code := range []int{ixgbevf.API10, ixgbevf.API11, ixgbevf.API12, ixgbevf.API13, ixgbevf.API14, ixgbevf.API15, ixgbevf.API16, ixgbevf.API17} {
		want = append(want, fmt.Sprintf("API code %d", code))
	}
	for _, name := range want {
		if total.Met[name] == 0 {
			t.Errorf("no twin moved with: %s", name)
		}
	}
}
