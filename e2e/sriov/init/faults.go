package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/sriov/job"
)

// fault matches what the driver of the Intel IOMMU prints of an access that it
// refused (drivers/iommu/intel/dmar.c, dmar_fault_do_one), and gives the
// function that tried it, without the PCI domain.
var fault = regexp.MustCompile(`\[(?:DMA (?:Read|Write)|INTR-REMAP)[^\]]*\] Request device \[([0-9a-f:.]+)\]`)

// readFaults reads the kernel's log from its beginning.
func readFaults() ([]string, error) {
	log, err := readKernelLog()
	if err != nil {
		return nil, err
	}
	names, err := os.ReadFile(job.Faulty)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return faults(log, strings.Fields(string(names))), nil
}

// faults returns the messages of the log that tell of a fault of a function
// that is not in expected.
func faults(log, expected []string) []string {
	var found []string
	for _, message := range log {
		m := fault.FindStringSubmatch(message)
		if m != nil && !slices.Contains(expected, "0000:"+m[1]) {
			found = append(found, message)
		}
	}
	return found
}

// readKernelLog returns the messages that the kernel keeps.
func readKernelLog() ([]string, error) {
	// Not through os.File, which would wait for the next message.
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/kmsg: %w", err)
	}
	defer unix.Close(fd)
	var messages []string
	record := make([]byte, 8<<10)
	for {
		n, err := unix.Read(fd, record)
		switch {
		case err == unix.EAGAIN:
			return messages, nil
		case err == unix.EINTR:
		case err == unix.EPIPE:
			return nil, errors.New("records of the kernel's log were lost: what the IOMMU said is not known")
		case err != nil:
			return nil, fmt.Errorf("/dev/kmsg: %w", err)
		default:
			if _, message, ok := strings.Cut(string(record[:n]), ";"); ok {
				message, _, _ = strings.Cut(message, "\n")
				messages = append(messages, message)
			}
		}
	}
}
