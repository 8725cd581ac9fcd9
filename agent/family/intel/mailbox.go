package intel

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// MailboxWords is the length of the mailbox memory in dwords.
const MailboxWords = 16

// Bits of the mailbox register. "VF" and "PF" tell who sets the bit.
const (
	MailboxREQ   = 1 << 0 // VF: a message is in the memory
	MailboxACK   = 1 << 1 // VF: the PF's message was read
	MailboxVFU   = 1 << 2 // VF: owns the memory
	MailboxPFU   = 1 << 3 // PF: owns the memory
	MailboxPFSTS = 1 << 4 // PF: a message is in the memory; read-clear
	MailboxPFACK = 1 << 5 // PF: the VF's message was read; read-clear
	MailboxRSTI  = 1 << 6 // PF: it is being reset
	MailboxRSTD  = 1 << 7 // PF: its reset is done; read-clear
	// MailboxReadClear has the bits that a read of the mailbox register clears.
	MailboxReadClear = MailboxPFSTS | MailboxPFACK | MailboxRSTD
)

// Word 0 of a message.
const (
	MsgIDMask    = 0xffff  // message id
	MsgInfoShift = 16      // MSGINFO, an argument of the message
	MsgInfoMask  = 0xff    // MSGINFO after the shift
	MsgACK       = 1 << 31 // reply: done
	MsgNACK      = 1 << 30 // reply: refused
	MsgCTS       = 1 << 29 // from the PF: the VF is clear to send messages
	MsgPFControl = 0x0100  // unsolicited message of the PF ("ping")
)

// MAC is an Ethernet address.
type MAC = [6]byte

// Verdict tells whether a reply acknowledges its request. It fails when the
// words are not a reply to that request.
func Verdict(request, reply []uint32) (acked bool, err error) {
	if len(request) == 0 || len(reply) == 0 {
		return false, errors.New("empty message")
	}
	if reply[0]&MsgIDMask != request[0]&MsgIDMask {
		return false, fmt.Errorf("reply %#010x does not belong to request %#010x", reply[0], request[0])
	}
	switch reply[0] & (MsgACK | MsgNACK) {
	case MsgACK:
		return true, nil
	case MsgNACK:
		return false, nil
	}
	return false, fmt.Errorf("reply %#010x neither acknowledges nor refuses", reply[0])
}

// ReadMAC reads an address from two words, of which there must be two, lowest
// byte first.
func ReadMAC(words []uint32) *MAC {
	var b [8]byte
	binary.LittleEndian.PutUint32(b[:], words[0])
	binary.LittleEndian.PutUint32(b[4:], words[1])
	return (*MAC)(b[:6])
}

// MACWords is the reverse of ReadMAC.
func MACWords(m MAC) (low, high uint32) {
	return binary.LittleEndian.Uint32(m[:4]), uint32(binary.LittleEndian.Uint16(m[4:]))
}

// Hashes reads so many multicast hashes, of 16 bits each, from words, or as many
// as there are.
func Hashes(count int, words []uint32) []uint16 {
	hashes := make([]uint16, min(count, 2*len(words)))
	for i := range hashes {
		hashes[i] = uint16(words[i/2] >> (16 * (i % 2)))
	}
	return hashes
}
