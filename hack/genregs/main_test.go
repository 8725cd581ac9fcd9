package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "docs", "reference")
	if err := run([]string{dir}); err != nil {
		t.Fatal(err)
	}
	for name, lines := range pages {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range lines {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s lacks %q", name, want)
			}
		}
	}
	if run(nil) == nil || run([]string{filepath.Join(dir, "ixgbevf-registers.md", "below")}) == nil {
		t.Error("wrote nowhere without an error")
	}
}

// pages has lines that must be on each page.
var pages = map[string][]string{
	"ixgbevf-registers.md": {
		"| 0x0000 | VFCTRL | write | replay | 0x04000000 | all | only the",
		"| 0x0100 | VTEICR | read, read clears, write 1 clears | derive | 0x00000007 | all |",
		"| 0x0820 + 0x04 n, n = 0..2 | VTEITR(n) | read, write | copy | 0x80000ff8, of which 0x80000000 modifies the write | all |",
		"| 0x1028 + 0x40 n, n = 0..7 | VFRXDCTL(n) | read, write | copy | 0x46000000 | 82599 |",
		"| 0x1028 + 0x40 n, n = 0..7 | VFRXDCTL(n) | read, write | copy | 0x4600bfff | X540, X550, X552 (X550EM_x), X553 (X550EM_a) |",
		"| 0x101c | VFGPRC | read | emulate | - | all |",
		"| 0x3200 + 0x04 n, n = 0..15 | VFRETA(n) | read, write | copy | 0xffffffff | X550, X552 (X550EM_x), X553 (X550EM_a) |",
		"| 8086:15c5 | X553 (X550EM_a) | yes | yes |",
	},
	"igbvf-registers.md": {
		"| 8086:10ca | 82576 | 2 | no |",
		"| 8086:1520 | I350 | 1 | yes |",
		"| 0x0c40 | V2PMAILBOX | read, read clears, write | replay | 0x00000007 | all | operations",
		"| 0x280c | SRRCTL(0) | read, write | copy | 0xcff03f7f | I350 |",
		"| 0x3818 + 0x100 n, n = 0..1 | TDT(n) | read, write | copy | 0x0000ffff | all |",
	},
}

func TestIrregularArray(t *testing.T) {
	if (&row{offsets: []uint32{0, 4, 8}}).regular() != nil || (&row{offsets: []uint32{0, 4, 12}}).regular() == nil {
		t.Error("regular does not tell arrays with equal distances from others")
	}
}
