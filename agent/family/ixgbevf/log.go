package ixgbevf

import (
	"bytes"
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

const (
	// resetReplyWords is the length of the reply to RESET.
	resetReplyWords = 4
	// maxMACVLANs bounds the list of further addresses. An 82599 has 128
	// address filters for all of its functions together.
	maxMACVLANs = 128
	// maxAssociations is how many security associations an 82599 has for both
	// directions and all of its functions together.
	maxAssociations = 2048
	// maxVLANs is the number of VLAN ids there are.
	maxVLANs = 4096
)

type mac = intel.MAC

// modeRequest is a request for a mode and what the PF granted.
type modeRequest struct{ asked, granted uint32 }

// Log is the state that the guest's messages add up to in the PF. The zero
// value is the record of a VF that was never reset by a message: such a VF is
// silent, and nothing is to be replayed. Not safe for concurrent use.
type Log struct {
	// ready is set by a completed RESET message; all else needs it.
	ready bool
	// mo is the multicast filter type from the reply to RESET.
	mo       uint32
	mac      *mac
	api      *uint32
	queues   *[4]uint32
	features *modeRequest
	maxFrame *uint32
	// refusedFrame is a frame size asked for after maxFrame that the PF
	// refused: an 82599's PF turns reception off then.
	refusedFrame *uint32
	macVLANs     []mac
	// vlans is in ascending order, without repetitions.
	vlans []uint16
	// multicast is nil until a list was set; it may then be empty.
	multicast []uint16
	// listed tells that the list was set after the mode: the PF receives by
	// its table then even in mode NONE.
	listed bool
	// ipsec counts security associations the PF holds for the guest. Of those
	// that were added since the record was last read from its encoding,
	// associations has the handles.
	ipsec        uint16
	associations []uint32
	// unknown is the id of the first operation this package cannot read but
	// the PF acknowledged, 0 for none.
	unknown uint16
	// overflow is set once there are more addresses than maxMACVLANs.
	overflow bool
	kept
}

// kept is what a PF driver remembers of a VF across its resets, besides the
// address that it used last.
type kept struct {
	// xcast is the mode that the PF took up last, under API version xcastAPI;
	// nil stands for NONE, the mode of a VF that never asked. Asking for it
	// again does nothing.
	xcast    *modeRequest
	xcastAPI uint32
	// xcastNow tells that this was after the last reset.
	xcastNow bool
	// unchecked tells that the PF granted a further MAC once, and with it
	// stopped to check the source of what the VF sends.
	unchecked bool
	// tried tells that the PF refused a further MAC that it could have granted:
	// it has stopped to check if that was for want of a filter, and not if an
	// administrator's address forbids it. The replies are the same.
	tried bool
}

var _ family.Log = (*Log)(nil)

// Reset forgets what the PF does: a reset by VFCTRL.RST, or of the function,
// makes the PF drop the VF's filters and answer nothing but a RESET message.
func (l *Log) Reset() {
	l.xcastNow = false
	*l = Log{mac: l.mac, kept: l.kept}
}

// minWords is the length below which a request or its reply cannot be read.
func minWords(id uint32) (request, reply int) {
	switch id {
	case MsgReset:
		return 1, resetReplyWords
	case MsgSetMAC, MsgSetMACVLAN:
		return 3, 1
	case MsgSetVLAN, MsgSetLPE, MsgAPINegotiate:
		return 2, 1
	case MsgGetQueues:
		return 1, 5
	case MsgUpdateXcastMode, MsgFeaturesNegotiate:
		return 2, 2
	}
	return 1, 1
}

// Completed notes a request and the PF's reply. Only what the PF acknowledged
// changes the record, but for RESET: refused, it is complete as well and
// merely says that the PF has no address for the VF.
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
		l.ready, l.mo = true, reply[3]
		if acked {
			l.mac = intel.ReadMAC(reply[1:])
		}
		return
	}
	switch {
	case !l.ready:
		return
	case !acked:
		// Without CTS the PF has not even looked at it.
		if reply[0]&MsgCTS != 0 {
			l.refused(id, request)
		}
		return
	}
	l.acknowledged(id, request, reply)
}

// refused notes what a refusal leaves behind in the PF.
func (l *Log) refused(id uint32, request []uint32) {
	switch id {
	case MsgSetLPE:
		l.refusedFrame = new(request[1])
	case MsgSetMACVLAN:
		if a := intel.ReadMAC(request[1:]); request[0]>>MsgInfoShift&MsgInfoMask != 0 && *a != (mac{}) && a[0]&1 == 0 {
			l.tried = true
		}
	}
}

