package ixgbevf

import (
	"encoding/binary"
	"fmt"

	"compsc.io/compsc/agent/family/intel"
)

// logVersion is the newest version of the encoding below. Version 3 added
// keptTried, and is only written for records that have it, so that a node of an
// older release takes the others. Version 1 is also read: it has no flags of
// what is kept, and ends with the operation not known.
const logVersion = 3

// Flags of what is kept across resets.
const (
	keptMAC = 1 << iota
	keptXcast
	keptXcastNow
	keptUnchecked
	keptTried // since version 3
	keptAll   = 1<<iota - 1
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
	b := l.marshalKept([]byte{l.version(), 0})
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
		b = intel.AppendShorts(b, l.multicast)
		b = append(b, bit(l.listed, 1))
	}
	b = intel.AppendShorts(b, l.vlans)
	b = be.AppendUint16(b, uint16(len(l.macVLANs)))
	for _, m := range l.macVLANs {
		b = append(b, m[:]...)
	}
	b = be.AppendUint16(b, l.ipsec)
	return be.AppendUint16(b, l.unknown)
}

// version is the oldest that holds all of the record.
func (l *Log) version() byte {
	if l.tried {
		return 3
	}
	return 2
}

// bit is b if it is set.
func bit(set bool, b byte) byte {
	if set {
		return b
	}
	return 0
}

func (l *Log) marshalKept(b []byte) []byte {
	b = append(b, bit(l.mac != nil, keptMAC)|bit(l.xcast != nil, keptXcast)|bit(l.xcastNow, keptXcastNow)|bit(l.unchecked, keptUnchecked)|bit(l.tried, keptTried))
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
func (l *Log) readKept(r *intel.Reader, version byte) {
	flags := r.Byte()
	if flags&keptMAC != 0 {
		l.mac = new(r.MAC())
	}
	if flags&keptXcast != 0 {
		l.xcast, l.xcastAPI = readMode(r), r.Word()
	}
	l.xcastNow, l.unchecked = flags&keptXcastNow != 0, flags&keptUnchecked != 0
	l.tried = flags&keptTried != 0
	// A record without the flag is of an older version.
	if extra := flags &^ keptAll; extra != 0 || l.tried != (version > 2) || l.xcastNow && l.xcast == nil {
		r.Fail("flags %#x of what is kept make no sense", flags)
	}
}

func readMode(r *intel.Reader) *modeRequest { return &modeRequest{r.Word(), r.Word()} }

// unmarshalLog accepts exactly what Marshal writes, and what it wrote in
// version 1.
func unmarshalLog(b []byte) (*Log, error) {
	r := intel.NewReader(b)
	head := r.Take(2)
	switch {
	case r.Err() != nil:
		return nil, r.Err()
	case head[0] == 0 || head[0] > logVersion:
		return nil, fmt.Errorf("version %d, this release reads versions 1 to %d", head[0], logVersion)
	case head[1] > 1:
		return nil, fmt.Errorf("ready is %d, want 0 or 1", head[1])
	}
	l := &Log{ready: head[1] == 1}
	if head[0] > 1 {
		l.readKept(r, head[0])
	}
	if l.ready {
		l.read(r, head[0])
	}
	if err := r.End(); err != nil {
		return nil, err
	}
	return l, nil
}

// read fills the record of a ready VF; failures are left in r.
func (l *Log) read(r *intel.Reader, version byte) {
	flags := r.Byte()
	if version > 1 && flags&hasMAC != 0 {
		r.Fail("the address is given twice")
	}
	l.mo = r.Word()
	if version == 1 && flags&hasMAC != 0 {
		l.mac = new(r.MAC())
	}
	if flags&hasAPI != 0 {
		l.api = new(r.Word())
	}
	if flags&hasQueues != 0 {
		l.queues = &[4]uint32{r.Word(), r.Word(), r.Word(), r.Word()}
	}
	if flags&hasFeatures != 0 {
		l.features = readMode(r)
	}
	if flags&hasMaxFrame != 0 {
		l.maxFrame = new(r.Word())
	}
	if version > 1 && flags&hasRefusedFrame != 0 {
		l.refusedFrame = new(r.Word())
	}
	if flags&hasMulticast != 0 {
		l.multicast = r.Shorts("multicast hashes", MaxMulticast)
		if version > 1 {
			l.listed = r.Flag()
		}
	}
	if version == 1 && flags&hasXcast != 0 {
		l.xcast, l.xcastNow = readMode(r), true
		if l.api != nil {
			l.xcastAPI = *l.api
		}
	}
	l.overflow = flags&hasOverflow != 0
	if l.vlans = r.Shorts("VLANs", maxVLANs); len(l.vlans) == 0 {
		l.vlans = nil
	}
	for i, id := range l.vlans {
		if id >= maxVLANs || i > 0 && id <= l.vlans[i-1] {
			r.Fail("VLAN %d is out of range or out of order", id)
			return
		}
	}
	for range r.Length("further MAC addresses", maxMACVLANs) {
		l.macVLANs = append(l.macVLANs, r.MAC())
	}
	l.ipsec, l.unknown = r.Short(), r.Short()
}
