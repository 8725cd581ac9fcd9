// Package gate is the switchover gate: an NBD server that lets its owner hold
// QEMU at the two moments that matter in a live migration.
//
// QEMU opens the gate's export as a qcow2 image that no guest device uses. When
// it stops the VM at the end of pre-copy it flushes every writable block node:
// the source holds that FLUSH while it captures the device. When it starts the
// VM on the target it re-reads the image's header: the target holds that READ
// while it restores the device. An error instead of success is a veto: EIO for
// the FLUSH fails the migration and the source VM resumes; EIO for the READ
// fails the start on the target.
//
// The structures and constants are those of github.com/pojntfx/go-nbd. Its
// server is not used, because it cannot advertise FLUSH, reply EIO, or have a
// request wait while others are served.
//
// Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
// (fixed newstyle, simple replies).
package gate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// negotiationTimeout bounds the time from connect to the transmission phase.
	negotiationTimeout = 10 * time.Second
	// writeTimeout bounds the sending of one reply.
	writeTimeout = 10 * time.Second
	// acceptPause is how long the server waits after accept failed for want of
	// resources.
	acceptPause = 100 * time.Millisecond
	// maxConnections bounds the clients served at once. QEMU uses one; a second
	// one connects while the first reconnects.
	maxConnections = 16
)

// Handler decides over QEMU's requests. Its methods are called concurrently, one
// call per request; each may take its time and thereby hold its request, while
// others go on. A non-nil error is answered with EIO. The context ends when the
// connection closes or the server stops; the reply is then lost, and the call
// should return. QEMU's main loop waits for a held request, and it flushes on
// suspend, inactivation, failure and quit too, and more than once per stop: so
// holds must be bounded, and the methods idempotent.
type Handler interface {
	// Flush is called for each FLUSH.
	Flush(ctx context.Context) error
	// Read is called for each READ, of n bytes at off, before the data is taken.
	Read(ctx context.Context, off int64, n int) error
}

// Server is the gate. Writes by clients go to one copy of the image in memory,
// which lives as long as the Server and is shared by all connections.
type Server struct {
	h   Handler
	log *slog.Logger

	negotiationTimeout time.Duration

	mu    sync.RWMutex
	image []byte
}

// New returns a gate that asks h. A nil log means slog.Default().
func New(h Handler, log *slog.Logger) *Server {
	if log == nil {
		log = slog.Default()
	}
	return &Server{h: h, log: log, negotiationTimeout: negotiationTimeout, image: Image()}
}

// Serve accepts clients on ln until ctx ends. It closes ln. A client that breaks
// the protocol loses its own connection only. Serve returns nil when ctx ended,
// after the last Handler call has returned, else the listener's error.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	var conns sync.WaitGroup
	defer func() {
		cancel()
		stop()
		ln.Close()
		conns.Wait()
	}()
	places := make(chan struct{}, maxConnections)
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			select {
			case places <- struct{}{}:
			default:
				s.log.Warn("gate: a client was refused: too many connections", "limit", maxConnections)
				c.Close()
				continue
			}
			conns.Go(func() {
				defer func() { <-places }()
				s.serve(ctx, c)
			})
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("gate: %w", err)
		default:
			s.log.Warn("gate: accepting a client failed", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(acceptPause):
			}
		}
	}
}

// serve serves one client to its end.
func (s *Server) serve(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	err := c.SetDeadline(time.Now().Add(s.negotiationTimeout))
	if err == nil {
		err = negotiate(c)
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err == nil {
		s.log.Debug("gate: client connected")
		err = s.transmit(ctx, c)
	}
	if err != nil && !errors.Is(err, errDone) && ctx.Err() == nil {
		s.log.Warn("gate: connection ended", "err", err)
	}
}
