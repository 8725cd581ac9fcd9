package vfiouser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// Commands of the protocol ("Commands" in the vfio-user specification).
const (
	cmdVersion            uint16 = 1
	cmdDMAMap             uint16 = 2
	cmdDMAUnmap           uint16 = 3
	cmdDeviceGetInfo      uint16 = 4
	cmdGetRegionInfo      uint16 = 5
	cmdGetRegionIOFDs     uint16 = 6
	cmdGetIRQInfo         uint16 = 7
	cmdSetIRQs            uint16 = 8
	cmdRegionRead         uint16 = 9
	cmdRegionWrite        uint16 = 10
	cmdDMARead            uint16 = 11
	cmdDMAWrite           uint16 = 12
	cmdDeviceReset        uint16 = 13
	cmdRegionWriteMulti   uint16 = 15
	cmdDeviceFeature      uint16 = 16
	cmdMigrationDataRead  uint16 = 17
	cmdMigrationDataWrite uint16 = 18
)

// Header flags ("Header" in the specification).
const (
	flagTypeMask uint32 = 0xf
	flagReply    uint32 = 0x1
	flagNoReply  uint32 = 0x10
	flagError    uint32 = 0x20
)

// Sizes in bytes. Payload sizes do not include the header.
const (
	headerSize       = 16
	deviceInfoSize   = 16
	regionInfoSize   = 32
	sparseSize       = 16 // struct vfio_region_info_cap_sparse_mmap
	areaSize         = 16 // one of its areas
	irqInfoSize      = 16
	irqSetSize       = 20
	dmaMapSize       = 32
	dmaUnmapSize     = 24
	regionAccessSize = 16 // offset, region, count
	dmaAccessSize    = 16 // address, count
	writeMultiSize   = 24 // one write: offset, region, count, 8 bytes of data

	// maxTransfer is the largest count of one region or DMA access; it is
	// announced as max_data_xfer_size and is the specification's default.
	maxTransfer = 1 << 20

	// maxMessage bounds every message that is received.
	maxMessage = headerSize + dmaAccessSize + maxTransfer

	// maxFDs bounds the descriptors of one message (max_msg_fds). QEMU never
	// sends more (VFIO_USER_MAX_MAX_FDS in hw/vfio-user/protocol.h).
	maxFDs = 16

	// dmaChunk is the largest server-initiated access. QEMU 11.1 stops reading
	// its socket for good when a DMA_READ reply exceeds about 210 KB.
	dmaChunk = 64 << 10
)

// Flags of DMA_MAP and DMA_UNMAP.
const (
	dmaFlagRead  uint32 = 1 << 0
	dmaFlagWrite uint32 = 1 << 1

	unmapFlagAll uint32 = 1 << 1 // VFIO_DMA_UNMAP_FLAG_ALL in <linux/vfio.h>
)

// Flags of SET_IRQS.
const (
	irqDataNone      uint32 = 1 << 0
	irqDataBool      uint32 = 1 << 1
	irqDataEventfd   uint32 = 1 << 2
	irqDataMask             = irqDataNone | irqDataBool | irqDataEventfd
	irqActionMask    uint32 = 1 << 3
	irqActionUnmask  uint32 = 1 << 4
	irqActionTrigger uint32 = 1 << 5
	irqActionsMask          = irqActionMask | irqActionUnmask | irqActionTrigger
)

// Of DEVICE_GET_REGION_INFO, in addition to the flags of a Region: the region can
// be mapped, and capabilities follow, among them the areas that can be mapped.
const (
	regionFlagMap  uint32 = 1 << 2 // VFIO_REGION_INFO_FLAG_MMAP
	regionFlagCaps uint32 = 1 << 3 // VFIO_REGION_INFO_FLAG_CAPS
	capSparse      uint16 = 1      // VFIO_REGION_INFO_CAP_SPARSE_MMAP
)

// PCI layout of VFIO (<linux/vfio.h>): the counts that DEVICE_GET_INFO reports.
const (
	numRegions = 9
	numIRQs    = 5

	deviceFlagReset uint32 = 1 << 0
	deviceFlagPCI   uint32 = 1 << 1
)

var (
	// ErrNotConnected is returned by server-initiated requests when no client
	// is connected, or when the client went away before it answered.
	ErrNotConnected = errors.New("vfio-user: no client is connected")

	// ErrProtocol is wrapped by errors that say that the peer broke the protocol.
	ErrProtocol = errors.New("vfio-user: protocol violation")
)

// le is the byte order of the wire. The specification says that of the host;
// all hosts this can run on (amd64, arm64) are little-endian.
var le = binary.LittleEndian

// header is the fixed start of every message.
type header struct {
	id    uint16
	cmd   uint16
	size  uint32 // of the whole message
	flags uint32
	errno uint32
}

func (h header) put(b []byte) {
	le.PutUint16(b[0:], h.id)
	le.PutUint16(b[2:], h.cmd)
	le.PutUint32(b[4:], h.size)
	le.PutUint32(b[8:], h.flags)
	le.PutUint32(b[12:], h.errno)
}

// parseHeader reads a header from b, which holds headerSize bytes.
func parseHeader(b []byte) (header, error) {
	h := header{
		id:    le.Uint16(b[0:]),
		cmd:   le.Uint16(b[2:]),
		size:  le.Uint32(b[4:]),
		flags: le.Uint32(b[8:]),
		errno: le.Uint32(b[12:]),
	}
	if h.size < headerSize || h.size > maxMessage {
		return h, fmt.Errorf("%w: message size %d is not within [%d, %d]", ErrProtocol, h.size, headerSize, maxMessage)
	}
	if t := h.flags & flagTypeMask; t > flagReply {
		return h, fmt.Errorf("%w: message type %d is neither command nor reply", ErrProtocol, t)
	}
	return h, nil
}

func (h header) isReply() bool { return h.flags&flagTypeMask == flagReply }

// errnoOf returns the number that an error reply carries for err: that of the
// syscall.Errno it wraps, else EIO.
func errnoOf(err error) syscall.Errno {
	if e, ok := errors.AsType[syscall.Errno](err); ok && e != 0 {
		return e
	}
	return syscall.EIO
}

// badRequest is an error that is answered with EINVAL.
func badRequest(format string, args ...any) error {
	return fmt.Errorf("%w: %s: %w", ErrProtocol, fmt.Sprintf(format, args...), syscall.EINVAL)
}
