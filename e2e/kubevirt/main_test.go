//go:build e2ekubevirt

package kubevirt

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"compsc.io/compsc/e2e/artifacts"
)

// stack is what all tests work with, one after the other.
var stack *Stack

// startTimeout bounds the start of everything.
const startTimeout = 20 * time.Minute

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	start := time.Now()
	say := func(what string) { fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", time.Since(start).Seconds(), what) }
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	a, err := artifacts.FindReal()
	if err != nil {
		say(err.Error())
		return 1
	}
	startCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	stack, err = Start(startCtx, Options{Artifacts: a, Progress: say})
	if err != nil {
		say(err.Error())
		return 1
	}
	done := make(chan int, 1)
	go func() { done <- m.Run() }()
	code := 1
	select {
	case code = <-done:
		if code != 0 {
			say("what there is after the failure:")
			fmt.Fprintln(os.Stderr, stack.Diagnose(ctx))
		}
	case <-ctx.Done():
		say("interrupted")
	}
	say("taking everything down")
	if err := stack.Close(); err != nil {
		say(err.Error())
		code = 1
	}
	left, err := stack.Lab.Left()
	if err != nil || len(left) > 0 {
		say(fmt.Sprintf("not taken down: %s (%v)", strings.Join(left, ", "), err))
		code = 1
	}
	say("done")
	return code
}

// testContext ends with the test.
func testContext(t *testing.T, bound time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	t.Cleanup(cancel)
	return ctx
}
