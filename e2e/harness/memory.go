package harness

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// pageSize is the guest's and QEMU's.
const pageSize = 4096

// RAMReport is what a comparison of the RAM of two QEMUs found, in pages.
type RAMReport struct {
	// Pages is the size of the RAM; Used pages are not all zero on the source.
	Pages, Used int
	// Different are the numbers of those that differ, ascending: their
	// offset in the RAM, which is the guest-physical address as long as the
	// guest has less than 2 GiB.
	Different []int
}

// CompareRAM compares the RAM of two QEMU processes page by page. Neither may
// run its VM. The RAM is a memfd (memory-backend-memfd), which is read behind
// QEMU's back.
func CompareRAM(source, target int) (RAMReport, error) {
	a, err := openRAM(source)
	if err != nil {
		return RAMReport{}, fmt.Errorf("source: %w", err)
	}
	defer a.Close()
	b, err := openRAM(target)
	if err != nil {
		return RAMReport{}, fmt.Errorf("target: %w", err)
	}
	defer b.Close()
	return comparePages(a, b)
}

// openRAM opens the one memfd of a QEMU process.
func openRAM(pid int) (*os.File, error) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		// QEMU's display and migration code have memfds of other names.
		if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "/memfd:memory-backend-memfd") {
			return os.Open(fd)
		}
	}
	return nil, fmt.Errorf("process %d has no memfd of a memory backend among its %d descriptors", pid, len(fds))
}

// comparePages compares two images of equal size, whole pages each.
func comparePages(a, b io.Reader) (RAMReport, error) {
	var r RAMReport
	zero := make([]byte, pageSize)
	x, y := make([]byte, 256*pageSize), make([]byte, 256*pageSize)
	for {
		n, err := io.ReadFull(a, x)
		m, merr := io.ReadFull(b, y)
		if n != m || n%pageSize != 0 {
			return r, fmt.Errorf("page %d: %d bytes follow on the source, %d on the target: not one size, or not whole pages", r.Pages, n, m)
		}
		for at := 0; at < n; at += pageSize {
			p, q := x[at:at+pageSize], y[at:at+pageSize]
			if !bytes.Equal(p, q) {
				r.Different = append(r.Different, r.Pages)
			}
			if !bytes.Equal(p, zero) {
				r.Used++
			}
			r.Pages++
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return r, nil
		}
		if err := errors.Join(err, merr); err != nil {
			return r, err
		}
	}
}
