package ipxe

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func startServer(t *testing.T, parts ...[]byte) *server {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := serve(l, parts, []byte("a kernel"), []byte("an initrd"))
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// get fetches in the background.
func get(t *testing.T, url string) <-chan []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte, 1)
	go func() {
		defer close(got)
		a, err := http.DefaultClient.Do(r)
		if err != nil {
			return
		}
		defer a.Body.Close()
		if b, err := io.ReadAll(a.Body); err == nil && a.StatusCode == http.StatusOK {
			got <- b
		}
	}()
	return got
}

// until waits until ok is true.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	again := time.NewTicker(tick)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

func TestPartEndsWhenReleased(t *testing.T) {
	part := make([]byte, 128<<10)
	rand.NewChaCha8([32]byte{1}).Read(part)
	s := startServer(t, part)
	got := get(t, s.base+partPath+"0")
	until(t, "most of the part to be sent", func() bool {
		n, asked, err := s.progress(0)
		return n > len(part)-100 && asked == 1 && err == nil
	})
	select {
	case <-got:
		t.Fatal("the part ended before it was released")
	default:
	}
	s.end(0)
	if b := <-got; !bytes.Equal(b, part) {
		t.Errorf("%d bytes arrived, not the %d that were to be sent", len(b), len(part))
	}
}

func TestPortion(t *testing.T) {
	for _, size := range []int{1, 2, 100, reserve, reserve + 1, 3 * reserve} {
		rest, sent := size, 0
		for n := portion(rest, false); n > 0; n = portion(rest, false) {
			if n > rest || n > rate {
				t.Fatalf("%d of %d bytes are sent at once", n, rest)
			}
			rest -= n
			sent += n
		}
		if rest != 1 || sent != size-1 {
			t.Errorf("of %d bytes %d are left before the release, want 1", size, rest)
		}
		if n := portion(rest, true); n != rest {
			t.Errorf("of %d bytes %d are sent after the release", rest, n)
		}
	}
}

func TestCheckWaits(t *testing.T) {
	s := startServer(t, []byte("x"))
	got := get(t, s.base+checkPath+checkLinux)
	until(t, "the check to arrive", func() bool { ok, err := s.awaits(checkLinux); return ok && err == nil })
	select {
	case <-got:
		t.Fatal("the check was answered before it was approved")
	default:
	}
	s.approve(checkLinux)
	if b := <-got; len(b) == 0 {
		t.Error("the check was not answered")
	}
	if b, ok := <-get(t, s.base+checkPath+"1"); ok {
		t.Errorf("a check of a part that does not exist was answered with %q", b)
	}
}

func TestReports(t *testing.T) {
	s := startServer(t, []byte("x"))
	if _, _, ok, err := s.opened(); ok || err != nil {
		t.Errorf("nothing has happened, but opened says %v, %v", ok, err)
	}
	<-get(t, s.base+openPath+"?chip=82599-vf&mac=52-54-00-00-00-01")
	if chip, mac, ok, err := s.opened(); chip != "82599-vf" || mac != "52-54-00-00-00-01" || !ok || err != nil {
		t.Errorf("opened says %q, %q, %v, %v", chip, mac, ok, err)
	}
	<-get(t, s.base+failedPath+"?i=0&errno=0x4c")
	if _, err := s.awaits("0"); err == nil || !strings.Contains(err.Error(), "0x4c") {
		t.Errorf("after a failure the error is %v", err)
	}
}

func TestScript(t *testing.T) {
	got, err := script(netip.MustParsePrefix("198.18.3.100/24"), "http://198.18.3.1:80", 6, "console=ttyS0")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"#!ipxe\n", "set net0/ip 198.18.3.100\n", "set net0/netmask 255.255.255.0\n",
		"iseq ${i} 6 || goto part\n", "kernel --name kernel http://198.18.3.1:80/kernel console=ttyS0 ||",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the script lacks %q:\n%s", want, got)
		}
	}
	if _, err := script(netip.MustParsePrefix("2001:db8::1/64"), "", 1, ""); err == nil {
		t.Error("an IPv6 address is no error")
	}
	if _, err := script(netip.MustParsePrefix("198.18.3.100/24"), "", 1, "a\nb"); err == nil {
		t.Error("two lines of arguments are no error")
	}
}
