package vfiouser

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ClientMemory answers the accesses to guest memory that the server makes
// through the client. Its methods are called by the client's reader goroutine,
// one at a time; the errors are answered as those of a Device are.
type ClientMemory interface {
	ReadAt(addr uint64, p []byte) error
	WriteAt(addr uint64, p []byte) error
}

// Client is a vfio-user client, for tests: it speaks as QEMU does, but leaves
// every message to the caller. It is safe for concurrent use.
type Client struct {
	link *link
	mem  ClientMemory
	end  chan struct{}
	err  error // why the connection ended; valid once end is closed
}

// Dial connects to the server at path and negotiates version 0.0, as QEMU 11.1
// does. Server-initiated accesses go to mem; nil refuses them with ENODEV, as
// QEMU does while the function's bus-master bit is clear.
func Dial(ctx context.Context, path string, mem ClientMemory) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("vfio-user client: %w", err)
	}
	c, err := newClient(conn.(*net.UnixConn), mem)
	if err != nil {
		return nil, err
	}
	if err := c.negotiate(ctx); err != nil {
		c.Close()
		return nil, fmt.Errorf("vfio-user client: version negotiation at %s: %w", path, err)
	}
	return c, nil
}

// newClient takes ownership of conn, also on error.
func newClient(conn *net.UnixConn, mem ClientMemory) (*Client, error) {
	l, err := newLink(conn)
	if err != nil {
		return nil, err
	}
	c := &Client{link: l, mem: mem, end: make(chan struct{})}
	go func() {
		defer close(c.end)
		c.err = c.link.run(c.handle)
	}()
	return c, nil
}

// Close ends the connection and waits for the reader goroutine.
func (c *Client) Close() {
	c.link.sock.close()
	<-c.end
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.end }

func (c *Client) negotiate(ctx context.Context) error {
	offer, err := json.Marshal(versionData{capabilities{
		MaxMsgFDs: maxFDs, MaxDataXferSize: maxTransfer, MaxDMAMaps: MaxMappings, PageSizes: 4096, WriteMultiple: true,
	}})
	if err != nil {
		return err
	}
	r, err := c.link.request(ctx, cmdVersion, append(append(make([]byte, 4), offer...), 0))
	if err != nil {
		return err
	}
	var answer versionData
	if len(r) < 5 || le.Uint32(r) != 0 {
		return fmt.Errorf("%w: the server answered with another version, or none", ErrProtocol)
	}
	return json.Unmarshal(bytes.TrimRight(r[4:], "\x00"), &answer)
}

// handle answers one command of the server. Like QEMU, it answers a command that
// wants no reply when that failed.
func (c *Client) handle(m *message) error {
	body, err := c.dma(m)
	if m.flags&flagNoReply != 0 && err == nil {
		return nil
	}
	return c.link.reply(m.header, body, err)
}

func (c *Client) dma(m *message) ([]byte, error) {
	if len(m.fds) > 0 || len(m.body) < dmaAccessSize {
		return nil, badRequest("command %d has %d bytes and %d descriptors", m.cmd, len(m.body), len(m.fds))
	}
	if c.mem == nil {
		return nil, syscall.ENODEV
	}
	addr, n := le.Uint64(m.body[0:]), le.Uint64(m.body[8:])
	data := m.body[dmaAccessSize:]
	switch {
	case n > maxTransfer:
		return nil, syscall.E2BIG
	case m.cmd == cmdDMARead && len(data) == 0:
		b := make([]byte, dmaAccessSize+n)
		copy(b, m.body)
		return b, c.mem.ReadAt(addr, b[dmaAccessSize:])
	case m.cmd == cmdDMAWrite && uint64(len(data)) == n:
		return m.body[:dmaAccessSize], c.mem.WriteAt(addr, data)
	}
	return nil, badRequest("command %d has %d bytes of data and a count of %d", m.cmd, len(data), n)
}

