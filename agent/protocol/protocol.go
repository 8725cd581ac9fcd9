// Package protocol tells which parts of CompSC understand each other. Manager,
// agents and device processes are replaced one after the other when CompSC is
// upgraded, and a device process stays what it was for as long as its VM stays
// in its pod: so each says which versions of what they say to each other it
// speaks, and two that have none in common refuse a migration before it begins.
package protocol

import "fmt"

// The versions that this build speaks. Newest is raised with each change that
// parts of the version before would take wrongly; a field that they can do
// without is no such change. Oldest follows so that parts one version apart
// always have one in common.
const (
	Oldest = 1
	Newest = 1
)

// Range is from the oldest to the newest version that a part speaks. The zero
// value is that of a part which does not say: it speaks version 1.
type Range struct{ Oldest, Newest uint32 }

// Own is the range of this build.
func Own() Range { return Range{Oldest, Newest} }

func (r Range) said() Range {
	if r == (Range{}) {
		return Range{1, 1}
	}
	return r
}

// Meets tells whether two parts have a version in common.
func (r Range) Meets(o Range) bool {
	r, o = r.said(), o.said()
	return r.Oldest <= o.Newest && o.Oldest <= r.Newest
}

// String is the range in words, such as "1" or "1 to 2".
func (r Range) String() string {
	if r = r.said(); r.Oldest != r.Newest {
		return fmt.Sprintf("%d to %d", r.Oldest, r.Newest)
	}
	return fmt.Sprint(r.Newest)
}
