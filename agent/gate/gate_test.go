package gate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pojntfx/go-nbd/pkg/protocol"
)

const (
	read       = protocol.TRANSMISSION_TYPE_REQUEST_READ
	write      = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	disconnect = protocol.TRANSMISSION_TYPE_REQUEST_DISC
)

// handler lets tests decide; a nil function succeeds at once.
type handler struct {
	flush func(ctx context.Context) error
	read  func(ctx context.Context, off int64, n int) error
}

func (h handler) Flush(ctx context.Context) error {
	if h.flush == nil {
		return nil
	}
	return h.flush(ctx)
}

func (h handler) Read(ctx context.Context, off int64, n int) error {
	if h.read == nil {
		return nil
	}
	return h.read(ctx, off, n)
}

// start serves a gate until the test ends, and checks that it then stops.
func start(t *testing.T, h Handler) (path string, s *Server) {
	t.Helper()
	path = socketPath(t)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s = New(h, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := wait(t, served); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return path, s
}

func wait[T any](t *testing.T, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(testTimeout):
		t.Fatal("waited too long")
		panic("unreachable")
	}
}

func TestImageStructure(t *testing.T) {
	b := Image()
	be := binary.BigEndian
	if len(b) != ImageSize || string(b[:4]) != "QFI\xfb" || be.Uint32(b[4:]) != 3 {
		t.Fatalf("no qcow2 version 3 header: % x", b[:8])
	}
	cluster := uint64(1) << be.Uint32(b[20:])
	refTable, l1 := be.Uint64(b[48:]), be.Uint64(b[40:])
	refBlock := be.Uint64(b[refTable:])
	for name, off := range map[string]uint64{"refcount table": refTable, "refcount block": refBlock, "L1 table": l1} {
		if off == 0 || off%cluster != 0 || off >= ImageSize {
			t.Errorf("%s at %#x", name, off)
		}
	}
	// One L1 entry must cover the disk, and be empty.
	if covers := cluster / 8 * cluster; uint64(be.Uint32(b[36:])) != (be.Uint64(b[24:])+covers-1)/covers {
		t.Errorf("%d L1 entries of %#x bytes for a disk of %#x", be.Uint32(b[36:]), covers, be.Uint64(b[24:]))
	}
	if be.Uint64(b[l1:]) != 0 {
		t.Error("the disk is not empty")
	}
	// Exactly the clusters of the file are in use, once each.
	for i := range cluster / 2 {
		want := uint16(0)
		if i < ImageSize/cluster {
			want = 1
		}
		if got := be.Uint16(b[refBlock+2*i:]); got != want {
			t.Fatalf("cluster %d has refcount %d, want %d", i, got, want)
		}
	}
}

func TestNegotiation(t *testing.T) {
	path, _ := start(t, handler{})
	exportInfo := []byte{0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0x01, 0x0d} // 16 KiB; HAS_FLAGS, FLUSH, FUA, MULTI_CONN

	t.Run("go with all infos", func(t *testing.T) {
		c := dial(t, path)
		c.hello(3)
		c.option(8, nil) // structured replies
		if kind, _ := c.optionReply(8); kind != protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED {
			t.Fatalf("structured replies: %#x", kind)
		}
		c.option(protocol.NEGOTIATION_ID_OPTION_GO, infoData("", 1, 2, 3))
		var got [][]byte
		for {
			kind, data := c.optionReply(protocol.NEGOTIATION_ID_OPTION_GO)
			if kind == protocol.NEGOTIATION_TYPE_REPLY_ACK {
				break
			}
			got = append(got, data)
		}
		want := [][]byte{
			exportInfo,
			{0, 1},
			append([]byte{0, 2}, exportDescription...),
			{0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0},
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
		c.request(1, commandFlush, 0, 0, 0, nil)
		if errno, _ := c.reply(1, 0); errno != 0 {
			t.Errorf("flush after GO: error %d", errno)
		}
	})
	t.Run("refusals leave the negotiation open", func(t *testing.T) {
		c := dial(t, path)
		c.hello(1)
		for _, tt := range []struct {
			id   uint32
			data []byte
			want uint32
		}{
			{protocol.NEGOTIATION_ID_OPTION_GO, infoData("other"), protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN},
			{protocol.NEGOTIATION_ID_OPTION_GO, []byte{0, 0, 0, 9, 0, 0}, replyErrInvalid},
			{protocol.NEGOTIATION_ID_OPTION_GO, append(infoData(""), 0), replyErrInvalid},
			{protocol.NEGOTIATION_ID_OPTION_INFO, []byte{0xff, 0xff, 0xff, 0xff, 0, 0}, replyErrInvalid},
			{protocol.NEGOTIATION_ID_OPTION_LIST, []byte{1}, replyErrInvalid},
			{5, nil, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED},
		} {
			c.option(tt.id, tt.data)
			if kind, _ := c.optionReply(tt.id); kind != tt.want {
				t.Errorf("option %d with % x: reply %#x, want %#x", tt.id, tt.data, kind, tt.want)
			}
		}
		c.option(protocol.NEGOTIATION_ID_OPTION_LIST, nil)
		if kind, data := c.optionReply(3); kind != protocol.NEGOTIATION_TYPE_REPLY_SERVER || !bytes.Equal(data, make([]byte, 4)) {
			t.Errorf("LIST: %#x % x", kind, data)
		}
		if kind, _ := c.optionReply(3); kind != protocol.NEGOTIATION_TYPE_REPLY_ACK {
			t.Errorf("end of LIST: %#x", kind)
		}
		c.option(protocol.NEGOTIATION_ID_OPTION_ABORT, nil)
		if kind, _ := c.optionReply(2); kind != protocol.NEGOTIATION_TYPE_REPLY_ACK {
			t.Errorf("ABORT: %#x", kind)
		}
		c.wantEOF()
	})
	for _, noZeroes := range []bool{false, true} {
		c := dial(t, path)
		want := append(append([]byte(nil), exportInfo[2:]...), make([]byte, 124)...)
		if noZeroes {
			c.hello(3)
			want = want[:10]
		} else {
			c.hello(1)
		}
		c.option(optionExportName, nil)
		c.request(7, read, 0, 0, 4, nil)
		got := make([]byte, len(want))
		c.read(got)
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("EXPORT_NAME, no zeroes %v: %s", noZeroes, d)
		}
		if errno, data := c.reply(7, 4); errno != 0 || string(data) != "QFI\xfb" {
			t.Errorf("first read: error %d, %q", errno, data)
		}
	}
}

