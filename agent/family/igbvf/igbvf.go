// Package igbvf describes the virtual functions of the Intel 82576 and I350,
// as the Linux igbvf driver and DPDK see them: the registers of the 16 KiB
// BAR0, the class of the state behind each, and the mailbox dialect spoken
// with the igb PF driver.
//
// Names are those of the driver's headers
// (drivers/net/ethernet/intel/igbvf/{regs.h,defines.h,mbx.h}) and, for
// registers that the driver does not use, of the 82576 datasheet. What is said
// about behaviour comes from these drivers, from the igb PF driver, and from
// QEMU's igb, which emulates the 82576; silicon was not observed.
//
// The PF has the blocks of all queues at 0xc000 (receive) and 0xe000
// (transmit), with those of queues 0 to 3 also at 0x2800 and 0x3800; a VF has
// only the latter places. Its CTRL is also at 0x0004, which no driver uses and
// which is left out here, as a guest's reset must not go unseen.
package igbvf

// Name is the name of the family.
const Name = "igbvf"

// VendorID and DeviceID identify an 82576 VF, DeviceIDI350 an I350 VF. A VF's
// own configuration space reads all ones there: the operating system takes
// them from the SR-IOV capability of the PF.
const (
	VendorID     = 0x8086
	DeviceID     = 0x10ca
	DeviceIDI350 = 0x1520
)

// Limits of the device.
const (
	// BARSize is the size of BAR0 in bytes.
	BARSize = 0x4000
	// MSIXVectors is the size of the MSI-X table in BAR3.
	MSIXVectors = 3
	// MaxQueuePairs is the number of queue pairs of an 82576 VF. Linux's
	// driver uses one, which is all that an I350 VF has.
	MaxQueuePairs = 2
	// queueStride is the distance between the blocks of two queues.
	queueStride = 0x100
)

// Control, mailbox and statistics registers (page 0 of BAR0). The counters are
// 32 bits wide, read-only, wrapping, and cleared by nothing a VF can do.
const (
	CTRL       = 0x0000 // reset of the VF
	STATUS     = 0x0008 // link state and speed, alias of the PF's STATUS
	VMBMEM     = 0x0800 // mailbox memory, MailboxWords dwords
	V2PMAILBOX = 0x0c40 // mailbox control
	PBACL      = 0x0f04 // clears pending bits of MSI-X
	PSRTYPE    = 0x0f0c // packet split types and queues used for RSS
	VFGPRC     = 0x0f10 // good packets received
	VFGPTC     = 0x0f14 // good packets sent
	VFGORC     = 0x0f18 // good octets received
	VFGOTC     = 0x0f34 // good octets sent
	VFMPRC     = 0x0f3c // multicast packets received
	VFGPRLBC   = 0x0f40 // good packets received that were looped back
	VFGPTLBC   = 0x0f44 // good packets sent that were looped back
	VFGORLBC   = 0x0f48 // good octets received that were looped back
	VFGOTLBC   = 0x0f50 // good octets sent that were looped back
)

// Interrupt registers (page 1), and the packet buffers' wrap counters.
const (
	FRTIMER  = 0x1048 // free running timer of the whole device
	EICS     = 0x1520 // sets causes
	EIMS     = 0x1524 // sets the mask of enabled vectors
	EIMC     = 0x1528 // clears the mask of enabled vectors
	EIAC     = 0x152c // causes cleared by sending their message
	EIAM     = 0x1530 // vectors masked when their cause is set or cleared
	EICR     = 0x1580 // interrupt causes, read-clear
	IVAR0    = 0x1700 // vectors of the queues, a byte each: rx 0, tx 0, rx 1, tx 1
	IVARMisc = 0x1740 // vector of the mailbox cause (IVAR_MISC)
	PBRWAC   = 0x24e8 // receive packet buffer wrap around counter, alias of the PF's
	PBTWAC   = 0x34e8 // transmit packet buffer wrap around counter, alias of the PF's
)

// EITR is the offset of the interrupt throttle of vector n = 0..2.
func EITR(n int) uint32 { return 0x1680 + 4*uint32(n) }

