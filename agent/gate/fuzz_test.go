package gate

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// stream is a client that sends fixed bytes and takes whatever comes.
type stream struct {
	*bytes.Reader
	out bytes.Buffer
}

func (s *stream) Write(p []byte) (int, error) { return s.out.Write(p) }

func pack(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		if err := binary.Write(&b, binary.BigEndian, p); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

func option(id uint32, data []byte) []byte {
	return pack(protocol.NegotiationOptionHeader{OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, ID: id, Length: uint32(len(data))}, data)
}

func FuzzNegotiation(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(pack(uint32(3)), option(protocol.NEGOTIATION_ID_OPTION_GO, infoData("", 1, 2, 3, 9))...))
	f.Add(append(pack(uint32(1)), option(protocol.NEGOTIATION_ID_OPTION_LIST, nil)...))
	f.Add(append(pack(uint32(1)), option(optionExportName, nil)...))
	f.Add(append(pack(uint32(3)), option(protocol.NEGOTIATION_ID_OPTION_INFO, []byte{0xff, 0xff, 0xff, 0xff, 0, 0})...))
	f.Fuzz(func(t *testing.T, in []byte) {
		s := &stream{Reader: bytes.NewReader(in)}
		err := negotiate(s)
		if s.out.Len() < 18 {
			t.Fatal("no greeting")
		}
		if err == nil && !bytes.Contains(s.out.Bytes(), pack(uint64(ImageSize), exportFlags)) {
			t.Fatal("transmission begins without the export's size")
		}
	})
}

func request(kind, flags uint16, off uint64, length uint32, data []byte) []byte {
	return pack(protocol.TransmissionRequestHeader{
		RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, CommandFlags: flags, Type: kind, Offset: off, Length: length,
	}, data)
}

func FuzzTransmission(f *testing.F) {
	f.Add([]byte{})
	f.Add(append(request(read, 0, 0, 512, nil), request(commandFlush, 0, 0, 0, nil)...))
	f.Add(append(request(write, 1, 4096, 3, []byte("abc")), request(read, 0, 4096, 3, nil)...))
	f.Add(request(write, 0, 1<<64-1, 1, []byte("a")))
	f.Add(request(read, 0, 1<<63, 1<<32-1, nil))
	f.Add(request(disconnect, 0, 0, 0, nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		s := New(handler{}, slog.New(slog.DiscardHandler))
		here, there := net.Pipe()
		if err := there.SetDeadline(time.Now().Add(testTimeout)); err != nil {
			t.Fatal(err)
		}
		replies := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(there)
			replies <- b
		}()
		// The reader of requests sees the fuzzed bytes and then the end, while
		// replies go to the pipe.
		err := s.transmit(context.Background(), &halfConn{Conn: here, in: bytes.NewReader(in)})
		here.Close()
		if err == nil {
			t.Fatal("transmit returned no reason")
		}
		if b := <-replies; len(b) > 0 && binary.BigEndian.Uint32(b) != protocol.TRANSMISSION_MAGIC_REPLY {
			t.Fatalf("the first reply is % x", b[:min(len(b), 16)])
		}
		if len(s.image) != ImageSize {
			t.Fatalf("the image has %d bytes now", len(s.image))
		}
	})
}

// halfConn reads from in and does everything else on Conn.
type halfConn struct {
	net.Conn
	in io.Reader
}

func (c *halfConn) Read(p []byte) (int, error) { return c.in.Read(p) }
