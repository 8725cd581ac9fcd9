package proto

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

const (
	// repeatAfter is how long a client waits for an answer before it asks again,
	// patience how long a patient one does.
	repeatAfter, patience = time.Second, 20 * time.Second
	// writeTimeout bounds the writing of a line.
	writeTimeout = time.Second
)

// Client speaks to a guest. It is safe for concurrent use.
type Client struct {
	conn   net.Conn
	repeat time.Duration
	done   chan struct{} // closed when the reader has ended, err is set then
	err    error

	writing sync.Mutex

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan Response
}

// NewClient speaks over conn, the socket of the guest's second serial port,
// and owns it until Close. The guest need not run yet.
func NewClient(conn net.Conn) *Client { return newClient(conn, repeatAfter) }

// NewPatientClient is NewClient for a guest that takes many seconds to answer,
// which repeated requests would keep busy.
func NewPatientClient(conn net.Conn) *Client { return newClient(conn, patience) }

func newClient(conn net.Conn, repeat time.Duration) *Client {
	c := &Client{
		conn:   conn,
		repeat: repeat,
		done:   make(chan struct{}),
		// Another client may have used this line and left answers in it.
		next:    rand.Uint64(),
		waiting: map[uint64]chan Response{},
	}
	go c.read()
	return c
}

// Close ends the connection. Calls in progress fail.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

func (c *Client) read() {
	defer close(c.done)
	lines := bufio.NewReaderSize(c.conn, MaxResponse)
	for {
		line, err := readLine(lines)
		if err != nil {
			c.err = err
			return
		}
		var response Response
		if !parse(line, &response) || response.To == "" {
			continue
		}
		c.mu.Lock()
		answer := c.waiting[response.ID]
		delete(c.waiting, response.ID)
		c.mu.Unlock()
		if answer != nil {
			answer <- response
		}
	}
}

// Call sends a request, repeating it now and then, until it is answered or ctx
// ends. It sets the request's ID. An answer with an error is an error.
func (c *Client) Call(ctx context.Context, request Request) (Response, error) {
	answer := make(chan Response, 1)
	c.mu.Lock()
	c.next++
	request.ID = c.next
	c.waiting[request.ID] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.waiting, request.ID)
		c.mu.Unlock()
	}()
	line, err := format(request)
	if err != nil {
		return Response{}, fmt.Errorf("guest %s: %w", request.Op, err)
	}
	repeat := time.NewTicker(c.repeat)
	defer repeat.Stop()
	for {
		if err := c.write(line); err != nil {
			return Response{}, fmt.Errorf("guest %s: %w", request.Op, err)
		}
		select {
		case response := <-answer:
			if response.Error != "" {
				return response, fmt.Errorf("guest %s: %s", request.Op, response.Error)
			}
			return response, nil
		case <-repeat.C:
		case <-c.done:
			return Response{}, fmt.Errorf("guest %s: the serial line ended: %w", request.Op, c.err)
		case <-ctx.Done():
			return Response{}, fmt.Errorf("guest %s: no answer: %w", request.Op, context.Cause(ctx))
		}
	}
}

// write sends a line. A guest that does not read (it is stopped, or still
// boots) is no error: the line is repeated later.
func (c *Client) write(line []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	if err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := c.conn.Write(line)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return nil
	}
	return err
}

// Info describes the guest.
func (c *Client) Info(ctx context.Context) (Info, error) {
	response, err := c.Call(ctx, Request{Op: OpInfo})
	if err != nil {
		return Info{}, err
	}
	if response.Info == nil {
		return Info{}, errors.New("guest info: the answer holds none")
	}
	return *response.Info, nil
}

// Stats returns the counters of the guest's interfaces, in the order of
// Info.Interfaces.
func (c *Client) Stats(ctx context.Context) ([]Stats, error) {
	response, err := c.Call(ctx, Request{Op: OpStats})
	return response.Stats, err
}

// Resets returns the signs of resets that the guest's kernel logged.
func (c *Client) Resets(ctx context.Context) (Resets, error) {
	response, err := c.Call(ctx, Request{Op: OpResets})
	if err != nil {
		return Resets{}, err
	}
	if response.Resets == nil {
		return Resets{}, errors.New("guest resets: the answer holds none")
	}
	return *response.Resets, nil
}

// Streams returns the guest's ends of all streams, oldest first.
func (c *Client) Streams(ctx context.Context) ([]Stream, error) {
	response, err := c.Call(ctx, Request{Op: OpStreams})
	return response.Streams, err
}

// Frames returns how many frames of each token came in.
func (c *Client) Frames(ctx context.Context) (map[uint64]uint64, error) {
	response, err := c.Call(ctx, Request{Op: OpFrames})
	return response.Frames, err
}

// Settings returns what ethtool says of the first VF.
func (c *Client) Settings(ctx context.Context) (Settings, error) {
	response, err := c.Call(ctx, Request{Op: OpSettings})
	if err != nil {
		return Settings{}, err
	}
	if response.Settings == nil {
		return Settings{}, errors.New("guest settings: the answer holds none")
	}
	return *response.Settings, nil
}

// Run has the guest carry out an action and waits until it has.
func (c *Client) Run(ctx context.Context, action Action) error {
	_, err := c.Call(ctx, Request{Op: OpRun, Action: &action})
	return err
}

// WaitUp waits until n of the guest's interfaces have a link and returns what
// the guest says then.
func (c *Client) WaitUp(ctx context.Context, n int) (Info, error) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		info, err := c.Info(ctx)
		if err != nil {
			return Info{}, err
		}
		up := 0
		for _, i := range info.Interfaces {
			if i.Carrier {
				up++
			}
		}
		if up >= n {
			return info, nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return Info{}, fmt.Errorf("%d of the guest's interfaces have a link, want %d (%+v): %w", up, n, info.Interfaces, context.Cause(ctx))
		}
	}
}
