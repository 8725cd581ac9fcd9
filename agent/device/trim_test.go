package device

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
)

// fileResident is how much of the program's file is resident, in KiB.
func fileResident(t *testing.T) int {
	t.Helper()
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var n int
		if strings.HasPrefix(s.Text(), "RssFile:") {
			if _, err := fmt.Sscanf(s.Text(), "RssFile: %d kB", &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatal("no RssFile in /proc/self/status")
	return 0
}

func TestTrim(t *testing.T) {
	before := fileResident(t)
	if err := trim(); err != nil {
		t.Fatal(err)
	}
	if after := fileResident(t); after >= before {
		t.Errorf("%d KiB of the file resident after trim, %d before", after, before)
	}
}
