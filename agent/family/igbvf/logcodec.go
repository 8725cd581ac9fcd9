package igbvf

import (
	"encoding/binary"

	"compsc.io/compsc/agent/family/intel"
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
		b = intel.AppendShorts(b, l.vlans)
	}
	if l.multicast != nil {
		b = intel.AppendShorts(append(b, l.multicasts), l.multicast)
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

// unmarshalLog accepts exactly what Marshal writes.
func unmarshalLog(b []byte) (*Log, error) {
	r := intel.NewReader(b)
	version, flags := r.Byte(), r.Byte()
	if version != logVersion {
		r.Fail("version %d, this release reads version %d", version, logVersion)
	}
	if flags&isReady == 0 && flags&needReady != 0 {
		r.Fail("flags %#x make no sense for a VF that is not ready", flags)
	}
	l := &Log{kept: kept{addressed: flags&isAddressed != 0, overflow: flags&isOverflown != 0}}
	for range r.Length("further MAC addresses", maxFilters) {
		m := r.MAC()
		l.filters = append(l.filters, m)
	}
	if flags&hasMaxFrame != 0 {
		l.maxFrame = new(r.Word())
	}
	if l.ready = flags&isReady != 0; l.ready {
		l.read(r, flags)
	}
	if err := r.End(); err != nil {
		return nil, err
	}
	return l, nil
}

// read fills the record of a ready VF; failures are left in r.
func (l *Log) read(r *intel.Reader, flags byte) {
	if flags&hasMAC != 0 {
		l.mac = new(r.MAC())
	}
	if flags&hasLastVLAN != 0 {
		l.lastVLAN = new(r.Short())
		l.readVLANs(r)
	}
	if flags&hasMulticast != 0 {
		l.multicasts = r.Byte()
		l.multicast = r.Shorts("multicast hashes", min(MaxMulticast, int(l.multicasts)))
	}
	if flags&hasPromisc != 0 {
		l.promisc = &promiscRequest{r.Byte(), r.Flag()}
	}
	l.unknown = r.Short()
}

func (l *Log) readVLANs(r *intel.Reader) {
	if *l.lastVLAN >= maxVLANs {
		r.Fail("VLAN %d is out of range", *l.lastVLAN)
	}
	if l.vlans = r.Shorts("VLANs", maxVLANs); len(l.vlans) == 0 {
		l.vlans = nil
	}
	if *l.lastVLAN == 0 && (len(l.vlans) == 0 || l.vlans[0] != 0) {
		r.Fail("VLAN 0 was the last one set and is not there")
	}
	for i, id := range l.vlans {
		if id >= maxVLANs || i > 0 && id <= l.vlans[i-1] {
			r.Fail("VLAN %d is out of range or out of order", id)
			return
		}
	}
}