// Info asks for the counts of regions and interrupt types, and then for each.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var info Info
	r, err := c.query(ctx, cmdDeviceGetInfo, deviceInfoSize, 0)
	if err != nil {
		return info, err
	}
	regions, irqs := le.Uint32(r[8:]), le.Uint32(r[12:])
	if regions > numRegions || irqs > numIRQs {
		return info, fmt.Errorf("%w: %d regions and %d interrupt types", ErrProtocol, regions, irqs)
	}
	for i := range regions {
		if r, err = c.query(ctx, cmdGetRegionInfo, regionInfoSize, i); err != nil {
			return info, err
		}
		info.Regions = append(info.Regions, Region{Index: i, Flags: le.Uint32(r[4:]), Size: le.Uint64(r[16:])})
	}
	for i := range irqs {
		if r, err = c.query(ctx, cmdGetIRQInfo, irqInfoSize, i); err != nil {
			return info, err
		}
		info.IRQs = append(info.IRQs, IRQ{Index: i, Flags: le.Uint32(r[4:]), Count: le.Uint32(r[12:])})
	}
	return info, nil
}

// RegionMap asks what parts of a region the client may map, as QEMU does; nil for
// none. The caller closes the file.
func (c *Client) RegionMap(ctx context.Context, region uint32) (*RegionMap, error) {
	r, err := c.query(ctx, cmdGetRegionInfo, regionInfoSize, region)
	if err != nil {
		return nil, err
	}
	size := le.Uint32(r)
	if le.Uint32(r[4:])&regionFlagMap == 0 || size > maxMessage {
		return nil, nil
	}
	b := make([]byte, regionInfoSize)
	putUint32s(b, size, 0, region)
	got := c.link.ask(ctx, cmdGetRegionInfo, b)
	if got.err != nil {
		return nil, got.err
	}
	m, err := parseRegionMap(got.body)
	if err == nil && len(got.files) != 1 {
		err = fmt.Errorf("%w: region %d can be mapped, and %d descriptors came for that", ErrProtocol, region, len(got.files))
	}
	if err != nil {
		got.closeFiles()
		return nil, err
	}
	m.File = got.files[0]
	return m, nil
}

// parseRegionMap reads a description of a region that can be mapped in parts.
func parseRegionMap(b []byte) (*RegionMap, error) {
	const least = regionInfoSize + sparseSize
	if len(b) < least || le.Uint32(b[4:])&regionFlagCaps == 0 || le.Uint32(b[12:]) != regionInfoSize || le.Uint16(b[regionInfoSize:]) != capSparse {
		return nil, fmt.Errorf("%w: the description of a region does not tell which parts can be mapped", ErrProtocol)
	}
	n := le.Uint32(b[regionInfoSize+8:])
	if uint64(len(b)-least) != uint64(n)*areaSize {
		return nil, fmt.Errorf("%w: %d areas of a region in %d bytes", ErrProtocol, n, len(b)-least)
	}
	m := &RegionMap{Offset: le.Uint64(b[24:])}
	for at := least; at < len(b); at += areaSize {
		m.Areas = append(m.Areas, Area{le.Uint64(b[at:]), le.Uint64(b[at+8:])})
	}
	return m, nil
}

