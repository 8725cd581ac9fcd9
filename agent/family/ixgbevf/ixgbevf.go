// Package ixgbevf describes the virtual functions of the Intel 82599, and of
// its successors with the same layout, as the Linux ixgbevf driver and DPDK
// see them: the registers of the 16 KiB BAR0, the class of the state behind
// each, and the mailbox dialect spoken with the ixgbe PF driver.
//
// Names are those of the 82599 datasheet and of the driver's headers
// (drivers/net/ethernet/intel/ixgbevf/{regs.h,mbx.h}). What is said about
// behaviour comes from those drivers, from the 82599 specification update, and
// from the ixgbe PF driver; where silicon was never observed, the comment says
// so.
package ixgbevf

// Name is the name of the family.
const Name = "ixgbevf"

// VendorID and DeviceID identify an 82599 VF. Its own configuration space
// reads all ones there: the operating system takes them from the SR-IOV
// capability of the PF. The others are the members of the family that share
// its layout; see Members.
const (
	VendorID        = 0x8086
	DeviceID        = 0x10ed
	DeviceIDX540    = 0x1515
	DeviceIDX550    = 0x1565
	DeviceIDX550EMX = 0x15a8
	DeviceIDX550EMA = 0x15c5
)

// Limits of the device.
const (
	// BARSize is the size of BAR0 in bytes.
	BARSize = 0x4000
	// MSIXVectors is the size of the MSI-X table in BAR3.
	MSIXVectors = 3
	// MaxQueuePairs is the number of queue pairs that BAR0 has room for. How
	// many a VF really has depends on the mode of the PF: 8, 4 or 2 with 16,
	// 32 or 64 pools.
	MaxQueuePairs = 8
	// DefaultQueuePairs is what a PF with 64 pools gives each VF, the mode in
	// which the Linux driver runs with more than 31 VFs or without RSS in VFs.
	DefaultQueuePairs = 2
	// queueStride is the distance between the blocks of two queues.
	queueStride = 0x40
)

// Control, status and interrupt registers (page 0 of BAR0).
const (
	VFCTRL     = 0x0000 // reset of the VF
	VFSTATUS   = 0x0008 // alias of the PF's STATUS; read to flush posted writes
	VFLINKS    = 0x0010 // link state and speed, alias of the PF's LINKS
	VFFRTIMER  = 0x0048 // free running timer of the whole device
	VTEICR     = 0x0100 // interrupt causes, read-clear
	VTEICS     = 0x0104 // sets causes
	VTEIMS     = 0x0108 // sets the mask of enabled vectors; reads the mask
	VTEIMC     = 0x010c // clears the mask of enabled vectors
	VTEIAC     = 0x0110 // causes cleared by sending their message
	VTEIAM     = 0x0114 // vectors masked when their cause is set or cleared
	VTIVARMisc = 0x0140 // vector of the mailbox cause (VTIVAR_MISC)
	VFMBMEM    = 0x0200 // mailbox memory, MailboxWords dwords
	VFMAILBOX  = 0x02fc // mailbox control
	VFPSRTYPE  = 0x0300 // packet split types and queues used for RSS
	// VFRXMEMWRAP is an alias of the PF's RXMEMWRAP.
	VFRXMEMWRAP = 0x3190
	// VFMRQC turns on RSS by the VF's own key and table; X550 and later.
	VFMRQC = 0x3000
)

// Statistics. They sit inside the blocks of queue 0 but count for the whole
// VF; read-only, wrapping, cleared by nothing a VF can do.
const (
	VFGPRC    = 0x101c // good packets received, 32 bits
	VFGORCLSB = 0x1020 // good octets received, low 32 of 36 bits
	VFGORCMSB = 0x1024 // good octets received, high 4 of 36 bits
	VFMPRC    = 0x1034 // multicast packets received, 32 bits
	VFGPTC    = 0x201c // good packets sent, 32 bits
	VFGOTCLSB = 0x2020 // good octets sent, low 32 of 36 bits
	VFGOTCMSB = 0x2024 // good octets sent, high 4 of 36 bits
)

// VTIVAR is the offset of the vector assignment of queue pairs 2n and 2n+1,
// n = 0..3: one byte each for rx 2n, tx 2n, rx 2n+1, tx 2n+1.
func VTIVAR(n int) uint32 { return 0x0120 + 4*uint32(n) }

// VTRSCINT is the offset of the receive-side coalescing interrupt delay n.
func VTRSCINT(n int) uint32 { return 0x0180 + 4*uint32(n) }

// VTEITR is the offset of the interrupt throttle of vector n.
func VTEITR(n int) uint32 { return 0x0820 + 4*uint32(n) }

// VFRSSRK is the offset of dword n = 0..9 of the VF's own RSS key; X550 and
// later.
func VFRSSRK(n int) uint32 { return 0x3100 + 4*uint32(n) }

// VFRETA is the offset of dword n = 0..15 of the VF's own redirection table, a
// byte for each entry; X550 and later.
func VFRETA(n int) uint32 { return 0x3200 + 4*uint32(n) }

func rx(inner uint32, n int) uint32 { return 0x1000 + inner + queueStride*uint32(n) }

func tx(inner uint32, n int) uint32 { return 0x2000 + inner + queueStride*uint32(n) }

