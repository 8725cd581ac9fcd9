// Package stream is a TCP stream that proves itself: both ends send a
// pseudo-random sequence that is a function of a seed and the offset, and both
// check every byte that arrives. A byte lost, doubled, moved or changed
// anywhere between the two applications is seen, with its offset. The guest
// serves such streams and tests hold one open while the VM moves.
//
// The client opens with a header of 20 bytes, all big-endian: the magic
// "CSS1", the seed (8 bytes) and the rate in bytes per second (8 bytes, 0 for
// as fast as TCP allows). Everything after it, in both directions, is the
// sequence, until the sender ends its direction of the connection.
package stream

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Port is the TCP port at which a guest serves streams.
const Port = 5001

const (
	magic      = "CSS1"
	headerSize = len(magic) + 16
	// maxChunk is the most that one write or read moves.
	maxChunk = 64 << 10
	// chunksPerSecond is how often a stream with a limited rate sends: often
	// enough for a stall of a few milliseconds to be visible in Stats.
	chunksPerSecond = 200
	// maxRate bounds a rate that arrives in a header, so that time computed
	// from it stays in range.
	maxRate = 1 << 40
	// sendBuffer bounds what TCP holds of a sender that is faster than the
	// network. By itself TCP takes megabytes, behind which the end of a stream
	// waits for minutes when a guest is slow.
	sendBuffer = 256 << 10
	// headerTimeout bounds the wait for a client's header.
	headerTimeout = 10 * time.Second
)

