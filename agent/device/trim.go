package device

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// trim gives back the memory that only the start needed: the heap's free
// pages, and the program's own read-only pages, which come back from the page
// cache when they are used again. The binary is one for all of CompSC's
// processes, and initialising the parts that this one never uses touches most
// of it; with one device process for each VM that adds up.
func trim() error {
	debug.FreeOSMemory()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var start, end uintptr
		var perms string
		if n, _ := fmt.Sscanf(s.Text(), "%x-%x %s", &start, &end, &perms); n != 3 {
			continue
		}
		// Only what was never written: a page that was is not in the file.
		if strings.HasSuffix(s.Text(), " "+exe) && (perms == "r-xp" || perms == "r--p") {
			if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED); errno != 0 {
				return fmt.Errorf("madvise: %w", errno)
			}
		}
	}
	return nil
}
