package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPage(t *testing.T) {
	file := filepath.Join(t.TempDir(), "reference", "page.md")
	if err := run([]string{file}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	page := string(b)
	for _, want := range []string{
		"| 0x0000 | VFCTRL | write | replay | 0x04000000 | all | only the",
		"| 0x0100 | VTEICR | read, read clears, write 1 clears | derive | 0x00000007 | all |",
		"| 0x0820 + 0x04 n, n = 0..2 | VTEITR(n) | read, write | copy | 0x80000ff8, of which 0x80000000 modifies the write | all |",
		"| 0x1028 + 0x40 n, n = 0..7 | VFRXDCTL(n) | read, write | copy | 0x46000000 | 82599 |",
		"| 0x1028 + 0x40 n, n = 0..7 | VFRXDCTL(n) | read, write | copy | 0x4600bfff | X540, X550, X552 (X550EM_x), X553 (X550EM_a) |",
		"| 0x101c | VFGPRC | read | emulate | - | all |",
		"| 0x3200 + 0x04 n, n = 0..15 | VFRETA(n) | read, write | copy | 0xffffffff | X550, X552 (X550EM_x), X553 (X550EM_a) |",
		"| 8086:15c5 | X553 (X550EM_a) | yes | yes |",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	if run(nil) == nil || run([]string{filepath.Join(file, "below", "a file")}) == nil {
		t.Error("wrote nowhere without an error")
	}
}

func TestIrregularArray(t *testing.T) {
	if (&row{offsets: []uint32{0, 4, 8}}).regular() != nil || (&row{offsets: []uint32{0, 4, 12}}).regular() == nil {
		t.Error("regular does not tell arrays with equal distances from others")
	}
}
