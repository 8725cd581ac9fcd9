package vfiouser

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestDMA(t *testing.T) {
	ram := &guestRAM{ram: make([]byte, 256<<10)}
	_, s, _ := connect(t, ram)
	ctx := testContext(t)
	data := make([]byte, 2*dmaChunk+5)
	for i := range data {
		data[i] = byte(i * 7)
	}
	if err := s.DMAWrite(ctx, 100, data); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if err := s.DMARead(ctx, 100, got); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read back something else, %v", err)
	}
	writes, reads := ram.seen()
	if d := cmp.Diff([]uint64{100, 100 + dmaChunk, 100 + 2*dmaChunk}, writes); d != "" {
		t.Error("writes:", d)
	}
	if d := cmp.Diff([]int{dmaChunk, dmaChunk, 5}, reads); d != "" {
		t.Error("reads:", d)
	}
	if err := s.DMARead(ctx, 1<<40, got[:1]); !errors.Is(err, syscall.EFAULT) {
		t.Errorf("a refused read: %v", err)
	}
	if err := s.DMAWrite(ctx, 1<<40, got[:1]); !errors.Is(err, syscall.EFAULT) {
		t.Errorf("a refused write: %v", err)
	}
}

// TestFence shows that posted writes are done, in order, when Fence returns, and
// that it tells, once, of one that failed.
func TestFence(t *testing.T) {
	ram := &guestRAM{ram: make([]byte, 1<<20)}
	_, s, _ := connect(t, ram)
	ctx := testContext(t)
	var want []uint64
	for i := range uint64(200) {
		addr := i * 4096
		want = append(want, addr)
		if err := s.PostWrite(addr, []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Fence(ctx, 0); err != nil {
		t.Fatal(err)
	}
	writes, _ := ram.seen()
	if d := cmp.Diff(want, writes); d != "" {
		t.Error("after the fence:", d)
	}
	if err := s.PostWrite(1<<40, []byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := s.Fence(ctx, 0); !errors.Is(err, syscall.EFAULT) {
		t.Errorf("a fence after a failed write: %v", err)
	}
	if err := s.Fence(ctx, 0); err != nil {
		t.Errorf("the next fence: %v", err)
	}
}

// TestReadFencesRegisterWrites shows that a DMARead reply comes after the posted
// register writes that the client had sent before it.
func TestReadFencesRegisterWrites(t *testing.T) {
	var client atomic.Pointer[Client]
	ram := &guestRAM{ram: make([]byte, 4096), hook: func(uint64, bool) error {
		for i := range uint64(50) {
			if err := client.Load().PostRegionWrite(RegionBAR0, 4*i, []byte{1, 0, 0, 0}); err != nil {
				return err
			}
		}
		return nil
	}}
	dev, s, c := connect(t, ram)
	client.Store(c)
	if err := s.DMARead(testContext(t), 0, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if n := len(dev.written()); n != 50 {
		t.Errorf("%d of 50 register writes were seen", n)
	}
}

func TestDisconnectFailsPendingDMA(t *testing.T) {
	entered, release := make(chan struct{}, 2), make(chan struct{})
	ram := &guestRAM{ram: make([]byte, 4096), hook: func(uint64, bool) error {
		entered <- struct{}{}
		<-release
		return nil
	}}
	dev, s, c := connect(t, ram)
	failed := make(chan error, 2)
	go func() { failed <- s.DMARead(context.Background(), 0, make([]byte, 8)) }()
	wait(t, entered)
	go func() { failed <- s.DMAWrite(context.Background(), 0, make([]byte, 8)) }()
	c.link.sock.close()
	for range 2 {
		if err := wait(t, failed); !errors.Is(err, ErrNotConnected) {
			t.Errorf("pending request: %v", err)
		}
	}
	close(release)
	wait(t, dev.gone)
	if s.Connected() {
		t.Error("the client counts as connected")
	}
	ctx := testContext(t)
	for name, err := range map[string]error{
		"read":  s.DMARead(ctx, 0, make([]byte, 1)),
		"write": s.DMAWrite(ctx, 0, make([]byte, 1)),
		"post":  s.PostWrite(0, make([]byte, 1)),
		"fence": s.Fence(ctx, 0),
	} {
		if !errors.Is(err, ErrNotConnected) {
			t.Errorf("%s without a client: %v", name, err)
		}
	}
}

// TestGivenUpRequest shows that a late reply is not taken for another's.
func TestGivenUpRequest(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	ram := &guestRAM{ram: []byte("abcdefgh")}
	ram.hook = func(addr uint64, _ bool) error {
		if addr == 0 {
			entered <- struct{}{}
			<-release
		}
		return nil
	}
	_, s, _ := connect(t, ram)
	ctx, cancel := context.WithCancel(testContext(t))
	failed := make(chan error, 1)
	go func() { failed <- s.DMARead(ctx, 0, make([]byte, 4)) }()
	wait(t, entered)
	cancel()
	if err := wait(t, failed); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	close(release)
	var got [4]byte
	if err := s.DMARead(testContext(t), 4, got[:]); err != nil || string(got[:]) != "efgh" {
		t.Errorf("the next read: %q, %v", got, err)
	}
}

// TestWrongReply shows that a reply of the wrong size fails its request only.
func TestWrongReply(t *testing.T) {
	mem := &shortReads{}
	_, s, c := connect(t, mem)
	mem.c.Store(c)
	if err := s.DMARead(testContext(t), 0, make([]byte, 4)); !errors.Is(err, ErrProtocol) {
		t.Errorf("a short reply: %v", err)
	}
	if err := c.Reset(testContext(t)); err != nil {
		t.Errorf("the session did not survive: %v", err)
	}
}

// shortReads answers the server's first request before the client's proper
// answer, with one byte less than asked for.
type shortReads struct{ c atomic.Pointer[Client] }

func (r *shortReads) ReadAt(_ uint64, p []byte) error {
	return r.c.Load().link.send(header{id: 1, cmd: cmdDMARead, flags: flagReply}, make([]byte, dmaAccessSize+len(p)-1))
}

func (r *shortReads) WriteAt(uint64, []byte) error { return nil }

// TestServerStop shows that the end of Serve's context ends the session and what
// waits for it.
func TestServerStop(t *testing.T) {
	dev := newFakeDevice()
	s, err := Listen(t.TempDir()+"/s", dev, Options{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	entered, release := make(chan struct{}), make(chan struct{})
	c, err := Dial(testContext(t), s.ln.Addr().String(), &guestRAM{ram: make([]byte, 1), hook: func(uint64, bool) error {
		close(entered)
		<-release
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	defer close(release)
	wait(t, dev.connected)
	failed := make(chan error, 1)
	go func() { failed <- s.DMARead(context.Background(), 0, make([]byte, 1)) }()
	wait(t, entered)
	cancel()
	if err := wait(t, failed); !errors.Is(err, ErrNotConnected) {
		t.Errorf("pending request: %v", err)
	}
	if err := wait(t, served); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := wait(t, dev.gone); !errors.Is(err, context.Canceled) {
		t.Errorf("the device was told %v", err)
	}
}

// TestUnreadClient shows that a client that does not read loses its session
// instead of blocking the server for good.
func TestUnreadClient(t *testing.T) {
	blocked := make(chan struct{})
	dev, s, _ := connect(t, &guestRAM{hook: func(uint64, bool) error { <-blocked; return nil }})
	defer close(blocked)
	l, err := s.link()
	if err != nil {
		t.Fatal(err)
	}
	l.wmu.Lock()
	l.writeTimeout = 20 * time.Millisecond
	l.wmu.Unlock()
	for err == nil {
		err = s.PostWrite(0, make([]byte, dmaChunk))
	}
	if !errors.Is(err, ErrNotConnected) {
		t.Errorf("posting to a client that does not read: %v", err)
	}
	if err := wait(t, dev.gone); err == nil {
		t.Error("the session's end is reported as the client's own")
	}
}

// BenchmarkPostWrite marks 500 pages, one byte each, and fences once, which is
// what the source does while the VM is stopped.
func BenchmarkPostWrite(b *testing.B) {
	const pages = 500
	ram := &guestRAM{ram: make([]byte, pages*4096)}
	_, s, _ := connect(b, ram)
	for b.Loop() {
		for i := range uint64(pages) {
			if err := s.PostWrite(i*4096, []byte{1}); err != nil {
				b.Fatal(err)
			}
		}
		if err := s.Fence(context.Background(), 0); err != nil {
			b.Fatal(err)
		}
		ram.mu.Lock()
		ram.writes, ram.reads = ram.writes[:0], ram.reads[:0]
		ram.mu.Unlock()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*pages), "ns/page")
}
