package ixgbevf

import (
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

// Replay lists the messages that bring the PF of a VF that was just reset to
// the recorded state. The order is the PF's: without a RESET it answers
// nothing, the API version decides which messages it takes, the frame size
// may decide whether it lets the VF receive at all, and RESET undoes all.
//
// Queries are not among them, but for GET_QUEUES, whose answer must be what
// the guest was told. What the PF remembers across resets comes first, where
// it cannot be had otherwise; if the guest has reset the VF and completed no
// RESET since, that is all.
func (l *Log) Replay() []family.Message {
	messages := l.replayKept()
	if !l.ready {
		return messages
	}
	messages = append(messages, l.replayReset())
	add := func(name string, words ...uint32) {
		messages = append(messages, family.Message{Name: name, Words: words, Check: acknowledges(words)})
	}
	if l.api != nil {
		add("API_NEGOTIATE", MsgAPINegotiate, *l.api, 0)
	}
	if l.queues != nil {
		messages = append(messages, replayQueues(*l.queues))
	}
	if l.features != nil {
		messages = append(messages, replayMode("FEATURES_NEGOTIATE", MsgFeaturesNegotiate, *l.features))
	}
	if l.maxFrame != nil {
		add("SET_LPE", MsgSetLPE, *l.maxFrame)
	}
	if l.refusedFrame != nil {
		words := []uint32{MsgSetLPE, *l.refusedFrame}
		messages = append(messages, family.Message{Name: "SET_LPE", Words: words, Check: refuses(words)})
	}
	if l.mac != nil {
		low, high := intel.MACWords(*l.mac)
		add("SET_MAC_ADDR", MsgSetMAC, low, high)
	}
	if l.spoofing() && len(l.macVLANs) == 0 {
		messages = append(messages, l.replayUnchecked()...)
	}
	if len(l.macVLANs) > 0 {
		add("SET_MACVLAN", MsgSetMACVLAN, 0, 0)
	}
	for i, m := range l.macVLANs {
		low, high := intel.MACWords(m)
		add("SET_MACVLAN", MsgSetMACVLAN|uint32(i+1)<<MsgInfoShift, low, high)
	}
	for _, id := range l.vlans {
		add("SET_VLAN", MsgSetVLAN|1<<MsgInfoShift, uint32(id))
	}
	var mode []family.Message
	if l.xcast != nil && l.xcastNow {
		mode = replayXcast(*l.xcast)
	}
	if l.multicast != nil && l.listed {
		messages, mode = append(messages, mode...), nil
	}
	if l.multicast != nil {
		add("SET_MULTICAST", multicastWords(l.multicast)...)
	}
	return append(messages, mode...)
}

// Release is empty: what the PF keeps of a VF that was reset filters no frames.
func (l *Log) Release() []family.Message { return nil }

// replayKept brings the PF to remember what the source's PF does, and resets
// the VF. Of a mode it is asked for as much as was granted: what was asked for
// beyond that it may grant by now, for trust changes, and a reset comes with it.
func (l *Log) replayKept() []family.Message {
	mode := l.xcast != nil && !l.xcastNow
	if !mode && (l.ready || l.mac == nil && !l.spoofing()) {
		return nil
	}
	var messages []family.Message
	add := func(name string, words ...uint32) {
		messages = append(messages, family.Message{Name: name, Words: words, Check: acknowledges(words)})
	}
	reset := []uint32{MsgReset}
	messages = append(messages, family.Message{Name: "RESET", Words: reset, Check: func(reply []uint32) error {
		_, err := intel.Verdict(reset, reply)
		return err
	}})
	if mode {
		add("API_NEGOTIATE", MsgAPINegotiate, l.xcastAPI, 0)
		messages = append(messages, replayXcast(modeRequest{l.xcast.granted, l.xcast.granted})...)
	}
	if l.mac != nil {
		low, high := intel.MACWords(*l.mac)
		add("SET_MAC_ADDR", MsgSetMAC, low, high)
	}
	if l.spoofing() {
		messages = append(messages, l.replayUnchecked()...)
	}
	return append(messages, family.Message{Name: "VFCTRL.RST"})
}

// spoofing tells that the PF may no longer check the source of what the VF
// sends.
func (l *Log) spoofing() bool { return l.unchecked || l.tried }

// replayUnchecked adds a further MAC and takes it back: what remains is that
// the PF no longer checks the source of what the VF sends. Where the source's
// PF has only refused such a request, this one may as well: it does for the
// same reason, or stops to check.
func (l *Log) replayUnchecked() []family.Message {
	m := mac{0x02, 0, 0, 0, 0, 1} // locally administered
	if l.mac != nil {
		m = *l.mac
	}
	low, high := intel.MACWords(m)
	answers := acknowledges
	if !l.unchecked {
		answers = answered
	}
	add, clear := []uint32{MsgSetMACVLAN | 1<<MsgInfoShift, low, high}, []uint32{MsgSetMACVLAN, 0, 0}
	return []family.Message{
		{Name: "SET_MACVLAN", Words: add, Check: answers(add)},
		{Name: "SET_MACVLAN", Words: clear, Check: acknowledges(clear)},
	}
}

// replayReset checks the multicast filter type, for the guest computed its
// hashes with the one it was told. Whether the PF has an address for the VF
// may differ: the guest's address follows in a message of its own.
func (l *Log) replayReset() family.Message {
	request := []uint32{MsgReset}
	return family.Message{Name: "RESET", Words: request, Check: func(reply []uint32) error {
		if _, err := intel.Verdict(request, reply); err != nil {
			return err
		}
		if len(reply) < resetReplyWords {
			return fmt.Errorf("reply has %d words, want %d", len(reply), resetReplyWords)
		}
		if reply[3] != l.mo {
			return fmt.Errorf("multicast filter type is %d here and %d where the guest computed its hashes: "+
				"set both PFs to the same type", reply[3], l.mo)
		}
		return nil
	}}
}

func replayQueues(want [4]uint32) family.Message {
	request := []uint32{MsgGetQueues, 0, 0, 0, 0}
	return family.Message{Name: "GET_QUEUES", Words: request, Check: func(reply []uint32) error {
		if err := acknowledges(request)(reply); err != nil {
			return err
		}
		if len(reply) < 1+len(want) {
			return fmt.Errorf("reply has %d words, want %d", len(reply), 1+len(want))
		}
		if got := [4]uint32(reply[1:5]); got != want {
			return fmt.Errorf("tx queues, rx queues, traffic classes and default queue are %v here, but the guest was told %v: "+
				"set the target PF to the source's number of VFs, traffic classes and port VLAN", got, want)
		}
		return nil
	}}
}

// replayMode replays a request whose reply says how much of it was granted.
func replayMode(name string, id uint32, m modeRequest) family.Message {
	request := []uint32{id, m.asked}
	return family.Message{Name: name, Words: request, Check: func(reply []uint32) error {
		if err := acknowledges(request)(reply); err != nil {
			return err
		}
		if len(reply) < 2 {
			return fmt.Errorf("reply has %d words, want 2", len(reply))
		}
		if reply[1] != m.granted {
			return fmt.Errorf("asked for %#x the PF grants %#x here, but granted %#x before: "+
				"give the VF the same trust on both PFs", m.asked, reply[1], m.granted)
		}
		return nil
	}}
}

// replayXcast asks for another mode first: the PF driver remembers a VF's mode
// across resets, and passes over a request for the mode it remembers although
// the reset took it out of the hardware.
func replayXcast(m modeRequest) []family.Message {
	other := uint32(XcastNone)
	if m.granted == XcastNone {
		other = XcastMulti
	}
	request := []uint32{MsgUpdateXcastMode, other}
	return []family.Message{
		{Name: "UPDATE_XCAST_MODE", Words: request, Check: acknowledges(request)},
		replayMode("UPDATE_XCAST_MODE", MsgUpdateXcastMode, m),
	}
}

// acknowledges returns the check that a request was acknowledged, as it was
// on the source.
func acknowledges(request []uint32) func([]uint32) error {
	return func(reply []uint32) error {
		acked, err := intel.Verdict(request, reply)
		if err != nil {
			return err
		}
		if !acked {
			return fmt.Errorf("the PF refuses (%#010x) what the PF of the source granted", reply[0])
		}
		return nil
	}
}

// answered returns the check that a request was granted or refused.
func answered(request []uint32) func([]uint32) error {
	return func(reply []uint32) error {
		_, err := intel.Verdict(request, reply)
		return err
	}
}

// refuses returns the check that a request was refused, as it was on the
// source.
func refuses(request []uint32) func([]uint32) error {
	return func(reply []uint32) error {
		acked, err := intel.Verdict(request, reply)
		if err != nil {
			return err
		}
		if acked {
			return fmt.Errorf("the PF grants (%#010x) what the PF of the source refused", reply[0])
		}
		return nil
	}
}

// multicastWords packs a list of hashes into a message.
func multicastWords(hashes []uint16) []uint32 {
	words := slices.Repeat([]uint32{0}, MailboxWords)
	words[0] = MsgSetMulticast | uint32(len(hashes))<<MsgInfoShift
	for i, h := range hashes {
		words[1+i/2] |= uint32(h) << (16 * (i % 2))
	}
	return words
}