// TestBrokenNegotiation shows that each breach costs the client its connection.
func TestBrokenNegotiation(t *testing.T) {
	path, _ := start(t, handler{})
	for name, act := range map[string]func(c *client){
		"unknown client flag":  func(c *client) { c.hello(7) },
		"not fixed newstyle":   func(c *client) { c.hello(0) },
		"bad option magic":     func(c *client) { c.hello(3); c.write([]byte("IHAVEOPX"), uint64(0)) },
		"oversized option":     func(c *client) { c.hello(3); c.write(protocol.NEGOTIATION_MAGIC_OPTION, uint32(7), uint32(1<<31)) },
		"unknown export name":  func(c *client) { c.hello(3); c.option(optionExportName, []byte("x")) },
		"truncated then ended": func(c *client) { c.hello(3); c.write([]byte("IHAV")); c.c.(*net.UnixConn).CloseWrite() },
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, path)
			act(c)
			c.wantEOF()
		})
	}
	t.Run("endless options", func(t *testing.T) {
		c := dial(t, path)
		c.hello(3)
		for range maxOptions {
			c.option(5, nil)
			c.optionReply(5)
		}
		c.wantEOF()
	})
}

func TestNegotiationDeadline(t *testing.T) {
	path := socketPath(t)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := New(handler{}, slog.New(slog.DiscardHandler))
	s.negotiationTimeout = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	c := dial(t, path)
	var h protocol.NegotiationNewstyleHeader
	c.read(&h)
	c.wantEOF() // a silent client is dropped
	cancel()
	if err := wait(t, served); err != nil {
		t.Error(err)
	}
}

