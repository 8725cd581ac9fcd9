// Package vfiouser is the server side of the vfio-user protocol, version 0.x,
// for the vfio-user-pci device of stock QEMU 10.1 and later. It is how a device
// process presents a PCI function to a virtual machine without a kernel driver.
//
// A [Device] is what is presented. A [Server] listens on a unix socket, serves
// one client at a time, turns its messages into calls of the Device, and lets
// the owner access guest memory through the client (DMARead, DMAWrite,
// PostWrite). [Memory] is guest memory mapped from the descriptors that the
// client passes. [Client] is the other side, for tests.
//
// Specification: docs/interop/vfio-user.rst in QEMU's source tree. Structures
// and constants that it takes from VFIO: <linux/vfio.h>.
//
// Every message is length-checked; a client that breaks the protocol ends its
// own session only. A descriptor that a message carries is either handed to
// exactly one callback, which then owns it, or closed.
package vfiouser

import "os"

// Indices of the regions of a PCI device (<linux/vfio.h>, VFIO_PCI_*_REGION_INDEX).
const (
	RegionBAR0   uint32 = 0
	RegionBAR3   uint32 = 3
	RegionConfig uint32 = 7
)

// Indices of the interrupt types of a PCI device (<linux/vfio.h>, VFIO_PCI_*_IRQ_INDEX).
const (
	IRQIndexMSIX  uint32 = 2
	IRQIndexError uint32 = 3
	// IRQIndexRequest is the request to release the device.
	IRQIndexRequest uint32 = 4
)

// Flags of a region (VFIO_REGION_INFO_FLAG_*). That it can be mapped is told by
// Region.Map.
const (
	RegionReadable uint32 = 1 << 0
	RegionWritable uint32 = 1 << 1
)

// Flags of an interrupt type (VFIO_IRQ_INFO_*).
const (
	IRQEventfd    uint32 = 1 << 0
	IRQMaskable   uint32 = 1 << 1
	IRQAutomasked uint32 = 1 << 2
	IRQNoResize   uint32 = 1 << 3
)

// Region describes one region of a device.
type Region struct {
	Index uint32 // 0 to 8, see the Region* constants
	Size  uint64 // bytes
	Flags uint32 // RegionReadable, RegionWritable
	// Map lets the client map parts of the region; nil for none. QEMU waits for
	// the answer to each write to a device with such a region, for a mapped
	// access could overtake a posted one.
	Map *RegionMap
}

// RegionMap is how a client reaches parts of a region by itself. All else of the
// region comes to the Device as ever.
type RegionMap struct {
	// File is passed to the client, which can then do with it what the file
	// allows. In a Device's Info it stays the Device's.
	File *os.File
	// Offset is where the region begins in File.
	Offset uint64
	// Areas of the region that the client maps, of whole pages, in ascending order.
	Areas []Area
}

// Area is a part of a region.
type Area struct{ Offset, Size uint64 }

// IRQ describes one interrupt type of a device.
type IRQ struct {
	Index uint32 // 0 to 4, see the IRQIndex* constants
	Count uint32 // vectors
	Flags uint32 // IRQEventfd and others
}

// Info describes a device. Regions and interrupt types that are not listed are
// reported with size or count 0. QEMU warns at start unless IRQIndexError has
// one vector.
type Info struct {
	Regions []Region
	IRQs    []IRQ
}

// IRQOp says what a SET_IRQS message asks for.
type IRQOp int

const (
	// IRQAssign connects vectors Start to Start+Count-1 to IRQRequest.Eventfds,
	// in place of what they were connected to.
	IRQAssign IRQOp = iota + 1
	// IRQDeassign disconnects vectors Start to Start+Count-1.
	IRQDeassign
	// IRQDisable disconnects all vectors of the index; Start and Count are 0.
	IRQDisable
	// IRQMask masks vectors Start to Start+Count-1.
	IRQMask
	// IRQUnmask unmasks vectors Start to Start+Count-1.
	IRQUnmask
	// IRQTrigger raises vectors Start to Start+Count-1 as the device would.
	IRQTrigger
)

// IRQRequest is one SET_IRQS message; Start+Count is within the index's count.
type IRQRequest struct {
	Op       IRQOp
	Index    uint32
	Start    uint32
	Count    uint32
	Eventfds []*Eventfd // for IRQAssign: Count of them; else nil
}

// DMAMap is one DMA_MAP message. Addr+Size does not overflow, and Size is not 0.
type DMAMap struct {
	Addr     uint64 // guest-physical
	Size     uint64 // bytes
	Offset   uint64 // of Addr within File
	Readable bool
	Writable bool
	File     *os.File // nil when the range cannot be mapped
}

// DMAUnmap is one DMA_UNMAP message: of the range [Addr, Addr+Size), or of
// everything when All is set (Addr and Size are then 0).
type DMAUnmap struct {
	Addr uint64
	Size uint64
	All  bool
}

// Device is what a Server presents to its client.
//
// All methods but Info are called by one goroutine of the Server, one at a time,
// in the order of the client's messages. While a callback runs, the client
// waits, and QEMU with it: it holds its global lock. So a callback must not
// block on anything that needs the client, above all on the Server's DMARead,
// DMAWrite or Fence, whose replies the same goroutine reads. An error becomes
// the errno reply of the syscall.Errno it wraps, else EIO; posted writes have no
// reply, so their errors are only logged.
type Device interface {
	// Info describes the device; it is called once per session.
	Info() Info
	// Connected is called when a client completed version negotiation.
	Connected()
	// Disconnected is called once for each Connected, after the session's last
	// other callback. The reason is nil when the client closed the connection
	// between two messages. The device disconnects its interrupts and unmaps
	// guest memory; device state stays, as the specification asks.
	Disconnected(reason error)
	// Reset is a function-level reset by the client.
	Reset() error
	// RegionRead fills p from a region. Offset and length are within the region.
	RegionRead(region uint32, off uint64, p []byte) error
	// RegionWrite writes p, which is valid only during the call, to a region.
	// Offset and length are within the region. The members of a coalesced
	// message (REGION_WRITE_MULTI) arrive as single writes.
	RegionWrite(region uint32, off uint64, p []byte) error
	// SetIRQs changes interrupt wiring. The device owns r.Eventfds from the call
	// on, also when it returns an error.
	SetIRQs(r IRQRequest) error
	// DMAMap announces guest memory. The device owns m.File from the call on,
	// also when it returns an error. See Memory.Map.
	DMAMap(m DMAMap) error
	// DMAUnmap withdraws guest memory: on return the device has no access under
	// way in that range and starts none. See Memory.Unmap.
	DMAUnmap(u DMAUnmap) error
}
