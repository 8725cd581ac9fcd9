package model

import (
	"time"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// mailbox handles a write of VFMAILBOX.
func (v *VF) mailbox(val uint32) {
	r := &v.regs[ixgbevf.VFMAILBOX/4]
	if *r&ixgbevf.MailboxPFU == 0 {
		*r = *r&^ixgbevf.MailboxVFU | val&ixgbevf.MailboxVFU
	}
	// ACK only tells the PF that its message was read; its driver does not wait.
	if val&ixgbevf.MailboxREQ == 0 {
		return
	}
	if v.cfg.PFLatency <= 0 {
		v.serveMailbox()
		return
	}
	if v.answer != nil {
		return // the PF has not looked yet, and will find the last message
	}
	epoch := v.epoch.Load()
	v.answer = time.AfterFunc(v.cfg.PFLatency, func() {
		v.mu.Lock()
		defer v.unlock()
		if v.epoch.Load() == epoch {
			v.answer = nil
			v.serveMailbox()
		}
	})
}

// serveMailbox is the PF's interrupt handler: it takes the message from the
// mailbox memory and puts its answer there.
func (v *VF) serveMailbox() {
	body := v.regs[ixgbevf.VFMBMEM/4 : ixgbevf.VFMBMEM/4+ixgbevf.MailboxWords]
	var message [ixgbevf.MailboxWords]uint32
	copy(message[:], body)
	v.regs[ixgbevf.VFMAILBOX/4] |= ixgbevf.MailboxPFACK
	if message[0]&(ixgbevf.MsgACK|ixgbevf.MsgNACK) != 0 {
		v.mailboxCause() // an answer, not a message: read and ignored
		return
	}
	id := message[0] & ixgbevf.MsgIDMask
	v.stats.Messages++
	switch {
	case id == ixgbevf.MsgReset:
		v.pf.reset(v.cfg, &message)
		for q := range v.tx {
			v.regs[ixgbevf.VFTDWBAL(q)/4] = 0
			v.regs[ixgbevf.VFTDWBAH(q)/4] = 0
		}
		v.wake()
	case !v.pf.cts:
		message[0] |= ixgbevf.MsgNACK
	case v.pf.handle(v.cfg, id, &message):
		message[0] |= ixgbevf.MsgACK | ixgbevf.MsgCTS
	default:
		message[0] |= ixgbevf.MsgNACK | ixgbevf.MsgCTS
	}
	if message[0]&ixgbevf.MsgNACK != 0 && id != ixgbevf.MsgReset {
		v.stats.Refused++
	}
	copy(body, message[:])
	v.regs[ixgbevf.VFMAILBOX/4] |= ixgbevf.MailboxPFSTS
	v.mailboxCause()
}

// ping has the PF send its unsolicited message. As in its driver it is not
// sent while the VF holds the mailbox memory.
func (v *VF) ping() {
	r := &v.regs[ixgbevf.VFMAILBOX/4]
	if *r&ixgbevf.MailboxVFU != 0 {
		return
	}
	word := uint32(ixgbevf.MsgPFControl)
	if v.pf.cts {
		word |= ixgbevf.MsgCTS
	}
	v.regs[ixgbevf.VFMBMEM/4] = word
	*r |= ixgbevf.MailboxPFSTS
	v.mailboxCause()
}
