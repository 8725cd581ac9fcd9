package gate

import "encoding/binary"

// Layout of the image: four clusters of 4 KiB (header, refcount table, refcount
// block, L1 table) that describe an empty disk of 1 MiB.
const (
	clusterBits = 12
	clusterSize = 1 << clusterBits
	clusters    = 4
	virtualSize = 1 << 20

	// ImageSize is the size in bytes of the export.
	ImageSize = clusters * clusterSize
)

// Image returns the bytes of the export as they are before any write: an empty
// qcow2 image, version 3 (docs/interop/qcow2.rst in QEMU's source tree). It is
// always the same, so both sides of a migration present equal images.
func Image() []byte {
	const (
		refcountTable = 1 * clusterSize
		refcountBlock = 2 * clusterSize
		l1Table       = 3 * clusterSize
		headerLength  = 104
	)
	be := binary.BigEndian
	b := make([]byte, ImageSize)
	be.PutUint32(b[0:], 0x514649fb) // "QFI\xfb"
	be.PutUint32(b[4:], 3)          // version
	be.PutUint32(b[20:], clusterBits)
	be.PutUint64(b[24:], virtualSize)
	be.PutUint32(b[36:], 1) // L1 entries; one covers 2 MiB at this cluster size
	be.PutUint64(b[40:], l1Table)
	be.PutUint64(b[48:], refcountTable)
	be.PutUint32(b[56:], 1) // clusters of the refcount table
	be.PutUint32(b[96:], 4) // refcounts of 1<<4 bits
	be.PutUint32(b[100:], headerLength)
	// The header extensions end at once: 8 zero bytes follow the header.

	be.PutUint64(b[refcountTable:], refcountBlock)
	for i := range clusters {
		be.PutUint16(b[refcountBlock+2*i:], 1)
	}
	return b
}
