// Package driver is a driver of 82576 VFs that does as a guest's does, by the
// registers alone, and can be stopped between any two steps. It sends and
// receives frames of one Ethernet type.
//
// What it does is what Linux's igbvf does (drivers/net/ethernet/intel/igbvf),
// with one queue pair and a vector each for receiving and sending.
package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"compsc.io/compsc/agent/family/igbvf"
)

// Bus is how the driver reaches the registers of its VF.
type Bus interface {
	Read(off uint32) uint32
	Write(off, v uint32)
}

const (
	// RingSize is the number of descriptors of each ring.
	RingSize = 16
	// MemorySize is how much memory the driver needs.
	MemorySize = 0x20000

	descriptorSize = 16
	// BufferSize is the size of a receive buffer: the smallest that there is,
	// for longer frames to need two.
	BufferSize     = 1024
	longest        = 2 * BufferSize
	rxRing, txRing = 0x0000, 0x1000
	rxBuffers      = 0x10000
	txBuffers      = rxBuffers + RingSize*BufferSize

	// FrameType is the Ethernet type of the frames, one for local experiments.
	FrameType = 0x88b5
	// minFrame is the shortest frame, without its checksum.
	minFrame = 60

	patience = 5 * time.Second
	poll     = time.Millisecond
)

// Vectors of the interrupts.
const (
	VectorRX = iota
	VectorTX
	VectorMailbox
)

// NIC is a VF with its driver. Its memory is what moves with a guest; Bus may
// be replaced between two calls.
type NIC struct {
	// Patience bounds every wait for the device and the PF; New sets it to 5 s.
	Patience time.Duration
	// Bus leads to the VF.
	Bus Bus
	// MAC is the VF's address, set by Start.
	MAC net.HardwareAddr

	memory []byte
	base   uint64
	// seen are bits of the mailbox that a read took away from the device.
	seen uint32
	// next is the descriptor to send with, clean the one to look at for a
	// received frame.
	next, clean uint32
}

// New returns a driver that uses memory, which the device reaches at base.
func New(bus Bus, memory []byte, base uint64) *NIC {
	return &NIC{Bus: bus, Patience: patience, memory: memory[:MemorySize], base: base}
}

// Start resets the VF, gives it a MAC unless the PF has, and turns its queues
// and interrupts on.
func (n *NIC) Start(mac net.HardwareAddr) error {
	has, err := n.reset()
	if err != nil {
		return err
	}
	if !bytes.Equal(has, mac) {
		if err := n.setMAC(mac); err != nil {
			return err
		}
	}
	n.MAC = slices.Clone(mac)
	clear(n.memory)
	n.next, n.clean = 0, 0
	w := n.Bus.Write
	for i := range uint32(RingSize) {
		n.arm(i)
	}
	w(igbvf.RDBAL(0), uint32(n.base+rxRing))
	w(igbvf.RDBAH(0), uint32((n.base+rxRing)>>32))
	w(igbvf.RDLEN(0), RingSize*descriptorSize)
	w(igbvf.SRRCTL(0), BufferSize>>10|1<<25) // advanced descriptors, one buffer
	w(igbvf.RDH(0), 0)
	w(igbvf.RDT(0), 0)
	w(igbvf.TDBAL(0), uint32(n.base+txRing))
	w(igbvf.TDBAH(0), uint32((n.base+txRing)>>32))
	w(igbvf.TDLEN(0), RingSize*descriptorSize)
	w(igbvf.TDH(0), 0)
	w(igbvf.TDT(0), 0)
	for _, ctl := range []uint32{igbvf.TXDCTL(0), igbvf.RXDCTL(0)} {
		w(ctl, n.Bus.Read(ctl)|igbvf.QueueEnable)
		if err := n.wait("queue on", func() bool { return n.Bus.Read(ctl)&igbvf.QueueEnable != 0 }); err != nil {
			return err
		}
	}
	w(igbvf.RDT(0), RingSize-1)
	w(igbvf.IVAR0, (igbvf.IVARValid|VectorTX)<<8|(igbvf.IVARValid+VectorRX))
	w(igbvf.IVARMisc, igbvf.IVARValid|VectorMailbox)
	w(igbvf.EIAC, igbvf.VectorMask)
	// Not EIAM: vectors stay on without somebody to turn them on again.
	w(igbvf.EIMS, igbvf.VectorMask)
	return nil
}