func TestHeldFlushHoldsNothingElse(t *testing.T) {
	entered, release := make(chan struct{}), make(chan error)
	path, _ := start(t, handler{flush: func(ctx context.Context) error {
		entered <- struct{}{}
		select {
		case err := <-release:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}})
	c, other := connect(t, path), connect(t, path)
	c.request(1, commandFlush, 0, 0, 0, nil)
	wait(t, entered)
	// The same connection and another one go on. The reply to the read comes
	// before that to the flush, so the flush is held.
	c.request(2, read, 0, 0, 4, nil)
	if errno, data := c.reply(2, 4); errno != 0 || string(data) != "QFI\xfb" {
		t.Errorf("read during the hold: error %d, %q", errno, data)
	}
	other.request(3, write, commandFlagFUA, 4096, 2, []byte("ab"))
	if errno, _ := other.reply(3, 0); errno != 0 {
		t.Errorf("write during the hold: error %d", errno)
	}
	release <- nil
	if errno, _ := c.reply(1, 0); errno != 0 {
		t.Errorf("released flush: error %d", errno)
	}
	c.request(4, commandFlush, 0, 0, 0, nil)
	wait(t, entered)
	release <- errors.New("the target refused")
	if errno, _ := c.reply(4, 0); errno != nbdEIO {
		t.Errorf("vetoed flush: error %d, want EIO", errno)
	}
	// The connection lives on after a veto; both clients see the write.
	c.request(5, read, 0, 4096, 2, nil)
	if errno, data := c.reply(5, 2); errno != 0 || string(data) != "ab" {
		t.Errorf("read after the veto: error %d, %q", errno, data)
	}
}

func TestReadVeto(t *testing.T) {
	type call struct {
		off int64
		n   int
	}
	var got atomic.Pointer[call]
	path, _ := start(t, handler{read: func(_ context.Context, off int64, n int) error {
		got.Store(&call{off, n})
		return errors.New("not restored")
	}})
	c := connect(t, path)
	c.request(9, read, 0, 512, 1024, nil)
	if errno, _ := c.reply(9, 1024); errno != nbdEIO {
		t.Errorf("error %d, want EIO", errno)
	}
	if g := got.Load(); g == nil || *g != (call{512, 1024}) {
		t.Errorf("handler saw %+v", g)
	}
}

func TestContextEndsWithConnection(t *testing.T) {
	entered, ended := make(chan struct{}), make(chan error, 1)
	h := handler{flush: func(ctx context.Context) error {
		close(entered)
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}}
	for name, end := range map[string]func(c *client){
		"closed":       func(c *client) { c.c.Close() },
		"disconnected": func(c *client) { c.request(2, disconnect, 0, 0, 0, nil) },
		"garbage":      func(c *client) { c.write(make([]byte, 28)) },
	} {
		t.Run(name, func(t *testing.T) {
			entered = make(chan struct{})
			path, _ := start(t, h)
			c := connect(t, path)
			c.request(1, commandFlush, 0, 0, 0, nil)
			wait(t, entered)
			end(c)
			if err := wait(t, ended); !errors.Is(err, context.Canceled) {
				t.Errorf("context: %v", err)
			}
		})
	}
}

func TestServeEndsHeldRequests(t *testing.T) {
	path := socketPath(t)
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	s := New(handler{flush: func(ctx context.Context) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	}}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	c := connect(t, path)
	c.request(1, commandFlush, 0, 0, 0, nil)
	wait(t, entered)
	cancel()
	if err := wait(t, served); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

func TestRequestErrors(t *testing.T) {
	path, _ := start(t, handler{})
	c := connect(t, path)
	for i, tt := range []struct {
		name        string
		kind, flags uint16
		off         uint64
		length      uint32
		data        []byte
		want        uint32
	}{
		{"read to the end", read, 0, ImageSize - 1, 1, nil, 0},
		{"read past the end", read, 0, ImageSize - 1, 2, nil, 22},
		{"read with overflow", read, 0, 1<<64 - 1, 2, nil, 22},
		{"huge read", read, 0, 0, 1<<32 - 1, nil, 22},
		{"empty read", read, 0, 0, 0, nil, 22},
		{"write past the end", write, 0, ImageSize - 1, 2, []byte("ab"), nbdENOSPC},
		{"write with overflow", write, 0, 1<<64 - 1, 2, []byte("ab"), nbdENOSPC},
		{"write larger than the image", write, 0, 0, ImageSize + 1, make([]byte, ImageSize+1), nbdENOSPC},
		{"flush of a range", commandFlush, 0, 0, 1, nil, 22},
		{"trim", 4, 0, 0, 512, nil, 22},
		{"write zeroes", 6, 0, 0, 512, nil, 22},
		{"unknown flag", read, 1 << 5, 0, 1, nil, 22},
		{"unknown command", 99, 0, 0, 0, nil, 22},
	} {
		c.request(uint64(i), tt.kind, tt.flags, tt.off, tt.length, tt.data)
		if errno, _ := c.reply(uint64(i), int(tt.length)); errno != tt.want {
			t.Errorf("%s: error %d, want %d", tt.name, errno, tt.want)
		}
	}
	c.request(0, write, 0, 0, maxPayload+1, nil)
	c.wantEOF() // its data cannot be skipped within bounds
}

func TestInFlightLimit(t *testing.T) {
	path, _ := start(t, handler{flush: func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}})
	c := connect(t, path)
	for i := range maxInFlight {
		c.request(uint64(i), commandFlush, 0, 0, 0, nil)
	}
	c.request(0, commandFlush, 0, 0, 0, nil)
	// Every held request ends with its context; the replies that still get out
	// are vetoes.
	for n := 0; ; n++ {
		var h protocol.TransmissionReplyHeader
		if err := binary.Read(c.c, binary.BigEndian, &h); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("the connection was not closed")
			}
			break
		}
		if h.Error != nbdEIO || n > maxInFlight {
			t.Fatalf("reply %d: %+v", n, h)
		}
	}
	if connect(t, path) == nil {
		t.Fatal("no new client")
	}
}
