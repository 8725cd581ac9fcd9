// Package remote lets the processes of a lab run on another machine. That one
// serves (Serve); this one runs a process there (Run) as if it were its own: the
// process's output, its end and the signals for it pass through the connection,
// and with the connection the process is killed. Sockets of that machine are
// made to appear on this one (Forward).
//
// Whoever reaches the server's port may do everything there: it is for machines
// that consist of nothing but a test.
package remote

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"compsc.io/compsc/e2e/lab"
)

// Port is where servers usually listen.
const Port = 7000

const (
	// dialTimeout bounds a connection to a server.
	dialTimeout = 30 * time.Second
	// lookInterval is how often the server looks for a socket that is not there.
	lookInterval = 100 * time.Millisecond
)

// Process is a process to run. All paths are those of the other machine.
type Process struct {
	// Command may name neither a network namespace nor a log. Without a Path only
	// the directories and files are made.
	lab.Command
	// Dirs are directories that are made first, Files files that are written, by
	// their paths.
	Dirs  []string          `json:",omitempty"`
	Files map[string][]byte `json:",omitempty"`
}

// request is what a connection begins with.
type request struct {
	// Run is a process; messages follow in both directions.
	Run *Process `json:",omitempty"`
	// Await is the path of a socket: a line is the answer when it is there.
	Await string `json:",omitempty"`
	// Dial is the path of a socket: its bytes follow in both directions.
	Dial string `json:",omitempty"`
	// Quit ends the server.
	Quit bool `json:",omitempty"`
}

// message is a line about a process that runs.
type message struct {
	// Signal is for the process.
	Signal int `json:",omitempty"`
	// Output is what it printed.
	Output []byte `json:",omitempty"`
	// Ended tells that it has ended, Failure how, if not well.
	Ended   bool   `json:",omitempty"`
	Failure string `json:",omitempty"`
}

// open sends a request to the server at the address.
func open(address string, r request) (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", address, dialTimeout)
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// inDir calls do with another path of the file, for the path of a socket may be
// longer than a socket's address may be.
func inDir[T any](path string, do func(string) (T, error)) (out T, err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return out, err
	}
	defer dir.Close()
	return do(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}
