package igbvf

// MailboxWords is the length of the mailbox memory in dwords.
const MailboxWords = 16

// Bits of V2PMAILBOX. "VF" and "PF" tell who sets the bit.
const (
	MailboxREQ   = 1 << 0 // VF: a message is in the memory
	MailboxACK   = 1 << 1 // VF: the PF's message was read
	MailboxVFU   = 1 << 2 // VF: owns the memory
	MailboxPFU   = 1 << 3 // PF: owns the memory
	MailboxPFSTS = 1 << 4 // PF: a message is in the memory; read-clear
	MailboxPFACK = 1 << 5 // PF: the VF's message was read; read-clear
	MailboxRSTI  = 1 << 6 // PF: it is being reset
	MailboxRSTD  = 1 << 7 // PF: its reset is done; read-clear
	// MailboxReadClear has the bits that a read of V2PMAILBOX clears.
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

// Message ids (drivers/net/ethernet/intel/igbvf/mbx.h and igb/e1000_mbx.h).
// There is no negotiation of a version. A reply has one word, but for RESET's.
const (
	MsgReset        = 0x01 // word 0; reply: MAC in words 1-2
	MsgSetMAC       = 0x02 // MAC in words 1-2; MSGINFO one of the MAC constants
	MsgSetMulticast = 0x03 // MSGINFO hashes, 16 bits each, from word 1
	MsgSetVLAN      = 0x04 // MSGINFO 1 adds, 0 removes; VLAN id in word 1
	MsgSetLPE       = 0x05 // largest frame in word 1
	MsgSetPromisc   = 0x06 // MSGINFO some of the Promisc constants
)

// MSGINFO of MsgSetMAC.
const (
	MACAddress     = 0 // the VF's own address
	MACFilterClear = 1 // removes all further unicast addresses
	MACFilterAdd   = 2 // adds a further unicast address
)

// MSGINFO of MsgSetPromisc: bits that combine. Linux's PF driver refuses the
// first, and does as the rest says all the same.
const (
	PromiscUnicast   = 1
	PromiscMulticast = 2
)

// MaxMulticast is the number of hashes that one MsgSetMulticast can carry. A
// count above it tells the PF that there are more, and to let all multicast
// packets through.
const MaxMulticast = 30
