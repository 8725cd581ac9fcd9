package ixgbevf

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// logVersion is the version of the encoding below.
const logVersion = 1

// Flags of the encoding: which optional parts follow.
const (
	hasMAC = 1 << iota
	hasAPI
	hasQueues
	hasFeatures
	hasMaxFrame
	hasMulticast
	hasXcast
	hasOverflow
)

// Marshal encodes the record: version, ready, and if it is ready everything
// else in fixed order, big-endian. Equal records have equal encodings, of at
// most some 9 KiB.
func (l *Log) Marshal() []byte {
	if !l.ready {
		return []byte{logVersion, 0}
	}
	be := binary.BigEndian
	flags := byte(0)
	flag := func(present bool, bit byte) {
		if present {
			flags |= bit
		}
	}
	flag(l.mac != nil, hasMAC)
	flag(l.api != nil, hasAPI)
	flag(l.queues != nil, hasQueues)
	flag(l.features != nil, hasFeatures)
	flag(l.maxFrame != nil, hasMaxFrame)
	flag(l.multicast != nil, hasMulticast)
	flag(l.xcast != nil, hasXcast)
	flag(l.overflow, hasOverflow)

	b := []byte{logVersion, 1, flags}
	words := func(ws ...uint32) {
		for _, w := range ws {
			b = be.AppendUint32(b, w)
		}
	}
	words(l.mo)
	if l.mac != nil {
		b = append(b, l.mac[:]...)
	}
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
	if l.multicast != nil {
		b = appendShorts(b, l.multicast)
	}
	if l.xcast != nil {
		words(l.xcast.asked, l.xcast.granted)
	}
	b = appendShorts(b, l.vlans)
	b = be.AppendUint16(b, uint16(len(l.macVLANs)))
	for _, m := range l.macVLANs {
		b = append(b, m[:]...)
	}
	b = be.AppendUint16(b, l.ipsec)
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

func (r *reader) mode() *modeRequest { return &modeRequest{r.word(), r.word()} }

// unmarshalLog accepts exactly what Marshal writes.
func unmarshalLog(b []byte) (*Log, error) {
	r := &reader{b: b}
	head := r.take(2)
	switch {
	case r.err != nil:
		return nil, r.err
	case head[0] != logVersion:
		return nil, fmt.Errorf("version %d, this release reads version %d", head[0], logVersion)
	case head[1] > 1:
		return nil, fmt.Errorf("ready is %d, want 0 or 1", head[1])
	}
	l := &Log{ready: head[1] == 1}
	if l.ready {
		l.read(r)
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
func (l *Log) read(r *reader) {
	flags := r.take(1)[0]
	l.mo = r.word()
	if flags&hasMAC != 0 {
		l.mac = (*mac)(append([]byte(nil), r.take(6)...))
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
	if flags&hasMulticast != 0 {
		l.multicast = r.shorts("multicast hashes", MaxMulticast)
	}
	if flags&hasXcast != 0 {
		l.xcast = r.mode()
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
