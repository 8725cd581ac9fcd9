package vfiouser

import "testing"

// TestSpin shows what the outcomes make of the trials: messages that come in
// time are always looked for, others ever more rarely, down to a bound, and one
// that does come in time makes up for all before it.
func TestSpin(t *testing.T) {
	trials := func(s *spin, messages int, found bool) int {
		n := 0
		for range messages {
			if s.try() {
				n++
				s.ended(found)
			}
		}
		return n
	}
	var s spin
	if n := trials(&s, 100, true); n != 100 {
		t.Errorf("%d trials for 100 messages that come in time", n)
	}
	// After 1, 3, 7, ..., 1023, 1024, 1024 ... more messages each.
	if n := trials(&s, 2047, false); n != 11 {
		t.Errorf("%d trials for 2047 messages that come late, want 11", n)
	}
	if n := trials(&s, 100*(maxSkip+1), false); n < 99 || n > 101 {
		t.Errorf("%d trials for 100 times %d messages that come late", n, maxSkip+1)
	}
	trials(&s, maxSkip, false)
	for !s.try() {
	}
	s.ended(true)
	if n := trials(&s, 10, true); n != 10 {
		t.Errorf("%d trials for 10 messages in time after many that were late", n)
	}
	if n := trials(&spin{off: true}, 10, true); n != 0 {
		t.Errorf("%d trials where there is one processor", n)
	}
}
