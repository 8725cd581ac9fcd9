package stream

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// connPair returns both ends of a TCP connection over the loopback interface.
func connPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err = net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// waitFor polls until the stream's statistics satisfy cond.
func waitFor(t *testing.T, ctx context.Context, s *Stream, what string, cond func(Stats) bool) Stats {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if stats := s.Stats(); cond(stats) {
			return stats
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("no %s within the time: %+v", what, s.Stats())
		}
	}
}

func TestStreamArrivesIntactInBothDirections(t *testing.T) {
	for _, rate := range []uint64{0, 5 << 20, 1000} {
		ctx := bounded(t)
		clientConn, serverConn := connPair(t)
		client := Run(ctx, clientConn, 42, rate)
		server, err := Serve(ctx, serverConn)
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, ctx, client, "data at the client", func(s Stats) bool { return s.Received > 256 })
		waitFor(t, ctx, server, "data at the server", func(s Stats) bool { return s.Received > 256 })
		atClient, err := client.Stop(ctx)
		if err != nil {
			t.Fatalf("rate %d: %v", rate, err)
		}
		select {
		case <-server.Done():
		case <-ctx.Done():
			t.Fatal("the server's end did not end with the client's")
		}
		atServer := server.Stats()
		if atClient.Sent != atServer.Received || atServer.Sent != atClient.Received {
			t.Errorf("rate %d: not all arrived: client %+v, server %+v", rate, atClient, atServer)
		}
		for end, s := range map[string]Stats{"client": atClient, "server": atServer} {
			if !s.Intact || s.FirstBad != -1 || !s.Ended || s.Error != "" {
				t.Errorf("rate %d: %s: %+v, want an intact and orderly stream", rate, end, s)
			}
		}
	}
}

// corrupting changes what arrives on a connection.
type corrupting struct {
	*net.TCPConn
	change func(p []byte, offset int) int
	offset int
}

func (c *corrupting) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	read := n
	if n > 0 {
		n = c.change(p[:n], c.offset)
	}
	c.offset += read
	return n, err
}

func TestStreamDetectsDamage(t *testing.T) {
	const at = 3*wordSize + 5 // in the middle of a word
	tests := map[string]func(p []byte, offset int) int{
		"one bit changed": func(p []byte, offset int) int {
			if i := at - offset; i >= 0 && i < len(p) {
				p[i] ^= 0x10
			}
			return len(p)
		},
		"one byte lost": func(p []byte, offset int) int {
			i := at - offset
			if i < 0 || i >= len(p) {
				return len(p)
			}
			return copy(p[i:], p[i+1:]) + i
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			ctx := bounded(t)
			clientConn, serverConn := connPair(t)
			client := Run(ctx, &corrupting{TCPConn: clientConn.(*net.TCPConn), change: change}, 7, 1<<20)
			if _, err := Serve(ctx, serverConn); err != nil {
				t.Fatal(err)
			}
			got := waitFor(t, ctx, client, "damage", func(s Stats) bool { return !s.Intact })
			// Bytes after a lost one can be equal by chance, but not many.
			if got.FirstBad < at || got.FirstBad > at+2 {
				t.Errorf("first bad byte at %d, want %d", got.FirstBad, at)
			}
		})
	}
}

func TestStreamIsCutWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(bounded(t))
	clientConn, serverConn := connPair(t)
	client := Run(ctx, clientConn, 1, 1<<20)
	server, err := Serve(bounded(t), serverConn)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, ctx, client, "data", func(s Stats) bool { return s.Received > 0 })
	reason := errors.New("enough")
	cancel(reason)
	if stats, err := client.Stop(bounded(t)); !errors.Is(err, reason) || stats.Error == "" {
		t.Errorf("Stop after a cut: stats %+v, error %v, want %v", stats, err, reason)
	}
	<-server.Done()
}

func TestStopDoesNotWaitForeverForASilentPeer(t *testing.T) {
	clientConn, _ := connPair(t) // nobody serves the other end
	client := Run(bounded(t), clientConn, 1, 1000)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := client.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop = %v, want %v", err, context.DeadlineExceeded)
	}
}

func TestLongestStallCountsThePresentOne(t *testing.T) {
	clientConn, _ := connPair(t)
	client := Run(bounded(t), clientConn, 1, 1000)
	first := client.Stats().LongestStall
	waitFor(t, bounded(t), client, "growing stall", func(s Stats) bool { return s.LongestStall > first+time.Millisecond })
}

func TestPace(t *testing.T) {
	now := time.Now()
	s := &Stream{rate: 1000}
	if got, want := s.next(now, 64), now.Add(64*time.Millisecond); !got.Equal(want) {
		t.Errorf("next chunk due %v after the first, want %v", got.Sub(now), want.Sub(now))
	}
	late := s.next(now.Add(-time.Hour), 64)
	if behind := time.Since(late); behind > time.Second || behind < 200*time.Millisecond {
		t.Errorf("a stream held up for an hour is %v behind, want about 200 ms", behind)
	}
	for rate, want := range map[uint64]uint64{0: maxChunk, 1: 64, 200_000: 1000, 1 << 39: maxChunk} {
		if got := (&Stream{rate: rate}).chunk(); got != want {
			t.Errorf("chunk at %d bytes/s = %d, want %d", rate, got, want)
		}
	}
}

func TestServeRefusesBadHeaders(t *testing.T) {
	header := func(magic string, rate uint64) []byte {
		h := binary.BigEndian.AppendUint64([]byte(magic), 1)
		return binary.BigEndian.AppendUint64(h, rate)
	}
	for _, test := range []struct {
		name   string
		header []byte
		want   string
	}{
		{"other magic", header("GET ", 1), "magic"},
		{"absurd rate", header(magic, maxRate+1), "rate"},
		{"cut short", header(magic, 1)[:9], io.ErrUnexpectedEOF.Error()},
	} {
		t.Run(test.name, func(t *testing.T) {
			client, server := connPair(t)
			if _, err := client.Write(test.header); err != nil {
				t.Fatal(err)
			}
			client.(*net.TCPConn).CloseWrite()
			if _, err := Serve(bounded(t), server); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Serve = %v, want an error about %q", err, test.want)
			}
			if _, err := server.Write([]byte{0}); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is still open: %v", err)
			}
		})
	}
}

func TestSequenceIsTheSameFromAnyOffset(t *testing.T) {
	q := sequence{seed: 99}
	whole := make([]byte, 200)
	q.fill(whole, 0)
	for offset := range 40 {
		for length := range 40 {
			part := make([]byte, length)
			q.fill(part, uint64(offset))
			if i := firstDifference(part, whole[offset:offset+length]); i >= 0 {
				t.Fatalf("offset %d, length %d: differs at %d", offset, length, i)
			}
		}
	}
	other := make([]byte, len(whole))
	sequence{seed: 100}.fill(other, 0)
	if firstDifference(other, whole) < 0 {
		t.Error("two seeds give the same sequence")
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(append([]byte(magic), make([]byte, 16)...))
	f.Add([]byte("CSS1\x00\x00\x00\x00\x00\x00\x00\x01\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) != headerSize {
			return
		}
		if _, rate, err := parseHeader(data); err == nil && (rate > maxRate || string(data[:4]) != magic) {
			t.Errorf("accepted %x", data)
		}
	})
}
