package compsc

import (
	"errors"
	"fmt"

	"compsc.io/compsc/agent/family"
)

// Memory is memory as the device reaches it by DMA. Both methods move all of
// p or fail, and must be safe for concurrent use. What is written through it
// to the guest's memory must be counted as written by the device.
type Memory interface {
	ReadAt(addr uint64, p []byte) error
	WriteAt(addr uint64, p []byte) error
}

// Scratch is memory of the host that the device reaches by DMA and the guest
// does not use: what a VF's rings are worked on with. With VFIO it is an IOVA
// range of our own, with a model an address range beyond the guest's RAM.
//
// Each queue gets an equal part of it, which must hold a ring as long as the
// guest's and 4 KiB more. 68 KiB a queue are enough for the 4,096 descriptors
// that drivers allow, 1,028 KiB for the longest ring there can be.
type Scratch interface {
	Memory
	// Range is where the device finds it, and its size in bytes. The address
	// is a multiple of 4 KiB.
	Range() (addr uint64, size int)
}

// Looper is a capability of a Backend: it can have the PF send frames to its
// VF past the wire. Loop returns once the frame is with the VF's filters; it
// fails when the PF does not offer this now. Frames must pass the filters to
// arrive, and their loss is no error.
type Looper interface {
	Loop(frame []byte) error
}

// spareSize is what a queue's part of the scratch memory has besides a ring.
const spareSize = 4 << 10

// scratchOf gives the address of the queue's part of the scratch memory: a
// ring's room of size bytes first, and spareSize bytes at spare behind it.
func (v *VF) scratchOf(q family.Queue, size uint32) (ring, spare uint64, err error) {
	if v.o.Scratch == nil {
		return 0, 0, errors.New("there is no scratch memory")
	}
	addr, total := v.o.Scratch.Range()
	part := total / len(v.queues) / spareSize * spareSize
	if int(size)+spareSize > part {
		return 0, 0, fmt.Errorf("%s: a ring of %d bytes does not fit into the scratch memory, which has %d for each queue: "+
			"provide more", queueName(q), size, max(part-spareSize, 0))
	}
	for i, o := range v.queues {
		if o.Ctl == q.Ctl {
			addr += uint64(i * part)
		}
	}
	return addr, addr + uint64(part-spareSize), nil
}

// place is where a queue's registers put its ring.
type place struct {
	base uint64
	size uint32 // in descriptors
}

// placeOf reads a ring's place as the guest programmed it.
func (v *VF) placeOf(q family.Queue) place {
	return place{
		base: uint64(v.current(q.BAH))<<32 | uint64(v.current(q.BAL)),
		size: v.current(q.LEN) / q.DescriptorSize,
	}
}
