package vfiouser

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"syscall"
	"time"
)

// session is one client's connection. Its fields belong to the goroutine that
// runs handle.
type session struct {
	srv       *Server
	link      *link
	connected bool // a version was negotiated, and the client told so
	regions   [numRegions]Region
	irqs      [numIRQs]IRQ
	out       []byte // reply body under construction
	// pass is a file whose descriptor goes with the reply, nil for none.
	pass *os.File
}

func newSession(s *Server, l *link) *session {
	ss := &session{srv: s, link: l}
	l.in.messageTimeout, l.in.greetBy = s.messageTimeout, time.Now().Add(s.greetTimeout)
	info := s.dev.Info()
	for _, r := range info.Regions {
		if r.Index < numRegions {
			ss.regions[r.Index] = r
		}
	}
	for _, q := range info.IRQs {
		if q.Index < numIRQs {
			ss.irqs[q.Index] = q
		}
	}
	return ss
}

// handle carries out one command and answers it. An error ends the session.
func (s *session) handle(m *message) error {
	s.pass = nil
	body, err := s.dispatch(m)
	if m.flags&flagNoReply != 0 {
		if err != nil {
			s.srv.log.Debug("vfio-user: a posted command failed", "command", m.cmd, "err", err)
		}
	} else if e := s.answer(m.header, body, err); e != nil {
		return e
	}
	if !s.connected {
		if err != nil {
			return fmt.Errorf("version negotiation: %w", err)
		}
		s.connected = true
		s.link.in.greetBy = time.Time{}
		s.srv.log.Info("vfio-user: client connected")
		s.srv.cur.Store(s)
		s.srv.dev.Connected()
	}
	return nil
}

// answer replies, with the descriptor of pass if there is one.
func (s *session) answer(h header, body []byte, err error) error {
	if s.pass == nil || err != nil {
		return s.link.reply(h, body, err)
	}
	c, err := s.pass.SyscallConn()
	if err != nil {
		return s.link.reply(h, nil, err)
	}
	var sent error
	// Held while it is sent: the device may close it at any time.
	if err := c.Control(func(fd uintptr) { sent = s.link.reply(h, body, nil, int(fd)) }); err != nil {
		return s.link.reply(h, nil, err)
	}
	return sent
}

// dispatch returns the body of the reply.
func (s *session) dispatch(m *message) ([]byte, error) {
	if !s.connected && m.cmd != cmdVersion {
		return nil, badRequest("command %d came before VERSION", m.cmd)
	}
	if len(m.fds) > 0 && m.cmd != cmdDMAMap && m.cmd != cmdSetIRQs {
		return nil, badRequest("command %d came with descriptors", m.cmd)
	}
	dev := s.srv.dev
	switch m.cmd {
	case cmdVersion:
		return s.version(m)
	case cmdDMAMap:
		return nil, s.dmaMap(m)
	case cmdDMAUnmap:
		return s.dmaUnmap(m)
	case cmdDeviceGetInfo:
		return s.deviceInfo(m)
	case cmdGetRegionInfo:
		return s.regionInfo(m)
	case cmdGetIRQInfo:
		return s.irqInfo(m)
	case cmdSetIRQs:
		return nil, s.setIRQs(m)
	case cmdRegionRead:
		return s.regionRead(m)
	case cmdRegionWrite:
		return s.regionWrite(m)
	case cmdRegionWriteMulti:
		return s.regionWriteMulti(m)
	case cmdDeviceReset:
		if err := wantSize(m, 0); err != nil {
			return nil, err
		}
		return nil, dev.Reset()
	case cmdGetRegionIOFDs, cmdDeviceFeature, cmdMigrationDataRead, cmdMigrationDataWrite:
		return nil, fmt.Errorf("command %d: %w", m.cmd, syscall.ENOTSUP)
	default:
		return nil, badRequest("unknown command %d", m.cmd)
	}
}

func wantSize(m *message, n int) error {
	if len(m.body) != n {
		return badRequest("command %d has %d bytes, not %d", m.cmd, len(m.body), n)
	}
	return nil
}

// wantArgsz checks the size of a query and the size of reply that it allows for.
func wantArgsz(m *message, n int) error {
	if err := wantSize(m, n); err != nil {
		return err
	}
	if a := le.Uint32(m.body); a < uint32(n) {
		return badRequest("command %d allows for a reply of %d bytes, it has %d", m.cmd, a, n)
	}
	return nil
}

