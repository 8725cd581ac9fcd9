package remote

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/lab"
)

// errQuit: a client has ended the server.
var errQuit = errors.New("the server was told to end")

// Serve serves the connections of l until ctx ends, or a client asks for that.
// Processes run in the lab.
func Serve(ctx context.Context, l net.Listener, processes *lab.Lab) error {
	ctx, quit := context.WithCancelCause(ctx)
	defer quit(nil)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		switch {
		case errors.Is(context.Cause(ctx), errQuit):
			return nil
		case err != nil:
			return errors.Join(context.Cause(ctx), err)
		}
		go func() {
			defer conn.Close()
			switch err := serve(ctx, conn, processes); {
			case errors.Is(err, errQuit):
				quit(err)
			case err != nil:
				fmt.Fprintln(os.Stderr, "remote:", err)
			}
		}()
	}
}

func serve(ctx context.Context, conn net.Conn, processes *lab.Lab) error {
	in := bufio.NewReader(conn)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		return err
	}
	switch {
	case r.Run != nil:
		x := &execution{out: json.NewEncoder(conn)}
		return x.tell(message{Ended: true, Failure: text(x.run(in, r.Run, processes))})
	case r.Await != "":
		return await(ctx, conn, r.Await)
	case r.Quit:
		return errQuit
	case r.Dial != "":
		return dial(conn, in, r.Dial)
	}
	return errors.New("an empty request")
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// execution is a process that runs for a connection.
type execution struct {
	mu  sync.Mutex
	out *json.Encoder
}

func (x *execution) tell(m message) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.out.Encode(m)
}

// Write passes on what the process prints.
func (x *execution) Write(b []byte) (int, error) { return len(b), x.tell(message{Output: b}) }

// run returns how the process ended.
func (x *execution) run(in io.Reader, p *Process, processes *lab.Lab) error {
	if err := p.prepare(); err != nil || p.Path == "" {
		return err
	}
	output, input, err := os.Pipe()
	if err != nil {
		return err
	}
	defer output.Close()
	c := p.Command
	c.Log = fmt.Sprintf("/proc/self/fd/%d", input.Fd())
	started, err := processes.Start(c)
	if err = errors.Join(err, input.Close()); err != nil {
		return err
	}
	go func() {
		// The client that is gone, or has nothing more to say: the process ends
		// with it.
		defer started.Stop(0)
		for d := json.NewDecoder(in); ; {
			var m message
			if d.Decode(&m) != nil || started.Signal(unix.Signal(m.Signal)) != nil {
				return
			}
		}
	}()
	_, err = io.Copy(x, output)
	<-started.Done()
	return errors.Join(started.Err(), err)
}

func (p *Process) prepare() error {
	for _, d := range p.Dirs {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	for path, content := range p.Files {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		// Whoever reads it meanwhile reads the old one.
		if err := errors.Join(os.WriteFile(path+".new", content, 0o600), os.Rename(path+".new", path)); err != nil {
			return err
		}
	}
	return nil
}

// await answers when the file is there. A client that is gone is noticed then.
func await(ctx context.Context, conn net.Conn, path string) error {
	t := time.NewTicker(lookInterval)
	defer t.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			_, err := conn.Write([]byte("\n"))
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// dial connects the connection with a socket.
func dial(conn net.Conn, in io.Reader, path string) error {
	to, err := inDir(path, func(path string) (net.Conn, error) { return net.Dial("unix", path) })
	if err != nil {
		return err
	}
	defer to.Close()
	go func() {
		_, _ = io.Copy(to, in)
		_ = to.(*net.UnixConn).CloseWrite()
	}()
	// The socket's end ends the connection.
	_, _ = io.Copy(conn, to)
	return nil
}
