package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/family/ixgbevf"
)

// bar is how a driver reaches the registers of its VF.
type bar interface {
	Read(off uint32) uint32
	Write(off, v uint32)
}

// Layout of the guest's memory, from address 0. All receive queues share their
// buffers, and so do all transmit queues.
const (
	descriptorSize = 16
	ringLen        = 512
	ringBytes      = ringLen * descriptorSize
	bufferSize     = 2048
	atRings        = 0x10000
	atRXBuffers    = 0x100000
	atTXBuffers    = 0x200000
	ramSize        = 0x300000
)

func rxRing(q int) uint64 { return atRings + uint64(2*q)*ringBytes }
func txRing(q int) uint64 { return atRings + uint64(2*q+1)*ringBytes }

// driver uses a VF as ixgbevf does.
type driver struct {
	bar bar
	ram []byte
	// bits are read-clear bits of the mailbox register that it has read.
	bits uint32
	// next is the next descriptor of queue 0 to use or to look at, tail the
	// receive ring's.
	txNext, rxNext, rxTail int
}

// newRAM makes a guest's memory: the file to share, and the guest's view of it.
func newRAM() (*os.File, []byte, error) {
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, nil, err
	}
	file := os.NewFile(uintptr(fd), "ram")
	if err := file.Truncate(ramSize); err != nil {
		file.Close()
		return nil, nil, err
	}
	ram, err := unix.Mmap(fd, 0, ramSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		file.Close()
		return nil, nil, err
	}
	return file, ram, nil
}

// answerLimit bounds a wait for the VF.
const answerLimit = 5 * time.Second

func await(what string, done func() bool) error {
	for deadline := time.Now().Add(answerLimit); !done(); {
		if time.Now().After(deadline) {
			return fmt.Errorf("no %s within %v", what, answerLimit)
		}
	}
	return nil
}

func (d *driver) awaitMailbox(bit uint32) error {
	return await("answer of the PF", func() bool {
		d.bits |= d.bar.Read(ixgbevf.VFMAILBOX) & ixgbevf.MailboxReadClear
		seen := d.bits & bit
		d.bits &^= seen
		return seen != 0
	})
}

// call sends a message to the PF, which must agree.
func (d *driver) call(words ...uint32) error {
	d.bar.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	for i, w := range words {
		d.bar.Write(ixgbevf.VFMBMEM+4*uint32(i), w)
	}
	d.bar.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	if err := errors.Join(d.awaitMailbox(ixgbevf.MailboxPFACK), d.awaitMailbox(ixgbevf.MailboxPFSTS)); err != nil {
		return err
	}
	reply := d.bar.Read(ixgbevf.VFMBMEM)
	d.bar.Write(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
	if reply&ixgbevf.MsgACK == 0 {
		return fmt.Errorf("the PF answered message %#x with %#x", words[0], reply)
	}
	return nil
}

// bringUp resets the VF and turns the queues on, their receive rings filled.
func (d *driver) bringUp(queues int) error {
	d.bar.Write(ixgbevf.VTEIMC, ixgbevf.VectorMask)
	d.bar.Write(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	low, high := le.Uint32(guestMAC), uint32(le.Uint16(guestMAC[4:]))
	err := errors.Join(
		d.awaitMailbox(ixgbevf.MailboxRSTD),
		d.call(ixgbevf.MsgReset),
		d.call(ixgbevf.MsgAPINegotiate, ixgbevf.API14),
		d.call(ixgbevf.MsgGetQueues, 0, 0, 0, 0),
		d.call(ixgbevf.MsgSetLPE, 1518),
		d.call(ixgbevf.MsgSetMAC, low, high),
		d.call(ixgbevf.MsgUpdateXcastMode, ixgbevf.XcastMulti),
		d.call(ixgbevf.MsgSetVLAN|1<<ixgbevf.MsgInfoShift, 0),
		d.call(ixgbevf.MsgSetMulticast|2<<ixgbevf.MsgInfoShift, 0x0230001),
	)
	if err != nil {
		return err
	}
	for i := range ringLen {
		for q := range queues {
			le.PutUint64(d.ram[rxRing(q)+uint64(i)*descriptorSize:], rxBuffer(i))
		}
	}
	for q := range queues {
		d.bar.Write(ixgbevf.VFTDBAL(q), uint32(txRing(q)))
		d.bar.Write(ixgbevf.VFTDBAH(q), 0)
		d.bar.Write(ixgbevf.VFTDLEN(q), ringBytes)
		d.bar.Write(ixgbevf.VFTDH(q), 0)
		d.bar.Write(ixgbevf.VFTDT(q), 0)
		d.bar.Write(ixgbevf.VFTXDCTL(q), 0x80120|ixgbevf.QueueEnable)
		d.bar.Write(ixgbevf.VFRDBAL(q), uint32(rxRing(q)))
		d.bar.Write(ixgbevf.VFRDBAH(q), 0)
		d.bar.Write(ixgbevf.VFRDLEN(q), ringBytes)
		d.bar.Write(ixgbevf.VFRDH(q), 0)
		d.bar.Write(ixgbevf.VFSRRCTL(q), 1<<25|bufferSize>>10)
		d.bar.Write(ixgbevf.VFRXDCTL(q), ixgbevf.QueueEnable)
		d.bar.Write(ixgbevf.VFRDT(q), ringLen-1)
		if q%2 == 0 {
			d.bar.Write(ixgbevf.VTIVAR(q/2), 0x80808080)
		}
	}
	d.rxTail = ringLen - 1
	d.bar.Write(ixgbevf.VTIVARMisc, 0x81)
	d.bar.Write(ixgbevf.VTEIAC, 3)
	d.bar.Write(ixgbevf.VTEIAM, 3)
	d.bar.Write(ixgbevf.VTEIMS, 3)
	return nil
}

func rxBuffer(i int) uint64 { return atRXBuffers + uint64(i)*bufferSize }
func txBuffer(i int) uint64 { return atTXBuffers + uint64(i)*bufferSize }

// fillFilters asks the PF for all the filters it has.
func (d *driver) fillFilters(macVLANs, vlans int) error {
	for i := range macVLANs {
		mac := uint32(i)<<24 | 0x00_54_52
		err := d.call(ixgbevf.MsgSetMACVLAN|uint32(i+1)<<ixgbevf.MsgInfoShift, mac, uint32(0x1000+i))
		if err != nil {
			return err
		}
	}
	for id := range vlans - 1 { // VLAN 0 is there
		if err := d.call(ixgbevf.MsgSetVLAN|1<<ixgbevf.MsgInfoShift, uint32(64*(id+1))); err != nil {
			return err
		}
	}
	words := make([]uint32, 1+ixgbevf.MaxMulticast/2)
	words[0] = ixgbevf.MsgSetMulticast | ixgbevf.MaxMulticast<<ixgbevf.MsgInfoShift
	for i := range words[1:] {
		words[1+i] = uint32(2*i*37)&0xfff | uint32((2*i+1)*37)&0xfff<<16
	}
	return d.call(words...)
}
