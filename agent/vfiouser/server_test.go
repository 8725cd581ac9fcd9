package vfiouser

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestInfo(t *testing.T) {
	_, _, c := connect(t, nil)
	got, err := c.Info(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	want := Info{
		Regions: []Region{{Index: 0, Size: 4096, Flags: 3}, {Index: 1}, {Index: 2}, {Index: 3, Size: 0x4000, Flags: 1},
			{Index: 4}, {Index: 5}, {Index: 6}, {Index: 7, Size: 256, Flags: 3}, {Index: 8}},
		IRQs: []IRQ{{0, 0, 0}, {1, 0, 0}, {2, 3, 3}, {3, 1, 1}, {4, 0, 0}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestRegions(t *testing.T) {
	dev, _, c := connect(t, nil)
	ctx := testContext(t)
	if err := c.RegionWrite(ctx, RegionBAR0, 8, []byte{1, 2, 3, 4}); err != nil {
		t.Fatal(err)
	}
	if err := c.PostRegionWrite(RegionBAR0, 12, []byte{5, 6}); err != nil {
		t.Fatal(err)
	}
	// A posted write that is refused is not answered, and harms nothing.
	if err := c.PostRegionWrite(RegionBAR3, 0, []byte{9}); err != nil {
		t.Fatal(err)
	}
	if err := c.RegionWriteMulti(ctx,
		RegionWriteOp{RegionBAR0, 14, []byte{7}}, RegionWriteOp{RegionConfig, 4, []byte{6, 0}}); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8)
	if err := c.RegionRead(ctx, RegionBAR0, 8, p); err != nil || !bytes.Equal(p, []byte{1, 2, 3, 4, 5, 6, 7, 0}) {
		t.Errorf("read % x, %v", p, err)
	}
	want := []RegionWriteOp{
		{RegionBAR0, 8, []byte{1, 2, 3, 4}}, {RegionBAR0, 12, []byte{5, 6}},
		{RegionBAR0, 14, []byte{7}}, {RegionConfig, 4, []byte{6, 0}},
	}
	if d := cmp.Diff(want, dev.written()); d != "" {
		t.Error(d)
	}
	if err := c.Reset(ctx); err != nil || dev.resetCount() != 1 {
		t.Errorf("%d resets, %v", dev.resetCount(), err)
	}
	dev.setOnWrite(func(RegionWriteOp) error { return errors.New("no number") })
	if err := c.RegionWrite(ctx, RegionBAR0, 0, []byte{1}); !errors.Is(err, syscall.EIO) {
		t.Errorf("a device error without a number is answered with %v, want EIO", err)
	}
}

func TestVersion(t *testing.T) {
	for _, tt := range []struct {
		name     string
		body     string
		multiple bool
		want     string // of the reply, or
		errno    syscall.Errno
	}{
		{name: "as QEMU offers", body: "\x00\x00\x00\x00" + `{"capabilities":{"write_multiple":true,"max_msg_fds":16,"future":[1]}}` + "\x00",
			want: "\x00\x00\x00\x00" + `{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,"pgsizes":4096}}` + "\x00"},
		{name: "coalesced writes", body: "\x00\x00\x01\x00" + `{"capabilities":{"write_multiple":true}}` + "\x00", multiple: true,
			want: "\x00\x00\x01\x00" + `{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,"pgsizes":4096,"write_multiple":true}}` + "\x00"},
		{name: "later minor, no data", body: "\x00\x00\x09\x00", multiple: true,
			want: "\x00\x00\x01\x00" + `{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"max_dma_maps":65535,"pgsizes":4096}}` + "\x00"},
		{name: "other major", body: "\x01\x00\x00\x00", errno: syscall.EINVAL},
		{name: "short", body: "\x00\x00", errno: syscall.EINVAL},
		{name: "no NUL", body: "\x00\x00\x00\x00{}", errno: syscall.EINVAL},
		{name: "no JSON", body: "\x00\x00\x00\x00{\x00", errno: syscall.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := newFakeDevice()
			path, s := start(t, dev, Options{WriteMultiple: tt.multiple})
			c := rawClient(t, path)
			got, err := c.link.request(testContext(t), cmdVersion, []byte(tt.body))
			if tt.errno != 0 {
				if !errors.Is(err, tt.errno) {
					t.Fatalf("error %v, want %v", err, tt.errno)
				}
				wait(t, c.Done()) // the session ends
				if s.Connected() || len(dev.connected) != 0 {
					t.Error("the device counts as connected")
				}
				return
			}
			if err != nil || string(got) != tt.want {
				t.Errorf("reply %q, %v, want %q", got, err, tt.want)
			}
			wait(t, dev.connected)
			if _, err := c.link.request(testContext(t), cmdVersion, []byte(tt.body)); !errors.Is(err, syscall.EINVAL) {
				t.Errorf("a second VERSION: %v", err)
			}
		})
	}
}

// rawClient connects without negotiation.
func rawClient(t *testing.T, path string) *Client {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	c, err := newClient(conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestRefusedCommands sends commands that must be refused without harm to the
// session or a leaked descriptor.
func TestRefusedCommands(t *testing.T) {
	_, _, c := connect(t, nil)
	ctx := testContext(t)
	file, event := memfd(t, 1<<20), eventfd(t)
	ints := func(vs ...uint32) []byte { return putUint32s(make([]byte, 4*len(vs)), vs...) }
	dmaMap := func(argsz, flags uint32, off, addr, size uint64) []byte {
		b := append(ints(argsz, flags), make([]byte, 24)...)
		le.PutUint64(b[8:], off)
		le.PutUint64(b[16:], addr)
		le.PutUint64(b[24:], size)
		return b
	}
	if err := c.Reset(ctx); err != nil { // warm up
		t.Fatal(err)
	}
	before := openFDs(t)
	const evt = irqDataEventfd | irqActionTrigger
	for _, tt := range []struct {
		name string
		cmd  uint16
		body []byte
		fds  []*os.File
		want syscall.Errno
	}{
		{"unknown command", 99, nil, nil, syscall.EINVAL},
		{"server's command", cmdDMARead, make([]byte, 16), nil, syscall.EINVAL},
		{"migration", cmdDeviceFeature, make([]byte, 8), nil, syscall.ENOTSUP},
		{"region fds", cmdGetRegionIOFDs, make([]byte, 16), nil, syscall.ENOTSUP},
		{"reset with data", cmdDeviceReset, make([]byte, 1), nil, syscall.EINVAL},
		{"reset with descriptor", cmdDeviceReset, nil, []*os.File{file}, syscall.EINVAL},
		{"short info", cmdDeviceGetInfo, ints(16, 0, 0), nil, syscall.EINVAL},
		{"info, small argsz", cmdDeviceGetInfo, ints(15, 0, 0, 0), nil, syscall.EINVAL},
		{"no such region info", cmdGetRegionInfo, append(ints(32, 0, 9), make([]byte, 20)...), nil, syscall.EINVAL},
		{"no such irq info", cmdGetIRQInfo, ints(16, 0, 5, 0), nil, syscall.EINVAL},
		{"read of no region", cmdRegionRead, regionAccess(1, 0, 4), nil, syscall.EINVAL},
		{"read of region 2^32-1", cmdRegionRead, regionAccess(1<<32-1, 0, 4), nil, syscall.EINVAL},
		{"read past the end", cmdRegionRead, regionAccess(0, 4093, 4), nil, syscall.EINVAL},
		{"read of more than the region", cmdRegionRead, regionAccess(RegionConfig, 0, 257), nil, syscall.EINVAL},
		{"read with overflow", cmdRegionRead, regionAccess(0, 1<<64-2, 4), nil, syscall.EINVAL},
		{"read of nothing", cmdRegionRead, regionAccess(0, 0, 0), nil, syscall.EINVAL},
		{"read, long message", cmdRegionRead, append(regionAccess(0, 0, 4), 0), nil, syscall.EINVAL},
		{"short write", cmdRegionWrite, regionAccess(0, 0, 4)[:15], nil, syscall.EINVAL},
		{"write, data missing", cmdRegionWrite, append(regionAccess(0, 0, 4), 1, 2, 3), nil, syscall.EINVAL},
		{"write, too much data", cmdRegionWrite, append(regionAccess(0, 0, 1), 1, 2), nil, syscall.EINVAL},
		{"write to read-only region", cmdRegionWrite, append(regionAccess(RegionBAR3, 0, 1), 1), nil, syscall.EPERM},
		{"multi, no count", cmdRegionWriteMulti, make([]byte, 7), nil, syscall.EINVAL},
		{"multi of nothing", cmdRegionWriteMulti, make([]byte, 8), nil, syscall.EINVAL},
		{"multi, huge count", cmdRegionWriteMulti, le.AppendUint64(nil, 1<<63), nil, syscall.EINVAL},
		{"multi, 9 bytes", cmdRegionWriteMulti, append(le.AppendUint64(nil, 1), append(regionAccess(0, 0, 9), make([]byte, 8)...)...), nil, syscall.EINVAL},
		{"map, short", cmdDMAMap, make([]byte, 31), []*os.File{file}, syscall.EINVAL},
		{"map, unknown flag", cmdDMAMap, dmaMap(32, 7, 0, 0, 4096), []*os.File{file}, syscall.EINVAL},
		{"map, no access", cmdDMAMap, dmaMap(32, 0, 0, 0, 4096), []*os.File{file}, syscall.EINVAL},
		{"map, size 0", cmdDMAMap, dmaMap(32, 3, 0, 0, 0), []*os.File{file}, syscall.EINVAL},
		{"map, overflow", cmdDMAMap, dmaMap(32, 3, 0, 1<<64-4096, 8192), []*os.File{file}, syscall.EINVAL},
		{"map past the file", cmdDMAMap, dmaMap(32, 3, 4096, 0, 1<<20), []*os.File{file}, syscall.EINVAL},
		{"map, offset overflow", cmdDMAMap, dmaMap(32, 3, 1<<64-4096, 0, 8192), []*os.File{file}, syscall.EINVAL},
		{"map, two descriptors", cmdDMAMap, dmaMap(32, 3, 0, 0, 4096), []*os.File{file, file}, syscall.EINVAL},
		{"map of an eventfd", cmdDMAMap, dmaMap(32, 3, 0, 0, 4096), []*os.File{event}, syscall.EINVAL},
		{"unmap of nothing", cmdDMAUnmap, append(ints(24, 0), make([]byte, 16)...), nil, syscall.EINVAL},
		{"unmap with bitmap", cmdDMAUnmap, append(ints(24, 1), make([]byte, 16)...), nil, syscall.ENOTSUP},
		{"unmap, unknown range", cmdDMAUnmap, append(ints(24, 0, 0, 0), 1, 0, 0, 0, 0, 0, 0, 0), nil, syscall.ENOENT},
		{"irqs, short", cmdSetIRQs, ints(20, evt, 2, 0), []*os.File{event}, syscall.EINVAL},
		{"irqs, no data kind", cmdSetIRQs, ints(20, irqActionTrigger, 2, 0, 1), nil, syscall.EINVAL},
		{"irqs, two data kinds", cmdSetIRQs, ints(20, evt|irqDataNone, 2, 0, 1), nil, syscall.EINVAL},
		{"irqs, two actions", cmdSetIRQs, ints(20, evt|irqActionMask, 2, 0, 1), []*os.File{event}, syscall.EINVAL},
		{"irqs, no action", cmdSetIRQs, ints(20, irqDataNone, 2, 0, 1), nil, syscall.EINVAL},
		{"irqs, unknown flag", cmdSetIRQs, ints(20, evt|1<<6, 2, 0, 1), []*os.File{event}, syscall.EINVAL},
		{"irqs, no such index", cmdSetIRQs, ints(20, evt, 9, 0, 1), []*os.File{event}, syscall.EINVAL},
		{"irqs, no such vector", cmdSetIRQs, ints(20, evt, 2, 3, 1), []*os.File{event}, syscall.EINVAL},
		{"irqs, vector overflow", cmdSetIRQs, ints(20, evt, 2, 1<<32-1, 2), []*os.File{event, event}, syscall.EINVAL},
		{"irqs, wrong descriptor count", cmdSetIRQs, ints(20, evt, 2, 0, 2), []*os.File{event}, syscall.EINVAL},
		{"irqs, second is no eventfd", cmdSetIRQs, ints(20, evt, 2, 0, 2), []*os.File{event, file}, syscall.EINVAL},
		{"irqs, eventfd for mask", cmdSetIRQs, ints(20, irqDataEventfd|irqActionMask, 2, 0, 1), []*os.File{event}, syscall.ENOTSUP},
		{"irqs, descriptor with none", cmdSetIRQs, ints(20, irqDataNone|irqActionTrigger, 2, 0, 1), []*os.File{event}, syscall.EINVAL},
		{"irqs, bools missing", cmdSetIRQs, ints(20, irqDataBool|irqActionTrigger, 2, 0, 2), nil, syscall.EINVAL},
		{"irqs, mask of nothing", cmdSetIRQs, ints(20, irqDataNone|irqActionMask, 2, 0, 0), nil, syscall.EINVAL},
		{"irqs, device refuses", cmdSetIRQs, ints(20, evt, 3, 0, 1), []*os.File{event}, syscall.EINVAL},
	} {
		var fds []int
		for _, f := range tt.fds {
			fds = append(fds, int(f.Fd()))
		}
		if _, err := c.link.request(ctx, tt.cmd, tt.body, fds...); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	if err := c.Reset(ctx); err != nil {
		t.Errorf("the session did not survive: %v", err)
	}
	if after := openFDs(t); after != before {
		t.Errorf("%d descriptors are open, %d were", after, before)
	}
}

func TestIRQs(t *testing.T) {
	dev, _, c := connect(t, nil)
	ctx := testContext(t)
	a, b := eventfd(t), eventfd(t)
	before := openFDs(t)
	set := func(op IRQOp, start, count uint32, fds ...*os.File) {
		t.Helper()
		if err := c.SetIRQs(ctx, op, IRQIndexMSIX, start, count, fds...); err != nil {
			t.Fatal(err)
		}
	}
	set(IRQDeassign, 0, 1) // as QEMU begins to enable MSI-X
	set(IRQAssign, 1, 2, a, b)
	if n := openFDs(t); n != before+2 {
		t.Errorf("%d descriptors for 2 vectors", n-before)
	}
	set(IRQTrigger, 2, 1)
	if p, err := dev.vector(2).Pending(); err != nil || !p {
		t.Errorf("pending %v, %v after the trigger", p, err)
	}
	var count [8]byte
	if _, err := b.Read(count[:]); err != nil || count != [8]byte{1} {
		t.Errorf("the client's eventfd reads % x, %v", count, err)
	}
	if p, err := dev.vector(2).Pending(); err != nil || p {
		t.Errorf("pending %v, %v after the client took it", p, err)
	}
	set(IRQMask, 1, 1)
	set(IRQUnmask, 1, 1)
	// An array of booleans is carried out for those that are true.
	bools := append(putUint32s(make([]byte, irqSetSize), irqSetSize+3, irqDataBool|irqActionMask, IRQIndexMSIX, 0, 3), 1, 0, 1)
	if _, err := c.link.request(ctx, cmdSetIRQs, bools); err != nil {
		t.Fatal(err)
	}
	set(IRQDeassign, 1, 1)
	set(IRQDisable, 0, 0)
	if n := openFDs(t); n != before {
		t.Errorf("%d descriptors stay after the vectors were disconnected", n-before)
	}
	want := []IRQRequest{
		{Op: IRQDeassign, Index: 2, Start: 0, Count: 1}, {Op: IRQAssign, Index: 2, Start: 1, Count: 2},
		{Op: IRQTrigger, Index: 2, Start: 2, Count: 1}, {Op: IRQMask, Index: 2, Start: 1, Count: 1},
		{Op: IRQUnmask, Index: 2, Start: 1, Count: 1}, {Op: IRQMask, Index: 2, Start: 0, Count: 1},
		{Op: IRQMask, Index: 2, Start: 2, Count: 1}, {Op: IRQDeassign, Index: 2, Start: 1, Count: 1},
		{Op: IRQDisable, Index: 2},
	}
	if d := cmp.Diff(want, dev.requested()); d != "" {
		t.Error(d)
	}
}

func TestEventfdNeverBlocks(t *testing.T) {
	f := eventfd(t) // blocking
	fd, err := unix.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEventfd(fd)
	if err != nil {
		t.Fatal(err)
	}
	full := [8]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	if _, err := f.Write(full[:]); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- e.Signal() }()
	if err := wait(t, done); err != nil {
		t.Errorf("signalling a saturated event: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if err := e.Signal(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("signalling after Close: %v", err)
	}
}

func TestSecondClientIsRefused(t *testing.T) {
	path, _ := start(t, newFakeDevice(), Options{}, func(s *Server) { s.takeOverWait = time.Millisecond })
	first, err := Dial(testContext(t), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if c, err := Dial(testContext(t), path, nil); !errors.Is(err, ErrNotConnected) {
		if c != nil {
			c.Close()
		}
		t.Fatalf("the second client: %v", err)
	}
	if err := first.Reset(testContext(t)); err != nil {
		t.Errorf("the first client suffers: %v", err)
	}
}

// TestSuccession shows that a client that comes when another has just gone is
// served, even if the end of the old session takes a while.
func TestSuccession(t *testing.T) {
	dev := newFakeDevice()
	entered, release := make(chan struct{}), make(chan struct{})
	dev.onWrite = func(RegionWriteOp) error {
		close(entered)
		<-release
		return nil
	}
	path, _ := start(t, dev, Options{}, func(s *Server) { s.takeOverWait = testTimeout })
	first, err := Dial(testContext(t), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.PostRegionWrite(RegionBAR0, 0, []byte{1}); err != nil {
		t.Fatal(err)
	}
	wait(t, entered)
	first.Close()
	next := rawClient(t, path)
	close(release)
	if _, err := next.link.request(testContext(t), cmdVersion, make([]byte, 4)); err != nil {
		t.Fatalf("no client can follow: %v", err)
	}
	if err := wait(t, dev.gone); err != nil {
		t.Errorf("an orderly end is reported as %v", err)
	}
}

// TestBrokenStreams shows that a breach ends the session, that the device hears
// of it, and that the next client is served.
func TestBrokenStreams(t *testing.T) {
	dev := newFakeDevice()
	path, _ := start(t, dev, Options{})
	hdr := func(size, flags uint32) []byte {
		b := make([]byte, headerSize)
		header{id: 1, cmd: cmdDeviceReset, size: size, flags: flags}.put(b)
		return b
	}
	file := memfd(t, 4096)
	before := 0
	for _, tt := range []struct {
		name string
		data []byte
		fds  int
		want string
	}{
		{"warm-up", []byte{1}, 0, "unexpected EOF"},
		{"oversized", hdr(maxMessage+1, 0), 0, "message size"},
		{"undersized", hdr(15, 0), 0, "message size"},
		{"message type", hdr(16, 2), 0, "message type 2"},
		{"truncated header", hdr(16, 0)[:7], 0, "unexpected EOF"},
		{"truncated body", hdr(20, 0), 1, "unexpected EOF"},
		{"too many descriptors", hdr(16, 0), maxFDs + 1, "more than 16 descriptors"},
		{"too many descriptors in two parts", hdr(20, 0), maxFDs, "more than 16 descriptors"},
	} {
		c, err := Dial(testContext(t), path, nil)
		if err != nil {
			t.Fatal(err)
		}
		var oob []byte
		if tt.fds > 0 {
			fds := make([]int, tt.fds)
			for i := range fds {
				fds[i] = int(file.Fd())
			}
			oob = unix.UnixRights(fds...)
		}
		if err := c.link.sock.send(tt.data, oob, testTimeout); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(tt.name, "in two parts") {
			if err := c.link.sock.send(make([]byte, 4), unix.UnixRights(int(file.Fd())), testTimeout); err != nil {
				t.Fatal(err)
			}
		}
		// Closed already if the server was faster.
		_ = c.link.sock.raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
		if err := wait(t, dev.gone); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: the session ended with %v, want %q", tt.name, err, tt.want)
		}
		c.Close()
		if n := openFDs(t); before == 0 {
			before = n
		} else if n > before {
			t.Errorf("%s: %d descriptors leaked", tt.name, n-before)
		}
	}
}

func TestCommandBeforeVersion(t *testing.T) {
	dev := newFakeDevice()
	path, _ := start(t, dev, Options{})
	c := rawClient(t, path)
	if err := c.Reset(testContext(t)); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("RESET before VERSION: %v", err)
	}
	wait(t, c.Done())
	if dev.resetCount() != 0 || len(dev.gone) != 0 {
		t.Errorf("the device saw %d resets and %d ends", dev.resetCount(), len(dev.gone))
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	dev := newFakeDevice()
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	s, err := Listen(path, dev, Options{Mode: 0o660})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("socket mode %v, %v", st.Mode(), err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, dev, Options{}); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file in the way: %v", err)
	}
	if _, err := Listen(filepath.Join(dir, strings.Repeat("x", 110)), dev, Options{}); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("a long path: %v", err)
	}
}