// acknowledged applies one acknowledged message other than RESET.
func (l *Log) acknowledged(id uint32, request, reply []uint32) {
	info := request[0] >> MsgInfoShift & MsgInfoMask
	switch id {
	case MsgSetMAC:
		l.mac = intel.ReadMAC(request[1:])
	case MsgSetMulticast:
		l.setMulticast(int(info), request[1:])
	case MsgSetVLAN:
		l.setVLAN(uint16(request[1]%maxVLANs), info != 0)
	case MsgSetLPE:
		l.maxFrame, l.refusedFrame = new(request[1]), nil
	case MsgSetMACVLAN:
		l.setMACVLAN(info, request[1:])
	case MsgAPINegotiate:
		l.api = new(request[1])
	case MsgGetQueues:
		l.queues = (*[4]uint32)(slices.Clone(reply[1:5]))
	case MsgUpdateXcastMode:
		l.setXcast(modeRequest{request[1], reply[1]})
	case MsgFeaturesNegotiate:
		l.features = &modeRequest{request[1], reply[1]}
	case MsgIPsecAdd:
		l.addAssociation(reply)
	case MsgIPsecDel:
		l.removeAssociation(request)
	case MsgGetRETA, MsgGetRSSKey, MsgGetLinkState, MsgGetPFLinkState:
		// Questions: they leave nothing behind in the PF.
	default:
		if l.unknown == 0 {
			l.unknown = uint16(id)
		}
	}
}

// setXcast notes a mode, unless the PF was in it already.
func (l *Log) setXcast(m modeRequest) {
	was := uint32(XcastNone)
	if l.xcast != nil {
		was = l.xcast.granted
	}
	if m.granted == was {
		return
	}
	l.xcast, l.xcastNow, l.listed = &m, true, false
	if l.api != nil {
		l.xcastAPI = *l.api
	}
}

func (l *Log) addAssociation(reply []uint32) {
	l.ipsec = min(l.ipsec, ^uint16(0)-1) + 1
	if len(reply) > 1 && len(l.associations) < maxAssociations {
		l.associations = append(l.associations, reply[1])
	}
}

// removeAssociation counts only what is known to have been there: the PF driver
// also acknowledges the removal of what is not (ixgbe_ipsec_vf_del_sa).
func (l *Log) removeAssociation(request []uint32) {
	if len(request) < 2 {
		return
	}
	if i := slices.Index(l.associations, request[1]); i >= 0 {
		l.associations = slices.Delete(l.associations, i, i+1)
		l.ipsec--
	}
}

func (l *Log) setMulticast(count int, words []uint32) {
	l.multicast = intel.Hashes(min(count, MaxMulticast), words)
	l.listed = true
}

func (l *Log) setVLAN(id uint16, add bool) {
	at, found := slices.BinarySearch(l.vlans, id)
	switch {
	case add && !found:
		l.vlans = slices.Insert(l.vlans, at, id)
	case !add && found:
		l.vlans = slices.Delete(l.vlans, at, at+1)
	}
}

// setMACVLAN follows the PF driver: index 0 empties the list, 1 empties it and
// adds, any other adds.
func (l *Log) setMACVLAN(index uint32, words []uint32) {
	if index <= 1 {
		l.macVLANs, l.overflow = nil, false
	}
	if index == 0 {
		return
	}
	l.unchecked = true
	if len(l.macVLANs) == maxMACVLANs {
		l.overflow = true
		return
	}
	l.macVLANs = append(l.macVLANs, *intel.ReadMAC(words))
}

// Summary tells what the target's verdict needs.
func (l *Log) Summary() family.Summary {
	s := family.Summary{MulticastFilterType: l.mo, FurtherAddresses: len(l.macVLANs)}
	if l.api != nil {
		s.API = *l.api
	}
	if l.mac != nil && l.ready {
		s.MAC = bytes.Clone(l.mac[:])
	}
	switch {
	case l.ipsec > 0:
		s.NotMigratable = fmt.Sprintf("the guest offloaded %d IPsec security associations: the PF chose their indices, "+
			"and another PF cannot be made to choose the same; remove them in the guest", l.ipsec)
	case l.unknown != 0:
		s.NotMigratable = fmt.Sprintf("the PF acknowledged mailbox message %#04x, which this release does not know how to replay", l.unknown)
	case l.overflow:
		s.NotMigratable = fmt.Sprintf("the guest set more than %d further MAC addresses", maxMACVLANs)
	}
	return s
}
