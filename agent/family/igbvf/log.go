package igbvf

import (
	"bytes"
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

const (
	// maxFilters bounds the list of further addresses. An I350, which has the
	// most, has 32 address filters for all of its functions together.
	maxFilters = 32
	// maxVLANs is the number of VLAN ids there are.
	maxVLANs = 4096
)

type mac = intel.MAC

// promiscRequest is a request for promiscuous modes. The PF takes those up
// that it has, also when it refuses the request for another.
type promiscRequest struct {
	modes   byte
	granted bool
}

// Log is the state that the guest's messages add up to in the PF. The zero
// value is the record of a VF that was never reset by a message: such a VF is
// silent, and nothing is to be replayed. Not safe for concurrent use.
type Log struct {
	settled
	kept
}

// settled is what a reset of the VF undoes.
type settled struct {
	// ready is set by a completed RESET message; all else needs it.
	ready bool
	mac   *mac
	// vlans is in ascending order, without repetitions.
	vlans []uint16
	// lastVLAN is the id in the last message about VLANs that had an effect,
	// nil for none. The PF strips tags unless it is 0.
	lastVLAN *uint16
	// multicast is nil until a list was set; it may then be empty. multicasts
	// is the guest's count of addresses, which may be larger than the list.
	multicast  []uint16
	multicasts byte
	promisc    *promiscRequest
	// unknown is the id of the first operation this package cannot read but
	// the PF acknowledged, 0 for none.
	unknown uint16
}

// kept is what the PF driver remembers of a VF across its resets.
type kept struct {
	// filters are further addresses, in the order they were added.
	filters []mac
	// overflow is set once there are more than maxFilters.
	overflow bool
	// maxFrame is the largest frame in bytes, with the checksum.
	maxFrame *uint32
	// addressed tells that the PF may have an address filter for the VF: a
	// reset leaves it, until the RESET message that follows.
	addressed bool
}

var _ family.Log = (*Log)(nil)

// Reset forgets what the PF does: a reset by CTRL.RST, or of the function,
// makes the PF drop what it did for the VF, but for further addresses and the
// largest frame, and answer nothing but a RESET message.
func (l *Log) Reset() { l.settled = settled{} }

// minWords is the length below which a request or its reply cannot be read.
func minWords(id uint32) (request, reply int) {
	switch id {
	case MsgReset:
		return 1, 3
	case MsgSetMAC:
		return 3, 1
	case MsgSetVLAN, MsgSetLPE:
		return 2, 1
	}
	return 1, 1
}

// Completed notes a request and the PF's reply. Only what the PF acknowledged
// changes the record, with two exceptions: a RESET that is refused is complete
// as well and merely says that the PF has no address for the VF, and of
// promiscuous modes the PF takes up those it has before it refuses the rest.
func (l *Log) Completed(request, reply []uint32) {
	acked, err := intel.Verdict(request, reply)
	if err != nil {
		return
	}
	id := request[0] & MsgIDMask
	if wantRequest, wantReply := minWords(id); len(request) < wantRequest || len(reply) < wantReply {
		return
	}
	if id == MsgReset {
		l.Reset()
		l.ready, l.addressed = true, true
		if acked {
			l.mac = intel.ReadMAC(reply[1:])
		}
		return
	}
	info := request[0] >> MsgInfoShift & MsgInfoMask
	switch {
	case !l.ready:
	case acked:
		l.acknowledged(id, info, request)
	case id == MsgSetPromisc && reply[0]&MsgCTS != 0:
		l.promisc = &promiscRequest{modes: byte(info)}
	}
}

// acknowledged applies one acknowledged message other than RESET.
func (l *Log) acknowledged(id, info uint32, request []uint32) {
	switch id {
	case MsgSetMAC:
		l.setMAC(info, *intel.ReadMAC(request[1:]))
	case MsgSetMulticast:
		l.setMulticast(byte(info), request[1:])
	case MsgSetVLAN:
		l.setVLAN(uint16(request[1]%maxVLANs), info != 0)
	case MsgSetLPE:
		l.maxFrame = new(request[1])
	case MsgSetPromisc:
		l.promisc = &promiscRequest{modes: byte(info), granted: true}
	default:
		l.noteUnknown(id)
	}
}

func (l *Log) noteUnknown(id uint32) {
	if l.unknown == 0 {
		l.unknown = uint16(id)
	}
}

func (l *Log) setMAC(info uint32, m mac) {
	switch info {
	case MACAddress:
		l.mac = &m
	case MACFilterClear:
		l.filters, l.overflow = nil, false
	case MACFilterAdd:
		switch {
		case slices.Contains(l.filters, m):
		case len(l.filters) == maxFilters:
			l.overflow = true
		default:
			l.filters = append(l.filters, m)
		}
	default:
		l.noteUnknown(MsgSetMAC)
	}
}

func (l *Log) setMulticast(count byte, words []uint32) {
	l.multicasts = count
	l.multicast = intel.Hashes(min(int(count), MaxMulticast), words)
}

// setVLAN follows the PF driver: VLAN 0 is never removed, and any other
// message decides whether tags are stripped.
func (l *Log) setVLAN(id uint16, add bool) {
	if id == 0 && !add {
		return
	}
	l.lastVLAN = &id
	at, found := slices.BinarySearch(l.vlans, id)
	switch {
	case add && !found:
		l.vlans = slices.Insert(l.vlans, at, id)
	case !add && found:
		l.vlans = slices.Delete(l.vlans, at, at+1)
	}
}

// Summary tells what the target's verdict needs. The multicast filter type is
// always 0: the PF does not tell it, and drivers count on that one.
func (l *Log) Summary() family.Summary {
	s := family.Summary{API: onlyAPI, FurtherAddresses: len(l.filters)}
	if l.mac != nil {
		s.MAC = bytes.Clone(l.mac[:])
	}
	switch {
	case l.unknown != 0:
		s.NotMigratable = fmt.Sprintf("the PF acknowledged mailbox message %#04x in a form that this release does not know how to replay", l.unknown)
	case l.overflow:
		s.NotMigratable = fmt.Sprintf("the guest set more than %d further MAC addresses", maxFilters)
	}
	return s
}
