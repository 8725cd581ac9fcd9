package ixgbevf

// MailboxWords is the length of the mailbox memory in dwords.
const MailboxWords = 16

// Bits of VFMAILBOX. "VF" and "PF" tell who sets the bit.
const (
	MailboxREQ   = 1 << 0 // VF: a message is in the memory
	MailboxACK   = 1 << 1 // VF: the PF's message was read
	MailboxVFU   = 1 << 2 // VF: owns the memory
	MailboxPFU   = 1 << 3 // PF: owns the memory
	MailboxPFSTS = 1 << 4 // PF: a message is in the memory; read-clear
	MailboxPFACK = 1 << 5 // PF: the VF's message was read; read-clear
	MailboxRSTI  = 1 << 6 // PF: a reset is in progress
	MailboxRSTD  = 1 << 7 // PF: a reset is done; read-clear
	// MailboxReadClear has the bits that a read of VFMAILBOX clears.
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

// Message ids (drivers/net/ethernet/intel/ixgbevf/mbx.h).
const (
	MsgReset             = 0x01 // word 0; reply: MAC in words 1-2, MO in word 3
	MsgSetMAC            = 0x02 // MAC in words 1-2
	MsgSetMulticast      = 0x03 // MSGINFO hashes, 16 bits each, from word 1
	MsgSetVLAN           = 0x04 // MSGINFO 1 adds, 0 removes; VLAN id in word 1
	MsgSetLPE            = 0x05 // largest frame in word 1
	MsgSetMACVLAN        = 0x06 // MSGINFO 0 clears, 1 starts a list, >1 adds
	MsgAPINegotiate      = 0x08 // API code in word 1
	MsgGetQueues         = 0x09 // reply: tx, rx, TCs, default queue
	MsgGetRETA           = 0x0a // reply: redirection table
	MsgGetRSSKey         = 0x0b // reply: hash key
	MsgUpdateXcastMode   = 0x0c // mode in word 1; reply: mode granted
	MsgIPsecAdd          = 0x0d // security association
	MsgIPsecDel          = 0x0e // index of a security association
	MsgGetLinkState      = 0x10 // reply: administrative link state
	MsgGetPFLinkState    = 0x11 // reply: speed and link, E610 only
	MsgFeaturesNegotiate = 0x12 // features in word 1; reply: features granted
)

// Codes of mailbox API versions, in word 1 of MsgAPINegotiate.
const (
	API10 = 0
	API20 = 1 // Solaris; no PF driver for Linux accepts it
	API11 = 2
	API12 = 3
	API13 = 4
	API14 = 5
	API15 = 6
	API16 = 7
	API17 = 8
)

// Modes in word 1 of MsgUpdateXcastMode.
const (
	XcastNone     = 0
	XcastMulti    = 1
	XcastAllMulti = 2
	XcastPromisc  = 3
)

// Features in word 1 of MsgFeaturesNegotiate.
const (
	FeatureIPsec = 1 << 0
	FeatureESX   = 1 << 1
)

// MaxMulticast is the number of hashes that one MsgSetMulticast can carry.
const MaxMulticast = 30

// MulticastHashBits is the number of bits of one multicast hash.
const MulticastHashBits = 12
