package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// accessPlan is what the client is to do.
type accessPlan struct {
	Servers []accessServer
	// Rounds over all servers, each of so many accesses.
	Rounds, Reads, Writes int
	// Processors that client and server run on: one for both, or one each.
	Processors []int
	// Polls has the client look for the answer without sleeping: how long it
	// takes to wake the client is then no part of the round trip.
	Polls bool
}

// accessServer is one to be measured.
type accessServer struct {
	Name, Path string
	PID        int
	// Floor tells that it takes no part in the protocol, Device that there is a
	// VF behind it, which the client is to bring up.
	Floor, Device bool
	Registers     []uint32 // that are read
	Doorbells     []uint32 // that are written
}

// accessResult has, for each server in turn, the samples of each register and
// of each doorbell in turn.
type accessResult struct {
	Servers []serverResult
}

type serverResult struct {
	Reads, Writes []accessSamples
}

// accessSamples are nanoseconds for an access, one value each round: how long
// it took, and how long the server's processors worked for it.
type accessSamples struct{ Took, Worked []float64 }

// runClient is the client's process: it does what QEMU does for a guest, with
// as little as can be of its own.
func runClient(context.Context, []string) error {
	debug.SetGCPercent(-1)
	runtime.LockOSThread()
	// Plans for the same servers.
	var plans []accessPlan
	if err := json.NewDecoder(os.Stdin).Decode(&plans); err != nil {
		return err
	}
	servers := plans[0].Servers
	conns := make([]*rawConn, len(servers))
	for i, s := range servers {
		c, err := dialRaw(s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		conns[i] = c
	}
	results := make([]accessResult, len(plans))
	for p, plan := range plans {
		results[p].init(plan)
		for round := range plan.Rounds + 1 { // the first is to warm up
			for i := range servers {
				if err := results[p].Servers[i].round(conns[i], plan, plan.Servers[i], round > 0); err != nil {
					return fmt.Errorf("%s: %w", servers[i].Name, err)
				}
			}
		}
	}
	return json.NewEncoder(os.Stdout).Encode(results)
}

func (r *accessResult) init(plan accessPlan) {
	for _, s := range plan.Servers {
		r.Servers = append(r.Servers, serverResult{make([]accessSamples, len(s.Registers)), make([]accessSamples, len(s.Doorbells))})
	}
}

// round takes one sample of each of a server's accesses.
func (r *serverResult) round(c *rawConn, plan accessPlan, s accessServer, keep bool) error {
	// Where the scheduler puts two processes that wake each other makes more of
	// a difference than all else.
	client, server := plan.Processors[0], plan.Processors[len(plan.Processors)-1]
	if err := errors.Join(pin(os.Getpid(), client), pin(s.PID, server)); err != nil {
		return err
	}
	c.polls = plan.Polls
	for n, off := range s.Registers {
		err := r.Reads[n].sample(keep, s.PID, plan.Reads, func() {
			for range plan.Reads {
				c.Read(off)
			}
		})
		if err = errors.Join(err, c.err); err != nil {
			return fmt.Errorf("reading: %w", err)
		}
	}
	for n, off := range s.Doorbells {
		err := r.Writes[n].sample(keep, s.PID, plan.Writes, func() {
			for range plan.Writes {
				c.Write(off, 0)
			}
			c.Read(s.Registers[0]) // its answer comes behind them all
		})
		if err = errors.Join(err, c.err); err != nil {
			return fmt.Errorf("writing: %w", err)
		}
	}
	return nil
}

// pin has all threads of a process run on one processor.
func pin(pid, processor int) error {
	var set unix.CPUSet
	set.Set(processor)
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return err
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("pinning process %d to processor %d: %w", pid, processor, err)
		}
	}
	return nil
}

// sample measures do, which makes n accesses.
func (a *accessSamples) sample(keep bool, pid, n int, do func()) error {
	before, err := processorTime(pid)
	if err != nil {
		return err
	}
	began := time.Now()
	do()
	took := time.Since(began)
	after, err := processorTime(pid)
	if err != nil {
		return err
	}
	if keep {
		a.Took = append(a.Took, float64(took.Nanoseconds())/float64(n))
		a.Worked = append(a.Worked, (after-before)/float64(n))
	}
	return nil
}

