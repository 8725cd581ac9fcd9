package harness

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestComparePages(t *testing.T) {
	image := func(pages int, set ...int) []byte {
		b := make([]byte, pages*pageSize)
		for _, at := range set {
			b[at]++
		}
		return b
	}
	last := 300*pageSize - 1
	tests := map[string]struct {
		a, b []byte
		want RAMReport
		fail bool
	}{
		"equal":           {image(300, 5, last), image(300, 5, last), RAMReport{Pages: 300, Used: 2}, false},
		"first and last":  {image(300, 0, last), image(300), RAMReport{Pages: 300, Used: 2, Different: []int{0, 299}}, false},
		"only the target": {image(300), image(300, 257*pageSize), RAMReport{Pages: 300, Different: []int{257}}, false},
		"a page short":    {image(300), image(299), RAMReport{}, true},
		"half a page":     {image(300)[:last], image(300)[:last], RAMReport{}, true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := comparePages(bytes.NewReader(test.a), bytes.NewReader(test.b))
			if (err != nil) != test.fail {
				t.Fatalf("error %v, want one: %v", err, test.fail)
			}
			if diff := cmp.Diff(test.want, got); diff != "" && !test.fail {
				t.Errorf("report (-want +got):\n%s", diff)
			}
		})
	}
}