// capabilities are the members of the VERSION message that concern us.
type capabilities struct {
	MaxMsgFDs       uint64 `json:"max_msg_fds,omitempty"`
	MaxDataXferSize uint64 `json:"max_data_xfer_size,omitempty"`
	MaxDMAMaps      uint64 `json:"max_dma_maps,omitempty"`
	PageSizes       uint64 `json:"pgsizes,omitempty"`
	WriteMultiple   bool   `json:"write_multiple,omitempty"`
}

type versionData struct {
	Capabilities capabilities `json:"capabilities"`
}

// version negotiates. The reply's major must equal the client's and its minor
// must not exceed it; QEMU 11.1 offers 0.0.
func (s *session) version(m *message) ([]byte, error) {
	if s.connected {
		return nil, badRequest("VERSION came twice")
	}
	if len(m.body) < 4 {
		return nil, badRequest("VERSION has %d bytes", len(m.body))
	}
	major, minor := le.Uint16(m.body[0:]), le.Uint16(m.body[2:])
	if major != 0 {
		return nil, badRequest("the client speaks version %d.%d, the server 0.1", major, minor)
	}
	var offer versionData
	if data := m.body[4:]; len(data) > 0 {
		if data[len(data)-1] != 0 {
			return nil, badRequest("the data of VERSION does not end with a NUL")
		}
		if err := json.Unmarshal(bytes.TrimRight(data, "\x00"), &offer); err != nil {
			return nil, badRequest("the data of VERSION: %v", err)
		}
	}
	answer, err := json.Marshal(versionData{capabilities{
		MaxMsgFDs:       maxFDs,
		MaxDataXferSize: maxTransfer,
		MaxDMAMaps:      MaxMappings,
		PageSizes:       4096,
		WriteMultiple:   s.srv.opts.WriteMultiple && offer.Capabilities.WriteMultiple,
	}})
	if err != nil {
		return nil, err
	}
	body := make([]byte, 4, 4+len(answer)+1)
	le.PutUint16(body[2:], min(minor, 1))
	return append(append(body, answer...), 0), nil
}

func (s *session) dmaMap(m *message) error {
	if err := wantArgsz(m, dmaMapSize); err != nil {
		return err
	}
	flags := le.Uint32(m.body[4:])
	d := DMAMap{
		Offset:   le.Uint64(m.body[8:]),
		Addr:     le.Uint64(m.body[16:]),
		Size:     le.Uint64(m.body[24:]),
		Readable: flags&dmaFlagRead != 0,
		Writable: flags&dmaFlagWrite != 0,
	}
	switch {
	case flags&^(dmaFlagRead|dmaFlagWrite) != 0:
		return badRequest("DMA_MAP has unknown flags %#x", flags)
	case d.Size == 0 || d.Addr+d.Size < d.Addr:
		return badRequest("DMA_MAP of %#x bytes at %#x is not a range", d.Size, d.Addr)
	case len(m.fds) > 1:
		return badRequest("DMA_MAP came with %d descriptors", len(m.fds))
	}
	if len(m.fds) == 1 {
		d.File = os.NewFile(uintptr(m.takeFD(0)), "guest memory")
	}
	return s.srv.dev.DMAMap(d)
}

func (s *session) dmaUnmap(m *message) ([]byte, error) {
	if err := wantArgsz(m, dmaUnmapSize); err != nil {
		return nil, err
	}
	flags := le.Uint32(m.body[4:])
	u := DMAUnmap{
		Addr: le.Uint64(m.body[8:]),
		Size: le.Uint64(m.body[16:]),
		All:  flags&unmapFlagAll != 0,
	}
	switch {
	case flags&^unmapFlagAll != 0:
		return nil, fmt.Errorf("DMA_UNMAP with flags %#x: %w", flags, syscall.ENOTSUP)
	case u.All && (u.Addr != 0 || u.Size != 0):
		return nil, badRequest("DMA_UNMAP of everything names a range")
	case !u.All && (u.Size == 0 || u.Addr+u.Size < u.Addr):
		return nil, badRequest("DMA_UNMAP of %#x bytes at %#x is not a range", u.Size, u.Addr)
	}
	return m.body, s.srv.dev.DMAUnmap(u)
}

func (s *session) deviceInfo(m *message) ([]byte, error) {
	if err := wantArgsz(m, deviceInfoSize); err != nil {
		return nil, err
	}
	return putUint32s(s.reply(deviceInfoSize), deviceInfoSize, deviceFlagReset|deviceFlagPCI, numRegions, numIRQs), nil
}

