//go:build e2e

package vfiouser

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"compsc.io/compsc/agent/device"
	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/e2e/nbd"
)

const (
	uid = "11111111-2222-3333-4444-555555555555"
	// Where the client has what, in serve.c and client.h.
	guestRAM, ring, buffers = 0x100000, 32, 0x10000
	bufferSize, page        = 2048, 4096
)

// source is the device process as the source of migrations, of which the test
// plays agent and gate, and the client the rest.
type source struct {
	*testing.T
	d      *deviceProcess
	ctl    pb.DeviceClient
	gate   *nbd.Client
	client *serving
}

// serving is the client as a server of guest memory.
type serving struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string
}

func startServing(t *testing.T, client, socket string) *serving {
	t.Helper()
	c := &serving{t: t, cmd: exec.Command(client, socket, "serve"), lines: make(chan string)}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	c.cmd.Stderr = &stderr
	stdin, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.stdin = stdin
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(c.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			c.lines <- s.Text()
		}
	}()
	t.Cleanup(func() {
		c.stdin.Close()
		for range c.lines { // until it ends, so that Wait does not cut it off
		}
		if err := c.cmd.Wait(); err != nil {
			t.Errorf("the client: %v: %s", err, stderr.String())
		}
	})
	c.expect("ready")
	return c
}

// line returns what the client says next.
func (c *serving) line() string {
	c.t.Helper()
	select {
	case l, ok := <-c.lines:
		if !ok {
			c.t.Fatal("the client has ended")
		}
		return l
	case <-time.After(bound):
		c.t.Fatalf("the client says nothing for %v", bound)
	}
	panic("unreachable")
}

func (c *serving) expect(want string) {
	c.t.Helper()
	if got := c.line(); got != want {
		c.t.Fatalf("the client says %q, want %q", got, want)
	}
}

func (c *serving) say(format string, args ...any) {
	c.t.Helper()
	if _, err := fmt.Fprintf(c.stdin, format+"\n", args...); err != nil {
		c.t.Fatal(err)
	}
}

// do has the client do something.
func (c *serving) do(format string, args ...any) {
	c.t.Helper()
	c.say(format, args...)
	c.expect("ok")
}

func (s *source) prepare(timeout time.Duration) (*pb.PrepareSourceReply, error) {
	ctx, cancel := context.WithTimeout(s.Context(), timeout)
	defer cancel()
	return s.ctl.PrepareSource(ctx, &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: durationpb.New(10 * time.Second)})
}

func (s *source) cancel() {
	s.Helper()
	if _, err := s.ctl.CancelSource(s.Context(), &pb.CancelSourceRequest{MigrationUid: uid, Reason: "the test goes on"}); err != nil {
		s.Fatal(err)
	}
}

// prepared has the source prepared with the client answering as it shall, and
// compares what it learned.
func (s *source) prepared() {
	s.Helper()
	s.client.do("answer right")
	r, err := s.prepare(bound)
	if err != nil {
		s.Fatal(err)
	}
	table := make([]byte, 48)
	for i := range table {
		table[i] = byte(i + 1)
	}
	if got := r.GetInterfaces()[0].GetMsixTable(); !slices.Equal(got, table) {
		s.Fatalf("the MSI-X table was read as %x, want %x", got, table)
	}
}

