package compsc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"compsc.io/compsc/agent/family"
)

// mail is what the engine knows of the guest's use of the mailbox.
type mail struct {
	// request is the message the guest has sent and that has no reply yet.
	request []uint32
	sentAt  time.Time
	// resetting is set from the guest's reset until the device shows it.
	resetting bool
	resetAt   time.Time
	// readClear has bits that the engine's own reads cleared and that the
	// guest has yet to see.
	readClear uint32
}

func (v *VF) readMailboxMemory() []uint32 {
	words := make([]uint32, v.box.Words)
	for i := range words {
		words[i] = v.b.Read(v.box.Memory + 4*uint32(i))
	}
	return words
}

func (v *VF) writeMailboxMemory(words []uint32) {
	for i, w := range words {
		v.b.Write(v.box.Memory+4*uint32(i), w)
	}
}

// guestMailboxRead serves a guest's read of the mailbox register.
func (v *VF) guestMailboxRead() uint32 {
	value := v.lookMailbox()
	if value == allOnes {
		return value
	}
	value |= v.mail.readClear
	v.mail.readClear = 0
	return value
}

// lookMailbox reads the mailbox register, which clears some of its bits, and
// draws the conclusions. The message behind PFSTS is read at once: later, the
// guest may have written over it.
func (v *VF) lookMailbox() uint32 {
	value := v.b.Read(v.box.Control)
	if value == allOnes {
		return value
	}
	if v.resetOver(value) {
		v.mail.resetting = false
	}
	if value&v.box.PFSts != 0 && v.mail.request != nil {
		message := v.readMailboxMemory()
		if v.answers(v.mail.request, message) {
			v.log.Completed(v.mail.request, message)
			if v.mail.request[0]&v.box.IDMask == v.box.Reset {
				v.followZeroed()
			}
			v.mail.request = nil
		}
	}
	return value
}

// resetOver tells from the mailbox register whether a reset of the VF that was
// started is over.
func (v *VF) resetOver(value uint32) bool {
	return (value&(v.box.RstI|v.box.RstD) != 0) == v.box.ResetShows
}

// answers tells whether the message in the mailbox is the reply to a request,
// and neither one that the PF sent unasked nor the request itself.
func (v *VF) answers(request, message []uint32) bool {
	return (message[0]^request[0])&v.box.IDMask == 0 && message[0]&v.box.Replied != 0
}

// guestMailboxWrite passes a guest's write of the mailbox register on. A
// request is copied first, for the reply will overwrite it.
func (v *VF) guestMailboxWrite(val uint32) {
	if val&v.box.Req != 0 {
		v.mail.request = v.readMailboxMemory()
		v.mail.sentAt = v.o.Clock.Now()
	}
	v.b.Write(v.box.Control, val)
}

// settleMailbox waits until nothing is under way between guest and PF: no
// request without a reply, no reset without its end, and the PF not writing.
// What it sees on the way is kept for the guest. It returns the mailbox
// register as last read.
func (v *VF) settleMailbox(ctx context.Context) (uint32, error) {
	now := v.o.Clock.Now()
	if v.mail.request != nil && now.Sub(v.mail.sentAt) > v.o.MailboxTimeout {
		v.o.Logger.Warn("a mailbox request of the guest was never answered; its driver has given it up",
			"message", v.mail.request[0]&v.box.IDMask)
		v.mail.request = nil
	}
	if v.mail.resetting && now.Sub(v.mail.resetAt) > v.o.ResetTimeout {
		v.o.Logger.Warn("a reset by the guest never ended; its driver has given it up")
		v.mail.resetting = false
	}
	var value uint32
	err := v.poll(ctx, v.o.MailboxTimeout, "the PF has finished with the mailbox", func() (bool, error) {
		if value = v.lookMailbox(); value == allOnes {
			return false, ErrGone
		}
		v.mail.readClear |= value & v.box.ReadClear
		return v.mail.request == nil && !v.mail.resetting && value&v.box.PFU == 0, nil
	})
	return value, err
}

// lockMailbox takes the mailbox from the PF.
func (v *VF) lockMailbox(ctx context.Context) error {
	return v.poll(ctx, v.o.MailboxTimeout, "the mailbox is ours", func() (bool, error) {
		v.b.Write(v.box.Control, v.box.VFU)
		value := v.b.Read(v.box.Control)
		if value == allOnes {
			return false, ErrGone
		}
		return value&v.box.VFU != 0, nil
	})
}

// ask sends a message in the guest's place and returns the PF's reply. A RESET
// goes twice. The PF's drivers first look whether a VF was reset, and then for
// its messages (igb_msg_task, ixgbe_msg_task): one that was just about to do the
// latter, called by another VF, takes the RESET, finds the reset later, and
// from then on leaves the VF's messages unanswered. It has found it by the
// time it takes the second RESET.
func (v *VF) ask(ctx context.Context, request []uint32) ([]uint32, error) {
	if len(request) > 0 && request[0]&v.box.IDMask == v.box.Reset {
		if _, err := v.exchange(ctx, request); err != nil {
			return nil, err
		}
	}
	return v.exchange(ctx, request)
}

