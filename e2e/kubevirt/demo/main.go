// Demo shows this project on real Kubernetes and KubeVirt on one machine: see
// package e2e/kubevirt. `make demo-kubevirt` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/kubevirt"
)

func main() {
	keep := flag.Bool("keep", false, "leave everything running until interrupted")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, keep bool) (err error) {
	a, err := artifacts.FindReal()
	if err != nil {
		return err
	}
	start := time.Now()
	say := func(format string, args ...any) {
		fmt.Printf("%6.1f s  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	s, err := kubevirt.Start(ctx, kubevirt.Options{Artifacts: a, Progress: func(what string) { say("%s", what) }})
	if err != nil {
		return err
	}
	defer func() {
		say("taking everything down")
		err = errors.Join(err, s.Close())
	}()
	say("up; KUBECONFIG=%s", s.Kube.Kubeconfig)
	if keep {
		<-ctx.Done()
	}
	return nil
}
