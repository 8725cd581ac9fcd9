// Runs a program in a VM that plays a node with SR-IOV cards, and ends as it
// ended; go test takes it as -exec. An access that the node's IOMMU refused is
// a failure too.
//
// Usage: run [-node DIRECTORY] [-memory MiB] [-hugepages MiB] [-kvm QEMU] [-console FILE] [-limit TIME] [-file NAME=PATH]... PROGRAM [ARGUMENT]...
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/sriov/job"
	"compsc.io/compsc/e2e/sriov/node"
)

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "run-in-node:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func run() (int, error) {
	c := node.Config{Files: map[string]string{}, Output: os.Stdout}
	boots := flag.String("node", artifacts.StockNode, "what the node boots: a directory of the cache, below which are vmlinuz and initramfs.gz")
	flag.IntVar(&c.Memory, "memory", 512, "memory of the node in MiB")
	flag.IntVar(&c.HugePages, "hugepages", 0, "memory of the node in MiB that is for huge pages")
	flag.StringVar(&c.KVM, "kvm", "", "give the node KVM, and run it with this QEMU (see hack/svm-qemu)")
	flag.StringVar(&c.Console, "console", "", "file for the messages of the node's kernel")
	limit := flag.Duration("limit", 10*time.Minute, "time after which the node is killed")
	flag.Func("file", "NAME=PATH: a file to put into "+job.Dir+" of the node", func(s string) error {
		name, path, ok := strings.Cut(s, "=")
		if !ok || name == "" || strings.Contains(name, "/") {
			return errors.New("NAME=PATH is wanted, NAME without a slash")
		}
		c.Files[name] = path
		return nil
	})
	flag.Parse()
	if flag.NArg() == 0 {
		return 2, errors.New("no program to run is named")
	}
	files, err := artifacts.SRIOV(*boots)
	if err != nil {
		return 1, err
	}
	c.QEMU, c.Kernel, c.Initrd = files.QEMU, files.Kernel, files.Initrd
	program := filepath.Base(flag.Arg(0))
	c.Files[program] = flag.Arg(0)
	c.Job = job.Job{
		Args: append([]string{filepath.Join(job.Dir, program)}, flag.Args()[1:]...),
		Env:  []string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp"},
		Dir:  job.Dir,
	}
	for _, v := range os.Environ() {
		if strings.HasPrefix(v, "COMPSC_") || strings.HasPrefix(v, "GOTRACEBACK=") {
			c.Job.Env = append(c.Job.Env, v)
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGQUIT)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *limit)
	defer cancel()
	n, err := node.Start(ctx, c)
	if err != nil {
		return 1, err
	}
	s, err := n.Wait()
	if err != nil {
		return 1, errors.Join(ctx.Err(), err)
	}
	return s.ExitCode, s.Err()
}
