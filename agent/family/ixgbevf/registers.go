package ixgbevf

import (
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Masks of the bits that software can write. Where the datasheet's text was
// not at hand they are the bits that the Linux driver and DPDK name.
const (
	maskIVARMisc = IVARValid | IVARVector
	maskIVAR     = maskIVARMisc * 0x01010101
	maskEITR     = EITRInterval | EITRCountWDis
	maskPSRTYPE  = 0xe0001330 // RQPL 31:29; L2, IPv6, IPv4, UDP and TCP split
	maskBAL      = 0xffffff80 // rings start at multiples of 128 bytes
	maskLEN      = 0x000fff80 // and hold multiples of 8 descriptors
	maskIndex    = 0x0000ffff
	// maskDCA drops the DCA enables (7:5) and the CPU id (31:24), which name
	// a processor of the host, and bit 12, which must be 0: with it, data
	// received is garbage.
	maskDCA    = 0x00ffef1f
	maskSRRCTL = 0x1fc03f7f // BSIZEPKT 6:0, BSIZEHDR 13:8, RDMTS 24:22, DESCTYPE 27:25, DROP_EN 28
	maskRX     = QueueEnable | QueueFlush | RXDCTLVME
	maskRSCCTL = RSCCTLEnable | 0xc // MAXDESC 3:2
	maskTXDCTL = 0x007f7f7f | QueueEnable | QueueFlush
	maskMRQC   = 0x00ff0001 // RSSEN 0, what is hashed 23:16
	maskAll    = 0xffffffff
)

// Reasons that many registers share.
const (
	whySetting = "set by the driver only, and nothing else remembers it"
	whyRing    = "set by the driver only; must be written while the queue is off"
	whyHead    = "the device's own position: read once the queue is off, written and verified before it is on again"
	whyTail    = "doorbell: written last, once the queue is on, for the device may ignore it before"
	whyCounter = "cannot be written, and is cleared by nothing a VF can do: the guest is shown hardware plus offset"
	whyAlias   = "alias of a register of the PF: the target's own value is the right one"
)

// controlRegisters lists page 0, and what page 3 of an 82599 has.
func controlRegisters() []family.Register {
	r := []family.Register{
		{Name: "VFCTRL", Offset: VFCTRL, Access: family.WO, Class: family.Replay, Mask: CtrlRST,
			Why: "only the self-clearing RST does anything; the restore starts with it"},
		{Name: "VFSTATUS", Offset: VFSTATUS, Access: family.RO, Class: family.Skip, Why: whyAlias},
		{Name: "VFLINKS", Offset: VFLINKS, Access: family.RO, Class: family.Skip, Why: whyAlias},
		{Name: "VFFRTIMER", Offset: VFFRTIMER, Access: family.RO, Class: family.Skip, Why: whyAlias},
		{Name: "VTEICR", Offset: VTEICR, Access: family.Readable | family.ReadClears | family.WriteOneClears,
			Class: family.Derive, Mask: VectorMask,
			Why: "a read destroys it: read once after the quiesce, and raised again through VTEICS"},
		{Name: "VTEICS", Offset: VTEICS, Access: family.WriteOneSets, Class: family.Replay, Mask: VectorMask,
			Why: "the tool that raises the causes again"},
		{Name: "VTEIMS", Offset: VTEIMS, Access: family.Readable | family.WriteOneSets, Class: family.Copy, Mask: VectorMask,
			Why: "the mask of enabled vectors: cleared through VTEIMC first, written last of all"},
		{Name: "VTEIMC", Offset: VTEIMC, Access: family.WriteOneClears, Class: family.Skip, Mask: VectorMask,
			Why: "the tool that clears VTEIMS; no state of its own"},
		{Name: "VTEIAC", Offset: VTEIAC, Access: family.RW, Class: family.Copy, Mask: VectorMask, Why: whySetting},
		{Name: "VTEIAM", Offset: VTEIAM, Access: family.RW, Class: family.Copy, Mask: VectorMask, Why: whySetting},
		{Name: "VTIVAR_MISC", Offset: VTIVARMisc, Access: family.RW, Class: family.Copy, Mask: maskIVARMisc, Why: whySetting},
		{Name: "VFMAILBOX", Offset: VFMAILBOX, Access: family.RW | family.ReadClears, Class: family.Replay,
			Mask: MailboxREQ | MailboxACK | MailboxVFU,
			Why:  "operations, not state: the messages sent through it are recorded and sent again"},
		{Name: "VFPSRTYPE", Offset: VFPSRTYPE, Access: family.RW, Class: family.Copy, Mask: maskPSRTYPE, Why: whySetting},
		{Name: "VFRXMEMWRAP", Offset: VFRXMEMWRAP, Access: family.RO, Class: family.Skip, Why: whyAlias},
	}
	for n := range 4 {
		r = append(r, family.Register{Name: fmt.Sprintf("VTIVAR(%d)", n), Offset: VTIVAR(n),
			Access: family.RW, Class: family.Copy, Mask: maskIVAR, Why: whySetting})
	}
	for n := range 2 {
		r = append(r, family.Register{Name: fmt.Sprintf("VTRSCINT(%d)", n), Offset: VTRSCINT(n),
			Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whySetting})
	}
	for n := range MSIXVectors {
		r = append(r, family.Register{Name: fmt.Sprintf("VTEITR(%d)", n), Offset: VTEITR(n),
			Access: family.RW, Class: family.Copy, Mask: maskEITR, Modifier: EITRCountWDis,
			Why: "set by the driver only; the interval that runs stays behind, and the cause it held back is raised with the others"})
	}
	for n := range MailboxWords {
		r = append(r, family.Register{Name: fmt.Sprintf("VFMBMEM(%d)", n), Offset: VFMBMEM + 4*uint32(n),
			Access: family.RW, Class: family.Skip, Mask: maskAll,
			Why: "shared with the PF; of an open transaction the body is shown again"})
	}
	return r
}

// rssRegisters lists what members with RSS of the VF's own have on page 3.
func rssRegisters() []family.Register {
	const why = "set by the driver only, and the PF does not know it"
	r := []family.Register{{Name: "VFMRQC", Offset: VFMRQC, Access: family.RW, Class: family.Copy, Mask: maskMRQC, Why: why}}
	for n := range RSSKeyWords {
		r = append(r, family.Register{Name: fmt.Sprintf("VFRSSRK(%d)", n), Offset: VFRSSRK(n),
			Access: family.RW, Class: family.Copy, Mask: maskAll, Why: why})
	}
	for n := range RSSTableWords {
		r = append(r, family.Register{Name: fmt.Sprintf("VFRETA(%d)", n), Offset: VFRETA(n),
			Access: family.RW, Class: family.Copy, Mask: maskAll, Why: why})
	}
	return r
}

// counter is one read-only statistics register.
func counter(name string, offset uint32) family.Register {
	return family.Register{Name: name, Offset: offset, Access: family.RO, Class: family.Emulate, Why: whyCounter}
}

// receiveRegisters lists the block of receive queue n on page 1, with the
// counters that sit in block 0. Members differ in what VFRXDCTL has.
func receiveRegisters(n int, maskRXDCTL uint32) []family.Register {
	name := func(s string) string { return fmt.Sprintf("%s(%d)", s, n) }
	r := []family.Register{
		{Name: name("VFRDBAL"), Offset: VFRDBAL(n), Access: family.RW, Class: family.Copy, Mask: maskBAL, Why: whyRing},
		{Name: name("VFRDBAH"), Offset: VFRDBAH(n), Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whyRing},
		{Name: name("VFRDLEN"), Offset: VFRDLEN(n), Access: family.RW, Class: family.Copy, Mask: maskLEN, Why: whyRing},
		{Name: name("VFDCA_RXCTRL"), Offset: VFDCARXCTRL(n), Access: family.RW, Class: family.Copy, Mask: maskDCA,
			Why: "relaxed ordering moves; DCA enables and CPU id belong to the host"},
		{Name: name("VFRDH"), Offset: VFRDH(n), Access: family.RW, Class: family.Derive, Mask: maskIndex, Why: whyHead},
		{Name: name("VFSRRCTL"), Offset: VFSRRCTL(n), Access: family.RW, Class: family.Copy, Mask: maskSRRCTL, Why: whyRing},
		{Name: name("VFRDT"), Offset: VFRDT(n), Access: family.RW, Class: family.Copy, Mask: maskIndex, Why: whyTail},
		{Name: name("VFRXDCTL"), Offset: VFRXDCTL(n), Access: family.RW, Class: family.Copy, Mask: maskRXDCTL,
			Why: "written without ENABLE first, then with it and polled"},
		{Name: name("VFRSCCTL"), Offset: VFRSCCTL(n), Access: family.RW, Class: family.Copy, Mask: maskRSCCTL, Why: whyRing},
	}
	if n == 0 {
		r = append(r, counter("VFGPRC", VFGPRC), counter("VFGORC_LSB", VFGORCLSB),
			counter("VFGORC_MSB", VFGORCMSB), counter("VFMPRC", VFMPRC))
	}
	return r
}

// transmitRegisters lists the block of transmit queue n on page 2, with the
// counters that sit in block 0.
func transmitRegisters(n int) []family.Register {
	name := func(s string) string { return fmt.Sprintf("%s(%d)", s, n) }
	r := []family.Register{
		{Name: name("VFTDBAL"), Offset: VFTDBAL(n), Access: family.RW, Class: family.Copy, Mask: maskBAL, Why: whyRing},
		{Name: name("VFTDBAH"), Offset: VFTDBAH(n), Access: family.RW, Class: family.Copy, Mask: maskAll, Why: whyRing},
		{Name: name("VFTDLEN"), Offset: VFTDLEN(n), Access: family.RW, Class: family.Copy, Mask: maskLEN, Why: whyRing},
		{Name: name("VFDCA_TXCTRL"), Offset: VFDCATXCTRL(n), Access: family.RW, Class: family.Copy, Mask: maskDCA,
			Why: "relaxed ordering moves; DCA enables and CPU id belong to the host"},
		{Name: name("VFTDH"), Offset: VFTDH(n), Access: family.RW, Class: family.Derive, Mask: maskIndex, Why: whyHead},
		{Name: name("VFTDT"), Offset: VFTDT(n), Access: family.RW, Class: family.Copy, Mask: maskIndex, Why: whyTail},
		{Name: name("VFTXDCTL"), Offset: VFTXDCTL(n), Access: family.RW, Class: family.Copy, Mask: maskTXDCTL,
			Why: "written without ENABLE first, then with it and polled"},
		{Name: name("VFTDWBAL"), Offset: VFTDWBAL(n), Access: family.RW, Class: family.Copy, Mask: maskAll,
			Why: "set by the driver only; after the replay, whose RESET makes the PF zero it"},
		{Name: name("VFTDWBAH"), Offset: VFTDWBAH(n), Access: family.RW, Class: family.Copy, Mask: maskAll,
			Why: "set by the driver only; after the replay, whose RESET makes the PF zero it"},
	}
	if n == 0 {
		r = append(r, counter("VFGPTC", VFGPTC), counter("VFGOTC_LSB", VFGOTCLSB), counter("VFGOTC_MSB", VFGOTCMSB))
	}
	return r
}
