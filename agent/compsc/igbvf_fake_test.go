package compsc

import (
	"encoding/binary"
	"maps"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
)

// igbPF is what the igb PF driver and its filters know of the fake VF.
type igbPF struct {
	cts      bool
	mac      [2]uint32 // the driver's idea of the VF's address
	rar      [2]uint32 // the address filter
	filters  [][2]uint32
	vlans    map[uint32]bool
	strip    bool
	hashes   []uint32
	promisc  uint32
	maxFrame uint32
}

// fakeIGB is an 82576 or I350 VF and its PF: registers behave as those of
// QEMU's igb, the PF as Linux's igb.
type fakeIGB struct {
	regs     map[uint32]uint32
	pf       igbPF
	mem      fakeMemory
	contexts map[uint32][2]string // by control register of a transmit queue
	// mask has the vectors that are enabled: EIMS reads what was written last.
	mask uint32
	// sent has the addresses of the buffers sent, in order.
	sent []uint64
	// serving tells that the PF lets the VF send and receive (VFTE, VFRE).
	serving bool

	// Knobs.
	adminMAC   *[2]uint32
	trusted    bool
	fixedHeads bool
	linkDown   bool
	mute       bool // the PF never replies
	inReset    int  // reads of V2PMAILBOX that show RSTI; negative: all
	gone       bool

	reply    []uint32
	read     []uint32 // offsets read
	queues   int
	writesOf map[uint32][]uint32
}

func newFakeIGB(device uint16) *fakeIGB {
	f, err := igbvf.ForDevice(igbvf.VendorID, device)
	if err != nil {
		panic(err)
	}
	return &fakeIGB{regs: map[uint32]uint32{igbvf.STATUS: 0x83}, mem: fakeMemory{}, contexts: map[uint32][2]string{},
		queues: len(f.Queues()) / 2, writesOf: map[uint32][]uint32{}}
}

// igbQueue finds the block of a queue register.
func igbQueue(off uint32) (n int, d family.Direction, inner uint32, ok bool) {
	if off < igbvf.RDBAL(0) || off >= igbvf.TDBAL(igbvf.MaxQueuePairs) || off&0xfff < 0x800 {
		return 0, 0, 0, false
	}
	if off >= igbvf.TDBAL(0) {
		d = family.TX
	}
	return int(off >> 8 & 7), d, off & 0xff, true
}

func (d *fakeIGB) Read(off uint32) uint32 {
	if d.gone {
		return allOnes
	}
	d.read = append(d.read, off)
	value := d.regs[off]
	switch off {
	case igbvf.EICR, igbvf.RQDPC(0), igbvf.RQDPC(1):
		d.regs[off] = 0
	case igbvf.V2PMAILBOX:
		d.regs[off] &^= igbvf.MailboxReadClear
		if d.inReset != 0 {
			value |= igbvf.MailboxRSTI
			if d.inReset--; d.inReset == 0 {
				d.regs[off] |= igbvf.MailboxRSTD
			}
		}
	}
	return value
}

func (d *fakeIGB) Write(off, value uint32) {
	if d.gone {
		return
	}
	d.writesOf[off] = append(d.writesOf[off], value)
	if n, dir, inner, ok := igbQueue(off); ok {
		d.writeQueue(n, dir, inner, value)
		return
	}
	switch off {
	case igbvf.CTRL:
		if value&igbvf.CtrlRST != 0 {
			d.reset()
		}
	case igbvf.EICS:
		d.regs[igbvf.EICR] |= value
	case igbvf.EIMS:
		d.mask |= value
		d.regs[off] = value
	case igbvf.EIMC:
		d.mask &^= value
	case igbvf.EICR:
		d.regs[off] &^= value
	case igbvf.V2PMAILBOX:
		d.writeMailbox(value)
	case igbvf.EITR(0), igbvf.EITR(1), igbvf.EITR(2):
		d.regs[off] = value &^ igbvf.EITRCountIgnore
	default:
		if off >= igbvf.VFGPRC && off <= igbvf.VFGOTLBC || off == igbvf.STATUS || off == igbvf.FRTIMER {
			return
		}
		d.regs[off] = value
	}
}

