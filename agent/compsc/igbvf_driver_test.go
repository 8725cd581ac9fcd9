package compsc

import (
	"encoding/binary"
	"log/slog"
	"testing"
	"time"

	"compsc.io/compsc/agent/family/igbvf"
)

// newIGB puts an engine on a fake device.
func newIGB(t *testing.T, d *fakeIGB, device uint16) *VF {
	t.Helper()
	f, err := igbvf.ForDevice(igbvf.VendorID, device)
	if err != nil {
		t.Fatal(err)
	}
	return New(f, d, Options{VendorID: igbvf.VendorID, DeviceID: device, Clock: &testClock{now: time.Unix(1000, 0)},
		Memory: d.mem, Scratch: fakeScratch{d.mem}, Logger: slog.New(slog.DiscardHandler)})
}

// sendIGB has the guest's driver send a message and take the reply, as igbvf
// does.
func sendIGB(t *testing.T, v *VF, words ...uint32) []uint32 {
	t.Helper()
	v.GuestWrite(igbvf.V2PMAILBOX, igbvf.MailboxVFU)
	if v.GuestRead(igbvf.V2PMAILBOX)&igbvf.MailboxVFU == 0 {
		t.Fatalf("message %#x: the mailbox is busy", words[0])
	}
	for i, w := range words {
		v.GuestWrite(igbvf.VMBMEM+4*uint32(i), w)
	}
	v.GuestWrite(igbvf.V2PMAILBOX, igbvf.MailboxREQ)
	if got := v.GuestRead(igbvf.V2PMAILBOX); got&igbvf.MailboxPFSTS == 0 {
		t.Fatalf("message %#x: no reply, V2PMAILBOX reads %#x", words[0], got)
	}
	reply := []uint32{v.GuestRead(igbvf.VMBMEM), v.GuestRead(igbvf.VMBMEM + 4), v.GuestRead(igbvf.VMBMEM + 8)}
	v.GuestWrite(igbvf.V2PMAILBOX, igbvf.MailboxACK)
	return reply
}

// Layout of the fake guest's memory.
const (
	igbRings   = uint64(1<<32 + 0x40000)
	igbBuffers = uint64(0x100000)
)

func igbTXRing(n int) uint64 { return igbRings + 0x10000*uint64(n) }
func igbRXRing(n int) uint64 { return igbRings + 0x10000*uint64(n) + 0x8000 }

// postIGB puts n data descriptors on a transmit ring, with buffers that are
// told apart by their address, and rings the doorbell.
func postIGB(v *VF, d *fakeIGB, queue, n int) {
	tail := v.GuestRead(igbvf.TDT(queue))
	for range n {
		desc := binary.LittleEndian.AppendUint64(nil, igbBuffers+uint64(queue)<<20+uint64(tail)*2048)
		desc = binary.LittleEndian.AppendUint32(desc, 0x2b300000|60)
		desc = binary.LittleEndian.AppendUint32(desc, 60<<14)
		_ = d.mem.WriteAt(igbTXRing(queue)+16*uint64(tail), desc)
		tail = (tail + 1) % ringSize
	}
	v.GuestWrite(igbvf.TDT(queue), tail)
}

// bootIGB does what Linux's driver does until the interface is up, with one
// VLAN and a further address, on all queue pairs; and leaves the rings
// somewhere in their middle.
func bootIGB(t *testing.T, v *VF, d *fakeIGB) {
	t.Helper()
	w := v.GuestWrite
	w(igbvf.EIMC, 7)
	w(igbvf.CTRL, igbvf.CtrlRST)
	for range 200 {
		if v.GuestRead(igbvf.V2PMAILBOX)&(igbvf.MailboxRSTI|igbvf.MailboxRSTD) == 0 {
			break
		}
	}
	sendIGB(t, v, igbvf.MsgReset)
	sendIGB(t, v, igbvf.MsgSetMAC, macLow, macHigh)
	sendIGB(t, v, igbvf.MsgSetMulticast|3<<16, 0x0a1b0c2d, 0x0333)
	sendIGB(t, v, igbvf.MsgSetMAC|igbvf.MACFilterClear<<16, 0, 0)
	sendIGB(t, v, igbvf.MsgSetMAC|igbvf.MACFilterAdd<<16, 0x33221154, 0x5544)
	sendIGB(t, v, igbvf.MsgSetVLAN|1<<16, 0)
	sendIGB(t, v, igbvf.MsgSetVLAN|1<<16, 77)
	sendIGB(t, v, igbvf.MsgSetPromisc|igbvf.PromiscMulticast<<16)
	sendIGB(t, v, igbvf.MsgSetLPE, 1522)
	for n := range d.queues {
		w(igbvf.TXDCTL(n), 0)
		w(igbvf.TDLEN(n), ringSize*16)
		w(igbvf.TDBAL(n), uint32(igbTXRing(n)))
		w(igbvf.TDBAH(n), uint32(igbTXRing(n)>>32))
		w(igbvf.TDH(n), 0)
		w(igbvf.TDT(n), 0)
		w(igbvf.DCATXCTRL(n), 0x2200)
		w(igbvf.TXDCTL(n), 0x00010108|igbvf.QueueEnable)
		w(igbvf.SRRCTL(n), 0x82000002)
		w(igbvf.RXDCTL(n), 0)
		w(igbvf.RDBAL(n), uint32(igbRXRing(n)))
		w(igbvf.RDBAH(n), uint32(igbRXRing(n)>>32))
		w(igbvf.RDLEN(n), ringSize*16)
		w(igbvf.DCARXCTRL(n), 0xa200)
		w(igbvf.RDH(n), 0)
		w(igbvf.RDT(n), 0)
		w(igbvf.RXDCTL(n), 0x00010810|igbvf.QueueEnable)
		w(igbvf.RDT(n), ringSize-1)
		_ = d.mem.WriteAt(igbTXRing(n), contextDescriptor(1, byte(n+1)))
		w(igbvf.TDT(n), 1)
		postIGB(v, d, n, 20+n)
	}
	// Head write-back is used by other drivers.
	w(igbvf.TDWBAL(0), 0x7000|igbvf.TDWBALEnable)
	w(igbvf.TDWBAH(0), 2)
	for n := range igbvf.MSIXVectors {
		w(igbvf.EITR(n), uint32(488+4*n))
	}
	w(igbvf.PSRTYPE, 0x330)
	ivar := uint32(0x8081)
	if d.queues > 1 {
		ivar |= 0x80810000
	}
	w(igbvf.IVAR0, ivar)
	w(igbvf.IVARMisc, 0x82)
	w(igbvf.EIAC, 7)
	w(igbvf.EIAM, 7)
	w(igbvf.EIMS, 7)
	w(igbvf.EIMS, 2) // as at the end of each poll
	if got := d.receive(10); got != 10 {
		t.Fatalf("received %d of 10 frames", got)
	}
}
