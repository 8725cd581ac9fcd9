package vfiouser

import (
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// frame is one message as bytes.
func frame(cmd uint16, flags uint32, body []byte) []byte {
	b := make([]byte, headerSize, headerSize+len(body))
	header{id: 7, cmd: cmd, size: uint32(headerSize + len(body)), flags: flags}.put(b)
	return append(b, body...)
}

// FuzzServer feeds arbitrary bytes, with descriptors, to a session. Nothing may
// panic, the session must end, and no descriptor or mapping may stay.
func FuzzServer(f *testing.F) {
	ints := func(vs ...uint32) []byte { return putUint32s(make([]byte, 4*len(vs)), vs...) }
	version := frame(cmdVersion, 0, append([]byte{0, 0, 0, 0}, "{\"capabilities\":{}}\x00"...))
	mapIt := frame(cmdDMAMap, 0, ints(32, 3, 0, 0, 0, 1, 4096, 0))
	multi := append(le.AppendUint64(nil, 1), append(regionAccess(0, 0, 4), make([]byte, 8)...)...)
	f.Add(false, uint8(0), version)
	f.Add(true, uint8(0), frame(cmdDeviceGetInfo, 0, ints(16, 0, 0, 0)))
	f.Add(true, uint8(0), frame(cmdGetRegionInfo, 0, ints(32, 0, 3, 0, 0, 0, 0, 0)))
	f.Add(true, uint8(1), mapIt)
	f.Add(true, uint8(1), append(mapIt, frame(cmdDMAUnmap, 0, ints(24, 2, 0, 0, 0, 0))...))
	f.Add(true, uint8(2), frame(cmdSetIRQs, 0, ints(20, irqDataEventfd|irqActionTrigger, 2, 0, 1)))
	f.Add(true, uint8(18), frame(cmdSetIRQs, 0, ints(20, irqDataEventfd|irqActionTrigger, 2, 0, 2)))
	f.Add(true, uint8(0), frame(cmdRegionRead, 0, regionAccess(0, 0, 4096)))
	f.Add(true, uint8(0), frame(cmdRegionWrite, flagNoReply, append(regionAccess(0, 4, 4), 1, 2, 3, 4)))
	f.Add(true, uint8(0), frame(cmdRegionWriteMulti, 0, multi))
	f.Add(true, uint8(0), frame(cmdDMARead, flagReply|flagError, nil))
	f.Add(true, uint8(1), frame(cmdDeviceReset, 0, nil)[:10])

	file, event := memfd(f, 1<<20), eventfd(f)
	log := slog.New(slog.DiscardHandler)
	f.Fuzz(func(t *testing.T, negotiated bool, fds uint8, data []byte) {
		before := openFDs(t)
		dev := newFakeDevice()
		here, there := socketPair(t)
		// Longer than a session takes that ends for another reason.
		srv := &Server{dev: dev, log: log, greetTimeout: time.Minute, messageTimeout: time.Minute}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			srv.session(t.Context(), here)
		}()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			// The end of the session may reset the connection.
			_, _ = io.Copy(io.Discard, there)
		}()
		if negotiated {
			if _, err := there.Write(version); err != nil {
				t.Fatal(err)
			}
		}
		// The low bits of fds choose the kind, the others the number.
		var rights []int
		for i := range int(fds>>4) + 1 {
			if fds&1 != 0 && i == 0 {
				rights = append(rights, int(file.Fd()))
			} else if fds&2 != 0 {
				rights = append(rights, int(event.Fd()))
			}
		}
		var oob []byte
		if len(rights) > 0 {
			oob = unix.UnixRights(rights...)
		}
		if len(data) > 0 {
			// The session may end before it has read everything.
			n, _, err := there.WriteMsgUnix(data, oob, nil)
			if err == nil && n < len(data) {
				_, _ = there.Write(data[n:])
			}
		}
		if err := there.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		wait(t, ended)
		wait(t, drained)
		there.Close()
		if negotiated && len(dev.gone) != 1 {
			t.Error("the device was not told that the client is gone")
		}
		if n := len(dev.mem.Ranges()); n != 0 {
			t.Errorf("%d mappings stay", n)
		}
		if after := openFDs(t); after != before {
			t.Errorf("%d descriptors are open, %d were", after, before)
		}
	})
}

// socketPair returns two connected sockets with bounded waits.
func socketPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := make([]*net.UnixConn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		if err := c.SetReadDeadline(time.Now().Add(testTimeout)); err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}
