package ixgbevf

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// logVersion is the version of the encoding below. Version 1 is also read: it
// has no flags of what is kept, and ends with the operation not known.
const logVersion = 2

// Flags of what is kept across resets.
const (
	keptMAC = 1 << iota
	keptXcast
	keptXcastNow
	keptUnchecked
	keptAll = 1<<iota - 1
)

// Flags of the encoding: which optional parts follow.
const (
	hasMAC = 1 << iota // in version 1
	hasAPI
	hasQueues
	hasFeatures
	hasMaxFrame
	hasMulticast
	hasXcast // in version 1
	hasOverflow
	// hasRefusedFrame takes the place of hasXcast in version 2.
	hasRefusedFrame = hasXcast
)

// Marshal encodes the record: version, ready, what is kept across resets, and
// if it is ready everything else in fixed order, big-endian. Equal records have equal encodings, of at
// most some 9 KiB.
func (l *Log) Marshal() []byte {
	b := l.marshalKept([]byte{logVersion, 0})
	if !l.ready {
		return b
	}
	b[1] = 1
	be := binary.BigEndian
	flags := byte(0)
	flag := func(present bool, bit byte) {
		if present {
			flags |= bit
		}
	}
	flag(l.api != nil, hasAPI)
	flag(l.queues != nil, hasQueues)
	flag(l.features != nil, hasFeatures)
	flag(l.maxFrame != nil, hasMaxFrame)
	flag(l.multicast != nil, hasMulticast)
	flag(l.refusedFrame != nil, hasRefusedFrame)
	flag(l.overflow, hasOverflow)

	b = append(b, flags)
	words := func(ws ...uint32) {
		for _, w := range ws {
			b = be.AppendUint32(b, w)
		}
	}
	words(l.mo)
	if l.api != nil {
		words(*l.api)
	}
	if l.queues != nil {
		words(l.queues[:]...)
	}
	if l.features != nil {
		words(l.features.asked, l.features.granted)
	}
	if l.maxFrame != nil {
		words(*l.maxFrame)
	}
	if l.refusedFrame != nil {
		words(*l.refusedFrame)
	}
	if l.multicast != nil {
		b = appendShorts(b, l.multicast)
		b = append(b, bit(l.listed, 1))
	}
	b = appendShorts(b, l.vlans)
	b = be.AppendUint16(b, uint16(len(l.macVLANs)))
	for _, m := range l.macVLANs {
		b = append(b, m[:]...)
	}
	b = be.AppendUint16(b, l.ipsec)
	return be.AppendUint16(b, l.unknown)
}

// bit is b if it is set.
func bit(set bool, b byte) byte {
	if set {
		return b
	}
	return 0
}

func (l *Log) marshalKept(b []byte) []byte {
	b = append(b, bit(l.mac != nil, keptMAC)|bit(l.xcast != nil, keptXcast)|bit(l.xcastNow, keptXcastNow)|bit(l.unchecked, keptUnchecked))
	if l.mac != nil {
		b = append(b, l.mac[:]...)
	}
	if l.xcast != nil {
		for _, w := range []uint32{l.xcast.asked, l.xcast.granted, l.xcastAPI} {
			b = binary.BigEndian.AppendUint32(b, w)
		}
	}
	return b
}

// readKept reads what marshalKept wrote.
func (l *Log) readKept(r *reader) {
	flags := r.take(1)[0]
	if flags&keptMAC != 0 {
		l.mac = r.mac()
	}
	if flags&keptXcast != 0 {
		l.xcast, l.xcastAPI = r.mode(), r.word()
	}
	l.xcastNow, l.unchecked = flags&keptXcastNow != 0, flags&keptUnchecked != 0
	if extra := flags &^ keptAll; r.err == nil && (extra != 0 || l.xcastNow && l.xcast == nil) {
		r.err = fmt.Errorf("flags %#x of what is kept make no sense", flags)
	}
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

func (r *reader) take(n int) []byte {
	if r.err == nil && len(r.b) < n {
		r.err = fmt.Errorf("ends %d bytes early", n-len(r.b))
	}
	if r.err != nil {
		return make([]byte, n)
	}
	taken := r.b[:n]
	r.b = r.b[n:]
	return taken
}

func (r *reader) word() uint32  { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) short() uint16 { return binary.BigEndian.Uint16(r.take(2)) }

// length reads the length of a list of at most limit entries.
func (r *reader) length(what string, limit int) int {
	n := int(r.short())
	if r.err == nil && n > limit {
		r.err = fmt.Errorf("%d %s, at most %d are possible", n, what, limit)
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
	b := r.take(1)[0]
	if r.err == nil && b > 1 {
		r.err = fmt.Errorf("a flag is %d, want 0 or 1", b)
	}
	return b == 1
}

func (r *reader) mac() *mac { return (*mac)(append([]byte(nil), r.take(6)...)) }

func (r *reader) mode() *modeRequest { return &modeRequest{r.word(), r.word()} }

// unmarshalLog accepts exactly what Marshal writes, and what it wrote in
// version 1.
func unmarshalLog(b []byte) (*Log, error) {
	r := &reader{b: b}
	head := r.take(2)
	switch {
	case r.err != nil:
		return nil, r.err
	case head[0] == 0 || head[0] > logVersion:
		return nil, fmt.Errorf("version %d, this release reads versions 1 to %d", head[0], logVersion)
	case head[1] > 1:
		return nil, fmt.Errorf("ready is %d, want 0 or 1", head[1])
	}
	l := &Log{ready: head[1] == 1}
	if head[0] > 1 {
		l.readKept(r)
	}
	if l.ready {
		l.read(r, head[0])
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
func (l *Log) read(r *reader, version byte) {
	flags := r.take(1)[0]
	if version > 1 && flags&hasMAC != 0 {
		r.err = errors.Join(r.err, errors.New("the address is given twice"))
	}
	l.mo = r.word()
	if version == 1 && flags&hasMAC != 0 {
		l.mac = r.mac()
	}
	if flags&hasAPI != 0 {
		l.api = new(r.word())
	}
	if flags&hasQueues != 0 {
		l.queues = &[4]uint32{r.word(), r.word(), r.word(), r.word()}
	}
	if flags&hasFeatures != 0 {
		l.features = r.mode()
	}
	if flags&hasMaxFrame != 0 {
		l.maxFrame = new(r.word())
	}
	if version > 1 && flags&hasRefusedFrame != 0 {
		l.refusedFrame = new(r.word())
	}
	if flags&hasMulticast != 0 {
		l.multicast = r.shorts("multicast hashes", MaxMulticast)
		if version > 1 {
			l.listed = r.flag()
		}
	}
	if version == 1 && flags&hasXcast != 0 {
		l.xcast, l.xcastNow = r.mode(), true
		if l.api != nil {
			l.xcastAPI = *l.api
		}
	}
	l.overflow = flags&hasOverflow != 0
	if l.vlans = r.shorts("VLANs", maxVLANs); len(l.vlans) == 0 {
		l.vlans = nil
	}
	for i, id := range l.vlans {
		if id >= maxVLANs || i > 0 && id <= l.vlans[i-1] {
			r.err = errors.Join(r.err, fmt.Errorf("VLAN %d is out of range or out of order", id))
			return
		}
	}
	for range r.length("further MAC addresses", maxMACVLANs) {
		l.macVLANs = append(l.macVLANs, mac(r.take(6)))
	}
	l.ipsec, l.unknown = r.short(), r.short()
}
