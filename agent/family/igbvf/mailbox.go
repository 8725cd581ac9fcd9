package igbvf

import "compsc.io/compsc/agent/family/intel"

// The mailbox of Intel's VFs, as intel describes it.
const (
	MailboxWords     = intel.MailboxWords
	MailboxREQ       = intel.MailboxREQ
	MailboxACK       = intel.MailboxACK
	MailboxVFU       = intel.MailboxVFU
	MailboxPFU       = intel.MailboxPFU
	MailboxPFSTS     = intel.MailboxPFSTS
	MailboxPFACK     = intel.MailboxPFACK
	MailboxRSTI      = intel.MailboxRSTI
	MailboxRSTD      = intel.MailboxRSTD
	MailboxReadClear = intel.MailboxReadClear
	MsgIDMask        = intel.MsgIDMask
	MsgInfoShift     = intel.MsgInfoShift
	MsgInfoMask      = intel.MsgInfoMask
	MsgACK           = intel.MsgACK
	MsgNACK          = intel.MsgNACK
	MsgCTS           = intel.MsgCTS
	MsgPFControl     = intel.MsgPFControl
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
