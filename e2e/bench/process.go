package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// roles are what this program is when the benchmark starts it again: its first
// argument tells.
var roles = map[string]func(context.Context, []string) error{
	"serve-floor":  serveFloor,
	"serve-bare":   serveBare,
	"serve-device": serveDevice,
	"client":       runClient,
	"answer":       runAnswer,
	"serve-ways":   serveWays,
}

// child is a process that serves until it is stopped.
type child struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// start runs a program and waits until it says that it is ready. A program of
// ours ends when its standard input does, that is, also with the benchmark.
func start(ctx context.Context, program string, args ...string) (*child, error) {
	c := &child{cmd: exec.CommandContext(ctx, program, args...)}
	c.cmd.Stderr = os.Stderr
	c.cmd.WaitDelay = time.Second
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	c.stdin = stdin
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "ready\n" {
		c.stop()
		return nil, fmt.Errorf("%s %s is not ready: it said %q: %w", program, strings.Join(args, " "), line, err)
	}
	return c, nil
}

// startSelf is start for a role of this program.
func startSelf(ctx context.Context, role string, args ...string) (*child, error) {
	return start(ctx, "/proc/self/exe", append([]string{role}, args...)...)
}

// stop ends the process. How it ends tells nothing: it may be killed.
func (c *child) stop() {
	c.stdin.Close()
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// untilStdinEnds is a context for a child of ours.
func untilStdinEnds(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		// Nothing comes; an error is an end as well.
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	return ctx, cancel
}

// ask runs a role with question as its input, and reads its answer.
func ask(ctx context.Context, role string, question, answer any) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", role)
	in, err := json.Marshal(question)
	if err != nil {
		return err
	}
	cmd.Stdin = strings.NewReader(string(in))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w", role, err)
	}
	return json.Unmarshal(out, answer)
}

// processorTime is how long the threads of a process have run, in nanoseconds.
func processorTime(pid int) (float64, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	var sum float64
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // the thread has ended
		}
		ran, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseFloat(ran, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		sum += n
	}
	return sum, nil
}
