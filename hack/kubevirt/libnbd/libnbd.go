// Package libnbd has the declarations of libguestfs.org/libnbd that KubeVirt's
// virt-launcher is compiled against, and none of its function: that module is
// not to be had from a Go module proxy. virt-launcher calls it for backups of
// a VM's disks only. Create refuses, so a backup fails with a clear message.
package libnbd

import "errors"

// The names and flags of the NBD protocol's metadata contexts, as in the
// protocol's specification and QEMU's docs/interop/nbd.rst.
const (
	CONTEXT_BASE_ALLOCATION          = "base:allocation"
	CONTEXT_QEMU_DIRTY_BITMAP        = "qemu:dirty-bitmap:"
	STATE_HOLE                uint32 = 1
	STATE_ZERO                uint32 = 2
	STATE_DIRTY               uint32 = 1
)

var errAbsent = errors.New("this build has no libnbd, which backups of disks need")

// LibnbdExtent is a stretch of a disk and its state.
type LibnbdExtent struct {
	Length uint64
	Flags  uint64
}

// BlockStatus64OptArgs and PreadOptArgs are never filled.
type (
	BlockStatus64OptArgs struct{}
	PreadOptArgs         struct{}
)

// Libnbd is a handle that cannot be had.
type Libnbd struct{}

// Create refuses.
func Create() (*Libnbd, error) { return nil, errAbsent }

// Close does nothing.
func (*Libnbd) Close() error { return nil }

// AddMetaContext refuses, as all that follow.
func (*Libnbd) AddMetaContext(string) error               { return errAbsent }
func (*Libnbd) CanMetaContext(string) (bool, error)       { return false, errAbsent }
func (*Libnbd) GetSize() (uint64, error)                  { return 0, errAbsent }
func (*Libnbd) SetExportName(string) error                { return errAbsent }
func (*Libnbd) ConnectUnix(string) error                  { return errAbsent }
func (*Libnbd) Pread([]byte, uint64, *PreadOptArgs) error { return errAbsent }
func (*Libnbd) BlockStatus64(uint64, uint64, func(string, uint64, []LibnbdExtent, *int) int, *BlockStatus64OptArgs) error {
	return errAbsent
}