// Stats describe a stream at one moment.
type Stats struct {
	// Sent and Received count bytes of the sequence; Sent counts what the
	// local TCP accepted.
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`
	// Intact says that all Received bytes were the expected ones.
	Intact bool `json:"intact"`
	// FirstBad is the offset of the first byte that was not the expected one,
	// -1 if Intact.
	FirstBad int64 `json:"firstBad"`
	// LongestStall is the longest time between two arrivals, including the
	// present one if nothing has arrived since.
	LongestStall time.Duration `json:"longestStall"`
	// Ended says that the peer has ended its direction in an orderly way.
	Ended bool `json:"ended"`
	// Error is why the stream broke; empty while it lives and after an orderly end.
	Error string `json:"error,omitempty"`
}

// Stream is one end of a running stream. It is safe for concurrent use.
type Stream struct {
	conn net.Conn
	rate uint64
	out  sequence
	in   sequence

	stopping chan struct{} // closed by Stop: send no more
	stopOnce sync.Once
	done     chan struct{} // closed when both directions are over

	mu      sync.Mutex
	stats   Stats
	arrived time.Time
	err     error
}

// Run starts the client's end of a stream on conn, which the Stream owns from
// then on, and returns at once. Rate is in bytes per second for each
// direction; 0 means no limit. When ctx ends the stream is cut; to end it in
// order and learn what came through, use Stop.
func Run(ctx context.Context, conn net.Conn, seed, rate uint64) *Stream {
	s := newStream(conn, rate, sequence{seed: seed}, sequence{seed: ^seed})
	header := make([]byte, 0, headerSize)
	header = append(header, magic...)
	header = binary.BigEndian.AppendUint64(header, seed)
	header = binary.BigEndian.AppendUint64(header, rate)
	s.start(ctx, header)
	return s
}

// Serve reads a client's header from conn and starts the server's end of the
// stream; conn belongs to the Stream from then on. It blocks until the header
// is complete, for at most 10 s. If it returns an error it has closed conn.
func Serve(ctx context.Context, conn net.Conn) (*Stream, error) {
	seed, rate, err := readHeader(conn)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("stream from %s: %w", conn.RemoteAddr(), err), conn.Close())
	}
	s := newStream(conn, rate, sequence{seed: ^seed}, sequence{seed: seed})
	s.start(ctx, nil)
	return s, nil
}

func newStream(conn net.Conn, rate uint64, out, in sequence) *Stream {
	if c, ok := conn.(interface{ SetWriteBuffer(int) error }); ok {
		// A connection that refuses, because it is closed, fails below.
		_ = c.SetWriteBuffer(sendBuffer)
	}
	return &Stream{
		conn: conn, rate: rate, out: out, in: in,
		stopping: make(chan struct{}), done: make(chan struct{}),
		stats: Stats{Intact: true, FirstBad: -1}, arrived: time.Now(),
	}
}

func readHeader(conn net.Conn) (seed, rate uint64, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(headerTimeout)); err != nil {
		return 0, 0, err
	}
	header := make([]byte, headerSize)
	if _, err := io.ReadFull(conn, header); err != nil {
		return 0, 0, fmt.Errorf("header: %w", err)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return 0, 0, err
	}
	return parseHeader(header)
}

// parseHeader takes a header of exactly headerSize bytes.
func parseHeader(header []byte) (seed, rate uint64, err error) {
	if got := header[:len(magic)]; string(got) != magic {
		return 0, 0, fmt.Errorf("header: magic is %q, want %q", got, magic)
	}
	seed = binary.BigEndian.Uint64(header[len(magic):])
	rate = binary.BigEndian.Uint64(header[len(magic)+8:])
	if rate > maxRate {
		return 0, 0, fmt.Errorf("header: rate is %d bytes/s, the most is %d", rate, uint64(maxRate))
	}
	return seed, rate, nil
}

func (s *Stream) start(ctx context.Context, header []byte) {
	// Cutting the connection is what ends both directions, whatever they wait for.
	cut := context.AfterFunc(ctx, func() {
		s.fail(context.Cause(ctx))
		_ = s.conn.Close()
	})
	var directions sync.WaitGroup
	directions.Go(func() {
		if err := s.send(header); err != nil {
			s.fail(fmt.Errorf("sending: %w", err))
			_ = s.conn.Close()
		}
	})
	directions.Go(func() {
		if err := s.receive(); err != nil {
			s.fail(fmt.Errorf("receiving: %w", err))
			_ = s.conn.Close()
		}
		s.stopOnce.Do(func() { close(s.stopping) }) // the peer ended; so do we
	})
	go func() {
		directions.Wait()
		cut()
		_ = s.conn.Close()
		close(s.done)
	}()
}

// fail records why the stream broke; only the first cause counts.
func (s *Stream) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil && !s.over() {
		s.err = err
	}
}

func (s *Stream) over() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// send writes the header and the sequence until the stream is stopped, and
// then ends this direction.
func (s *Stream) send(header []byte) error {
	if _, err := s.conn.Write(header); err != nil {
		return err
	}
	buf := make([]byte, s.chunk())
	pace := time.NewTimer(0)
	defer pace.Stop()
	due := time.Now()
	for offset := uint64(0); ; offset += uint64(len(buf)) {
		select {
		case <-s.stopping:
			return s.endSending()
		case <-pace.C:
		}
		s.out.fill(buf, offset)
		n, err := s.conn.Write(buf)
		s.mu.Lock()
		s.stats.Sent += uint64(n)
		s.mu.Unlock()
		if err != nil {
			return err
		}
		due = s.next(due, len(buf))
		pace.Reset(time.Until(due))
	}
}

// next is when the chunk after one of n bytes, due at due, is to be sent. A
// stream that was held up catches up for at most a fifth of a second.
func (s *Stream) next(due time.Time, n int) time.Time {
	if s.rate == 0 {
		return due
	}
	due = due.Add(time.Duration(float64(n) / float64(s.rate) * float64(time.Second)))
	if oldest := time.Now().Add(-200 * time.Millisecond); due.Before(oldest) {
		return oldest
	}
	return due
}

// chunk is the size of one write.
func (s *Stream) chunk() uint64 {
	if s.rate == 0 {
		return maxChunk
	}
	return min(max(s.rate/chunksPerSecond, 64), maxChunk)
}

func (s *Stream) endSending() error {
	if half, ok := s.conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return fmt.Errorf("a %T cannot be closed in one direction", s.conn)
}

// receive reads and checks the peer's sequence until it ends.
func (s *Stream) receive() error {
	buf, want := make([]byte, maxChunk), make([]byte, maxChunk)
	for offset := uint64(0); ; {
		n, err := s.conn.Read(buf)
		s.in.fill(want[:n], offset)
		s.note(buf[:n], want[:n], offset, err == io.EOF)
		offset += uint64(n)
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

func (s *Stream) note(got, want []byte, offset uint64, ended bool) {
	bad := firstDifference(got, want)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.stats.LongestStall = max(s.stats.LongestStall, now.Sub(s.arrived))
	s.arrived = now
	s.stats.Received += uint64(len(got))
	s.stats.Ended = s.stats.Ended || ended
	if bad >= 0 && s.stats.Intact {
		s.stats.Intact = false
		s.stats.FirstBad = int64(offset) + int64(bad)
	}
}

// Stats returns what the stream has done so far.
func (s *Stream) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := s.stats
	if !stats.Ended && !s.over() {
		stats.LongestStall = max(stats.LongestStall, time.Since(s.arrived))
	}
	if s.err != nil {
		stats.Error = s.err.Error()
	}
	return stats
}

// Done is closed when the stream is over, in order or not.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Stop ends the stream in order: it sends no more, waits until the peer has
// ended its direction too, and returns the final statistics. If ctx ends
// before that, Stop cuts the stream and says so.
func (s *Stream) Stop(ctx context.Context) (Stats, error) {
	s.stopOnce.Do(func() { close(s.stopping) })
	select {
	case <-s.done:
	case <-ctx.Done():
		s.fail(fmt.Errorf("the peer has not ended the stream: %w", context.Cause(ctx)))
		_ = s.conn.SetDeadline(time.Unix(1, 0)) // wake both directions
		<-s.done
	}
	stats := s.Stats()
	s.mu.Lock()
	defer s.mu.Unlock()
	return stats, s.err
}
