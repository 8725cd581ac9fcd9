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
	"os/signal"

	"golang.org/x/sys/unix"
)

// Run runs the process at the server, prints what it prints, passes on the
// signals that ask this process to end, and returns when it has ended.
func Run(address string, p *Process, output io.Writer) error {
	conn, err := open(address, request{Run: p})
	if err != nil {
		return err
	}
	defer conn.Close()
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(signals)
	go func() {
		to := json.NewEncoder(conn)
		for s := range signals {
			if n, ok := s.(unix.Signal); ok {
				_ = to.Encode(message{Signal: int(n)}) // a lost connection is noticed below
			}
		}
	}()
	for from := json.NewDecoder(conn); ; {
		var m message
		if err := from.Decode(&m); err != nil {
			return fmt.Errorf("%s: the connection to %s is lost: %w", p.Name, address, err)
		}
		if _, err := output.Write(m.Output); err != nil {
			return err
		}
		if m.Ended && m.Failure != "" {
			return errors.New(m.Failure)
		}
		if m.Ended {
			return nil
		}
	}
}

// Quit ends the server at the address.
func Quit(address string) error {
	conn, err := open(address, request{Quit: true})
	if err != nil {
		return err
	}
	return conn.Close()
}

// Forward makes the socket that the server has, or will have, at the path
// appear at the same path of this machine, whose directory must be there, once
// it is there; until ctx ends.
func Forward(ctx context.Context, address, path string) error {
	conn, err := open(address, request{Await: path})
	if err != nil {
		return err
	}
	go func() {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		_, err := bufio.NewReader(conn).ReadByte()
		stop()
		conn.Close()
		if err == nil {
			forward(ctx, address, path, path)
		}
	}()
	return nil
}

// forward serves the socket near here, which leads to the one at the path there.
func forward(ctx context.Context, address, path, near string) {
	l, err := inDir(near, func(path string) (net.Listener, error) {
		l, err := net.Listen("unix", path)
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // by a path that leads nowhere by then
		}
		return l, err
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "remote:", err)
		return
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		from, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer from.Close()
			to, err := open(address, request{Dial: path})
			if err != nil {
				return
			}
			defer to.Close()
			go func() {
				_, _ = io.Copy(to, from)
				_ = to.(*net.TCPConn).CloseWrite()
			}()
			_, _ = io.Copy(from, to)
		}()
	}
}