// TestServerRequests has the device process read and write guest memory through
// an independent client, that answers right and in every wrong way.
func TestServerRequests(t *testing.T) {
	dir := t.TempDir()
	client := buildClient(t, dir)
	s := &source{T: t, d: startDevice(t, dir)}
	sockets := filepath.Dir(s.d.socket)
	conn, err := grpc.NewClient("unix:"+filepath.Join(sockets, device.ControlSocket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.ctl = pb.NewDeviceClient(conn)
	if s.gate, err = nbd.Dial(filepath.Join(sockets, device.GateSocket)); err != nil {
		t.Fatal(err)
	}
	defer s.gate.Close()
	s.client = startServing(t, client, s.d.socket)

	s.prepared()
	s.cancel()
	for how, want := range map[string]string{
		"error": "bad address", "short": "describes another access", "long": "describes another access",
		"other": "describes another access", "other-count": "describes another access",
	} {
		s.client.do("answer %s", how)
		if _, err := s.prepare(bound); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), want) {
			t.Errorf("answered with %q: %v, want %q", how, err, want)
		}
		s.prepared() // the session goes on
		s.cancel()
	}
	for _, how := range []string{"stranger", "twice"} {
		s.client.do("answer %s", how)
		if _, err := s.prepare(bound); err != nil {
			t.Errorf("answered with %q: %v", how, err)
		}
		s.cancel()
		s.prepared()
		s.cancel()
	}
	// A late reply belongs to nobody: what it says, which is wrong, goes nowhere.
	s.client.do("answer late")
	if _, err := s.prepare(300 * time.Millisecond); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("without an answer: %v", err)
	}
	s.client.do("release")
	s.prepared()

	s.testMarking()
	s.testRefusedMarking()

	// A client that goes away with a request open is missed at once.
	s.client.do("answer never")
	ended := make(chan error, 1)
	begin := time.Now()
	go func() {
		_, err := s.prepare(bound)
		ended <- err
	}()
	until(t, "the request has reached the client", func() (bool, error) {
		s.client.say("report")
		l := s.client.line()
		return strings.HasPrefix(l, "reads 1 "), fmt.Errorf("it says %q", l)
	})
	s.client.do("hang-up")
	if err := <-ended; status.Code(err) != codes.Unavailable || time.Since(begin) > bound/2 {
		t.Errorf("the client went away: %v after %v", err, time.Since(begin))
	}
	if out := run(t, client, s.d.socket, "talk"); out != "ok" {
		t.Errorf("the next client's conversation ended with %q", out)
	}
}

// testMarking has the driver receive frames, and looks that exactly the pages
// which the device wrote are marked through the client, unchanged. The source is
// prepared, and afterwards runs as before.
func (s *source) testMarking() {
	s.client.do("traffic")
	s.client.say("report")
	s.client.line()
	flush := nbd.Held(s.gate.Flush)
	ctx, cancel := context.WithTimeout(s.Context(), bound)
	defer cancel()
	if _, err := s.ctl.AwaitCapture(ctx, &pb.AwaitCaptureRequest{MigrationUid: uid}); err != nil {
		s.Fatal(err)
	}
	r, err := s.ctl.ReleaseSource(ctx, &pb.ReleaseSourceRequest{MigrationUid: uid})
	if err != nil {
		s.Fatal(err)
	}
	if e := <-flush; e != 0 {
		s.Errorf("the flush failed with errno %d", e)
	}
	want := []string{fmt.Sprintf("%#x", guestRAM+page), fmt.Sprintf("%#x", guestRAM+2*page)} // the rings
	for at := guestRAM + buffers; at < guestRAM+buffers+ring*bufferSize; at += page {
		want = append(want, fmt.Sprintf("%#x", at))
	}
	s.client.say("report")
	got := s.client.line()
	// The table before the stop, and the fence behind the marks.
	if head := fmt.Sprintf("reads 2 writes %d changed 0 pages ", len(want)); got != head+strings.Join(want, " ") {
		s.Errorf("the client saw %q, want %q", got, head+strings.Join(want, " "))
	}
	if n := r.GetPages()[0].GetPagesMarked(); n != uint64(len(want)) {
		s.Errorf("%d pages are reported as marked, want %d", n, len(want))
	}
	s.cancel()
	s.client.do("traffic")
}

// testRefusedMarking has the client refuse the writes, which are posted: the
// error must be noticed all the same, and the VF run on.
func (s *source) testRefusedMarking() {
	s.prepared()
	s.client.do("traffic")
	s.client.do("answer error-writes")
	flush := nbd.Held(s.gate.Flush)
	ctx, cancel := context.WithTimeout(s.Context(), bound)
	defer cancel()
	if _, err := s.ctl.AwaitCapture(ctx, &pb.AwaitCaptureRequest{MigrationUid: uid}); err != nil {
		s.Fatal(err)
	}
	_, err := s.ctl.ReleaseSource(ctx, &pb.ReleaseSourceRequest{MigrationUid: uid})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "marking device-written pages") {
		s.Errorf("marks that the client refused: %v", err)
	}
	s.cancel()
	if e := <-flush; e != syscall.EIO {
		s.Errorf("the flush ended with errno %d, want EIO", e)
	}
	s.client.do("answer right")
	s.client.do("traffic")
}
