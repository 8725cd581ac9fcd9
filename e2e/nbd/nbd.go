// Package nbd is a client of a gate, as QEMU's block layer is: it asks for the
// export and then sends one request at a time.
package nbd

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// What the library has no names for: the client's flags (fixed newstyle, no
// zeroes), a FLUSH, and the length of a NBD_OPT_GO for the nameless export
// (github.com/NetworkBlockDevice/nbd, doc/proto.md).
const (
	clientFlags   = 3
	commandFlush  = 3
	goLength      = 6
	greetingBytes = 18
	sector        = 512
)

// Client is a connection to a gate. One request at a time.
type Client struct{ c net.Conn }

// Dial connects to the gate's socket and negotiates.
func Dial(path string) (*Client, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	if err := negotiate(c); err != nil {
		c.Close()
		return nil, fmt.Errorf("negotiation with %s: %w", path, err)
	}
	return &Client{c}, nil
}

func negotiate(c net.Conn) error {
	if _, err := io.CopyN(io.Discard, c, greetingBytes); err != nil {
		return err
	}
	be := binary.BigEndian
	b := be.AppendUint32(nil, clientFlags)
	b = be.AppendUint64(b, protocol.NEGOTIATION_MAGIC_OPTION)
	b = be.AppendUint32(b, protocol.NEGOTIATION_ID_OPTION_GO)
	b = append(be.AppendUint32(b, goLength), make([]byte, goLength)...)
	if _, err := c.Write(b); err != nil {
		return err
	}
	for {
		var h protocol.NegotiationReplyHeader
		if err := binary.Read(c, be, &h); err != nil {
			return err
		}
		if _, err := io.CopyN(io.Discard, c, int64(h.Length)); err != nil {
			return err
		}
		if h.Type == protocol.NEGOTIATION_TYPE_REPLY_ACK {
			return nil
		}
	}
}

// Close closes the connection.
func (q *Client) Close() error { return q.c.Close() }

// Flush sends a FLUSH, as QEMU does when it has stopped the VM, and returns
// the errno of the reply, however long the gate holds it; ESHUTDOWN if the
// connection ends.
func (q *Client) Flush() syscall.Errno { return q.do(commandFlush, 0) }

// Read reads the first sector, as QEMU does before it starts the VM, and
// returns what Flush does.
func (q *Client) Read() syscall.Errno {
	return q.do(protocol.TRANSMISSION_TYPE_REQUEST_READ, sector)
}

func (q *Client) do(kind uint16, length uint32) syscall.Errno {
	h := protocol.TransmissionRequestHeader{RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, Type: kind, Handle: 1, Length: length}
	if binary.Write(q.c, binary.BigEndian, h) != nil {
		return syscall.ESHUTDOWN
	}
	var r protocol.TransmissionReplyHeader
	if binary.Read(q.c, binary.BigEndian, &r) != nil {
		return syscall.ESHUTDOWN
	}
	if r.Error == 0 {
		if _, err := io.CopyN(io.Discard, q.c, int64(length)); err != nil {
			return syscall.ESHUTDOWN
		}
	}
	return syscall.Errno(r.Error)
}

// Held runs a request in the background.
func Held(request func() syscall.Errno) <-chan syscall.Errno {
	c := make(chan syscall.Errno, 1)
	go func() { c <- request() }()
	return c
}