// Map maps an area; the caller unmaps it.
func (m *RegionMap) Map(a Area) ([]byte, error) {
	c, err := m.File.SyscallConn()
	if err != nil {
		return nil, err
	}
	var mem []byte
	var merr error
	err = c.Control(func(fd uintptr) {
		mem, merr = unix.Mmap(int(fd), int64(m.Offset+a.Offset), int(a.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	})
	return mem, errors.Join(err, merr)
}

func (c *Client) query(ctx context.Context, cmd uint16, size int, index uint32) ([]byte, error) {
	b := make([]byte, size)
	putUint32s(b, uint32(size), 0, index)
	r, err := c.link.request(ctx, cmd, b)
	if err == nil && len(r) != size {
		err = fmt.Errorf("%w: the reply to command %d has %d bytes, not %d", ErrProtocol, cmd, len(r), size)
	}
	return r, err
}

// RegionRead fills p from a region of the device.
func (c *Client) RegionRead(ctx context.Context, region uint32, off uint64, p []byte) error {
	r, err := c.link.request(ctx, cmdRegionRead, regionAccess(region, off, len(p)))
	if err != nil {
		return err
	}
	if len(r) != regionAccessSize+len(p) {
		return fmt.Errorf("%w: the reply to a read of %d bytes has %d", ErrProtocol, len(p), len(r))
	}
	copy(p, r[regionAccessSize:])
	return nil
}

// RegionWrite writes p to a region of the device and waits for the reply.
func (c *Client) RegionWrite(ctx context.Context, region uint32, off uint64, p []byte) error {
	_, err := c.link.request(ctx, cmdRegionWrite, append(regionAccess(region, off, len(p)), p...))
	return err
}

// PostRegionWrite is RegionWrite without a reply, as QEMU writes BARs.
func (c *Client) PostRegionWrite(region uint32, off uint64, p []byte) error {
	return c.link.post(cmdRegionWrite, append(regionAccess(region, off, len(p)), p...))
}

// RegionWriteOp is one write of a coalesced message, of 1 to 8 bytes.
type RegionWriteOp struct {
	Region uint32
	Offset uint64
	Data   []byte
}

// RegionWriteMulti sends several writes in one message and waits for the reply.
func (c *Client) RegionWriteMulti(ctx context.Context, ops ...RegionWriteOp) error {
	b := le.AppendUint64(nil, uint64(len(ops)))
	for _, op := range ops {
		var data [8]byte
		copy(data[:], op.Data)
		b = append(append(b, regionAccess(op.Region, op.Offset, len(op.Data))...), data[:]...)
	}
	_, err := c.link.request(ctx, cmdRegionWriteMulti, b)
	return err
}

func regionAccess(region uint32, off uint64, n int) []byte {
	b := le.AppendUint64(nil, off)
	b = le.AppendUint32(b, region)
	return le.AppendUint32(b, uint32(n))
}

// Reset resets the device.
func (c *Client) Reset(ctx context.Context) error {
	_, err := c.link.request(ctx, cmdDeviceReset, nil)
	return err
}

// DMAMap announces guest memory. m.File, which may be nil, stays the caller's.
func (c *Client) DMAMap(ctx context.Context, m DMAMap) error {
	var flags uint32
	if m.Readable {
		flags |= dmaFlagRead
	}
	if m.Writable {
		flags |= dmaFlagWrite
	}
	b := putUint32s(make([]byte, dmaMapSize), dmaMapSize, flags)
	le.PutUint64(b[8:], m.Offset)
	le.PutUint64(b[16:], m.Addr)
	le.PutUint64(b[24:], m.Size)
	var fds []int
	if m.File != nil {
		fds = append(fds, int(m.File.Fd()))
	}
	_, err := c.link.request(ctx, cmdDMAMap, b, fds...)
	return err
}

// DMAUnmap withdraws guest memory.
func (c *Client) DMAUnmap(ctx context.Context, u DMAUnmap) error {
	var flags uint32
	if u.All {
		flags = unmapFlagAll
	}
	b := putUint32s(make([]byte, dmaUnmapSize), dmaUnmapSize, flags)
	le.PutUint64(b[8:], u.Addr)
	le.PutUint64(b[16:], u.Size)
	_, err := c.link.request(ctx, cmdDMAUnmap, b)
	return err
}

// SetIRQs carries out op on count vectors of an interrupt type. For IRQAssign,
// eventfds has count of them, which stay the caller's; else it is empty.
func (c *Client) SetIRQs(ctx context.Context, op IRQOp, index, start, count uint32, eventfds ...*os.File) error {
	flags := map[IRQOp]uint32{
		IRQAssign:   irqDataEventfd | irqActionTrigger,
		IRQDeassign: irqDataEventfd | irqActionTrigger,
		IRQDisable:  irqDataNone | irqActionTrigger,
		IRQMask:     irqDataNone | irqActionMask,
		IRQUnmask:   irqDataNone | irqActionUnmask,
		IRQTrigger:  irqDataNone | irqActionTrigger,
	}[op]
	var fds []int
	for _, f := range eventfds {
		fds = append(fds, int(f.Fd()))
	}
	b := putUint32s(make([]byte, irqSetSize), irqSetSize, flags, index, start, count)
	_, err := c.link.request(ctx, cmdSetIRQs, b, fds...)
	return err
}