// reset returns the MAC that the PF's administrator gave the VF, nil for none.
func (n *NIC) reset() (net.HardwareAddr, error) {
	n.Bus.Write(igbvf.CTRL, n.Bus.Read(igbvf.CTRL)|igbvf.CtrlRST)
	n.seen = 0
	// igbvf waits for as long as the PF says that it resets.
	if err := n.wait("reset", func() bool { return n.box()&igbvf.MailboxRSTI == 0 }); err != nil {
		return nil, err
	}
	reply, err := n.call(3, igbvf.MsgReset)
	if err != nil || reply[0]&igbvf.MsgACK == 0 {
		// A PF that knows no MAC for the VF refuses, and has reset it all the same.
		return nil, err
	}
	mac := binary.LittleEndian.AppendUint32(nil, reply[1])
	return binary.LittleEndian.AppendUint16(mac, uint16(reply[2])), nil
}

func (n *NIC) setMAC(mac net.HardwareAddr) error {
	reply, err := n.call(1, igbvf.MsgSetMAC, binary.LittleEndian.Uint32(mac), uint32(binary.LittleEndian.Uint16(mac[4:])))
	if err != nil {
		return err
	}
	if reply[0]&igbvf.MsgACK == 0 {
		return fmt.Errorf("the PF refuses MAC %v: reply %#x", mac, reply[0])
	}
	return nil
}

// box reads the mailbox's register, of which reading clears some bits.
func (n *NIC) box() uint32 {
	v := n.Bus.Read(igbvf.V2PMAILBOX) | n.seen
	n.seen = v & igbvf.MailboxReadClear
	return v
}

// call sends the PF a message and returns that many words of the reply.
func (n *NIC) call(words int, message ...uint32) ([]uint32, error) {
	what := fmt.Sprintf("reply of the PF to message %#x", message[0])
	lock := func() bool {
		n.Bus.Write(igbvf.V2PMAILBOX, igbvf.MailboxVFU)
		return n.box()&igbvf.MailboxVFU != 0
	}
	if err := n.wait("mailbox", lock); err != nil {
		return nil, err
	}
	n.seen &^= igbvf.MailboxPFACK | igbvf.MailboxPFSTS
	for i, word := range message {
		n.Bus.Write(igbvf.VMBMEM+4*uint32(i), word)
	}
	n.Bus.Write(igbvf.V2PMAILBOX, igbvf.MailboxREQ)
	for _, bit := range []uint32{igbvf.MailboxPFACK, igbvf.MailboxPFSTS} {
		if err := n.wait(what, func() bool { return n.box()&bit != 0 }); err != nil {
			return nil, err
		}
	}
	n.seen &^= igbvf.MailboxPFACK | igbvf.MailboxPFSTS
	if err := n.wait("mailbox", lock); err != nil {
		return nil, err
	}
	reply := make([]uint32, words)
	for i := range reply {
		reply[i] = n.Bus.Read(igbvf.VMBMEM + 4*uint32(i))
	}
	n.Bus.Write(igbvf.V2PMAILBOX, igbvf.MailboxACK)
	return reply, nil
}

func (n *NIC) descriptor(ring, i uint32) []byte {
	at := ring + i*descriptorSize
	return n.memory[at : at+descriptorSize]
}

