// Package procstatus tells by what the kernel says of a process (proc_pid_status(5))
// which privileges it has.
package procstatus

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const none = "0000000000000000"

// Unprivileged returns what is said of a process that has no capability and can
// get none, together with what else is wanted.
func Unprivileged(also map[string]string) map[string]string {
	want := map[string]string{"NoNewPrivs": "1", "CapInh": none, "CapPrm": none, "CapEff": none, "CapBnd": none, "CapAmb": none}
	maps.Copy(want, also)
	return want
}

// Read returns the fields in a status file, with single blanks in their values.
func Read(path string) (map[string]string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.Join(strings.Fields(value), " ")
	}
	return fields, nil
}

// Check fails unless the fields have the wanted values in each of the process'
// threads.
func Check(pid int, want map[string]string) error {
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return err
	}
	if len(paths) == 0 {
		return fmt.Errorf("there is no process %d", pid)
	}
	var errs []error
	for _, path := range paths {
		is, err := Read(path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			return err
		}
		for name, want := range want {
			if got, ok := is[name]; !ok || got != want {
				errs = append(errs, fmt.Errorf("%s: %s is %q, want %q", path, name, got, want))
			}
		}
	}
	return errors.Join(errs...)
}
