package vfiouser

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Eventfd is an interrupt vector's event descriptor, received from the client.
// It has one owner, who closes it. All methods are safe for concurrent use, also
// with Close.
type Eventfd struct {
	f *os.File
}

// NewEventfd takes ownership of fd, also on error. It refuses descriptors of
// other kinds, because signalling them could block or do harm, and makes the
// descriptor non-blocking.
func NewEventfd(fd int) (*Eventfd, error) {
	kind, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err == nil && kind != "anon_inode:[eventfd]" {
		err = fmt.Errorf("%w: a descriptor of SET_IRQS is %q, not an eventfd: %w", ErrProtocol, kind, syscall.EINVAL)
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Eventfd{f: os.NewFile(uintptr(fd), "eventfd")}, nil
}

// Signal raises the event. It never blocks: an event that is saturated is
// pending already, which is success. After Close it returns os.ErrClosed.
func (e *Eventfd) Signal() error {
	one := [8]byte{1} // native byte order; see le
	return e.control(func(fd int) error {
		_, err := unix.Write(fd, one[:])
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		return err
	})
}

// Pending reports whether an event was raised that the client has not taken yet.
func (e *Eventfd) Pending() (bool, error) {
	pending := false
	err := e.control(func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			_, err := unix.Poll(p, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			pending = p[0].Revents&unix.POLLIN != 0
			return err
		}
	})
	return pending, err
}

// Descriptor calls do with the number of the descriptor, which stays open
// meanwhile: for the kernel, to signal it. After Close it returns os.ErrClosed.
func (e *Eventfd) Descriptor(do func(fd int) error) error { return e.control(do) }

// Close closes the descriptor.
func (e *Eventfd) Close() error { return e.f.Close() }

func (e *Eventfd) control(do func(fd int) error) error {
	raw, err := e.f.SyscallConn()
	if err != nil {
		return err
	}
	var opErr error
	if err := raw.Control(func(fd uintptr) { opErr = do(int(fd)) }); err != nil {
		return fmt.Errorf("eventfd: %w", os.ErrClosed) // the only reason there is
	}
	return opErr
}
