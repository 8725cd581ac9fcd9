package igbvf

import (
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Masks of the bits that software can write. Where the datasheet's text was
// not at hand they are the bits that the Linux drivers and DPDK name.
const (
	maskIVARMisc  = IVARValid | IVARVector
	maskIVARQueue = maskIVARMisc * 0x0101        // receive and transmit of a pair
	maskEITR      = 0x0000fffc | EITRCountIgnore // interval 14:2, low latency 15
	maskPSRTYPE   = 0xe007fffe                   // header types 18:1, RQPL 31:29
	maskBAL       = 0xffffff80                   // rings start at multiples of 128 bytes
	maskLEN       = 0x000fff80                   // and hold multiples of 8 descriptors
	maskIndex     = 0x0000ffff
	// maskDCA drops the DCA enables (7:5) and the CPU id (31:24), which name
	// a processor of the host.
	maskDCA = 0x00ffff1f
	// maskSRRCTL: BSIZEPACKET 6:0, BSIZEHEADER 13:8, RDMTS 24:20, DESCTYPE
	// 27:25, DROP_EN 31.
	maskSRRCTL = 0x0ff03f7f | SRRCTLDropEnable
	// maskCtl: PTHRESH 4:0, HTHRESH 12:8, WTHRESH 20:16.
	maskCtl = 0x001f1f1f | QueueEnable | QueueFlush
	maskAll = 0xffffffff
)

// Reasons that many registers share.
const (
	whySetting = "set by the driver only, and nothing else remembers it"
	whyRing    = "set by the driver only; must be written while the queue is off"
	whyHead    = "the device's own position: read once the queue is off, written and verified before it is on again"
	whyTail    = "doorbell: as the head until the queue is on, its own value then, for that starts the queue"
	whyCounter = "cannot be written, and is cleared by nothing a VF can do: the guest is shown hardware plus offset"
	whyAlias   = "alias of a register of the PF: the target's own value is the right one"
	whyAfter   = "set by the driver only; after the replay, for a PF may zero it with the RESET"
	whyCtl     = "written without ENABLE first, then with it and polled"
	whyDCA     = "relaxed ordering moves; DCA enables and CPU id belong to the host"
	whyDropped = "a read clears it: what the guest has not read yet is added to what the target counts"
)

// controlRegisters lists pages 0 and 1, and what pages 2 and 3 have besides
// queues. Each queue pair has two bytes in IVAR0.
func controlRegisters(queuePairs int) []family.Register {
	r := []family.Register{
		{Name: "CTRL", Offset: CTRL, Access: family.WO, Class: family.Replay, Mask: CtrlRST,
			Why: "only the self-clearing RST does anything; the restore starts with it"},
		{Name: "STATUS", Offset: STATUS, Access: family.RO, Class: family.Skip, Why: whyAlias},
		{Name: "V2PMAILBOX", Offset: V2PMAILBOX, Access: family.RW | family.ReadClears, Class: family.Replay,
			Mask: MailboxREQ | MailboxACK | MailboxVFU,
			Why:  "operations, not state: the messages sent through it are recorded and sent again"},
		{Name: "PBACL", Offset: PBACL, Access: family.WriteOneClears, Class: family.Skip, Mask: VectorMask,
			Why: "clears pending bits of the table that the host owns; causes are raised again"},
		{Name: "PSRTYPE", Offset: PSRTYPE, Access: family.RW, Class: family.Copy, Mask: maskPSRTYPE, Why: whySetting},
		{Name: "FRTIMER", Offset: FRTIMER, Access: family.RO, Class: family.Skip, Why: whyAlias},
		{Name: "EICS", Offset: EICS, Access: family.WriteOneSets, Class: family.Replay, Mask: VectorMask,
			Why: "the tool that raises the causes again"},
		{Name: "EIMS", Offset: EIMS, Access: family.Readable | family.WriteOneSets, Class: family.Copy, Mask: VectorMask,
			Why: "the mask of enabled vectors, as the guest set it: cleared through EIMC first, written last of all"},
		{Name: "EIMC", Offset: EIMC, Access: family.WriteOneClears, Class: family.Skip, Mask: VectorMask,
			Why: "the tool that clears EIMS; no state of its own"},
		{Name: "EIAC", Offset: EIAC, Access: family.RW, Class: family.Copy, Mask: VectorMask, Why: whySetting},
		{Name: "EIAM", Offset: EIAM, Access: family.RW, Class: family.Copy, Mask: VectorMask, Why: whySetting},
		{Name: "EICR", Offset: EICR, Access: family.Readable | family.ReadClears | family.WriteOneClears,
			Class: family.Derive, Mask: VectorMask,
			Why: "a read destroys it: read once after the quiesce, and raised again through EICS"},
		{Name: "IVAR0", Offset: IVAR0, Access: family.RW, Class: family.Copy,
			Mask: uint32(1<<(16*queuePairs)-1) & (maskIVARQueue * 0x10001), Why: whySetting},
		{Name: "IVAR_MISC", Offset: IVARMisc, Access: family.RW, Class: family.Copy, Mask: maskIVARMisc, Why: whySetting},
		{Name: "PBRWAC", Offset: PBRWAC, Access: family.RO, Class: family.Skip, Why: whyAlias},
		{Name: "PBTWAC", Offset: PBTWAC, Access: family.RO, Class: family.Skip, Why: whyAlias},
	}
	for _, c := range counters() {
		r = append(r, family.Register{Name: c.Name, Offset: c.Low, Access: family.RO, Class: family.Emulate, Why: whyCounter})
	}
	for n := range MSIXVectors {
		r = append(r, family.Register{Name: fmt.Sprintf("EITR(%d)", n), Offset: EITR(n),
			Access: family.RW, Class: family.Copy, Mask: maskEITR, Modifier: EITRCountIgnore,
			Why: "set by the driver only; the running countdown is lost, which costs one interval at most"})
	}
	for n := range MailboxWords {
		r = append(r, family.Register{Name: fmt.Sprintf("VMBMEM(%d)", n), Offset: VMBMEM + 4*uint32(n),
			Access: family.RW, Class: family.Skip, Mask: maskAll,
			Why: "shared with the PF; of an open transaction the body is shown again"})
	}
	return r
}

// counters lists the statistics of the whole VF.
func counters() []family.Counter {
	return []family.Counter{
		{Name: "VFGPRC", Low: VFGPRC, Width: 32, Frames: true},
		{Name: "VFGPTC", Low: VFGPTC, Width: 32, Frames: true},
		{Name: "VFGORC", Low: VFGORC, Width: 32},
		{Name: "VFGOTC", Low: VFGOTC, Width: 32},
		{Name: "VFMPRC", Low: VFMPRC, Width: 32},
		{Name: "VFGPRLBC", Low: VFGPRLBC, Width: 32},
		{Name: "VFGPTLBC", Low: VFGPTLBC, Width: 32},
		{Name: "VFGORLBC", Low: VFGORLBC, Width: 32},
		{Name: "VFGOTLBC", Low: VFGOTLBC, Width: 32},
	}
}

// droppedWidth is the number of bits of RQDPC that count (igb_main.c,
// igb_update_stats).
const droppedWidth = 12

// dropped is the counter RQDPC of receive queue n.
func dropped(n int) family.Counter {
	return family.Counter{Name: fmt.Sprintf("RQDPC(%d)", n), Low: RQDPC(n), Width: droppedWidth, ReadClears: true}
}

// receiveRegisters lists the block of receive queue n on page 2. Members
// differ in what SRRCTL has.
func receiveRegisters(n int, maskSRRCTL uint32) []family.Register {
	name := func(s string) string { return fmt.Sprintf("%s(%d)", s, n) }
	return []family.Register{
		{Name: name("RDBAL"), Offset: RDBAL(n), Access: family.RW, Class: family.Copy, Mask: maskBAL, Why: whyRing},
		{Name: name("RDBAH"), Offset: RDBAH(n), Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whyRing},
		{Name: name("RDLEN"), Offset: RDLEN(n), Access: family.RW, Class: family.Copy, Mask: maskLEN, Why: whyRing},
		{Name: name("SRRCTL"), Offset: SRRCTL(n), Access: family.RW, Class: family.Copy, Mask: maskSRRCTL, Why: whyRing},
		{Name: name("RDH"), Offset: RDH(n), Access: family.RW, Class: family.Derive, Mask: maskIndex, Why: whyHead},
		{Name: name("DCA_RXCTRL"), Offset: DCARXCTRL(n), Access: family.RW, Class: family.Copy, Mask: maskDCA, Why: whyDCA},
		{Name: name("RDT"), Offset: RDT(n), Access: family.RW, Class: family.Copy, Mask: maskIndex, Why: whyTail},
		{Name: name("RXDCTL"), Offset: RXDCTL(n), Access: family.RW, Class: family.Copy, Mask: maskCtl, Why: whyCtl},
		{Name: name("RQDPC"), Offset: RQDPC(n), Access: family.Readable | family.ReadClears, Class: family.Emulate, Why: whyDropped},
	}
}

// transmitRegisters lists the block of transmit queue n on page 3.
func transmitRegisters(n int) []family.Register {
	name := func(s string) string { return fmt.Sprintf("%s(%d)", s, n) }
	return []family.Register{
		{Name: name("TDBAL"), Offset: TDBAL(n), Access: family.RW, Class: family.Copy, Mask: maskBAL, Why: whyRing},
		{Name: name("TDBAH"), Offset: TDBAH(n), Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whyRing},
		{Name: name("TDLEN"), Offset: TDLEN(n), Access: family.RW, Class: family.Copy, Mask: maskLEN, Why: whyRing},
		{Name: name("TDH"), Offset: TDH(n), Access: family.RW, Class: family.Derive, Mask: maskIndex, Why: whyHead},
		{Name: name("DCA_TXCTRL"), Offset: DCATXCTRL(n), Access: family.RW, Class: family.Copy, Mask: maskDCA, Why: whyDCA},
		{Name: name("TDT"), Offset: TDT(n), Access: family.RW, Class: family.Copy, Mask: maskIndex, Why: whyTail},
		{Name: name("TXDCTL"), Offset: TXDCTL(n), Access: family.RW, Class: family.Copy, Mask: maskCtl, Why: whyCtl},
		{Name: name("TDWBAL"), Offset: TDWBAL(n), Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whyAfter},
		{Name: name("TDWBAH"), Offset: TDWBAH(n), Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whyAfter},
	}
}
