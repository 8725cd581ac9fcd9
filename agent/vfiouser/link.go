package vfiouser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// writeTimeout bounds the sending of one message: a peer that does not read for
// so long loses its connection.
const writeTimeout = 10 * time.Second

// postedID marks the ids of commands that want no reply. QEMU still answers a
// NO_REPLY DMA_WRITE that failed, and the mark tells such a reply from a late
// one to a request that was given up.
const postedID uint16 = 1 << 15

// link is one connection, seen from either side: framing, descriptor passing,
// and the matching of own requests with their replies. One goroutine calls run;
// everything else may be called by any number of goroutines.
type link struct {
	sock *socket
	in   inbox // reader goroutine only

	wmu          sync.Mutex
	wbuf         []byte
	writeTimeout time.Duration

	pmu     sync.Mutex
	pending map[uint16]chan reply // nil once the link failed
	lastID  uint16
	posted  uint16
	postErr error // first error reply to a posted command since takePostErr
	done    chan struct{}
}

type reply struct {
	body []byte
	err  error
	// files are descriptors that came with it.
	files []*os.File
}

func (r *reply) closeFiles() {
	for _, f := range r.files {
		f.Close()
	}
}

// newLink takes ownership of c, also on error.
func newLink(c *net.UnixConn) (*link, error) {
	sock, err := newSocket(c)
	if err != nil {
		return nil, err
	}
	return &link{
		sock:         sock,
		in:           newInbox(sock),
		writeTimeout: writeTimeout,
		pending:      map[uint16]chan reply{},
		done:         make(chan struct{}),
	}, nil
}

// run reads messages until the connection ends or handle fails, and passes the
// commands among them to handle. It returns nil when the peer closed the
// connection between two messages. All pending requests have then failed.
func (l *link) run(handle func(*message) error) error {
	defer l.in.close()
	defer l.fail()
	for {
		m, err := l.in.next()
		if err == nil {
			switch {
			case !m.isReply():
				err = handle(m)
			case !l.in.greetBy.IsZero(): // would be a way to have the connection, and not negotiate
				err = fmt.Errorf("%w: a reply came before VERSION", ErrProtocol)
			default:
				l.deliver(m)
			}
			m.closeFDs()
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// fail closes the connection and lets all pending requests fail.
func (l *link) fail() {
	l.sock.close()
	l.pmu.Lock()
	defer l.pmu.Unlock()
	if l.pending != nil {
		l.pending = nil
		close(l.done)
	}
}

// send writes one message, whose size it fills in. The descriptors stay the
// caller's. QEMU reads a header with one call and gives up when it gets a part:
// so header and body leave in one write.
func (l *link) send(h header, body []byte, fds ...int) error {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	h.size = uint32(headerSize + len(body))
	if cap(l.wbuf) < int(h.size) {
		l.wbuf = make([]byte, h.size)
	}
	b := l.wbuf[:h.size]
	h.put(b)
	copy(b[headerSize:], body)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := l.sock.send(b, oob, l.writeTimeout); err != nil {
		l.sock.close() // the stream may end within a message
		return fmt.Errorf("%w: sending: %w", ErrNotConnected, err)
	}
	return nil
}

// reply answers the command h: with body and descriptors, which stay the
// caller's, or with err if that is not nil.
func (l *link) reply(h header, body []byte, err error, fds ...int) error {
	r := header{id: h.id, cmd: h.cmd, flags: flagReply}
	if err != nil {
		r.flags |= flagError
		r.errno = uint32(errnoOf(err))
		body = nil
	}
	return l.send(r, body, fds...)
}

// request sends a command and waits for its reply's body. The descriptors stay
// the caller's. An error reply is returned as an error that wraps its number.
func (l *link) request(ctx context.Context, cmd uint16, body []byte, fds ...int) ([]byte, error) {
	r := l.ask(ctx, cmd, body, fds...)
	r.closeFiles()
	return r.body, r.err
}

// ask is request for a reply that may come with descriptors.
func (l *link) ask(ctx context.Context, cmd uint16, body []byte, fds ...int) reply {
	ch := make(chan reply, 1)
	id, err := l.register(ch)
	if err != nil {
		return reply{err: err}
	}
	if err := l.send(header{id: id, cmd: cmd}, body, fds...); err != nil {
		l.forget(id, ch)
		return reply{err: err}
	}
	select {
	case r := <-ch:
		return r
	case <-l.done:
		select {
		case r := <-ch: // the peer answered, and then closed the connection
			return r
		default:
			return reply{err: ErrNotConnected}
		}
	case <-ctx.Done():
		l.forget(id, ch)
		return reply{err: fmt.Errorf("vfio-user: waiting for the reply to command %d: %w", cmd, context.Cause(ctx))}
	}
}

// post sends a command that is not answered.
func (l *link) post(cmd uint16, body []byte) error {
	l.pmu.Lock()
	l.posted = (l.posted + 1) &^ postedID
	id := l.posted | postedID
	l.pmu.Unlock()
	return l.send(header{id: id, cmd: cmd, flags: flagNoReply}, body)
}

func (l *link) register(ch chan reply) (uint16, error) {
	l.pmu.Lock()
	defer l.pmu.Unlock()
	if l.pending == nil {
		return 0, ErrNotConnected
	}
	if len(l.pending) >= int(postedID) {
		return 0, errors.New("vfio-user: too many requests are waiting for the client")
	}
	for {
		l.lastID = (l.lastID + 1) &^ postedID
		if _, used := l.pending[l.lastID]; !used {
			l.pending[l.lastID] = ch
			return l.lastID, nil
		}
	}
}

// forget gives a request up, with a reply that has come meanwhile.
func (l *link) forget(id uint16, ch chan reply) {
	l.pmu.Lock()
	defer l.pmu.Unlock()
	delete(l.pending, id)
	select {
	case r := <-ch:
		r.closeFiles()
	default:
	}
}

// deliver hands a reply to the request that waits for it. A reply that nobody
// waits for belongs to a request that was given up, and is dropped.
func (l *link) deliver(m *message) {
	var err error
	if m.flags&flagError != 0 {
		err = fmt.Errorf("vfio-user: the peer answered command %d: %w", m.cmd, syscall.Errno(m.errno))
		if m.errno == 0 {
			err = fmt.Errorf("vfio-user: the peer answered command %d: %w", m.cmd, syscall.EIO)
		}
	}
	l.pmu.Lock()
	defer l.pmu.Unlock()
	if m.id&postedID != 0 {
		if l.postErr == nil {
			l.postErr = err
		}
		return
	}
	if ch, ok := l.pending[m.id]; ok {
		delete(l.pending, m.id)
		r := reply{body: append([]byte(nil), m.body...), err: err}
		for i := range m.fds {
			r.files = append(r.files, os.NewFile(uintptr(m.takeFD(i)), "region"))
		}
		ch <- r
	}
}

// takePostErr returns, and forgets, the first failure of a posted command that
// was reported since the last call.
func (l *link) takePostErr() error {
	l.pmu.Lock()
	defer l.pmu.Unlock()
	err := l.postErr
	l.postErr = nil
	return err
}
