// Package model is a behavioural model of one virtual function of an Intel
// 82599, or of a member of its family (Config.DeviceID): its registers, two or
// more queue pairs, three MSI-X vectors, the part of the PF that it talks to
// through the mailbox, and the network behind it.
// It stands in for silicon where there is none, and for nothing else: no other
// package learns from it how a VF behaves.
//
// Facts come from these sources, named in brackets below: the Intel 82599
// datasheet where the tables of others transcribe it [D], its specification
// update 3.1 of March 2014 [SU], the ixgbevf drivers of Linux and of Intel [V],
// their PF driver ixgbe, above all ixgbe_sriov.c [P], the DPDK drivers [K]. The
// text of the datasheet was not at hand: the number of a section tells where to
// compare a behaviour with it, not that this was done.
//
// # Reproduced
//
// Registers: the 16 KiB of BAR0 with the access semantics of the table in
// package ixgbevf; offsets that are no register, and queues that the PF did
// not give, read 0. VTEICR is cleared by reads and by writing ones, VTEIMS and
// VTEIMC set and clear the mask, VTEICS raises causes [V]. Statistics wrap at
// 32 and 36 bits and are cleared by nothing a VF does [V, K].
//
// Reset: VFCTRL.RST and FLR stop queues, interrupts and the PF's forwarding;
// ring registers, heads, tails, contexts, vector assignment and statistics
// stay, so that a recycled VF has its former user's [SU clarification 5].
// VFMAILBOX shows RSTI, then RSTD.
//
// Mailbox: REQ, ACK, VFU, PFSTS, PFACK, RSTI and RSTD with their read-clear
// bits; messages 0x01 to 0x12 with the PF's side effects and refusals [P].
// There is clear-to-send only after RESET, whose reply is a failure if there
// is no admin MAC. A reset takes filters, VLANs and the API version away; the
// MAC last used, the xcast mode last granted and the admin settings stay, and
// asking for the mode again does nothing. RESET zeroes VFTDWBAL and VFTDWBAH.
// A change of trust revokes clear-to-send and pings the VF, as does a reset of
// the PF, which also stops the VF; a change of the link pings it. The rule for jumbo
// frames is that of the 82599 [SU clarification 14]. GET_RETA and
// GET_RSS_KEY are refused, as by a PF whose administrator did not allow them.
// Security associations get handles, and nothing is done to packets.
//
// Receive: filters by MAC, macvlans, broadcast, multicast hash (all four of
// MCSTCTRL.MO), all-multicast, VLAN table, port VLAN and maximum frame; VLAN
// stripping; RSS over the queues that VFPSRTYPE.RQPL asks for; legacy and
// advanced write-back, frames in several buffers, the quadword that drivers
// look at written last, descriptors written back in the order of the ring;
// header split (SRRCTL.DESCTYPE 010b) and header buffers that are always used
// (101b), after what VFPSRTYPE selects, with HDR_LEN, SPH and HBO [D, 7.1.10;
// the same table as the 82576's]; checksums verified, and reported as good or
// bad; a bounded packet buffer, drop-enable by VFSRRCTL or by the PF. Frames
// have at least 60 octets.
//
// Receive-side coalescing [D, 7.11; K and Linux's ixgbe for the descriptors],
// where Config.Coalescing has the PF allow it and VFRSCCTL.RSCEN asks for it:
// segments of TCP over IPv4 without options but the time stamp, with ACK and
// PSH alone, right checksums and payload, whose VLAN tag if any was stripped,
// are put together in the order of their sequence numbers, in as many
// descriptors as VFRSCCTL.MAXDESC allows, with RSCCNT in each and NEXTP in all
// but the last. A frame is whole when a segment has PSH or does not follow,
// when descriptors run out, when its queue is turned off, and at the latest
// with the interrupt of its queue. The IP header gets the length of all: the
// Linux driver hands it on as it is to a stack that checks it.
//
// Members: VFRXDCTL.RLPML of an X540 and its successors, and no jumbo rule for
// them; the VF's own RSS key and table of an X550 and its successors, and what
// VFMRQC has hashed [V, P].
//
// Transmit: legacy and advanced descriptors, two context slots per queue,
// segmentation of TCP and UDP, IP, TCP, UDP and SCTP checksums, VLAN tags by
// descriptor and by port VLAN, DD only where RS was set, head write-back
// instead if it is on, of the head after the last such descriptor, anti-spoofing by MAC. A goroutine works the rings off, so
// that heads trail tails, a disabled queue reads as enabled until what it
// fetched is out, and a drain is something to wait for.
//
// Interrupts: causes go where VTIVAR and VTIVAR_MISC point. A cause that comes
// while its vector is masked stays in VTEICR and is raised when it is unmasked.
// A vector is raised at once if it was not for as long as VTEITR says, and else
// at the end of that interval if there is a cause by then [D, 7.3.2.1; V for
// the unit of 2 microseconds]; CNT_WDIS leaves the interval that runs alone.
//
// # Unsure
//
// What is not known of silicon, and what the model does:
//
//   - Whether VFRDH and VFTDH take values other than zero while the queue is
//     off: Config.WritableRXHead and WritableTXHead. With the queue on, writes
//     are ignored.
//   - Whether heads outlive a disabled queue: Config.HeadsPersistAcrossDisable.
//   - Whether the PF sends frames to its VF through the internal switch when
//     asked to: Config.Loopback.
//   - Whether a reset clears statistics: Config.CountersClearedByReset. Whether
//     octets include the FCS: here they do not. Whether reading the low half
//     of an octet counter latches the high half: here it does not.
//   - Whether a reset leaves clear-to-send: Config.ClearToSendSurvivesFLR; and
//     the PF's multicast modes: Config.FilterModesClearedByReset.
//   - Whether base and length of rings, VTIVAR and VTEITR outlive a reset: here
//     they do. VTEIMS, VTEIAC and VTEIAM do not.
//   - A tail written while the queue is off: stored here. An enabled transmit
//     queue whose tail differs from its head starts at once.
//   - A head or tail outside of the ring: the queue stands still.
//   - Header split: a fragment is split after its IP header; HDR_LEN, SPH and
//     HBO are in the first descriptor of a frame alone; header buffers count as
//     1,023 bytes at most, which is what HDR_LEN can tell; DESCTYPE 011b, 100b,
//     110b and 111b, which are reserved, and header buffers of no size are as
//     001b.
//   - How the device takes malformed transmit descriptors: here they are
//     consumed and the packet is dropped, without latching the queue as
//     malicious-driver detection would.
//   - An interval of VTEITR starts with a message that is sent; one that a
//     mask held back starts none. A write without CNT_WDIS ends the interval
//     that runs, as one that writes 0 to the counter; the counter itself, bits
//     27:21, reads 0. A reset ends intervals and keeps VTEITR.
//   - Whether a VF coalesces at all: Config.Coalescing, by default not. The
//     register is there, but Linux's PF driver sets RFCTL.RSC_DIS for the whole
//     device while it has VFs [P], and DPDK counts on coalescing only without
//     SR-IOV [K].
//   - Which segments are coalesced, and what ends a frame: drivers show only
//     what comes of it. RSCCNT of a descriptor counts the segments with octets
//     in it, so that no descriptor with NEXTP has 0, by which drivers know
//     NEXTP; at 15 the frame is whole. 32 frames at once, over all queues. The
//     acknowledgement number must be that of the first segment, as
//     RDRXCTL.RSCACKC is set; window, time stamp and TCP checksum stay the
//     first one's. A first segment with padding is not coalesced. Without an
//     interval of VTEITR that runs each segment is a frame of its own; VTRSCINT
//     is storage.
//   - Descriptors that a coalesced frame goes beyond are written back at once,
//     but all descriptors in the order of the ring. A reset drops what is not
//     written back.
//   - VFSTATUS reads 0, and VFFRTIMER counts microseconds.
//   - RSS: the PF's key and table are those of this package; flows are spread
//     otherwise on any other card.
//
// # Not modelled
//
// Low-latency interrupts, the legacy write-back's fragment checksum (0), what
// IPsec does to packets, DCA, time stamps, write-back thresholds, VLAN anti-spoofing, switching between
// VFs of one PF, and frames that wait for a link: what is sent while it is down
// is lost.
//
// DMA to memory that is not mapped is not an error, unlike on silicon: QEMU
// takes guest memory away for moments when it changes the memory map. Such work
// is put off until the next doorbell or a retry.
package model
