// Command bench measures what CompSC costs: the steps of a switchover, the
// guest's accesses to its VF's registers, and what recording and page tracking
// take from its packet rate. It prints the figures and writes them as JSON.
//
// What is compared is measured in one run, in turns, so that what else the
// machine does falls on both alike; figures of different runs compare badly.
// Servers and the client that uses them are processes of their own, as QEMU and
// a device process are.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"time"
)

// runLimit bounds a run.
const runLimit = 3 * time.Minute

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, runLimit)
	defer cancel()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		if role, ok := roles[args[0]]; ok {
			return role(ctx, args[1:])
		}
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	out := flags.String("out", "out/bench.json", "`file` that the figures are written to")
	reference := flags.String("libvfio-user", "", "`program` that serves a device with libvfio-user; without it there is no such comparison")
	only := flags.String("only", "", "measure only this: switchover, access or overhead")
	strict := flags.Bool("strict", false, "fail when a target is missed")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	r := newReport()
	for _, part := range []struct {
		name    string
		measure func(context.Context, *report) error
	}{
		{"switchover", measureSwitchover},
		{"access", func(ctx context.Context, r *report) error { return measureAccess(ctx, r, *reference) }},
		{"overhead", measureOverhead},
	} {
		if *only != "" && *only != part.name {
			continue
		}
		if err := part.measure(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	r.print(os.Stdout)
	if err := r.write(*out); err != nil {
		return err
	}
	fmt.Printf("\nWritten to %s.\n", *out)
	if missed, targets := r.missed(); *strict && len(missed) > 0 {
		return fmt.Errorf("%d of %d targets missed: %s", len(missed), targets, strings.Join(missed, "; "))
	}
	return nil
}
