package igbvf

import (
	"errors"
	"fmt"
	"slices"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/intel"
)

// resetName names the reset of a VF by its reset bit among messages.
const resetName = "CTRL.RST"

// Replay lists the messages that bring the PF of a VF that was just reset to
// the recorded state. Without a RESET it answers nothing. If the guest has
// reset the VF and completed no RESET since, what the PF keeps is all.
func (l *Log) Replay() []family.Message {
	kept := l.replayKept()
	switch {
	case !l.ready && len(kept) == 0:
		return nil
	case !l.ready:
		return append(append(messages{anyVerdict("RESET", MsgReset)}, kept...), family.Message{Name: resetName})
	}
	list := append(l.replayAddress(), kept...)
	list = append(list, l.replayVLANs()...)
	if l.multicast != nil {
		list.add("SET_MULTICAST", l.multicastWords()...)
	}
	if l.promisc != nil {
		list = append(list, l.promisc.replay())
	}
	return list
}

// Release lists the messages that take back what a reset of the VF leaves in
// the PF: its address filter is cleared with the RESET message that follows a
// reset, and further addresses only if asked to. They would keep frames from
// the guest where it is now.
func (l *Log) Release() []family.Message {
	if !l.addressed && len(l.filters) == 0 && !l.overflow {
		return nil
	}
	list := messages{anyVerdict("RESET", MsgReset)}
	if len(l.filters) > 0 || l.overflow {
		list = append(list, anyVerdict("SET_MAC_ADDR, clear filters", clearFilters(l.mac)...))
	}
	return append(list, family.Message{Name: resetName})
}

// messages collects messages that must be acknowledged.
type messages []family.Message

func (m *messages) add(name string, words ...uint32) {
	*m = append(*m, family.Message{Name: name, Words: words, Check: acknowledges(words)})
}

// anyVerdict is a message whose reply does not matter.
func anyVerdict(name string, words ...uint32) family.Message {
	return family.Message{Name: name, Words: words, Check: func(reply []uint32) error {
		_, err := intel.Verdict(words, reply)
		return err
	}}
}

// replayAddress resets the VF and sets its address. A PF that had an address
// set by its administrator refuses to have it set again, even to the same one,
// unless it trusts the VF; but it tells it in the reply to the RESET.
func (l *Log) replayAddress() messages {
	var has *mac
	reset := []uint32{MsgReset}
	list := messages{{Name: "RESET", Words: reset, Check: func(reply []uint32) error {
		acked, err := intel.Verdict(reset, reply)
		switch _, want := minWords(MsgReset); {
		case err != nil:
			return err
		case len(reply) < want:
			return fmt.Errorf("reply has %d words, want %d", len(reply), want)
		case acked:
			has = intel.ReadMAC(reply[1:])
		}
		return nil
	}}}
	if l.mac == nil {
		return list
	}
	m := *l.mac
	low, high := intel.MACWords(m)
	set := []uint32{MsgSetMAC, low, high}
	return append(list, family.Message{Name: "SET_MAC_ADDR", Words: set, Check: func(reply []uint32) error {
		acked, err := intel.Verdict(set, reply)
		if err != nil || acked || has != nil && *has == m {
			return err
		}
		return errors.New("the PF refuses the guest's address: set it as the VF's on the PF, or trust the VF")
	}})
}

// clearFilters asks the PF to forget further addresses. It looks at the
// address in the message although it has no use for it: any valid one will do.
func clearFilters(m *mac) []uint32 {
	if m == nil {
		m = &mac{0x02, 0, 0, 0, 0, 1} // locally administered
	}
	low, high := intel.MACWords(*m)
	return []uint32{MsgSetMAC | MACFilterClear<<MsgInfoShift, low, high}
}

// replayKept has the PF do what no reset undoes.
func (l *Log) replayKept() (list messages) {
	if l.maxFrame != nil {
		list.add("SET_LPE", MsgSetLPE, *l.maxFrame)
	}
	if len(l.filters) > 0 {
		list.add("SET_MAC_ADDR, clear filters", clearFilters(l.mac)...)
	}
	for _, m := range l.filters {
		low, high := intel.MACWords(m)
		list.add("SET_MAC_ADDR, add filter", MsgSetMAC|MACFilterAdd<<MsgInfoShift, low, high)
	}
	return list
}

// replayVLANs adds the VLANs so that the last message leaves the stripping of
// tags as it was: off after one about VLAN 0, on after one about any other. If
// there is no other left, it is the removal of one that is not there.
func (l *Log) replayVLANs() (list messages) {
	if l.lastVLAN == nil {
		return nil
	}
	add := func(id uint16) { list.add("SET_VLAN", MsgSetVLAN|1<<MsgInfoShift, uint32(id)) }
	strip := *l.lastVLAN != 0
	ids := slices.Clone(l.vlans)
	if !strip && len(ids) > 0 && ids[0] == 0 {
		ids = append(ids[1:], 0)
	}
	for _, id := range ids {
		add(id)
	}
	if strip && (len(ids) == 0 || ids[len(ids)-1] == 0) {
		list.add("SET_VLAN", MsgSetVLAN, uint32(*l.lastVLAN))
	}
	return list
}

// multicastWords packs the list of hashes into a message.
func (l *Log) multicastWords() []uint32 {
	words := slices.Repeat([]uint32{0}, MailboxWords)
	words[0] = MsgSetMulticast | uint32(l.multicasts)<<MsgInfoShift
	for i, h := range l.multicast {
		words[1+i/2] |= uint32(h) << (16 * (i % 2))
	}
	return words
}

func (p promiscRequest) replay() family.Message {
	request := []uint32{MsgSetPromisc | uint32(p.modes)<<MsgInfoShift}
	return family.Message{Name: "SET_PROMISC", Words: request, Check: func(reply []uint32) error {
		acked, err := intel.Verdict(request, reply)
		if err == nil && acked != p.granted {
			err = fmt.Errorf("modes %#x are granted: %v, but were granted before: %v: use the same PF driver on both nodes", p.modes, acked, p.granted)
		}
		return err
	}}
}

// acknowledges returns the check that a request was acknowledged, as it was
// on the source.
func acknowledges(request []uint32) func([]uint32) error {
	return func(reply []uint32) error {
		acked, err := intel.Verdict(request, reply)
		if err == nil && !acked {
			err = fmt.Errorf("the PF refuses (%#010x) what the PF of the source granted: "+
				"it may be out of filters, or the VF has another trust or port VLAN there", reply[0])
		}
		return err
	}
}
