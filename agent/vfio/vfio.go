// Package vfio uses a VF through the kernel's VFIO: its registers, its
// interrupts, its resets, and what memory it reaches by DMA.
//
// Opening is split from use. A privileged process opens ([OpenGroup] or
// [OpenCdev]) and passes the descriptors on; the process that uses the VF
// ([Use]) needs no privilege but to lock the memory that the VF may reach.
//
// Two interfaces of the kernel do the same: a group in a container with a
// type 1 IOMMU (<linux/vfio.h>), on every kernel with VFIO, and a device cdev
// bound to an iommufd (<linux/iommufd.h>, Linux 6.6 and later), which alone
// can tell which pages the VF has written, where the IOMMU has dirty bits.
package vfio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// API says which of the kernel's interfaces the descriptors of a VF are of.
type API string

// The interfaces, with the descriptors of each in their order.
const (
	// Group: container, group, device.
	Group API = "group"
	// IOMMUFD: iommufd, device.
	IOMMUFD API = "iommufd"
)

// ErrBusy is what opening a VF wraps that another process uses.
var ErrBusy = errors.New("another process uses it: VFIO lets one only")

var (
	pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)
	cdevName   = regexp.MustCompile(`^vfio[0-9]{1,9}$`)
)

// Dir is where the kernel's VFIO device nodes are.
const Dir = "/dev/vfio"

// IOMMUNode is the device node of iommufd.
const IOMMUNode = "/dev/iommu"

// OpenGroup opens the VF with this PCI address through its IOMMU group. The
// files, in the order of [Group], belong to the caller. All functions of the
// group must be bound to vfio-pci; a VF behind a PCIe root port with ACS has
// a group of its own.
func OpenGroup(group int, address string) ([]*os.File, error) {
	if group < 0 || !pciAddress.MatchString(address) {
		return nil, fmt.Errorf("VF %.32q in IOMMU group %d: want a PCI address such as 0000:03:10.0, and a group", address, group)
	}
	return openGroup(kernel{}, filepath.Join(Dir, "vfio"), filepath.Join(Dir, strconv.Itoa(group)), address)
}

func openGroup(k ioctler, containerNode, groupNode, address string) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
			err = fmt.Errorf("VF %s, %s: %w", address, groupNode, err)
		}
	}()
	for _, node := range []string{containerNode, groupNode} {
		f, err := openNode(node)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	container, group := files[0], files[1]
	version, err := k.ioctl(container, getAPIVersion, nil)
	if err != nil {
		return files, fmt.Errorf("VFIO_GET_API_VERSION: %w", err)
	}
	if version != apiVersion {
		return files, fmt.Errorf("the kernel has VFIO API version %d, want %d", version, apiVersion)
	}
	if has, err := k.ioctlValue(container, checkExtension, type1v2IOMMU); err != nil || has == 0 {
		return files, fmt.Errorf("the kernel has no type 1 version 2 IOMMU (%v): turn the IOMMU on (intel_iommu=on or amd_iommu=on) and load vfio_iommu_type1", err)
	}
	status := groupStatus{argsz: uint32(unsafe.Sizeof(groupStatus{}))}
	if _, err := k.ioctl(group, groupGetStatus, unsafe.Pointer(&status)); err != nil {
		return files, fmt.Errorf("VFIO_GROUP_GET_STATUS: %w", err)
	}
	if status.flags&groupViable == 0 {
		return files, errors.New("the IOMMU group is not viable: bind each of its functions to vfio-pci, or to no driver")
	}
	fd, err := descriptor(container)
	if err != nil {
		return files, err
	}
	if _, err := k.ioctl(group, groupSetContainer, unsafe.Pointer(&fd)); err != nil {
		return files, fmt.Errorf("VFIO_GROUP_SET_CONTAINER: %w", err)
	}
	if _, err := k.ioctlValue(container, setIOMMU, type1v2IOMMU); err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w: the IOMMU does not remap interrupts; turn interrupt remapping on", err)
		}
		return files, fmt.Errorf("VFIO_SET_IOMMU: %w", err)
	}
	name := append([]byte(address), 0)
	dev, err := k.ioctl(group, groupGetDeviceFD, unsafe.Pointer(&name[0]))
	if err != nil {
		return files, fmt.Errorf("VFIO_GROUP_GET_DEVICE_FD: %w", err)
	}
	unix.CloseOnExec(dev)
	return append(files, os.NewFile(uintptr(dev), "vfio "+address)), nil
}

// OpenCdev opens a VF through its VFIO device cdev, whose name is that of the
// directory in the function's vfio-dev directory in sysfs, such as vfio0. The
// files, in the order of [IOMMUFD], belong to the caller.
func OpenCdev(name string) (files []*os.File, err error) {
	if !cdevName.MatchString(name) {
		return nil, fmt.Errorf("VFIO device %.32q: want a name such as vfio0", name)
	}
	for _, node := range []string{IOMMUNode, filepath.Join(Dir, "devices", name)} {
		f, err := openNode(node)
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("VFIO device %s: %w", name, err)
		}
		files = append(files, f)
	}
	return files, nil
}

// ProbeCdev binds a VF's device cdev to an iommufd and lets go of it at once.
// It wraps [ErrBusy] while a process uses the VF.
func ProbeCdev(name string) error {
	files, err := OpenCdev(name)
	if err != nil {
		return err
	}
	defer closeAll(files)
	_, err = bind(kernel{}, files[0], files[1])
	return err
}

func openNode(node string) (*os.File, error) {
	f, err := os.OpenFile(node, os.O_RDWR, 0)
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return f, err
}

// HasIOMMUFD tells whether the node has an iommufd; each function must have a
// device cdev too for it to be of use.
func HasIOMMUFD() bool {
	_, err := os.Stat(IOMMUNode)
	return err == nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// descriptor returns the number of f's descriptor, for an ioctl that names it.
func descriptor(f *os.File) (int32, error) {
	var n int32
	c, err := f.SyscallConn()
	if err == nil {
		err = c.Control(func(fd uintptr) { n = int32(fd) })
	}
	return n, err
}

// ioctler calls the kernel. Tests replace it.
type ioctler interface {
	// ioctl passes a pointer, which may be nil.
	ioctl(f *os.File, request uint, arg unsafe.Pointer) (int, error)
	// ioctlValue passes a number.
	ioctlValue(f *os.File, request uint, arg uintptr) (int, error)
}

// kernel is the real one.
type kernel struct{}

func (kernel) ioctl(f *os.File, request uint, arg unsafe.Pointer) (int, error) {
	return control(f, func(fd uintptr) (uintptr, unix.Errno) {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(arg))
		return r, errno
	})
}

func (kernel) ioctlValue(f *os.File, request uint, arg uintptr) (int, error) {
	return control(f, func(fd uintptr) (uintptr, unix.Errno) {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), arg)
		return r, errno
	})
}

// control calls do with the file's descriptor, which stays open meanwhile,
// until a signal does not interrupt it.
func control(f *os.File, do func(fd uintptr) (uintptr, unix.Errno)) (int, error) {
	c, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var r uintptr
	errno := unix.EINTR
	err = c.Control(func(fd uintptr) {
		for errno == unix.EINTR {
			r, errno = do(fd)
		}
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return int(r), err
}
