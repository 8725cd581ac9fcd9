package gate

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// testTimeout bounds every wait of a test.
const testTimeout = 10 * time.Second

// client is a hand-written NBD client: go-nbd's own needs a kernel device.
type client struct {
	t *testing.T
	c net.Conn
}

func dial(t *testing.T, path string) *client {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(testTimeout)); err != nil {
		t.Fatal(err)
	}
	return &client{t, c}
}

func (c *client) write(parts ...any) {
	c.t.Helper()
	var b bytes.Buffer
	for _, p := range parts {
		if err := binary.Write(&b, binary.BigEndian, p); err != nil {
			c.t.Fatal(err)
		}
	}
	if _, err := c.c.Write(b.Bytes()); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) read(v any) {
	c.t.Helper()
	if err := binary.Read(c.c, binary.BigEndian, v); err != nil {
		c.t.Fatalf("reading %T: %v", v, err)
	}
}

// wantEOF checks that the server has closed the connection.
func (c *client) wantEOF() {
	c.t.Helper()
	if n, err := io.Copy(io.Discard, c.c); n != 0 || err != nil {
		c.t.Fatalf("got %d bytes and error %v, want the end of the connection", n, err)
	}
}

func (c *client) hello(flags uint32) {
	c.t.Helper()
	var h protocol.NegotiationNewstyleHeader
	c.read(&h)
	want := protocol.NegotiationNewstyleHeader{
		OldstyleMagic: protocol.NEGOTIATION_MAGIC_OLDSTYLE, OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, HandshakeFlags: 3,
	}
	if h != want {
		c.t.Fatalf("greeting %+v, want %+v", h, want)
	}
	c.write(flags)
}

func (c *client) option(id uint32, data []byte) {
	c.t.Helper()
	c.write(protocol.NegotiationOptionHeader{
		OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, ID: id, Length: uint32(len(data)),
	}, data)
}

func (c *client) optionReply(id uint32) (uint32, []byte) {
	c.t.Helper()
	var h protocol.NegotiationReplyHeader
	c.read(&h)
	if h.ReplyMagic != protocol.NEGOTIATION_MAGIC_REPLY || h.ID != id || h.Length > 1<<16 {
		c.t.Fatalf("option reply %+v to option %d", h, id)
	}
	data := make([]byte, h.Length)
	c.read(data)
	return h.Type, data
}

func infoData(name string, wants ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(wants)))
	for _, w := range wants {
		b = binary.BigEndian.AppendUint16(b, w)
	}
	return b
}

// connect negotiates with GO, as QEMU does.
func connect(t *testing.T, path string) *client {
	t.Helper()
	c := dial(t, path)
	c.hello(3)
	c.option(protocol.NEGOTIATION_ID_OPTION_GO, infoData(""))
	if kind, _ := c.optionReply(protocol.NEGOTIATION_ID_OPTION_GO); kind != protocol.NEGOTIATION_TYPE_REPLY_INFO {
		t.Fatalf("reply to GO is %#x", kind)
	}
	if kind, _ := c.optionReply(protocol.NEGOTIATION_ID_OPTION_GO); kind != protocol.NEGOTIATION_TYPE_REPLY_ACK {
		t.Fatalf("second reply to GO is %#x", kind)
	}
	return c
}

func (c *client) request(handle uint64, kind, flags uint16, off uint64, length uint32, data []byte) {
	c.t.Helper()
	c.write(protocol.TransmissionRequestHeader{
		RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, CommandFlags: flags, Type: kind,
		Handle: handle, Offset: off, Length: length,
	}, data)
}

// reply reads a reply, with n bytes of data if it is no error.
func (c *client) reply(handle uint64, n int) (uint32, []byte) {
	c.t.Helper()
	var h protocol.TransmissionReplyHeader
	c.read(&h)
	if h.ReplyMagic != protocol.TRANSMISSION_MAGIC_REPLY || h.Handle != handle {
		c.t.Fatalf("reply %+v, want one to request %d", h, handle)
	}
	if h.Error != 0 {
		return h.Error, nil
	}
	data := make([]byte, n)
	c.read(data)
	return 0, data
}

func socketPath(t *testing.T) string { return filepath.Join(t.TempDir(), "gate.sock") }
