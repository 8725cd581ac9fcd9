package vfiouser

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// short is a bound that the tests of bounds have to wait for.
const short = 50 * time.Millisecond

// TestStalledClients shows that a client that does not go on loses the device to
// the next one: before VERSION, within it, and within any later message.
func TestStalledClients(t *testing.T) {
	version := frame(cmdVersion, 0, make([]byte, 4))
	write := frame(cmdRegionWrite, 0, append(regionAccess(RegionBAR0, 8, 4), 1, 2, 3, 4))
	reply := frame(cmdDMARead, flagReply, make([]byte, dmaAccessSize))
	file := memfd(t, 4096)
	for _, tt := range []struct {
		name       string
		negotiates bool
		data       []byte
		fds        int
		drip       []byte // sent over and over, with pauses shorter than the bound
		atOnce     bool   // before any bound
		want       string // why the session ended
	}{
		{name: "silent"},
		{name: "half a header", data: version[:7]},
		{name: "half of VERSION", data: version[:headerSize+1]},
		{name: "half of VERSION with descriptors", data: version[:headerSize+1], fds: 2},
		{name: "VERSION in drops", data: frame(cmdVersion, 0, make([]byte, maxTransfer))[:headerSize], drip: []byte{0}},
		{name: "replies only", drip: reply, atOnce: true},
		{name: "half a header, negotiated", negotiates: true, data: write[:7], want: "only 7 bytes came"},
		{name: "half a body, negotiated", negotiates: true, data: write[:headerSize+3], want: "only 19 bytes came"},
		{name: "half a body after a message", negotiates: true, data: append(write[:len(write):len(write)], write[:20]...), want: "only 20 bytes came"},
		{name: "half a body with descriptors", negotiates: true, data: write[:headerSize+3], fds: 2, want: "only 19 bytes came"},
		{name: "body in drops", negotiates: true, data: frame(cmdRegionWrite, 0, make([]byte, maxTransfer))[:headerSize], drip: []byte{0}, want: "bytes came"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := newFakeDevice()
			path, _ := start(t, dev, Options{}, func(s *Server) {
				s.greetTimeout, s.messageTimeout, s.takeOverWait = short, short, testTimeout
				if tt.negotiates || tt.atOnce {
					s.greetTimeout = 2 * testTimeout
				}
			})
			before := openFDs(t)
			c := rawClient(t, path)
			if tt.negotiates {
				if _, err := c.link.request(testContext(t), cmdVersion, make([]byte, 4)); err != nil {
					t.Fatal(err)
				}
				wait(t, dev.connected)
			}
			var oob []byte
			if tt.fds > 0 {
				oob = unix.UnixRights(int(file.Fd()), int(file.Fd()))
			}
			if err := c.link.sock.send(tt.data, oob, testTimeout); err != nil {
				t.Fatal(err)
			}
			drip, end := time.NewTicker(short/10), time.After(testTimeout)
			defer drip.Stop()
			for over := false; !over; {
				select {
				case <-c.Done():
					over = true
				case <-drip.C:
					_ = c.link.sock.send(tt.drip, nil, testTimeout) // fails once the session is over
				case <-end:
					t.Fatal("the session goes on")
				}
			}
			next := rawClient(t, path)
			if _, err := next.link.request(testContext(t), cmdVersion, make([]byte, 4)); err != nil {
				t.Fatalf("no client can follow: %v", err)
			}
			if tt.negotiates {
				if err := wait(t, dev.gone); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("the session ended with %v, want %q", err, tt.want)
				}
			} else if n := len(dev.gone); n != 0 {
				t.Errorf("the device saw %d ends of clients that were none", n)
			}
			// What is left is the second connection, at both its ends.
			if n := openFDs(t) - before; n != 2 {
				t.Errorf("%d descriptors are open more than before, want 2", n)
			}
		})
	}
}

// TestQuietClient shows that a client may say nothing for as long as it likes
// between two messages, and that one that is slow within its bound is served.
func TestQuietClient(t *testing.T) {
	dev := newFakeDevice()
	path, _ := start(t, dev, Options{}, func(s *Server) { s.greetTimeout, s.messageTimeout = time.Second, time.Second })
	c, err := Dial(testContext(t), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	pause := func(d time.Duration) {
		t.Helper()
		select {
		case <-c.Done():
			t.Fatal("the session ended")
		case <-time.After(d):
		}
	}
	pause(1200 * time.Millisecond)
	post := frame(cmdRegionWrite, flagNoReply, append(regionAccess(RegionBAR0, 8, 4), 1, 2, 3, 4))
	for at := 0; at < len(post); at += 12 {
		if err := c.link.sock.send(post[at:at+12], nil, testTimeout); err != nil {
			t.Fatal(err)
		}
		pause(100 * time.Millisecond)
	}
	pause(1200 * time.Millisecond)
	if err := c.Reset(testContext(t)); err != nil {
		t.Error(err)
	}
	if n := len(dev.written()); n != 1 {
		t.Errorf("%d writes, want 1", n)
	}
}