// VFRDBAL is the offset of the low half of receive ring n's base address.
func VFRDBAL(n int) uint32 { return rx(0x00, n) }

// VFRDBAH is the offset of the high half of receive ring n's base address.
func VFRDBAH(n int) uint32 { return rx(0x04, n) }

// VFRDLEN is the offset of receive ring n's length in bytes.
func VFRDLEN(n int) uint32 { return rx(0x08, n) }

// VFDCARXCTRL is the offset of receive queue n's VFDCA_RXCTRL.
func VFDCARXCTRL(n int) uint32 { return rx(0x0c, n) }

// VFRDH is the offset of receive ring n's head.
func VFRDH(n int) uint32 { return rx(0x10, n) }

// VFSRRCTL is the offset of receive queue n's split and replication control.
func VFSRRCTL(n int) uint32 { return rx(0x14, n) }

// VFRDT is the offset of receive ring n's tail.
func VFRDT(n int) uint32 { return rx(0x18, n) }

// VFRXDCTL is the offset of receive queue n's control.
func VFRXDCTL(n int) uint32 { return rx(0x28, n) }

// VFRSCCTL is the offset of receive queue n's coalescing control.
func VFRSCCTL(n int) uint32 { return rx(0x2c, n) }

// VFTDBAL is the offset of the low half of transmit ring n's base address.
func VFTDBAL(n int) uint32 { return tx(0x00, n) }

// VFTDBAH is the offset of the high half of transmit ring n's base address.
func VFTDBAH(n int) uint32 { return tx(0x04, n) }

// VFTDLEN is the offset of transmit ring n's length in bytes.
func VFTDLEN(n int) uint32 { return tx(0x08, n) }

// VFDCATXCTRL is the offset of transmit queue n's VFDCA_TXCTRL.
func VFDCATXCTRL(n int) uint32 { return tx(0x0c, n) }

// VFTDH is the offset of transmit ring n's head.
func VFTDH(n int) uint32 { return tx(0x10, n) }

// VFTDT is the offset of transmit ring n's tail.
func VFTDT(n int) uint32 { return tx(0x18, n) }

// VFTXDCTL is the offset of transmit queue n's control.
func VFTXDCTL(n int) uint32 { return tx(0x28, n) }

// VFTDWBAL is the offset of the low half of transmit queue n's head
// write-back address; bit 0 enables it.
func VFTDWBAL(n int) uint32 { return tx(0x38, n) }

// VFTDWBAH is the offset of the high half of transmit queue n's head
// write-back address.
func VFTDWBAH(n int) uint32 { return tx(0x3c, n) }

// Bits of the registers.
const (
	// CtrlRST in VFCTRL resets the VF; it clears itself.
	CtrlRST = 1 << 26
	// LinksUp in VFLINKS: the link is up.
	LinksUp = 1 << 30
	// LinksSpeedMask in VFLINKS selects one of the LinksSpeed values.
	LinksSpeedMask = 3 << 28
	// LinksSpeed10G, LinksSpeed1G and LinksSpeed100M are the speeds.
	LinksSpeed10G  = 3 << 28
	LinksSpeed1G   = 2 << 28
	LinksSpeed100M = 1 << 28
	// VectorMask has a bit for every vector in VTEICR and its kin.
	VectorMask = 1<<MSIXVectors - 1
	// IVARValid marks a byte of VTIVAR and VTIVAR_MISC as in use.
	IVARValid = 0x80
	// IVARVector masks the vector number in such a byte.
	IVARVector = 0x03
	// EITRCountWDis in VTEITR leaves the running countdown alone; it modifies
	// the write and is not stored.
	EITRCountWDis = 1 << 31
	// EITRInterval masks the interval in VTEITR.
	EITRInterval = 0xff8
	// QueueEnable in VFRXDCTL and VFTXDCTL: on write the wish, on read the
	// state.
	QueueEnable = 1 << 25
	// QueueFlush in VFRXDCTL and VFTXDCTL writes pending descriptors back; it
	// clears itself.
	QueueFlush = 1 << 26
	// RXDCTLLength in VFRXDCTL masks the largest packet that the queue takes,
	// with FCS but without a VLAN tag, if RXDCTLLengthEnable is set; X540 and
	// later.
	RXDCTLLength       = 0x3fff
	RXDCTLLengthEnable = 1 << 15
	// MRQCEnable in VFMRQC turns RSS on.
	MRQCEnable = 1
	// RSSKeyWords and RSSTableWords are the dwords of VFRSSRK and VFRETA.
	RSSKeyWords   = 10
	RSSTableWords = 16
	// RXDCTLVME in VFRXDCTL strips VLAN tags.
	RXDCTLVME = 1 << 30
	// RSCCTLEnable in VFRSCCTL turns receive-side coalescing on.
	RSCCTLEnable = 1
	// TDWBALEnable in VFTDWBAL turns head write-back on.
	TDWBALEnable = 1
)

// Values that survive nothing but power-on, for a model of the silicon.
const (
	// DCARXDefault and DCATXDefault are VFDCA_RXCTRL and VFDCA_TXCTRL after
	// power-on: the relaxed ordering bits.
	DCARXDefault = 0xa200
	DCATXDefault = 0x2a00
	// SRRCTLDefault is VFSRRCTL after power-on: 2 KiB packet buffers and 256
	// byte header buffers.
	SRRCTLDefault = 0x402
)
