package vfiouser

import (
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a connected unix stream socket that is read by one goroutine which
// sleeps in the kernel, not in the runtime's poller: the peer's write wakes it
// directly, and a guest's processor waits for each of its reads until then.
// While messages follow one another closely it does not sleep at all.
//
// recv is for one goroutine, and so is send; close may be called by any, at any
// time and more than once.
type socket struct {
	file *os.File // counts its users: the descriptor is closed after the last
	raw  syscall.RawConn
	// closed tells an end that was made here from the peer's.
	closed atomic.Bool

	// Arguments and results of the calls made through raw, kept here so that a
	// message costs no allocation.
	in, out        transfer
	doRecv, doSend func(fd uintptr) bool
	doPoll         func(fd uintptr) bool
	pollFor        time.Duration
	recvBy         time.Time // the deadline of doRecv; zero means that it waits for ever
	spin           spin      // of doRecv
}

// transfer is one call of recvmsg or sendmsg.
type transfer struct {
	p, oob         []byte
	n, oobn, flags int
	err            error
}

// recvmsg tells whether there was something to receive.
func (t *transfer) recvmsg(fd, flags int) bool {
	t.n, t.oobn, t.flags, _, t.err = unix.Recvmsg(fd, t.p, t.oob, unix.MSG_CMSG_CLOEXEC|flags)
	return t.err != unix.EINTR && t.err != unix.EAGAIN
}

// recvBy receives until the deadline. What came before it is received, however
// late this process looks.
func (t *transfer) recvBy(fd int, deadline time.Time) {
	for !t.recvmsg(fd, unix.MSG_DONTWAIT) {
		left := time.Until(deadline)
		if left <= 0 {
			t.err = os.ErrDeadlineExceeded
			return
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			t.err = err
			return
		}
	}
}

// newSocket takes ownership of c, also on error.
func newSocket(c *net.UnixConn) (*socket, error) {
	// Closing c takes the socket out of the poller, where its duplicate, which
	// is in blocking mode, does not enter.
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("vfio-user connection: %w", err)
	}
	fd := -1
	var e error
	err = raw.Control(func(own uintptr) {
		if fd, e = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0); e == nil {
			e = unix.SetNonblock(fd, false)
		}
	})
	if err == nil {
		err = e
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("vfio-user connection: taking the socket over: %w", err)
	}
	s := &socket{file: os.NewFile(uintptr(fd), "vfio-user connection")}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.file.Close()
		return nil, fmt.Errorf("vfio-user connection: %w", err)
	}
	s.spin = newSpin()
	s.doRecv = func(fd uintptr) bool {
		if !s.recvBy.IsZero() {
			s.in.recvBy(int(fd), s.recvBy)
			return true
		}
		if s.spin.try() {
			found := false
			for until := time.Now().Add(spinWindow); !found && time.Now().Before(until); {
				found = s.in.recvmsg(int(fd), unix.MSG_DONTWAIT)
			}
			if s.spin.ended(found); found {
				return true
			}
		}
		for !s.in.recvmsg(int(fd), 0) {
		}
		return true
	}
	s.doSend = func(fd uintptr) bool {
		t := &s.out
		t.n, t.err = unix.SendmsgN(int(fd), t.p, t.oob, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return true
	}
	s.doPoll = func(fd uintptr) bool {
		_, s.out.err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(s.pollFor.Milliseconds())+1)
		return true
	}
	return s, nil
}

// recv waits for bytes, until the deadline if that is not zero: it then fails
// with os.ErrDeadlineExceeded. It returns how many came, and how many bytes of
// control data with them; 0 bytes mean that the peer has closed the connection.
// It fails with os.ErrClosed when it was closed here. Descriptors that do not fit
// into oob are closed by the kernel, and flags has MSG_CTRUNC.
func (s *socket) recv(p, oob []byte, deadline time.Time) (n, oobn, flags int, err error) {
	s.in, s.recvBy = transfer{p: p, oob: oob}, deadline
	if err := s.raw.Read(s.doRecv); err != nil {
		return 0, 0, 0, err
	}
	if s.in.n == 0 && s.closed.Load() {
		return 0, 0, 0, os.ErrClosed
	}
	return s.in.n, s.in.oobn, s.in.flags, s.in.err
}

// send sends all of p, with oob at its first byte, within the timeout. After an
// error part of it may have been sent.
func (s *socket) send(p, oob []byte, timeout time.Duration) error {
	var deadline time.Time // known once there is something to wait for
	for len(p) > 0 {
		s.out = transfer{p: p, oob: oob}
		if err := s.raw.Write(s.doSend); err != nil {
			return err
		}
		switch err := s.out.err; err {
		case nil:
			p, oob = p[s.out.n:], nil
		case unix.EINTR:
		case unix.EAGAIN:
			now := time.Now()
			if deadline.IsZero() {
				deadline = now.Add(timeout)
			}
			if !now.Before(deadline) {
				return os.ErrDeadlineExceeded
			}
			s.pollFor = deadline.Sub(now)
			if err := s.raw.Write(s.doPoll); err != nil {
				return err
			}
			if err := s.out.err; err != nil && err != unix.EINTR {
				return err
			}
		default:
			return err
		}
	}
	return nil
}

// close ends the connection, and wakes who waits in recv or send.
func (s *socket) close() {
	s.closed.Store(true)
	// Of one that is closed already there is nothing to say.
	_ = s.raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	_ = s.file.Close()
}
