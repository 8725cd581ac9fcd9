package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/e2e/harness"
)

// Bounds of resident memory, in MiB.
const (
	maxManagerMiB = 100
	maxAgentMiB   = 60
	maxDeviceMiB  = 40
)

// idleTime is how long the processes are watched.
const idleTime = 5 * time.Second

// Footprint is what the product's processes use when nothing happens: the VM
// runs, without traffic or migration.
type Footprint struct {
	Manager Usage            `json:"manager"`
	Agents  map[string]Usage `json:"agents"`
	Device  Usage            `json:"device"`
}

// Usage is what one process uses.
type Usage struct {
	// ResidentMiB is resident memory without shared memory (RssAnon and
	// RssFile of /proc/PID/status): the guest's RAM, which the device process
	// maps, is not its own.
	ResidentMiB float64 `json:"residentMiB"`
	// IdleCPUPercent is the share of one CPU.
	IdleCPUPercent float64 `json:"idleCPUPercent"`
}

type named struct {
	name string
	Usage
	max float64
}

func (f Footprint) all() []named {
	l := []named{{"manager", f.Manager, maxManagerMiB}}
	for _, node := range []string{harness.NodeA, harness.NodeB} {
		l = append(l, named{"agent " + node, f.Agents[node], maxAgentMiB})
	}
	return append(l, named{"device", f.Device, maxDeviceMiB})
}

// check fails for a process that uses more memory than it may.
func (f Footprint) check() error {
	var errs []error
	for _, p := range f.all() {
		if p.ResidentMiB >= p.max {
			errs = append(errs, fmt.Errorf("the %s has %.1f MiB resident, it must stay below %.0f", p.name, p.ResidentMiB, p.max))
		}
	}
	return errors.Join(errs...)
}

// measure watches the product's processes for a while.
func measure(ctx context.Context, h *harness.Harness) (Footprint, error) {
	device, err := h.StandIn.DevicePID(ctx, client.ObjectKey{Namespace: harness.Namespace, Name: harness.VMI})
	if err != nil {
		return Footprint{}, err
	}
	f := Footprint{Agents: map[string]Usage{}}
	pids := map[string]int{"manager": h.Manager().PID(), "device": device}
	for node := range h.Lab.Nodes {
		pids[node] = h.Agent(node).PID()
	}
	before, start := map[string]time.Duration{}, time.Now()
	for name, pid := range pids {
		if before[name], err = cpuTime(pid); err != nil {
			return f, err
		}
	}
	select {
	case <-time.After(idleTime):
	case <-ctx.Done():
		return f, ctx.Err()
	}
	elapsed := time.Since(start)
	for name, pid := range pids {
		after, err := cpuTime(pid)
		if err != nil {
			return f, err
		}
		rss, err := resident(pid)
		if err != nil {
			return f, err
		}
		u := Usage{ResidentMiB: rss, IdleCPUPercent: 100 * float64(after-before[name]) / float64(elapsed)}
		switch name {
		case "manager":
			f.Manager = u
		case "device":
			f.Device = u
		default:
			f.Agents[name] = u
		}
	}
	return f, nil
}

// clockTick is the unit of times in /proc, USER_HZ, which is 100 on every
// Linux architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// cpuTime is utime and stime of /proc/PID/stat (proc_pid_stat(5)).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// Fields count from behind the command's name, which is the second.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: unexpected form", pid)
	}
	var sum time.Duration
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
		}
		sum += time.Duration(n) * clockTick
	}
	return sum, nil
}

// resident is RssAnon and RssFile of /proc/PID/status, in MiB.
func resident(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	var kib int64
	found := 0
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if name != "RssAnon" && name != "RssFile" {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/%d/status: %w", pid, err)
		}
		kib += n
		found++
	}
	if found != 2 {
		return 0, fmt.Errorf("/proc/%d/status: no resident memory in it", pid)
	}
	return float64(kib) / 1024, nil
}