// exchange sends a message and returns the PF's reply.
// A message that the PF sends unasked meanwhile is acknowledged and dropped: it
// tells the driver to look at the link, which it does on the kick that follows
// the restore. But it ends the wait with errUnanswered, for writing it the PF
// forgets a request that it has not read (igb_write_mbx_pf, ixgbe_write_mbx_pf),
// or has written over its own reply. No reply at all in time is errUnanswered
// as well.
func (v *VF) exchange(ctx context.Context, request []uint32) ([]uint32, error) {
	if len(request) == 0 || len(request) > v.box.Words {
		return nil, fmt.Errorf("message of %d words, the mailbox holds 1 to %d", len(request), v.box.Words)
	}
	if err := v.lockMailbox(ctx); err != nil {
		return nil, err
	}
	v.writeMailboxMemory(request)
	v.b.Write(v.box.Control, v.box.Req)
	var reply []uint32
	err := v.poll(ctx, v.o.MailboxTimeout, "the PF has answered", func() (bool, error) {
		value := v.b.Read(v.box.Control)
		if value == allOnes {
			return false, ErrGone
		}
		if value&v.box.PFSts == 0 {
			return false, nil
		}
		reply = v.readMailboxMemory()
		v.b.Write(v.box.Control, v.box.Ack)
		if !v.answers(request, reply) {
			v.dropped = true
			return false, fmt.Errorf("%w: the PF sent message %#x of its own", errUnanswered, reply[0])
		}
		return true, nil
	})
	if errors.Is(err, errTimeout) {
		err = fmt.Errorf("%w: %w", errUnanswered, err)
	}
	return reply, err
}

// errUnanswered marks a request of which is not known whether the PF did it.
var errUnanswered = errors.New("request lost")

// talk runs what sends requests to the PF. If one was lost, it runs it once
// more from its start, which is a RESET message: asking again for the lost one
// alone could have the PF take a filter twice.
func (v *VF) talk(ctx context.Context, requests func() error) error {
	err := requests()
	if !errors.Is(err, errUnanswered) || ctx.Err() != nil {
		return err
	}
	v.o.Logger.Info("a mailbox request was lost; all are sent again", "error", err)
	return requests()
}

// replay sends the messages of a record to the PF of a VF that was just reset,
// and checks the replies. It returns how many were done.
func (v *VF) replay(ctx context.Context, messages []family.Message) (done int, err error) {
	err = v.talk(ctx, func() (err error) {
		done, err = v.replayOnce(ctx, messages)
		return err
	})
	return done, err
}

func (v *VF) replayOnce(ctx context.Context, messages []family.Message) (int, error) {
	for i, m := range messages {
		if len(m.Words) == 0 {
			if err := v.resetDevice(ctx); err != nil {
				return i, fmt.Errorf("replay of %s: %w", m.Name, err)
			}
			continue
		}
		reply, err := v.ask(ctx, m.Words)
		if err != nil {
			return i, fmt.Errorf("replay of %s: %w", m.Name, err)
		}
		if err := m.Check(reply); err != nil {
			return i, &IncompatibleError{Reason: ReasonMailboxRefused,
				Message: fmt.Sprintf("replay of mailbox operation %s: %v", m.Name, err)}
		}
	}
	return len(messages), nil
}

// showMailbox puts back what the guest had before it: the body of the last
// message, the bits it has not seen, and its hold of the mailbox.
func (v *VF) showMailbox(ctx context.Context, m MailboxState) error {
	if err := v.lockMailbox(ctx); err != nil {
		return err
	}
	v.writeMailboxMemory(m.Memory)
	if !m.Held {
		v.b.Write(v.box.Control, 0)
	}
	v.mail = mail{readClear: m.ReadClear & v.box.ReadClear}
	return nil
}

// resetDevice turns interrupts and queues off, resets the VF and waits for
// the end of the reset. It goes on after a failure, for it is also the way to
// silence a VF.
func (v *VF) resetDevice(ctx context.Context) error {
	v.b.Write(v.irq.MaskClear, v.irq.All)
	var errs []error
	for _, q := range v.queues {
		errs = append(errs, v.turnOff(ctx, q, v.b.Read(q.Ctl)))
	}
	v.b.Read(v.box.Control) // an earlier reset's end shall not be taken for this one's
	v.b.Write(v.resetReg, v.resetBit)
	errs = append(errs, v.poll(ctx, v.o.ResetTimeout, "the reset is done", func() (bool, error) {
		value := v.b.Read(v.box.Control)
		if value == allOnes {
			return false, ErrGone
		}
		return v.resetOver(value), nil
	}))
	v.b.Read(v.irq.Cause)
	return errors.Join(errs...)
}
