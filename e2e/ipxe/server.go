package ipxe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Paths of the server, as the script asks for them.
const (
	openPath   = "/open"
	partPath   = "/part/"
	checkPath  = "/check/"
	kernelPath = "/kernel"
	initrdPath = "/initrd"
	failedPath = "/failed"
	// checkLinux is the check of kernel and initrd.
	checkLinux = "linux"
)

const (
	// rate is how fast a part is sent that must not end yet, in bytes per
	// second, in pieces of one per tick.
	rate = 1 << 20
	tick = 5 * time.Millisecond
	// reserve is the end of a part, of which less and less is sent with each
	// tick, so that there is always something left to send.
	reserve = 512 << 10
	// sendBuffer is the server's socket buffer: bytes in it count as sent.
	sendBuffer = 64 << 10
)

// server is what iPXE downloads from. Its methods are safe for concurrent use.
type server struct {
	parts          [][]byte
	kernel, initrd []byte

	http *http.Server
	base string
	done chan error

	mu       sync.Mutex
	chip     string // empty until the guest has opened its interface
	mac      string
	failure  string
	asked    []int           // requests for each part
	sent     []int           // bytes of each part
	linux    map[string]bool // of kernel and initrd, what was asked for
	release  []chan struct{} // closed when a part may end
	checking map[string]bool // checks that the guest waits for
	checked  map[string]chan struct{}
}

// serve answers on l until Close.
func serve(l net.Listener, parts [][]byte, kernel, initrd []byte) *server {
	s := &server{
		parts: parts, kernel: kernel, initrd: initrd,
		base: "http://" + l.Addr().String(), done: make(chan error, 1),
		asked: make([]int, len(parts)), sent: make([]int, len(parts)), linux: map[string]bool{},
		checking: map[string]bool{}, checked: map[string]chan struct{}{checkLinux: make(chan struct{})},
	}
	for i := range parts {
		s.release = append(s.release, make(chan struct{}))
		s.checked[strconv.Itoa(i)] = make(chan struct{})
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+openPath, s.open)
	mux.HandleFunc("GET "+partPath+"{part}", s.part)
	mux.HandleFunc("GET "+checkPath+"{what}", s.check)
	mux.HandleFunc("GET "+kernelPath, s.file(kernel))
	mux.HandleFunc("GET "+initrdPath, s.file(initrd))
	mux.HandleFunc("GET "+failedPath, s.failed)
	s.http = &http.Server{
		Handler: mux, ReadHeaderTimeout: time.Minute,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if t, ok := c.(*net.TCPConn); ok {
				// Best effort: a larger one only blurs what was sent when.
				_ = t.SetWriteBuffer(sendBuffer)
			}
			return ctx
		},
	}
	go func() { s.done <- s.http.Serve(l) }()
	return s
}

// Close ends the server and its connections.
func (s *server) Close() error {
	err := s.http.Close()
	if serr := <-s.done; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

func (s *server) open(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.chip, s.mac = r.FormValue("chip"), r.FormValue("mac")
	s.mu.Unlock()
	fmt.Fprintln(w, "opened")
}

func (s *server) failed(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.failure = r.URL.RawQuery
	s.mu.Unlock()
	fmt.Fprintln(w, "noted")
}

// file sends kernel or initrd as fast as it goes.
func (s *server) file(content []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.linux[r.URL.Path] = true
		s.mu.Unlock()
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		// A client that is gone does not ask for what follows.
		_, _ = w.Write(content)
	}
}

// part sends a part slowly, and never its end, until that is released.
func (s *server) part(w http.ResponseWriter, r *http.Request) {
	i, err := strconv.Atoi(r.PathValue("part"))
	if err != nil || i < 0 || i >= len(s.parts) {
		http.NotFound(w, r)
		return
	}
	s.mu.Lock()
	s.asked[i]++
	s.sent[i] = 0
	release := s.release[i]
	s.mu.Unlock()
	rest := s.parts[i]
	w.Header().Set("Content-Length", strconv.Itoa(len(rest)))
	out := http.NewResponseController(w)
	t := time.NewTicker(tick)
	defer t.Stop()
	for released := false; len(rest) > 0; {
		if !released {
			select {
			case <-t.C:
			case <-release:
				released = true
			case <-r.Context().Done():
				return
			}
		}
		n := portion(len(rest), released)
		if _, err := w.Write(rest[:n]); err != nil || out.Flush() != nil {
			return
		}
		rest = rest[n:]
		s.mu.Lock()
		s.sent[i] += n
		s.mu.Unlock()
	}
}

// portion is how much of the rest of a part is sent in one go, 1 at least
// while it is more than one byte that is left, or the part may end.
func portion(rest int, released bool) int {
	const each = int(rate * tick / time.Second)
	switch {
	case released:
		return min(rest, sendBuffer)
	case rest > reserve:
		return min(each, rest-reserve)
	case rest > 1:
		return min(each, max(1, rest/64))
	default:
		return 0
	}
}

// check answers once what the guest asks about was found to be right.
func (s *server) check(w http.ResponseWriter, r *http.Request) {
	what := r.PathValue("what")
	s.mu.Lock()
	checked := s.checked[what]
	s.checking[what] = checked != nil
	s.mu.Unlock()
	if checked == nil {
		http.NotFound(w, r)
		return
	}
	select {
	case <-checked:
		fmt.Fprintln(w, "right")
	case <-r.Context().Done():
	}
}

// opened tells what the guest said of its interface once it had opened it.
func (s *server) opened() (chip, mac string, ok bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.chip, s.mac, s.mac != "", s.err()
}

// err is the guest's own report of its failure. The caller holds s.mu.
func (s *server) err() error {
	if s.failure != "" {
		return fmt.Errorf("iPXE failed: %s (explained at https://ipxe.org/<errno>)", s.failure)
	}
	return nil
}

// progress of a part: how many bytes of it were sent, and how often the guest
// asked for it.
func (s *server) progress(part int) (sent, asked int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent[part], s.asked[part], s.err()
}

// end lets a part end.
func (s *server) end(part int) { close(s.release[part]) }

// awaits tells whether the guest waits for the check.
func (s *server) awaits(what string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.checking[what], s.err()
}

// approve answers the check.
func (s *server) approve(what string) { close(s.checked[what]) }
