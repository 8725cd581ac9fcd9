package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/wait"
)

// server runs a server until the test ends, and returns its address.
func server(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	processes := lab.Bare()
	done := make(chan error, 1)
	go func() { done <- Serve(context.Background(), l, processes) }()
	t.Cleanup(func() {
		err := Quit(l.Addr().String())
		if err = errors.Join(err, <-done, processes.Close()); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func shell(script string, p Process) *Process {
	p.Name, p.Path, p.Args = "script", "/bin/sh", []string{"-c", script}
	return &p
}

func TestRun(t *testing.T) {
	address, dir := server(t), t.TempDir()
	var out bytes.Buffer
	made := filepath.Join(dir, "made")
	file := filepath.Join(dir, "more", "file")
	p := shell("cat "+file+"; cd "+made+" && echo $WORD", Process{
		Dirs: []string{made}, Files: map[string][]byte{file: []byte("content\n")},
	})
	p.Env = []string{"WORD=said", "PATH=/usr/bin:/bin"}
	if err := Run(address, p, &out); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); got != "content\nsaid\n" {
		t.Errorf("the process printed %q", got)
	}
	if err := Run(address, shell("exit 3", Process{}), io.Discard); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("a process that fails: %v", err)
	}
	p = shell("", Process{})
	p.Path = filepath.Join(dir, "none")
	if err := Run(address, p, io.Discard); err == nil {
		t.Error("a program that is not there ran")
	}
}

// TestKill: a process ends with the connection of who runs it.
func TestKill(t *testing.T) {
	address := server(t)
	conn, err := open(address, request{Run: shell("echo $$; exec sleep 100", Process{})})
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	if _, err := conn.Read(line); err != nil { // it runs
		t.Fatal(err)
	}
	pid := 0
	var m message
	if err := json.NewDecoder(bytes.NewReader(line)).Decode(&m); err != nil {
		t.Fatal(err)
	}
	for _, c := range strings.TrimSpace(string(m.Output)) {
		pid = pid*10 + int(c-'0')
	}
	conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := wait.Until(ctx, "the process to be gone", func(context.Context) (bool, error) {
		return errors.Is(unix.Kill(pid, 0), unix.ESRCH), nil
	}); err != nil {
		t.Error(err)
	}
}

// TestForward: what is said to the socket here reaches the one there, by whatever
// long path.
func TestForward(t *testing.T) {
	address := server(t)
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "socket")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	far, err := inDir(path, func(path string) (net.Listener, error) { return net.Listen("unix", path) })
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	go func() {
		for {
			conn, err := far.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	near := filepath.Join(t.TempDir(), "near")
	go forward(ctx, address, path, near)
	var conn net.Conn
	if err := wait.Until(ctx, "the socket", func(context.Context) (bool, error) {
		conn, err = net.Dial("unix", near)
		return err == nil, nil
	}); err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "echo" {
		t.Errorf("got %q, %v", got, err)
	}
}
