// Package job is what a node VM is told to run, and what it answers.
package job

import "fmt"

// What the VM is given. Dir is where it finds the directory of its job.
const (
	// Dir holds File and what else the job was given.
	Dir = "/job"
	// File is the name of the encoded Job in Dir.
	File = "job.json"
	// DirTag and TreeTag are the tags of the shares: the job's directory, and
	// the root directory with QEMU.
	DirTag, TreeTag = "job", "tree"
	// TreeDir is where the root directory with QEMU is mounted, read-only.
	TreeDir = "/qemu"
	// OutputPort and StatusPort name the virtio ports for what the job's
	// program prints and for the encoded Status.
	OutputPort, StatusPort = "compsc.output", "compsc.status"
	// Faulty is a file in which a program names, one a line, the PCI functions
	// whose faults it provokes on purpose, such as 0000:01:10.0.
	Faulty = "/run/faulty"
)

// Job is a program to run.
type Job struct {
	// Args are the program, as seen inside the VM, and its arguments.
	Args []string
	// Env is its environment.
	Env []string
	// Dir is its working directory.
	Dir string
}

// Status tells how a job ended.
type Status struct {
	// ExitCode is the program's; 128 and more when a signal ended it.
	ExitCode int
	// Faults are the kernel's messages about accesses that the IOMMU refused,
	// but for the functions named in Faulty.
	Faults []string
	// Error tells why the program did not run, or was not watched, empty if all went well.
	Error string
}

// Err is nil if the program ended with 0 and the IOMMU refused nothing.
func (s Status) Err() error {
	switch {
	case s.Error != "":
		return fmt.Errorf("the node failed: %s", s.Error)
	case s.ExitCode != 0:
		return fmt.Errorf("exit status %d", s.ExitCode)
	case len(s.Faults) > 0:
		return fmt.Errorf("%d accesses of devices were refused by the IOMMU, the first: %s", len(s.Faults), s.Faults[0])
	}
	return nil
}