// rawConn is the client's end of a connection: calls of the kernel and nothing
// else. The first error stays, and later accesses do nothing.
type rawConn struct {
	fd    int
	polls bool // for an answer
	id    uint16
	err   error
	out   [readReply]byte
	in    [1024]byte
}

func dialRaw(s accessServer) (*rawConn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: s.Path}); err != nil {
		return nil, err
	}
	c := &rawConn{fd: fd}
	if s.Floor {
		return c, nil
	}
	body := append([]byte{0, 0, 0, 0}, `{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}`...)
	if err := c.command(cmdVersion, append(body, 0)); err != nil {
		return nil, fmt.Errorf("version negotiation: %w", err)
	}
	if s.Device {
		_, err = c.bringUp()
	}
	return c, err
}

// command sends a message, with descriptors, and takes the answer.
func (c *rawConn) command(cmd uint16, body []byte, fds ...int) error {
	c.id++
	msg := le.AppendUint16(nil, c.id)
	msg = le.AppendUint16(msg, cmd)
	msg = le.AppendUint32(msg, uint32(headerSize+len(body)))
	msg = append(append(msg, make([]byte, 8)...), body...)
	if err := unix.Sendmsg(c.fd, msg, unix.UnixRights(fds...), nil, 0); err != nil {
		return err
	}
	n, err := unix.Read(c.fd, c.in[:])
	if err != nil {
		return err
	}
	if n < headerSize || le.Uint16(c.in[:]) != c.id || le.Uint32(c.in[8:]) != 1 {
		return fmt.Errorf("command %d was answered with % x", cmd, c.in[:n])
	}
	return nil
}

// bringUp gives the VF memory and makes its queues ready for doorbells.
func (c *rawConn) bringUp() (*driver, error) {
	file, ram, err := newRAM()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	body := le.AppendUint32(nil, 32)
	body = le.AppendUint32(body, 3) // readable, writable
	for _, v := range []uint64{0, 0, ramSize} {
		body = le.AppendUint64(body, v)
	}
	if err := c.command(cmdDMAMap, body, int(file.Fd())); err != nil {
		return nil, fmt.Errorf("DMA_MAP: %w", err)
	}
	d := &driver{bar: c, ram: ram}
	return d, errors.Join(d.bringUp(ixgbevf.DefaultQueuePairs), c.err)
}

// message puts a region access together; it has size bytes with its header.
func (c *rawConn) message(cmd uint16, size, flags, off uint32) {
	c.id++
	b := &c.out
	le.PutUint16(b[0:], c.id)
	le.PutUint16(b[2:], cmd)
	le.PutUint32(b[4:], size)
	le.PutUint32(b[8:], flags)
	le.PutUint64(b[headerSize:], uint64(off))
	le.PutUint32(b[headerSize+8:], 0) // BAR0
	le.PutUint32(b[headerSize+12:], 4)
}

// transfer is sendto(2) or recvfrom(2). What the runtime does around a call that
// may block is left out: this process has nothing else to do.
func (c *rawConn) transfer(call uintptr, p []byte, flags uintptr) {
	for len(p) > 0 && c.err == nil {
		n, _, e := unix.RawSyscall6(call, uintptr(c.fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), flags, 0, 0)
		switch {
		case e == unix.EINTR, e == unix.EAGAIN:
		case e != 0:
			c.err = e
		case n == 0:
			c.err = errors.New("the server closed the connection")
		default:
			p = p[n:]
		}
	}
}

// Read is a trapped read of BAR0.
func (c *rawConn) Read(off uint32) uint32 {
	c.message(cmdRegionRead, readRequest, 0, off)
	c.transfer(unix.SYS_SENDTO, c.out[:readRequest], 0)
	flags := 0
	if c.polls {
		flags = unix.MSG_DONTWAIT
	}
	c.transfer(unix.SYS_RECVFROM, c.in[:readReply], uintptr(flags))
	return le.Uint32(c.in[readRequest:])
}

// Write is a posted write to BAR0.
func (c *rawConn) Write(off, v uint32) {
	c.message(cmdRegionWrite, readReply, flagNoReply, off)
	le.PutUint32(c.out[readRequest:], v)
	c.transfer(unix.SYS_SENDTO, c.out[:readReply], 0)
}
