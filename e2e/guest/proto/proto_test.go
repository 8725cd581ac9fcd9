package proto

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// serve runs a guest's end with handle and returns a client and the guest's
// end of the line, with which a test can add to what the guest answers.
func serve(t *testing.T, handle func(Request) Response) (*Client, net.Conn) {
	t.Helper()
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(guest, handle) }()
	client := NewClient(host)
	t.Cleanup(func() {
		client.Close()
		guest.Close()
		if err := <-served; err == nil {
			t.Error("Serve returned no error when its port ended")
		}
	})
	return client, guest
}

func TestCall(t *testing.T) {
	client, _ := serve(t, func(r Request) Response {
		switch {
		case r.Op == OpInfo:
			return Response{Info: &Info{Kernel: "6.1.0", Uptime: time.Second}}
		case r.Op == OpRun && r.Action != nil && *r.Action == Action{Name: ActionMTU, MTU: 9000}:
			return Response{}
		}
		return Response{Error: "unexpected request"}
	})
	ctx := bounded(t)
	info, err := client.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Info{Kernel: "6.1.0", Uptime: time.Second}, info); diff != "" {
		t.Errorf("info (-want +got):\n%s", diff)
	}
	if err := client.Run(ctx, Action{Name: ActionMTU, MTU: 9000}); err != nil {
		t.Error(err)
	}
	if err := client.Run(ctx, Action{Name: ActionMTU, MTU: 1}); err == nil || !strings.Contains(err.Error(), "unexpected request") {
		t.Errorf("a refused action: error %v, want the guest's", err)
	}
}

func TestCallRepeatsUntilAnswered(t *testing.T) {
	host, guest := net.Pipe()
	client := NewClient(host)
	defer client.Close()
	// The first request is lost but for its end, as when the guest opens the
	// port late; the answer comes among noise and answers to others.
	go func() {
		lines := bufio.NewReader(guest)
		for range 3 { // empty line, request, empty line
			if _, err := lines.ReadString('\n'); err != nil {
				return
			}
		}
		line, err := lines.ReadBytes('\n')
		var request Request
		if err != nil || json.Unmarshal(line, &request) != nil {
			return
		}
		answer, _ := json.Marshal(Response{ID: request.ID, To: request.Op, Resets: &Resets{Count: 7}})
		guest.Write(line) // as a port that still echoes does
		guest.Write([]byte("\x00\xff{\"id\":\n{\"id\":12345,\"to\":\"resets\",\"resets\":{\"count\":1}}\n" + strings.Repeat("x", 2*MaxResponse) + "\nnoise"))
		guest.Write(append(answer, '\n'))
	}()
	resets, err := client.Resets(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	if resets.Count != 7 {
		t.Errorf("resets: %+v, want those of the answer to this request", resets)
	}
}

func TestCallIsBounded(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	client := NewClient(host)
	defer client.Close()
	go io.Copy(io.Discard, guest) // a guest that never answers
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := client.Info(ctx); err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("a call without an answer: error %v", err)
	}
	guest.Close()
	if _, err := client.Info(bounded(t)); err == nil {
		t.Error("a call on a line that ended: no error")
	}
}

func TestServeSkipsGarbage(t *testing.T) {
	var handled atomic.Uint64
	client, _ := serve(t, func(Request) Response {
		handled.Add(1)
		return Response{}
	})
	garbage := "\x00\xff{{{\n[]\n{\"id\":1}\n{\"id\":\"x\",\"op\":\"info\"}\n" + strings.Repeat("a", 3*MaxRequest) + "\n{\"id\":5,\"op"
	if _, err := client.conn.Write([]byte(garbage)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Stats(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if got := handled.Load(); got != 1 {
		t.Errorf("%d requests were handled, want only the good one", got)
	}
}

// TestServeCarriesOutOnce: a client that was not answered in time asks again.
func TestServeCarriesOutOnce(t *testing.T) {
	const first, second = "\n{\"id\":7,\"op\":\"run\"}\n", "\n{\"id\":8,\"op\":\"run\"}\n"
	var out bytes.Buffer
	handled := 0
	err := Serve(port{strings.NewReader(first + first + second + first), &out}, func(Request) Response {
		handled++
		return Response{Error: strings.Repeat("x", handled)}
	})
	if err == nil {
		t.Error("Serve ended without an error")
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		var r Response
		if parse([]byte(line), &r) {
			got = append(got, r.Error)
		}
	}
	if diff := cmp.Diff([]string{"x", "x", "xx", "xxx"}, got); diff != "" {
		t.Errorf("answers to a request, itself again, another one, and the first (-want +got):\n%s", diff)
	}
}

// TestEchoIsNoAnswer: before the guest has set up its port, the port sends
// back what it gets; no request may be taken for its own answer.
func TestEchoIsNoAnswer(t *testing.T) {
	host, guest := net.Pipe()
	client := NewClient(host)
	defer client.Close()
	echoed := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(onlyWriter{guest}, guest, make([]byte, 1))
		echoed <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for name, call := range map[string]func(context.Context) error{
		"info":  func(ctx context.Context) error { _, err := client.Info(ctx); return err },
		"stats": func(ctx context.Context) error { _, err := client.Stats(ctx); return err },
		"run":   func(ctx context.Context) error { return client.Run(ctx, Action{Name: ActionRebind}) },
	} {
		if err := call(ctx); err == nil || !strings.Contains(err.Error(), "no answer") {
			t.Errorf("%s on a line that echoes: error %v, want that there is no answer", name, err)
		}
	}
	guest.Close()
	<-echoed
}

// onlyWriter hides what else a connection can do.
type onlyWriter struct{ io.Writer }

func TestWaitUp(t *testing.T) {
	var asked atomic.Uint64
	client, _ := serve(t, func(Request) Response {
		info := &Info{}
		if asked.Add(1) > 2 {
			info.Interfaces = []Interface{{Name: "eth0", Carrier: true}, {Name: "eth1"}}
		}
		return Response{Info: info}
	})
	if info, err := client.WaitUp(bounded(t), 1); err != nil || len(info.Interfaces) != 2 {
		t.Errorf("WaitUp = %+v, %v", info, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 120*time.Millisecond)
	defer cancel()
	if _, err := client.WaitUp(ctx, 2); err == nil {
		t.Error("WaitUp for two links, of which one is down: no error")
	}
}

// port is a serial port that has received data and takes what is sent.
type port struct {
	io.Reader
	io.Writer
}

func FuzzServe(f *testing.F) {
	f.Add([]byte("\n{\"id\":1,\"op\":\"info\"}\n"))
	f.Add([]byte("x{\"id\":18446744073709551615,\"op\":\"run\",\"action\":{\"name\":\"link\",\"up\":true}}\r\n{\"op\":\"s"))
	f.Add([]byte("{\"id\":1,\"op\":\"info\"}\n{\"id\":1,\"op\":\"info\"}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var out bytes.Buffer
		var handled int
		err := Serve(port{bytes.NewReader(data), &out}, func(r Request) Response {
			handled++
			if r.Op == "" {
				t.Error("a request without an operation was handled")
			}
			return Response{}
		})
		if err == nil {
			t.Error("Serve ended without an error")
		}
		if answers := strings.Count(out.String(), "{"); answers < handled || handled == 0 && answers > 0 {
			t.Errorf("%d requests were handled, %d answered", handled, answers)
		}
	})
}
