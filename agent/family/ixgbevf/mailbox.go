package ixgbevf

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
