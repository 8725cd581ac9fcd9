package gate

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// Transmission constants that go-nbd's protocol package lacks.
const (
	commandFlush = uint16(3)

	commandFlagFUA = uint16(1 << 0)

	nbdEIO    = uint32(5)
	nbdENOSPC = uint32(28)
)

const (
	// maxPayload is the largest READ or WRITE (the specification's default for
	// clients that do not ask).
	maxPayload = 32 << 20
	// maxInFlight bounds the requests of one connection that wait for their
	// replies. QEMU has at most 16; nbd-client programs up to 64.
	maxInFlight = 128
)

// connection is the transmission phase of one client. Each request is served by
// its own goroutine, so that a held one holds no other.
type connection struct {
	srv *Server
	c   net.Conn
	wmu sync.Mutex // one reply at a time
}

// transmit serves requests until the client disconnects (errDone) or breaks the
// protocol. All handler calls have returned when it does.
func (s *Server) transmit(ctx context.Context, c net.Conn) error {
	ctx, cancel := context.WithCancel(ctx)
	conn := &connection{srv: s, c: c}
	var calls sync.WaitGroup
	defer calls.Wait()
	defer cancel()
	places := make(chan struct{}, maxInFlight)
	for {
		h, data, err := readRequest(c)
		if err != nil {
			return err
		}
		if h.Type == protocol.TRANSMISSION_TYPE_REQUEST_DISC {
			return errDone
		}
		// A full house ends the connection instead of stopping the reader: only
		// a reader notices that the client has gone.
		select {
		case places <- struct{}{}:
		default:
			return fmt.Errorf("%w: more than %d requests in flight", errProtocol, maxInFlight)
		}
		calls.Go(func() {
			defer func() { <-places }()
			out, errno := conn.srv.do(ctx, h, data)
			if err := conn.reply(h.Handle, errno, out); err != nil {
				conn.c.Close() // the reader ends the connection
			}
		})
	}
}

// readRequest reads one request with the data of a WRITE. A WRITE of more than
// the image holds is read off the connection without being kept: data is nil.
func readRequest(r io.Reader) (h protocol.TransmissionRequestHeader, data []byte, err error) {
	if err := binary.Read(r, binary.BigEndian, &h); err != nil {
		return h, nil, endOfClient(err)
	}
	if h.RequestMagic != protocol.TRANSMISSION_MAGIC_REQUEST {
		return h, nil, fmt.Errorf("%w: request magic %#x", errProtocol, h.RequestMagic)
	}
	if h.Type != protocol.TRANSMISSION_TYPE_REQUEST_WRITE {
		return h, nil, nil
	}
	if h.Length > maxPayload {
		return h, nil, fmt.Errorf("%w: a write of %d bytes", errProtocol, h.Length)
	}
	if h.Length > ImageSize {
		_, err = io.CopyN(io.Discard, r, int64(h.Length))
	} else {
		data = make([]byte, h.Length)
		_, err = io.ReadFull(r, data)
	}
	if err != nil {
		return h, nil, fmt.Errorf("data of a write: %w", err)
	}
	return h, data, nil
}

// do carries out one request and returns the reply's data and error number.
func (s *Server) do(ctx context.Context, h protocol.TransmissionRequestHeader, data []byte) ([]byte, uint32) {
	if h.CommandFlags&^commandFlagFUA != 0 {
		return nil, protocol.TRANSMISSION_ERROR_EINVAL
	}
	within := h.Offset <= ImageSize && uint64(h.Length) <= ImageSize-h.Offset
	switch h.Type {
	case protocol.TRANSMISSION_TYPE_REQUEST_READ:
		if !within || h.Length == 0 {
			return nil, protocol.TRANSMISSION_ERROR_EINVAL
		}
		if err := s.h.Read(ctx, int64(h.Offset), int(h.Length)); err != nil {
			s.log.Warn("gate: a read was vetoed", "offset", h.Offset, "length", h.Length, "err", err)
			return nil, nbdEIO
		}
		s.mu.RLock()
		defer s.mu.RUnlock()
		return append([]byte(nil), s.image[h.Offset:][:h.Length]...), 0
	case protocol.TRANSMISSION_TYPE_REQUEST_WRITE:
		if !within {
			return nil, nbdENOSPC
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		copy(s.image[h.Offset:], data)
		return nil, 0
	case commandFlush:
		if h.Offset != 0 || h.Length != 0 {
			return nil, protocol.TRANSMISSION_ERROR_EINVAL
		}
		if err := s.h.Flush(ctx); err != nil {
			s.log.Warn("gate: a flush was vetoed", "err", err)
			return nil, nbdEIO
		}
		return nil, 0
	default: // TRIM, WRITE_ZEROES and others are not advertised
		return nil, protocol.TRANSMISSION_ERROR_EINVAL
	}
}

// reply sends one simple reply; the data of an error reply is empty.
func (c *connection) reply(handle uint64, errno uint32, data []byte) error {
	h := protocol.TransmissionReplyHeader{ReplyMagic: protocol.TRANSMISSION_MAGIC_REPLY, Error: errno, Handle: handle}
	b, err := binary.Append(make([]byte, 0, 16+len(data)), binary.BigEndian, h)
	if err != nil {
		return err
	}
	b = append(b, data...)
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err = c.c.Write(b)
	return err
}