func (d *fakeIGB) writeQueue(n int, dir family.Direction, inner, value uint32) {
	off := igbvf.RDBAL(n) + inner
	if dir == family.TX {
		off = igbvf.TDBAL(n) + inner
	}
	switch inner {
	case 0x00:
		value &^= 0x1f
	case 0x08:
		value &= 0xffff0
	case 0x10:
		if d.fixedHeads && value != 0 {
			return
		}
		value &= 0xffff
	case 0x18:
		value &= 0xffff
	case 0x30:
		return
	}
	d.regs[off] = value
	if dir == family.TX && inner == 0x18 {
		d.transmit(n)
	}
}

// transmit runs to completion within the doorbell.
func (d *fakeIGB) transmit(n int) {
	on := d.serving && d.regs[igbvf.TXDCTL(n)]&igbvf.QueueEnable != 0
	size := d.regs[igbvf.TDLEN(n)] / 16
	ring := uint64(d.regs[igbvf.TDBAH(n)])<<32 | uint64(d.regs[igbvf.TDBAL(n)])
	for on && size > 0 && d.regs[igbvf.TDH(n)] != d.regs[igbvf.TDT(n)] {
		at := ring + 16*uint64(d.regs[igbvf.TDH(n)])
		desc := d.mem[at/16]
		context := desc[10]>>4 == 2 && desc[11]&(1<<5) != 0
		if d.linkDown && !context {
			return
		}
		d.regs[igbvf.TDH(n)] = (d.regs[igbvf.TDH(n)] + 1) % size
		if context {
			slots := d.contexts[igbvf.TXDCTL(n)]
			slots[desc[12]>>4&1] = string(desc[:])
			d.contexts[igbvf.TXDCTL(n)] = slots
			continue
		}
		d.sent = append(d.sent, binary.LittleEndian.Uint64(desc[:]))
		d.regs[igbvf.VFGPTC]++
		d.regs[igbvf.VFGOTC] += 60
		if desc[11]&(1<<3) == 0 {
			continue
		}
		if low := d.regs[igbvf.TDWBAL(n)]; low&igbvf.TDWBALEnable != 0 {
			head := binary.LittleEndian.AppendUint32(nil, d.regs[igbvf.TDH(n)])
			_ = d.mem.WriteAt(uint64(d.regs[igbvf.TDWBAH(n)])<<32|uint64(low&^3), head)
		} else {
			_ = d.mem.WriteAt(at+12, []byte{desc[12] | 1})
		}
	}
}

// receive takes n multicast frames of 64 octets from the wire on queue 0,
// marking each by its length, and returns how many had a descriptor.
func (d *fakeIGB) receive(n int) (taken int) {
	size := d.regs[igbvf.RDLEN(0)] / 16
	ring := uint64(d.regs[igbvf.RDBAH(0)])<<32 | uint64(d.regs[igbvf.RDBAL(0)])
	for range n {
		if !d.serving || d.regs[igbvf.RXDCTL(0)]&igbvf.QueueEnable == 0 {
			return taken
		}
		if d.regs[igbvf.RDH(0)] == d.regs[igbvf.RDT(0)] {
			d.regs[igbvf.RQDPC(0)]++
			continue
		}
		taken++
		at := ring + 16*uint64(d.regs[igbvf.RDH(0)])
		_ = d.mem.WriteAt(at, []byte{0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 64, 0, 0, 0})
		d.regs[igbvf.RDH(0)] = (d.regs[igbvf.RDH(0)] + 1) % size
		d.regs[igbvf.VFGPRC]++
		d.regs[igbvf.VFMPRC]++
		d.regs[igbvf.VFGORC] += 64
	}
	return taken
}

// reset turns queues off and tells the PF, which drops what it does for the
// VF but for its address filters and the largest frame. Rings, heads, masks and counters stay.
func (d *fakeIGB) reset() {
	for n := range igbvf.MaxQueuePairs {
		d.regs[igbvf.RXDCTL(n)] &^= igbvf.QueueEnable
		d.regs[igbvf.TXDCTL(n)] &^= igbvf.QueueEnable
	}
	d.serving = false
	d.pf = igbPF{rar: d.pf.rar, filters: d.pf.filters, maxFrame: d.pf.maxFrame}
	if d.adminMAC != nil {
		d.pf.mac = *d.adminMAC
	}
}

