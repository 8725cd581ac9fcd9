package igbvf

import (
	"encoding/binary"
	"fmt"
)

// logVersion is the version of the encoding below.
const logVersion = 1

// Flags of the encoding: what is so, and which optional parts follow.
const (
	isReady = 1 << iota
	isAddressed
	isOverflown
	hasMAC
	hasMaxFrame
	hasLastVLAN
	hasMulticast
	hasPromisc
)

// needReady has the flags that make no sense in the record of a VF that is not
// ready.
const needReady = hasMAC | hasLastVLAN | hasMulticast | hasPromisc

// Marshal encodes the record: version, flags, what is kept across resets, and
// if it is ready everything else in fixed order, big-endian. Equal records have equal
// encodings, of at most some 9 KiB.
func (l *Log) Marshal() []byte {
	be := binary.BigEndian
	flags := byte(0)
	flag := func(present bool, bit byte) {
		if present {
			flags |= bit
		}
	}
	flag(l.ready, isReady)
	flag(l.addressed, isAddressed)
	flag(l.overflow, isOverflown)
	flag(l.mac != nil, hasMAC)
	flag(l.maxFrame != nil, hasMaxFrame)
	flag(l.lastVLAN != nil, hasLastVLAN)
	flag(l.multicast != nil, hasMulticast)
	flag(l.promisc != nil, hasPromisc)

	b := []byte{logVersion, flags}
	b = be.AppendUint16(b, uint16(len(l.filters)))
	for _, m := range l.filters {
		b = append(b, m[:]...)
	}
	if l.maxFrame != nil {
		b = be.AppendUint32(b, *l.maxFrame)
	}
	if !l.ready {
		return b
	}
	if l.mac != nil {
		b = append(b, l.mac[:]...)
	}
	if l.lastVLAN != nil {
		b = be.AppendUint16(b, *l.lastVLAN)
		b = appendShorts(b, l.vlans)
	}
	if l.multicast != nil {
		b = appendShorts(append(b, l.multicasts), l.multicast)
	}
	if l.promisc != nil {
		granted := byte(0)
		if l.promisc.granted {
			granted = 1
		}
		b = append(b, l.promisc.modes, granted)
	}
	return be.AppendUint16(b, l.unknown)
}

// appendShorts appends a list with its length.
func appendShorts(b []byte, list []uint16) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(list)))
	for _, v := range list {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return b
}

// reader takes values off the front of an encoding. After the first failure
// it returns zeros; err tells.
type reader struct {
	b   []byte
	err error
}

// fail notes the first failure.
func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
}

func (r *reader) take(n int) []byte {
	if len(r.b) < n {
		r.fail("ends %d bytes early", n-len(r.b))
	}
	if r.err != nil {
		return make([]byte, n)
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) byte() byte    { return r.take(1)[0] }
func (r *reader) word() uint32  { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) short() uint16 { return binary.BigEndian.Uint16(r.take(2)) }

// length reads the length of a list of at most limit entries.
func (r *reader) length(what string, limit int) int {
	n := int(r.short())
	if n > limit {
		r.fail("%d %s, at most %d are possible", n, what, limit)
	}
	if r.err != nil {
		return 0
	}
	return n
}

func (r *reader) shorts(what string, limit int) []uint16 {
	list := make([]uint16, r.length(what, limit))
	for i := range list {
		list[i] = r.short()
	}
	return list
}

func (r *reader) flag() bool {
	b := r.byte()
	if b > 1 {
		r.fail("a flag is %d, want 0 or 1", b)
	}
	return b == 1
}

// unmarshalLog accepts exactly what Marshal writes.
func unmarshalLog(b []byte) (*Log, error) {
	r := &reader{b: b}
	version, flags := r.byte(), r.byte()
	if version != logVersion {
		r.fail("version %d, this release reads version %d", version, logVersion)
	}
	if flags&isReady == 0 && flags&needReady != 0 {
		r.fail("flags %#x make no sense for a VF that is not ready", flags)
	}
	l := &Log{kept: kept{addressed: flags&isAddressed != 0, overflow: flags&isOverflown != 0}}
	for range r.length("further MAC addresses", maxFilters) {
		m := mac(r.take(6))
		l.filters = append(l.filters, m)
	}
	if flags&hasMaxFrame != 0 {
		l.maxFrame = new(r.word())
	}
	if l.ready = flags&isReady != 0; l.ready {
		l.read(r, flags)
	}
	if r.err != nil {
		return nil, r.err
	}
	if len(r.b) > 0 {
		return nil, fmt.Errorf("%d bytes too many", len(r.b))
	}
	return l, nil
}

// read fills the record of a ready VF; failures are left in r.
func (l *Log) read(r *reader, flags byte) {
	if flags&hasMAC != 0 {
		l.mac = new(mac(r.take(6)))
	}
	if flags&hasLastVLAN != 0 {
		l.lastVLAN = new(r.short())
		l.readVLANs(r)
	}
	if flags&hasMulticast != 0 {
		l.multicasts = r.byte()
		l.multicast = r.shorts("multicast hashes", min(MaxMulticast, int(l.multicasts)))
	}
	if flags&hasPromisc != 0 {
		l.promisc = &promiscRequest{r.byte(), r.flag()}
	}
	l.unknown = r.short()
}

func (l *Log) readVLANs(r *reader) {
	if *l.lastVLAN >= maxVLANs {
		r.fail("VLAN %d is out of range", *l.lastVLAN)
	}
	if l.vlans = r.shorts("VLANs", maxVLANs); len(l.vlans) == 0 {
		l.vlans = nil
	}
	if *l.lastVLAN == 0 && (len(l.vlans) == 0 || l.vlans[0] != 0) {
		r.fail("VLAN 0 was the last one set and is not there")
	}
	for i, id := range l.vlans {
		if id >= maxVLANs || i > 0 && id <= l.vlans[i-1] {
			r.fail("VLAN %d is out of range or out of order", id)
			return
		}
	}
}
