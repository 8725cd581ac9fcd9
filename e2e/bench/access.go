package main

import (
	"context"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// What is asked for: the round trip of a read in microseconds, and posted writes
// in a second.
const (
	readTarget = 4.8
	postTarget = 800_000
)

// measureAccess measures what a guest's access to a register costs, on the
// device process and beside it on servers that do less, all used by one client.
func measureAccess(ctx context.Context, r *report, reference string) error {
	dir, err := os.MkdirTemp("", "compsc-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := func(name string) string { return filepath.Join(dir, name) }
	registers, doorbells := []uint32{ixgbevf.VFLINKS}, []uint32{ixgbevf.VFTDT(0)}
	plan := accessPlan{Rounds: 15, Reads: 1000, Writes: 20000, Servers: []accessServer{
		{Name: "device process", Path: path(device.VFSocket(interfaceSlot)), Device: true,
			Registers: []uint32{ixgbevf.VFLINKS, ixgbevf.VFGPRC}, Doorbells: []uint32{ixgbevf.VFTDT(0), ixgbevf.VFRDT(0)}},
		{Name: "vfio-user server alone", Path: path("bare"), Registers: registers, Doorbells: doorbells},
		{Name: "floor (no protocol)", Path: path("floor"), Floor: true, Registers: registers, Doorbells: doorbells},
	}}
	programs := [][]string{{"serve-device", dir}, {"serve-bare", path("bare")}, {"serve-floor", path("floor")}}
	for i, p := range programs {
		c, err := startSelf(ctx, p[0], p[1:]...)
		if err != nil {
			return err
		}
		defer c.stop()
		plan.Servers[i].PID = c.cmd.Process.Pid
	}
	if reference != "" {
		c, err := start(ctx, reference, path("libvfio-user"))
		if err != nil {
			return err
		}
		defer c.stop()
		plan.Servers = append(plan.Servers, accessServer{Name: "libvfio-user", Path: path("libvfio-user"), PID: c.cmd.Process.Pid,
			Registers: registers, Doorbells: doorbells})
	} else {
		r.Remarks = append(r.Remarks, "libvfio-user was not there to be measured beside: see hack/libvfio-user/build.")
	}
	processors, err := usable()
	if err != nil {
		return err
	}
	// One connection to each server serves both: it is the client that ends last
	// that ends them.
	one, two := plan, plan
	one.Processors, two.Processors = processors[:1], processors[:min(2, len(processors))]
	polling := two
	polling.Polls = len(processors) > 1 // else the server could not run
	plans := []accessPlan{one, two, polling}
	var res []accessResult
	if err := ask(ctx, "client", plans, &res); err != nil {
		return err
	}
	r.addReads(" (one processor)", one, res[0], 0)
	if len(processors) > 1 {
		r.addReads(" (two processors)", two, res[1], 0)
		r.addReads(" (two processors, the client does not sleep)", polling, res[2], readTarget)
	}
	r.addPosts(" (one processor)", one, res[0], 0)
	if len(processors) > 1 {
		r.addPosts(" (two processors)", two, res[1], postTarget)
	}
	return nil
}

// usable lists the processors that this process may run on.
func usable() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, err
	}
	var list []int
	for n := range len(set) * 64 {
		if set.IsSet(n) {
			list = append(list, n)
		}
	}
	return list, nil
}

// Names of the registers and doorbells of the device process.
var (
	registerNames = []string{"plain register", "statistics register"}
	doorbellNames = []string{"transmit doorbell", "receive doorbell"}
)

// addReads reports the reads; those of the product are to be below a limit, if
// that is not 0.
func (r *report) addReads(where string, plan accessPlan, res accessResult, limit float64) {
	section := "Trapped read of 4 bytes, round trip" + where
	last := len(plan.Servers) - 1
	for i, s := range plan.Servers {
		for n, sample := range res.Servers[i].Reads {
			name := s.Name
			if s.Device {
				name += ", " + registerNames[n]
			}
			f := r.add(section, name, "µs", scaled(sample.Took, 1e-3))
			if i < 2 && limit > 0 {
				f.below(limit)
			}
		}
	}
	r.addWork("Server's processor time for such a read"+where, plan, res, func(s serverResult) []accessSamples { return s.Reads }, registerNames)
	for i, s := range plan.Servers[:last] {
		r.add(section, s.Name+" / "+plan.Servers[last].Name, "", ratios(res.Servers[i].Reads[0].Took, res.Servers[last].Reads[0].Took))
	}
}

// addPosts is addReads for posted writes, of which so many in a second are to
// be exceeded.
func (r *report) addPosts(where string, plan accessPlan, res accessResult, limit float64) {
	section := "Posted writes of 4 bytes" + where
	last := len(plan.Servers) - 1
	for i, s := range plan.Servers {
		for n, sample := range res.Servers[i].Writes {
			name := s.Name
			if s.Device {
				name += ", " + doorbellNames[n]
			}
			f := r.addRate(section, name, "/s", rates(sample.Took))
			if i < 2 && limit > 0 {
				f.above(limit)
			}
		}
	}
	r.addWork("Server's processor time for such a write"+where, plan, res, func(s serverResult) []accessSamples { return s.Writes }, doorbellNames)
	for i, s := range plan.Servers[:last] {
		r.addRate(section, s.Name+" / "+plan.Servers[last].Name, "", ratios(res.Servers[last].Writes[0].Took, res.Servers[i].Writes[0].Took))
	}
}

// addWork reports what the accesses took of the servers' processors.
func (r *report) addWork(section string, plan accessPlan, res accessResult, of func(serverResult) []accessSamples, names []string) {
	for i, s := range plan.Servers {
		for n, sample := range of(res.Servers[i]) {
			name := s.Name
			if s.Device {
				name += ", " + names[n]
			}
			r.add(section, name, "µs", scaled(sample.Worked, 1e-3))
		}
	}
}

func scaled(v []float64, by float64) []float64 {
	out := make([]float64, len(v))
	for i := range v {
		out[i] = v[i] * by
	}
	return out
}

// rates turns nanoseconds each into a number in a second.
func rates(ns []float64) []float64 {
	out := make([]float64, len(ns))
	for i := range ns {
		out[i] = 1e9 / ns[i]
	}
	return out
}
