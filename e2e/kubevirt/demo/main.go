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

const vmi = "vm"

var macs = []string{"52:54:00:c0:5c:01", "52:54:00:c0:5c:11"}

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
	say("all is up; to look at it from another terminal: export KUBECONFIG=%s", s.Kube.Kubeconfig)
	if err := show(ctx, s, say); err != nil {
		if ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, s.Diagnose(ctx))
		}
		return err
	}
	if keep {
		say("left running; interrupt to end")
		<-ctx.Done()
	}
	return nil
}

// show moves a virtual machine in every way, under traffic.
func show(ctx context.Context, s *kubevirt.Stack, say func(string, ...any)) error {
	say("a virtual machine with two interfaces that name our binding boots, with an unmodified ixgbevf")
	g, err := s.Boot(ctx, vmi, macs, 0)
	if err != nil {
		return err
	}
	node, err := s.NodeOf(ctx, vmi)
	if err != nil {
		return err
	}
	if err := g.StartTraffic(ctx); err != nil {
		return err
	}
	say("it runs on node %s; pings and a checksummed TCP stream from outside go through its first VF", node)
	var moves []*kubevirt.Move
	for _, way := range s.Ways(vmi) {
		say("moving it by %s", way.Name)
		m, err := s.Move(ctx, vmi, g, way.Name, way.Ask)
		if err != nil {
			return err
		}
		moves = append(moves, m)
	}
	st, err := g.StopTraffic(ctx)
	if err != nil {
		return err
	}
	say("the stream carried %d MiB, every byte right; the driver was never reset", (st.Sent+st.Received)>>20)
	for _, m := range moves {
		fmt.Println("          ", m)
	}
	return nil
}