// regionInfo describes a region. A client that does not allow for the areas to
// map is told how much to allow for, and nothing of capabilities: QEMU takes the
// flag without their place for an error. It then asks again.
func (s *session) regionInfo(m *message) ([]byte, error) {
	if err := wantArgsz(m, regionInfoSize); err != nil {
		return nil, err
	}
	i := le.Uint32(m.body[8:])
	if i >= numRegions {
		return nil, badRequest("there is no region %d", i)
	}
	r := s.regions[i]
	flags, size, offset := r.Flags&(RegionReadable|RegionWritable), regionInfoSize, uint64(i)<<40 // as vfio-pci does; only for mmap
	if r.Map != nil {
		flags |= regionFlagMap
		size += sparseSize + areaSize*len(r.Map.Areas)
		offset = r.Map.Offset
	}
	whole := size > regionInfoSize && le.Uint32(m.body) >= uint32(size)
	n := regionInfoSize
	if whole {
		n = size
	}
	b := putUint32s(s.reply(n), uint32(size), flags, i, 0)
	le.PutUint64(b[16:], r.Size)
	le.PutUint64(b[24:], offset)
	if whole {
		putUint32s(b[4:], flags|regionFlagCaps, i, regionInfoSize)
		putAreas(b[regionInfoSize:], r.Map.Areas)
		s.pass = r.Map.File
	}
	return b, nil
}

// putAreas writes the capability that names the areas of a region to map.
func putAreas(b []byte, areas []Area) {
	le.PutUint16(b[0:], capSparse)
	le.PutUint16(b[2:], 1)
	le.PutUint32(b[8:], uint32(len(areas)))
	for n, a := range areas {
		at := sparseSize + n*areaSize
		le.PutUint64(b[at:], a.Offset)
		le.PutUint64(b[at+8:], a.Size)
	}
}

func (s *session) irqInfo(m *message) ([]byte, error) {
	if err := wantArgsz(m, irqInfoSize); err != nil {
		return nil, err
	}
	i := le.Uint32(m.body[8:])
	if i >= numIRQs {
		return nil, badRequest("there is no interrupt type %d", i)
	}
	return putUint32s(s.reply(irqInfoSize), irqInfoSize, s.irqs[i].Flags, i, s.irqs[i].Count), nil
}

// setIRQs decodes SET_IRQS. QEMU 11.1 de-assigns with DATA_EVENTFD and no
// descriptors, which is also how it begins to enable MSI-X.
func (s *session) setIRQs(m *message) error {
	if len(m.body) < irqSetSize {
		return badRequest("SET_IRQS has %d bytes", len(m.body))
	}
	flags := le.Uint32(m.body[4:])
	r := IRQRequest{Index: le.Uint32(m.body[8:]), Start: le.Uint32(m.body[12:]), Count: le.Uint32(m.body[16:])}
	data, action := flags&irqDataMask, flags&irqActionsMask
	bools := m.body[irqSetSize:]
	switch {
	case flags&^(irqDataMask|irqActionsMask) != 0:
		return badRequest("SET_IRQS has unknown flags %#x", flags)
	case r.Index >= numIRQs || uint64(r.Start)+uint64(r.Count) > uint64(s.irqs[r.Index].Count):
		return badRequest("SET_IRQS names vectors %d+%d of interrupt type %d, which does not have them", r.Start, r.Count, r.Index)
	case data != irqDataEventfd && len(m.fds) > 0:
		return badRequest("SET_IRQS came with descriptors for another kind of data")
	case data == irqDataBool && len(bools) != int(r.Count), data != irqDataBool && len(bools) != 0:
		return badRequest("SET_IRQS has %d bytes of data for %d vectors", len(bools), r.Count)
	}
	switch action {
	case irqActionMask:
		r.Op = IRQMask
	case irqActionUnmask:
		r.Op = IRQUnmask
	case irqActionTrigger:
		r.Op = IRQTrigger
	default:
		return badRequest("SET_IRQS has not exactly one action in flags %#x", flags)
	}
	dev := s.srv.dev
	switch data {
	case irqDataNone:
		if r.Count == 0 {
			if r.Start != 0 || r.Op != IRQTrigger {
				return badRequest("SET_IRQS names no vectors")
			}
			r.Op = IRQDisable
		}
		return dev.SetIRQs(r)
	case irqDataBool:
		for i, b := range bools {
			if b == 0 {
				continue
			}
			one := IRQRequest{Op: r.Op, Index: r.Index, Start: r.Start + uint32(i), Count: 1}
			if err := dev.SetIRQs(one); err != nil {
				return err
			}
		}
		return nil
	case irqDataEventfd:
		return s.setEventfds(m, r)
	default:
		return badRequest("SET_IRQS has not exactly one kind of data in flags %#x", flags)
	}
}

