package protocol

import "testing"

func TestMeets(t *testing.T) {
	for _, tc := range []struct {
		a, b Range
		want bool
	}{
		{Range{1, 1}, Range{1, 1}, true},
		{Range{1, 2}, Range{2, 3}, true},
		{Range{1, 1}, Range{2, 3}, false},
		{Range{}, Range{1, 2}, true},
		{Range{}, Range{2, 2}, false},
		{Range{1, 4}, Range{2, 3}, true},
	} {
		if tc.a.Meets(tc.b) != tc.want || tc.b.Meets(tc.a) != tc.want {
			t.Errorf("%v and %v: %v and %v, want %v", tc.a, tc.b, tc.a.Meets(tc.b), tc.b.Meets(tc.a), tc.want)
		}
	}
}

// Of two builds in a row the newer must still speak what the older does.
func TestOwn(t *testing.T) {
	if before := (Range{Newest - 1, Newest - 1}); Newest > 1 && !Own().Meets(before) || Own().Oldest > Own().Newest {
		t.Errorf("this build speaks %v, not what the one before does", Own())
	}
	if got := (Range{1, 2}).String() + ", " + (Range{}).String(); got != "1 to 2, 1" {
		t.Errorf("in words: %s", got)
	}
}
