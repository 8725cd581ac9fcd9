package vfiouser

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// inboxSize is how many bytes are read ahead: some 1,800 posted register writes,
// more than a socket holds. A larger message has the buffer grow to its size.
const inboxSize = 64 << 10

// messageTimeout bounds the arrival of one message, from its first bytes to its
// last: a peer that sends no more within it loses its connection, which nobody
// else could have meanwhile.
const messageTimeout = 10 * time.Second

// message is one received message. The body is valid until the next is read.
type message struct {
	header
	body []byte
	fds  []int // owned by the message; -1 where taken
}

// takeFD passes descriptor i to the caller.
func (m *message) takeFD(i int) int {
	fd := m.fds[i]
	m.fds[i] = -1
	return fd
}

// closeFDs closes the descriptors that nobody took.
func (m *message) closeFDs() {
	for _, fd := range m.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	m.fds = nil
}

// inbox cuts the stream of a socket into messages. It reads as much as there is
// with one call: a guest posts its writes faster than they could be fetched with
// a call for each. Used by one goroutine.
type inbox struct {
	sock *socket
	buf  []byte
	// The bytes from start to end of buf were received and not passed on yet.
	start, end int
	msg        message
	oob        []byte
	// fds came with bytes the last of which is before fdsEnd, and were not
	// passed on yet.
	fds    []int
	fdsEnd int

	messageTimeout time.Duration
	// messageBy is when the message of which a part is here must be complete;
	// zero before anybody waited for the rest.
	messageBy time.Time
	// greetBy is when the peer must have negotiated a version; zero if it has, or
	// need not. Set by the owner.
	greetBy time.Time
}

func newInbox(s *socket) inbox {
	return inbox{sock: s, buf: make([]byte, inboxSize), oob: make([]byte, unix.CmsgSpace(4*maxFDs)), messageTimeout: messageTimeout}
}

// next returns the next message, which is valid until the next call; io.EOF only
// at a message boundary.
func (b *inbox) next() (*message, error) {
	for {
		need := headerSize
		if have := b.buf[b.start:b.end]; len(have) >= headerSize {
			h, err := parseHeader(have)
			if err != nil {
				return nil, err
			}
			if need = int(h.size); len(have) >= need {
				b.msg = message{header: h, body: have[headerSize:need:need]}
				if len(b.fds) > 0 && b.ownsFDs() {
					b.msg.fds, b.fds = b.fds, nil
				}
				b.start += need
				b.messageBy = time.Time{}
				return &b.msg, nil
			}
		}
		if err := b.fill(need); err != nil {
			return nil, err
		}
	}
}

// fill reads more of a message of which need bytes are known to belong together,
// and not all are there.
func (b *inbox) fill(need int) error {
	b.end = copy(b.buf, b.buf[b.start:b.end])
	b.fdsEnd -= b.start
	b.start = 0
	if need > len(b.buf) {
		b.buf = append(b.buf, make([]byte, need-len(b.buf))...)
	}
	n, oobn, flags, err := b.sock.recv(b.buf[b.end:], b.oob, b.deadline())
	b.end += max(n, 0)
	if oobn > 0 {
		if e := b.addFDs(b.oob[:oobn]); err == nil {
			err = e
		}
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded) && !b.greetBy.IsZero():
		return fmt.Errorf("%w: no version was negotiated in time: %w", ErrProtocol, err)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("%w: of a message only %d bytes came within %v: %w", ErrProtocol, b.end, b.messageTimeout, err)
	case err != nil:
		return err
	case flags&unix.MSG_CTRUNC != 0:
		return fmt.Errorf("%w: more than %d descriptors in one message", ErrProtocol, maxFDs)
	case n == 0 && b.end > 0:
		return io.ErrUnexpectedEOF
	case n == 0:
		return io.EOF
	}
	return nil
}

// deadline returns until when more bytes must come. Between two messages of a
// peer that has negotiated there is none, and no time is looked up.
func (b *inbox) deadline() time.Time {
	if b.end > b.start && b.messageBy.IsZero() {
		b.messageBy = time.Now().Add(b.messageTimeout)
	}
	if !b.greetBy.IsZero() {
		return b.greetBy
	}
	return b.messageBy
}

// addFDs takes the descriptors out of control data.
func (b *inbox) addFDs(oob []byte) error {
	b.fdsEnd = b.end
	scms, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("%w: control data: %w", ErrProtocol, err)
	}
	for _, scm := range scms {
		if scm.Header.Level != unix.SOL_SOCKET || scm.Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&scm)
		if err != nil {
			return fmt.Errorf("%w: control data: %w", ErrProtocol, err)
		}
		b.fds = append(b.fds, fds...)
	}
	if len(b.fds) > maxFDs {
		return fmt.Errorf("%w: more than %d descriptors in one message", ErrProtocol, maxFDs)
	}
	return nil
}

// fdCommands are the commands that may come with descriptors, themselves or
// their replies.
var fdCommands = []uint16{cmdDMAMap, cmdSetIRQs, cmdGetRegionInfo}

// ownsFDs tells whether the message at start, which is there as a whole, is the
// one that fds came with. A read goes on over what was sent without descriptors,
// and ends with what was sent by the call that passed some (unix(7)): so it is
// the last message in what was read then, or, if the client sent several with
// that call, the last of those that may have descriptors.
func (b *inbox) ownsFDs() bool {
	at := b.start + headerSize + len(b.msg.body)
	if at >= b.fdsEnd {
		return true
	}
	if !slices.Contains(fdCommands, b.msg.cmd) {
		return false
	}
	for at < b.fdsEnd {
		if b.fdsEnd-at < headerSize {
			return false // the command is not there yet
		}
		h, err := parseHeader(b.buf[at:])
		if err != nil || slices.Contains(fdCommands, h.cmd) {
			return false
		}
		at += int(h.size)
	}
	return true
}

// close closes the descriptors that no message was given.
func (b *inbox) close() {
	for _, fd := range b.fds {
		unix.Close(fd)
	}
	b.fds = nil
}