func (s *session) setEventfds(m *message, r IRQRequest) error {
	switch {
	case r.Op != IRQTrigger:
		return fmt.Errorf("SET_IRQS with eventfds for masking: %w", syscall.ENOTSUP)
	case r.Count == 0:
		return badRequest("SET_IRQS names no vectors")
	case len(m.fds) == 0:
		r.Op = IRQDeassign
		return s.srv.dev.SetIRQs(r)
	case len(m.fds) != int(r.Count):
		return badRequest("SET_IRQS came with %d descriptors for %d vectors", len(m.fds), r.Count)
	}
	r.Op = IRQAssign
	for i := range m.fds {
		e, err := NewEventfd(m.takeFD(i))
		if err != nil {
			for _, e := range r.Eventfds {
				e.Close()
			}
			return err
		}
		r.Eventfds = append(r.Eventfds, e)
	}
	return s.srv.dev.SetIRQs(r)
}

// access checks the fixed part of a region access against the region.
func (s *session) access(b []byte, need uint32) (region uint32, off uint64, n int, err error) {
	off, region = le.Uint64(b[0:]), le.Uint32(b[8:])
	count := le.Uint32(b[12:])
	if region >= numRegions || s.regions[region].Size == 0 {
		return 0, 0, 0, badRequest("there is no region %d", region)
	}
	r := s.regions[region]
	if count == 0 || count > maxTransfer || uint64(count) > r.Size || off > r.Size-uint64(count) {
		return 0, 0, 0, badRequest("%d bytes at %#x are not within region %d of %#x bytes", count, off, region, r.Size)
	}
	if r.Flags&need == 0 {
		return 0, 0, 0, fmt.Errorf("region %d has flags %#x: %w", region, r.Flags, syscall.EPERM)
	}
	return region, off, int(count), nil
}

func (s *session) regionRead(m *message) ([]byte, error) {
	if err := wantSize(m, regionAccessSize); err != nil {
		return nil, err
	}
	region, off, n, err := s.access(m.body, RegionReadable)
	if err != nil {
		return nil, err
	}
	b := s.reply(regionAccessSize + n)
	copy(b, m.body)
	return b, s.srv.dev.RegionRead(region, off, b[regionAccessSize:])
}

func (s *session) regionWrite(m *message) ([]byte, error) {
	if len(m.body) < regionAccessSize {
		return nil, badRequest("REGION_WRITE has %d bytes", len(m.body))
	}
	region, off, n, err := s.access(m.body, RegionWritable)
	if err != nil {
		return nil, err
	}
	if err := wantSize(m, regionAccessSize+n); err != nil {
		return nil, err
	}
	return m.body[:regionAccessSize], s.srv.dev.RegionWrite(region, off, m.body[regionAccessSize:])
}

// regionWriteMulti checks all writes of the message before it does the first.
func (s *session) regionWriteMulti(m *message) ([]byte, error) {
	if len(m.body) < 8 {
		return nil, badRequest("REGION_WRITE_MULTI has %d bytes", len(m.body))
	}
	count, writes := le.Uint64(m.body), m.body[8:]
	if count == 0 || len(writes)%writeMultiSize != 0 || uint64(len(writes)/writeMultiSize) != count {
		return nil, badRequest("REGION_WRITE_MULTI has %d bytes for %d writes", len(writes), count)
	}
	for do := range 2 {
		for w := writes; len(w) > 0; w = w[writeMultiSize:] {
			region, off, n, err := s.access(w, RegionWritable)
			if err == nil && n > 8 {
				err = badRequest("a write of REGION_WRITE_MULTI has %d bytes", n)
			}
			if err == nil && do == 1 {
				err = s.srv.dev.RegionWrite(region, off, w[regionAccessSize:][:n])
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return m.body[:8], nil
}

// reply returns a cleared buffer of n bytes, valid until the next call.
func (s *session) reply(n int) []byte {
	if cap(s.out) < n {
		s.out = make([]byte, n)
	}
	b := s.out[:n]
	clear(b)
	return b
}

func putUint32s(b []byte, vs ...uint32) []byte {
	for i, v := range vs {
		le.PutUint32(b[4*i:], v)
	}
	return b
}