// arm gives the device a receive buffer.
func (n *NIC) arm(i uint32) {
	d := n.descriptor(rxRing, i)
	binary.LittleEndian.PutUint64(d, n.base+rxBuffers+uint64(i)*BufferSize)
	clear(d[8:])
}

// Frame builds a frame with a text.
func Frame(dst, src net.HardwareAddr, text string) []byte {
	b := append(slices.Clone([]byte(dst)), src...)
	b = binary.BigEndian.AppendUint16(b, FrameType)
	b = append(b, text...)
	return append(b, make([]byte, max(0, minFrame-len(b)))...)
}

// Text is the text of a frame that Frame built, empty for another.
func Text(frame []byte) string {
	if len(frame) < 14 || binary.BigEndian.Uint16(frame[12:]) != FrameType {
		return ""
	}
	text, end := frame[14:], len(frame)-14
	for end > 0 && text[end-1] == 0 {
		end--
	}
	return string(text[:end])
}

// Send hands the device a frame with a text, which fills an ordinary frame at
// most; Sent tells when it is out.
func (n *NIC) Send(to net.HardwareAddr, text string) {
	frame := Frame(to, n.MAC, text)
	i := n.next
	at := txBuffers + i*longest
	copy(n.memory[at:], frame)
	d := n.descriptor(txRing, i)
	binary.LittleEndian.PutUint64(d, n.base+uint64(at))
	// An advanced data descriptor with all of the packet, to be reported.
	const data, extended, report, checksum, end = 3 << 20, 1 << 29, 1 << 27, 1 << 25, 1 << 24
	binary.LittleEndian.PutUint32(d[8:], data|extended|report|checksum|end|uint32(len(frame)))
	binary.LittleEndian.PutUint32(d[12:], uint32(len(frame))<<14)
	n.next = (i + 1) % RingSize
	n.Bus.Write(igbvf.TDT(0), n.next)
}

// Sent waits until the device has reported all frames as sent.
func (n *NIC) Sent() error {
	last := (n.next + RingSize - 1) % RingSize
	return n.wait("report of a sent frame", func() bool {
		return binary.LittleEndian.Uint32(n.descriptor(txRing, last)[12:])&1 != 0
	})
}

// ErrNothing says that no frame came.
var ErrNothing = errors.New("no frame came")

// Receive waits for a frame with a text and returns the text.
func (n *NIC) Receive() (string, error) {
	for {
		frame, err := n.frame()
		if err != nil {
			return "", err
		}
		if text := Text(frame); text != "" {
			return text, nil
		}
	}
}

// frame takes one frame out of its buffers, and hands those back.
func (n *NIC) frame() ([]byte, error) {
	const done, last = 1 << 0, 1 << 1
	var frame []byte
	for {
		i := n.clean
		d := n.descriptor(rxRing, i)
		status := func() uint32 { return binary.LittleEndian.Uint32(d[8:]) }
		if err := n.wait("frame", func() bool { return status()&done != 0 }); err != nil {
			return nil, fmt.Errorf("%w: descriptor %d: %w", ErrNothing, i, err)
		}
		size := uint32(binary.LittleEndian.Uint16(d[12:]))
		if size > BufferSize {
			return nil, fmt.Errorf("%d bytes were written into a buffer of %d", size, BufferSize)
		}
		at, end := rxBuffers+i*BufferSize, status()&last != 0
		frame = append(frame, n.memory[at:at+size]...)
		n.arm(i)
		n.clean = (i + 1) % RingSize
		n.Bus.Write(igbvf.RDT(0), i)
		// A doorbell may be on its way still when the next frame comes.
		n.Bus.Read(igbvf.RDT(0))
		if end {
			return frame, nil
		}
	}
}

// wait looks until done says so.
func (n *NIC) wait(what string, done func() bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), n.Patience)
	defer cancel()
	again := time.NewTicker(poll)
	defer again.Stop()
	for !done() {
		select {
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: not within %v", what, n.Patience)
		}
	}
	return nil
}
