package main

import (
	"errors"
	"os"
	"regexp"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/guest/proto"
)

// resetSigns match what the kernel and the Intel VF drivers print when a
// device is reset, hangs or loses its link (drivers/net/ethernet/intel/ixgbevf
// and igbvf, net/sched/sch_generic.c, drivers/pci).
var resetSigns = regexp.MustCompile(`(?i)` + strings.Join([]string{
	`link is down`,
	`tx unit hang`,
	`tx hang`,
	`netdev watchdog`,
	`transmit queue \d+ timed out`,
	`pf still (in reset|resetting)`,
	`reset adapter`,
	`resetting`,
	`reset (failed|done|error)`,
	`vfio.*reset`,
	`hardware error`,
	`pcie bus error`,
}, "|"))

// kernelLog follows the kernel's log from its beginning and keeps the signs of
// resets. It is safe for concurrent use.
type kernelLog struct {
	mu     sync.Mutex
	resets proto.Resets
}

// watchKernelLog follows the log for as long as the guest runs.
func watchKernelLog() (*kernelLog, error) {
	file, err := os.Open("/dev/kmsg")
	if err != nil {
		return nil, err
	}
	w := &kernelLog{}
	go w.follow(file)
	return w, nil
}

// follow reads records: /dev/kmsg gives one per read, EPIPE for records that
// were overwritten before they were read.
func (w *kernelLog) follow(file *os.File) {
	record := make([]byte, 8<<10)
	for {
		n, err := file.Read(record)
		switch {
		case errors.Is(err, unix.EPIPE):
			w.note("records of the kernel log were lost")
		case err != nil:
			w.note("the kernel log cannot be read: " + err.Error())
			return
		default:
			if message, ok := resetSign(string(record[:n])); ok {
				w.note(message)
			}
		}
	}
}

// resetSign returns the message of a record of /dev/kmsg
// (Documentation/ABI/testing/dev-kmsg) if it is a sign of a reset.
func resetSign(record string) (string, bool) {
	_, message, ok := strings.Cut(record, ";")
	if !ok {
		return "", false
	}
	message, _, _ = strings.Cut(message, "\n")
	return message, resetSigns.MatchString(message)
}

func (w *kernelLog) note(message string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.resets.Count++
	w.resets.Lines = append(w.resets.Lines, message)
	if len(w.resets.Lines) > proto.MaxResetLines {
		w.resets.Lines = w.resets.Lines[1:]
	}
}

func (w *kernelLog) signs() *proto.Resets {
	w.mu.Lock()
	defer w.mu.Unlock()
	return &proto.Resets{Count: w.resets.Count, Lines: append([]string{}, w.resets.Lines...)}
}
