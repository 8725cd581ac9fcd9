package vfiouser

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"
)

const (
	// maxSocketPath is the longest path of a unix socket (sun_path less its NUL).
	maxSocketPath = 107
	// acceptPause is how long the server waits after accept failed for want of
	// resources.
	acceptPause = 100 * time.Millisecond
	// takeOverWait is how long a new client is kept waiting for the session of
	// one that has just gone away to end, before it is refused.
	takeOverWait = time.Second
	// greetTimeout is how long a client may take to negotiate a version, from when
	// its session begins. QEMU sends VERSION as soon as it has connected.
	greetTimeout = 10 * time.Second
)

// Options configures a Server. The zero value is usable.
type Options struct {
	// Logger receives the sessions' course; default slog.Default().
	Logger *slog.Logger
	// Mode is the socket's permission; default 0600.
	Mode fs.FileMode
	// WriteMultiple announces REGION_WRITE_MULTI to clients that offer it. It is
	// off by default: the flag that QEMU 10.1 sets for it (VFIO_PROXY_USE_MULTI,
	// 0x16) overlaps others and makes it queue all its messages.
	WriteMultiple bool
}

// Server presents a Device on a unix socket, to one client at a time. Its
// methods are safe for concurrent use.
type Server struct {
	dev  Device
	opts Options
	log  *slog.Logger
	ln   *net.UnixListener
	busy chan struct{} // holds one element while a session lives
	cur  atomic.Pointer[session]

	takeOverWait, greetTimeout, messageTimeout time.Duration
}

// Listen creates the socket at path, in place of one that an earlier process
// left there, and returns a Server for it. Clients can connect from then on;
// they are served while Serve runs. The caller ends with Serve or Close.
func Listen(path string, dev Device, o Options) (*Server, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("vfio-user socket %s: the path has %d bytes, unix sockets allow %d: use a shorter directory", path, len(path), maxSocketPath)
	}
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("vfio-user socket %s: the path exists and is not a socket: remove it", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("vfio-user socket %s: removing the old socket: %w", path, err)
		}
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("vfio-user socket %s: %w", path, err)
	}
	mode := o.Mode
	if mode == 0 {
		mode = 0o600
	}
	if err := os.Chmod(path, mode); err != nil {
		ln.Close()
		return nil, fmt.Errorf("vfio-user socket %s: %w", path, err)
	}
	log := o.Logger
	if log == nil {
		log = slog.Default()
	}
	return &Server{
		dev: dev, opts: o, ln: ln,
		log:          log.With("socket", path),
		busy:         make(chan struct{}, 1),
		takeOverWait: takeOverWait, greetTimeout: greetTimeout, messageTimeout: messageTimeout,
	}, nil
}