func rx(inner uint32, n int) uint32 { return 0x2800 + inner + queueStride*uint32(n) }
func tx(inner uint32, n int) uint32 { return 0x3800 + inner + queueStride*uint32(n) }

// RDBAL is the offset of the low half of receive ring n's base address.
func RDBAL(n int) uint32 { return rx(0x00, n) }

// RDBAH is the offset of the high half of receive ring n's base address.
func RDBAH(n int) uint32 { return rx(0x04, n) }

// RDLEN is the offset of receive ring n's length in bytes.
func RDLEN(n int) uint32 { return rx(0x08, n) }

// SRRCTL is the offset of receive queue n's split and replication control.
func SRRCTL(n int) uint32 { return rx(0x0c, n) }

// RDH is the offset of receive ring n's head.
func RDH(n int) uint32 { return rx(0x10, n) }

// DCARXCTRL is the offset of receive queue n's DCA_RXCTRL.
func DCARXCTRL(n int) uint32 { return rx(0x14, n) }

// RDT is the offset of receive ring n's tail.
func RDT(n int) uint32 { return rx(0x18, n) }

// RXDCTL is the offset of receive queue n's control.
func RXDCTL(n int) uint32 { return rx(0x28, n) }

// RQDPC is the offset of receive queue n's count of packets dropped for want
// of descriptors. A read clears it.
func RQDPC(n int) uint32 { return rx(0x30, n) }

// TDBAL is the offset of the low half of transmit ring n's base address.
func TDBAL(n int) uint32 { return tx(0x00, n) }

// TDBAH is the offset of the high half of transmit ring n's base address.
func TDBAH(n int) uint32 { return tx(0x04, n) }

// TDLEN is the offset of transmit ring n's length in bytes.
func TDLEN(n int) uint32 { return tx(0x08, n) }

// TDH is the offset of transmit ring n's head.
func TDH(n int) uint32 { return tx(0x10, n) }

// DCATXCTRL is the offset of transmit queue n's DCA_TXCTRL.
func DCATXCTRL(n int) uint32 { return tx(0x14, n) }

// TDT is the offset of transmit ring n's tail.
func TDT(n int) uint32 { return tx(0x18, n) }

// TXDCTL is the offset of transmit queue n's control.
func TXDCTL(n int) uint32 { return tx(0x28, n) }

// TDWBAL is the offset of the low half of transmit queue n's head write-back
// address; bit 0 enables it.
func TDWBAL(n int) uint32 { return tx(0x38, n) }

// TDWBAH is the offset of the high half of transmit queue n's head write-back
// address.
func TDWBAH(n int) uint32 { return tx(0x3c, n) }

// Bits of the registers.
const (
	// StatusLU in STATUS: the link is up.
	StatusLU = 1 << 1
	// CtrlRST in CTRL resets the VF; it clears itself.
	CtrlRST = 1 << 26
	// StatusLinkUp in STATUS: the link is up.
	StatusLinkUp = 1 << 1
	// VectorMask has a bit for every vector in EICR and its kin.
	VectorMask = 1<<MSIXVectors - 1
	// IVARValid marks a byte of IVAR0 and IVAR_MISC as in use.
	IVARValid = 0x80
	// IVARVector masks the vector number in such a byte.
	IVARVector = 0x03
	// EITRCountIgnore in EITR leaves the running countdown alone; it modifies
	// the write and is not stored (E1000_EITR_CNT_IGNR).
	EITRCountIgnore = 1 << 31
	// QueueEnable in RXDCTL and TXDCTL: on write the wish, on read the state.
	QueueEnable = 1 << 25
	// QueueFlush in RXDCTL and TXDCTL writes pending descriptors back; it
	// clears itself.
	QueueFlush = 1 << 26
	// SRRCTLDropEnable in SRRCTL drops packets when there are no descriptors.
	SRRCTLDropEnable = 1 << 31
	// SRRCTLTimestamp in SRRCTL puts a time stamp in front of packets; I350.
	SRRCTLTimestamp = 1 << 30
	// TDWBALEnable in TDWBAL turns head write-back on.
	TDWBALEnable = 1
)