func (d *fakeIGB) writeMailbox(value uint32) {
	d.regs[igbvf.V2PMAILBOX] = d.regs[igbvf.V2PMAILBOX]&^uint32(igbvf.MailboxVFU) | value&igbvf.MailboxVFU
	if value&igbvf.MailboxREQ == 0 || d.mute {
		return
	}
	request := make([]uint32, igbvf.MailboxWords)
	for i := range request {
		request[i] = d.regs[igbvf.VMBMEM+4*uint32(i)]
	}
	d.regs[igbvf.V2PMAILBOX] |= igbvf.MailboxPFACK
	if d.reply = d.answer(request); d.reply == nil {
		return
	}
	for i, w := range d.reply {
		d.regs[igbvf.VMBMEM+4*uint32(i)] = w
	}
	d.regs[igbvf.V2PMAILBOX] |= igbvf.MailboxPFSTS
}

// answer is the PF driver; nil stands for no answer.
func (d *fakeIGB) answer(m []uint32) []uint32 {
	if m[0] == igbvf.MsgReset {
		was := d.pf.mac
		d.reset()
		d.pf.cts, d.pf.mac, d.pf.rar, d.serving = true, was, was, true
		if was == [2]uint32{} {
			return []uint32{igbvf.MsgReset | igbvf.MsgNACK, 0, 0}
		}
		return []uint32{igbvf.MsgReset | igbvf.MsgACK, was[0], was[1]}
	}
	if !d.pf.cts || m[0]&(igbvf.MsgACK|igbvf.MsgNACK) != 0 {
		return nil
	}
	verdict := uint32(igbvf.MsgNACK)
	if d.does(m[0]&igbvf.MsgIDMask, m[0]>>igbvf.MsgInfoShift&igbvf.MsgInfoMask, m) {
		verdict = igbvf.MsgACK
	}
	return []uint32{m[0] | verdict | igbvf.MsgCTS}
}

// does carries a message out, and tells whether the PF acknowledges it.
func (d *fakeIGB) does(id, info uint32, m []uint32) bool {
	addr := [2]uint32{m[1], m[2]}
	switch id {
	case igbvf.MsgSetMAC:
		if d.adminMAC != nil && !d.trusted || addr == [2]uint32{} {
			return false
		}
		switch info {
		case igbvf.MACAddress:
			d.pf.mac, d.pf.rar = addr, addr
		case igbvf.MACFilterClear:
			d.pf.filters = nil
		case igbvf.MACFilterAdd:
			d.pf.filters = append(d.pf.filters, addr)
		default:
			return false
		}
	case igbvf.MsgSetMulticast:
		d.pf.hashes = slices.Clone(m)
	case igbvf.MsgSetVLAN:
		if m[1] == 0 && info == 0 {
			return true
		}
		if d.pf.vlans == nil {
			d.pf.vlans = map[uint32]bool{}
		}
		d.pf.vlans[m[1]] = true
		if info == 0 {
			delete(d.pf.vlans, m[1])
		}
		d.pf.strip = m[1] != 0
	case igbvf.MsgSetLPE:
		d.pf.maxFrame = m[1]
	case igbvf.MsgSetPromisc:
		d.pf.promisc = info & igbvf.PromiscMulticast
		return info&^igbvf.PromiscMulticast == 0
	default:
		return false
	}
	return true
}

// snapshot is everything of the VF that a restore must bring over, and the
// PF's view of it; counters and the mailbox register are apart.
func (d *fakeIGB) snapshot() (map[uint32]uint32, igbPF) {
	regs := maps.Clone(d.regs)
	for _, c := range igbvf.New().Counters() {
		delete(regs, c.Low)
	}
	delete(regs, igbvf.V2PMAILBOX)
	regs[igbvf.EIMS] = d.mask
	maps.DeleteFunc(regs, func(_, value uint32) bool { return value == 0 })
	return regs, d.pf
}