// Close stops listening and removes the socket. A session ends with Serve.
func (s *Server) Close() error {
	if err := s.ln.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Serve accepts clients and serves them, one at a time, until ctx ends; a
// further one is refused by closing its connection. A client that does not
// negotiate a version, or stops within a message, is sent away after ten seconds.
// What goes wrong in a session ends that session only. Serve returns nil when ctx ended, after the last
// Device callback, else the error of the listener. The socket is then gone.
func (s *Server) Serve(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { s.ln.Close() })
	defer func() {
		cancel()
		stop()
		s.ln.Close()
		s.busy <- struct{}{} // wait for the session
		<-s.busy
	}()
	for {
		c, err := s.ln.AcceptUnix()
		switch {
		case err == nil:
			s.admit(ctx, c)
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("vfio-user server: %w", err)
		default:
			s.log.Warn("vfio-user: accepting a client failed", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
		}
	}
}

// admit starts a session on c, or refuses it. A client that went away may be
// replaced before its session has noticed, hence the short wait.
func (s *Server) admit(ctx context.Context, c *net.UnixConn) {
	wait := time.NewTimer(s.takeOverWait)
	defer wait.Stop()
	select {
	case s.busy <- struct{}{}:
	case <-wait.C:
		s.log.Warn("vfio-user: a second client was refused: the device has one already")
		c.Close()
		return
	case <-ctx.Done():
		c.Close()
		return
	}
	go func() {
		defer func() { <-s.busy }()
		s.session(ctx, c)
	}()
}

// session serves one client to its end.
func (s *Server) session(ctx context.Context, c *net.UnixConn) {
	l, err := newLink(c)
	if err != nil {
		s.log.Warn("vfio-user: a client was refused", "err", err)
		return
	}
	ss := newSession(s, l)
	stop := context.AfterFunc(ctx, l.sock.close)
	defer stop()
	err = l.run(ss.handle)
	if ctx.Err() != nil {
		err = fmt.Errorf("vfio-user server stopped: %w", ctx.Err())
	}
	s.cur.Store(nil)
	if ss.connected {
		s.log.Info("vfio-user: client disconnected", "reason", err)
		s.dev.Disconnected(err)
	} else {
		s.log.Warn("vfio-user: client left before version negotiation", "reason", err)
	}
}

// Connected reports whether a client is connected and has negotiated a version.
func (s *Server) Connected() bool { return s.cur.Load() != nil }

// link returns the current client's.
func (s *Server) link() (*link, error) {
	if ss := s.cur.Load(); ss != nil {
		return ss.link, nil
	}
	return nil, ErrNotConnected
}

// DMARead reads len(p) bytes at guest-physical addr through the client, in
// accesses of at most 64 KiB, one after the other. The reply also tells that
// everything the client sent before it, posted register writes included, has
// reached the Device. QEMU serves it once the guest has set the function's
// bus-master bit (ENODEV before), also while the VM is stopped, and reaches
// device memory and the PCI configuration space with it, not only RAM.
//
// It must not be called from a Device callback: the reply is read by the
// goroutine that runs the callback. It fails with ErrNotConnected as soon as the
// client goes away, and with the syscall.Errno of the client's error reply. On
// an error p is undefined.
func (s *Server) DMARead(ctx context.Context, addr uint64, p []byte) error {
	l, err := s.link()
	if err != nil {
		return err
	}
	return l.dmaRead(ctx, addr, p)
}

// DMAWrite writes p to guest-physical addr through the client, in accesses of at
// most 64 KiB, and returns when the client has done it. QEMU marks the pages
// dirty for migration, which a write through Memory does not. The conditions of
// DMARead hold. On an error part of p may have been written.
func (s *Server) DMAWrite(ctx context.Context, addr uint64, p []byte) error {
	l, err := s.link()
	if err != nil {
		return err
	}
	for _, c := range dmaChunks(addr, p) {
		body := make([]byte, dmaAccessSize+len(c.data))
		putDMAAccess(body, c.addr, len(c.data))
		copy(body[dmaAccessSize:], c.data)
		if _, err := l.request(ctx, cmdDMAWrite, body); err != nil {
			return fmt.Errorf("DMA_WRITE of %d bytes at %#x: %w", len(c.data), c.addr, err)
		}
	}
	return nil
}

// PostWrite is DMAWrite without waiting: the client carries posted writes out in
// order, before any later DMARead, DMAWrite or Fence. It fails only when the
// message cannot be sent; what the client says of it comes with the next Fence.
// It may be called from a Device callback, where Fence must not.
func (s *Server) PostWrite(addr uint64, p []byte) error {
	l, err := s.link()
	if err != nil {
		return err
	}
	for _, c := range dmaChunks(addr, p) {
		body := make([]byte, dmaAccessSize+len(c.data))
		putDMAAccess(body, c.addr, len(c.data))
		copy(body[dmaAccessSize:], c.data)
		if err := l.post(cmdDMAWrite, body); err != nil {
			return err
		}
	}
	return nil
}

// Fence waits until the client has carried out every PostWrite that returned
// before, by reading one byte at the guest-physical addr, and returns the first
// error the client reported for them. If several goroutines post at once, an
// error goes to whichever calls Fence first.
func (s *Server) Fence(ctx context.Context, addr uint64) error {
	l, err := s.link()
	if err != nil {
		return err
	}
	var b [1]byte
	if err := l.dmaRead(ctx, addr, b[:]); err != nil {
		return err
	}
	if err := l.takePostErr(); err != nil {
		return fmt.Errorf("a posted DMA_WRITE: %w", err)
	}
	return nil
}

func (l *link) dmaRead(ctx context.Context, addr uint64, p []byte) error {
	for _, c := range dmaChunks(addr, p) {
		var body [dmaAccessSize]byte
		putDMAAccess(body[:], c.addr, len(c.data))
		r, err := l.request(ctx, cmdDMARead, body[:])
		if err == nil && (len(r) != dmaAccessSize+len(c.data) || le.Uint64(r[0:]) != c.addr || le.Uint64(r[8:]) != uint64(len(c.data))) {
			err = fmt.Errorf("%w: the reply has %d bytes or describes another access", ErrProtocol, len(r))
		}
		if err != nil {
			return fmt.Errorf("DMA_READ of %d bytes at %#x: %w", len(c.data), c.addr, err)
		}
		copy(c.data, r[dmaAccessSize:])
	}
	return nil
}

type dmaPiece struct {
	addr uint64
	data []byte
}

// dmaChunks cuts an access into pieces of at most dmaChunk bytes.
func dmaChunks(addr uint64, p []byte) []dmaPiece {
	pieces := make([]dmaPiece, 0, (len(p)+dmaChunk-1)/dmaChunk)
	for len(p) > 0 {
		n := min(len(p), dmaChunk)
		pieces = append(pieces, dmaPiece{addr, p[:n]})
		addr += uint64(n)
		p = p[n:]
	}
	return pieces
}

func putDMAAccess(b []byte, addr uint64, n int) {
	le.PutUint64(b[0:], addr)
	le.PutUint64(b[8:], uint64(n))
}
