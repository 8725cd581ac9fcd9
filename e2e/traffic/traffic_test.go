//go:build e2e

package traffic

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/stream"
)

// The lab's node a plays the guest here.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	l, err := lab.New(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func uplink(t *testing.T, l *lab.Lab, up bool) {
	t.Helper()
	if err := l.Nodes["a"].NS.Do(func() error {
		link, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		if up {
			return netlink.LinkSetUp(link)
		}
		return netlink.LinkSetDown(link)
	}); err != nil {
		t.Fatal(err)
	}
}

// TestPing: every request is accounted for, and an outage costs the pings
// sent in it.
func TestPing(t *testing.T) {
	l := newLab(t)
	p, err := Ping(l, l.Nodes["a"].IP)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := p.Await(ctx, 20); err != nil {
		t.Fatal(err)
	}
	from := p.Mark()
	await(t, "50 requests", func() bool { return p.Mark() >= from+50 })
	if r, err := p.Report(ctx, from); err != nil || r.Lost != 0 || r.Sent < 50 {
		t.Fatalf("%+v, %v, want none lost of at least 50", r, err)
	}
	from = p.Mark()
	down := time.Now()
	uplink(t, l, false)
	await(t, "30 requests", func() bool { return p.Mark() >= from+30 })
	uplink(t, l, true)
	if err := p.Await(ctx, 1); err != nil {
		t.Fatal(err)
	}
	r, err := p.Report(ctx, from)
	if err != nil || r.Lost < 25 || r.Lost > r.Sent {
		t.Fatalf("%+v, %v, want about 30 lost", r, err)
	}
	for _, at := range r.LostAt {
		if at.Before(down.Add(-PingInterval)) {
			t.Errorf("a ping sent %s before the outage counts as lost", down.Sub(at))
		}
	}
}

// TestStream: a stream survives an outage, and its progress is seen.
func TestStream(t *testing.T) {
	l := newLab(t)
	var ln net.Listener
	if err := l.Nodes["a"].NS.Do(func() (err error) {
		ln, err = net.Listen("tcp4", net.JoinHostPort(l.Nodes["a"].IP.String(), "5001"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err == nil {
			_, err = stream.Serve(t.Context(), c)
		}
		if err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := OpenStream(ctx, l, l.Nodes["a"].IP, 1, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := AwaitProgress(ctx, s, 100<<10); err != nil {
		t.Fatal(err)
	}
	uplink(t, l, false)
	short, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	if err := AwaitProgress(short, s, 10<<20); err == nil {
		t.Error("progress without a network")
	}
	uplink(t, l, true)
	if err := AwaitProgress(ctx, s, 100<<10); err != nil {
		t.Fatal(err)
	}
	if st, err := s.Stop(ctx); err != nil || !st.Intact {
		t.Errorf("%+v, %v", st, err)
	}
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}
