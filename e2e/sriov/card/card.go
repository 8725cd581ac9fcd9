// Package card works on the SR-IOV cards of a node by the kernel's own
// interfaces alone, so that a test does not depend on what it tests.
package card

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/vfio"
)

const (
	devices = "/sys/bus/pci/devices"
	probe   = "/sys/bus/pci/drivers_probe"
)

// PF is a card: a physical function with its network interface.
type PF struct {
	// Name is the network interface's name, Address the PCI address.
	Name, Address string
}

// List returns the node's cards in the order of their PCI addresses.
func List() ([]PF, error) {
	paths, err := filepath.Glob("/sys/class/net/*/device/sriov_totalvfs")
	if err != nil {
		return nil, err
	}
	var cards []PF
	for _, path := range paths {
		device := filepath.Dir(path)
		address, err := filepath.EvalSymlinks(device)
		if err != nil {
			return nil, err
		}
		cards = append(cards, PF{Name: filepath.Base(filepath.Dir(device)), Address: filepath.Base(address)})
	}
	slices.SortFunc(cards, func(a, b PF) int {
		if a.Address < b.Address {
			return -1
		}
		return 1
	})
	return cards, nil
}

// Link is the card's network interface.
func (p PF) Link() (netlink.Link, error) { return netlink.LinkByName(p.Name) }

// Up sets the network interface up, without which the driver serves no VF.
func (p PF) Up() error {
	link, err := p.Link()
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// MakeVFs makes n VFs, which no driver touches. There must be none.
func (p PF) MakeVFs(n int) ([]VF, error) {
	device := filepath.Join(devices, p.Address)
	for _, set := range []struct {
		file  string
		value int
	}{{"sriov_drivers_autoprobe", 0}, {"sriov_numvfs", n}} {
		if err := os.WriteFile(filepath.Join(device, set.file), []byte(strconv.Itoa(set.value)), 0); err != nil {
			return nil, fmt.Errorf("card %s: %w", p.Name, err)
		}
	}
	vfs, err := p.VFs()
	if err == nil && len(vfs) != n {
		err = fmt.Errorf("card %s has %d VFs after it was given %d", p.Name, len(vfs), n)
	}
	return vfs, err
}

// VFs returns the VFs that there are.
func (p PF) VFs() ([]VF, error) {
	var vfs []VF
	for {
		to, err := os.Readlink(filepath.Join(devices, p.Address, fmt.Sprintf("virtfn%d", len(vfs))))
		if errors.Is(err, fs.ErrNotExist) {
			return vfs, nil
		}
		if err != nil {
			return nil, fmt.Errorf("card %s: %w", p.Name, err)
		}
		vfs = append(vfs, VF{PF: p, Number: len(vfs), Address: filepath.Base(to)})
	}
}

// RemoveVFs removes all VFs.
func (p PF) RemoveVFs() error {
	return os.WriteFile(filepath.Join(devices, p.Address, "sriov_numvfs"), []byte("0"), 0)
}

// VF is one virtual function.
type VF struct {
	PF PF
	// Number is its number on the card.
	Number int
	// Address is its PCI address.
	Address string
}

// Driver is the driver that it is bound to, empty for none.
func (v VF) Driver() (string, error) {
	to, err := os.Readlink(filepath.Join(devices, v.Address, "driver"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return filepath.Base(to), err
}

// Group is the number of its IOMMU group.
func (v VF) Group() (int, error) {
	to, err := os.Readlink(filepath.Join(devices, v.Address, "iommu_group"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(filepath.Base(to))
}

// Cdev is the name of its VFIO device cdev; it is bound to vfio-pci, and the
// kernel has such.
func (v VF) Cdev() (string, error) {
	paths, err := filepath.Glob(filepath.Join(devices, v.Address, "vfio-dev", "vfio*", "dev"))
	if err == nil && len(paths) != 1 {
		err = fmt.Errorf("VF %s has %d VFIO device cdevs, want 1", v.Address, len(paths))
	}
	if err != nil {
		return "", err
	}
	return filepath.Base(filepath.Dir(paths[0])), nil
}

// Open opens the VF, which is bound to vfio-pci, by the interface that the
// node is to be used by.
func (v VF) Open() (vfio.API, []*os.File, error) {
	api, err := API()
	if err != nil {
		return "", nil, err
	}
	if api == vfio.IOMMUFD {
		name, err := v.Cdev()
		if err != nil {
			return api, nil, err
		}
		files, err := vfio.OpenCdev(name)
		return api, files, err
	}
	group, err := v.Group()
	if err != nil {
		return api, nil, err
	}
	files, err := vfio.OpenGroup(group, v.Address)
	return api, files, err
}

// API is the interface of VFIO that the node's VFs are to be used by, which
// whoever runs the node says in COMPSC_VFIO_API.
func API() (vfio.API, error) {
	api := vfio.API(os.Getenv("COMPSC_VFIO_API"))
	if api != vfio.Group && api != vfio.IOMMUFD {
		return "", fmt.Errorf("COMPSC_VFIO_API is %.32q: want %s or %s", api, vfio.Group, vfio.IOMMUFD)
	}
	return api, nil
}

// Nodes counts by name the device nodes of VFIO and of iommufd that a process
// has open.
func Nodes(pid int) (map[string]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	nodes := map[string]int{}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was closed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(to, vfio.Dir+"/") || to == "/dev/iommu" {
			nodes[to]++
		}
	}
	return nodes, nil
}

// Bind binds the VF, which has no driver, to vfio-pci.
func (v VF) Bind() error {
	const driver = "vfio-pci"
	if err := os.WriteFile(filepath.Join(devices, v.Address, "driver_override"), []byte(driver), 0); err != nil {
		return err
	}
	if err := os.WriteFile(probe, []byte(v.Address), 0); err != nil {
		return err
	}
	got, err := v.Driver()
	if err == nil && got != driver {
		err = fmt.Errorf("VF %s has driver %q after it was given %s", v.Address, got, driver)
	}
	return err
}

// frameType is an Ethernet type for local experiments (IEEE 802).
const frameType = 0x88b5

// Listen opens a socket that sends and receives whole frames of the tests'
// Ethernet type on the card's own network interface. It does not block: a
// receiver finds EAGAIN. The caller closes it.
func (p PF) Listen() (fd int, err error) {
	link, err := p.Link()
	if err != nil {
		return 0, err
	}
	const inNetworkOrder = frameType>>8 | frameType&0xff<<8
	fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, inNetworkOrder)
	if err != nil {
		return 0, fmt.Errorf("packet socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: inNetworkOrder, Ifindex: link.Attrs().Index}); err != nil {
		return 0, errors.Join(fmt.Errorf("packet socket on %s: %w", p.Name, err), unix.Close(fd))
	}
	return fd, nil
}
