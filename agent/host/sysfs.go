package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

var pciAddress = regexp.MustCompile(`^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`)

// maxVFsOfPF bounds what a PF may claim: NumVFs has 16 bits (PCI Express 5.0,
// section 9.3.3.7), and no NIC of these families has more than 63.
const maxVFsOfPF = 1024

// sysfs is where the kernel shows its devices: /sys, or a tree made for a test.
type sysfs struct {
	root string
	// set writes an attribute, as the kernel takes it: at once and whole.
	set func(path, value string) error
	// begun has the writes that the kernel has not finished.
	begun *writes
}

// writes are writes of attributes that nobody could wait for to the end.
type writes struct {
	mu sync.Mutex
	of map[string]chan struct{} // closed when done, by path and value
}

func newSysfs(root string) sysfs {
	return sysfs{root: root, set: setAttribute, begun: &writes{of: map[string]chan struct{}{}}}
}

func setAttribute(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func (s sysfs) device(address string, parts ...string) string {
	return filepath.Join(append([]string{s.root, "bus/pci/devices", address}, parts...)...)
}

// text reads an attribute, without white space at its ends.
func (s sysfs) text(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

// number reads an attribute that is a number; missing if it is not there.
func (s sysfs) number(path string, missing int) (int, error) {
	t, err := s.text(path)
	if errors.Is(err, fs.ErrNotExist) {
		return missing, nil
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(t)
	if err != nil {
		return 0, fmt.Errorf("%s is %.32q: %w", path, t, err)
	}
	return n, nil
}

// link returns the last part of where a link leads; empty if there is none.
func (s sysfs) link(path string) (string, error) {
	to, err := os.Readlink(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return filepath.Base(to), err
}

// id returns vendor:device of a function.
func (s sysfs) id(address string) (string, error) {
	vendor, err := s.text(s.device(address, "vendor"))
	if err != nil {
		return "", err
	}
	device, err := s.text(s.device(address, "device"))
	return strings.TrimPrefix(vendor, "0x") + ":" + strings.TrimPrefix(device, "0x"), err
}

// functions lists the PCI addresses of all functions that can have VFs.
func (s sysfs) functions() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.root, "bus/pci/devices"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if !pciAddress.MatchString(e.Name()) {
			continue
		}
		if _, err := os.Stat(s.device(e.Name(), "sriov_numvfs")); err == nil {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// netdev returns the network interface of a function, empty for none.
func (s sysfs) netdev(address string) (string, error) {
	entries, err := os.ReadDir(s.device(address, "net"))
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return entries[0].Name(), nil
}

// vfs returns the VFs of a PF in the order of their numbers. A VF that goes
// while they are read is left out.
func (s sysfs) vfs(pf string) ([]VF, error) {
	n, err := s.number(s.device(pf, "sriov_numvfs"), 0)
	if err != nil {
		return nil, err
	}
	if n < 0 || n > maxVFsOfPF {
		return nil, fmt.Errorf("PF %s has %d VFs, at most %d", pf, n, maxVFsOfPF)
	}
	var out []VF
	for i := range n {
		address, err := s.link(s.device(pf, fmt.Sprintf("virtfn%d", i)))
		if err != nil || !pciAddress.MatchString(address) {
			continue
		}
		v := VF{Address: address, Index: i}
		if v.DeviceID, err = s.id(address); err == nil {
			v.Driver, err = s.link(s.device(address, "driver"))
		}
		if err == nil {
			v.IOMMUGroup, v.Obstacle, err = s.group(address)
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("VF %s: %w", address, err)
		}
		out = append(out, v)
	}
	return out, nil
}

// group returns the number of a function's IOMMU group, -1 for none, and what
// about it keeps the function from being used alone.
func (s sysfs) group(address string) (n int, obstacle string, err error) {
	name, err := s.link(s.device(address, "iommu_group"))
	if err != nil || name == "" {
		return -1, "it has no IOMMU group: turn the IOMMU on in the firmware and with intel_iommu=on or amd_iommu=on on the kernel's command line", err
	}
	if n, err = strconv.Atoi(name); err != nil {
		return -1, "", fmt.Errorf("IOMMU group %.32q: %w", name, err)
	}
	others, err := os.ReadDir(s.device(address, "iommu_group", "devices"))
	if err != nil {
		return n, "", err
	}
	for _, o := range others {
		class, err := s.text(s.device(o.Name(), "class"))
		if err != nil {
			return n, "", err
		}
		// Bridges are no endpoints, and VFIO lets them be.
		if o.Name() != address && !strings.HasPrefix(class, "0x0604") {
			return n, fmt.Sprintf("it shares IOMMU group %d with %s: it needs a group of its own, which takes a slot whose root port has ACS", n, o.Name()), nil
		}
	}
	return n, "", nil
}

// node is the number of a function's directory: another one when the function
// was removed and came back.
func (s sysfs) node(address string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(s.device(address), &st); err != nil {
		return 0, fmt.Errorf("VF %s: %w", address, err)
	}
	return st.Ino, nil
}

// cdev returns the name of a function's VFIO device cdev, empty for none.
func (s sysfs) cdev(address string) (string, error) {
	dir := s.device(address, "vfio-dev")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	// A kernel without VFIO_DEVICE_CDEV shows the device too, but no number to
	// open it by.
	name := entries[0].Name()
	if _, err := os.Stat(filepath.Join(dir, name, "dev")); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	return name, nil
}

// makeIOMMU makes the device node of the kernel's iommufd at path, if the
// kernel has one and it is not there: a container sees only the devices that
// the node had when it was started, and the module may be loaded later.
func (s sysfs) makeIOMMU(path string, mknod func(path string, mode uint32, dev int) error) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	t, err := s.text(filepath.Join(s.root, "class/misc/iommu/dev"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(t, "%d:%d", &major, &minor); err != nil {
		return fmt.Errorf("the device of iommufd is %.32q: %w", t, err)
	}
	if err := mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return fmt.Errorf("making %s: %w", path, err)
	}
	return nil
}

// vfioPCI is the driver that gives a function to a process.
const vfioPCI = "vfio-pci"

// unbindTimeout bounds how long a driver may take to let a function go:
// vfio-pci does not before the process that uses it has closed it.
const unbindTimeout = 5 * time.Second

// override reads a function's driver_override, empty for none.
func (s sysfs) override(address string) (string, error) {
	t, err := s.text(s.device(address, "driver_override"))
	if t == "(null)" { // how the kernel shows that there is none
		t = ""
	}
	return t, err
}

// bind has the function driven by this driver, which is empty for none, by
// way of its driver_override, which is left as given.
func (s sysfs) bind(ctx context.Context, address, driver, override string) error {
	have, err := s.link(s.device(address, "driver"))
	if err != nil {
		return fmt.Errorf("driver of %s: %w", address, err)
	}
	// An override decides what the kernel tries when it probes the function.
	during := override
	if driver != "" && have != driver {
		during = driver
	}
	if err := s.setOverride(address, during); err != nil {
		return err
	}
	if have != driver && have != "" {
		if err := s.write(ctx, s.device(address, "driver", "unbind"), address); err != nil {
			return fmt.Errorf("unbinding %s from %s: %w", address, have, err)
		}
	}
	if have != driver && driver != "" {
		if err := s.write(ctx, filepath.Join(s.root, "bus/pci/drivers_probe"), address); err != nil {
			return fmt.Errorf("binding %s to %s: %w", address, driver, err)
		}
		if have, err = s.link(s.device(address, "driver")); err != nil || have != driver {
			return fmt.Errorf("binding %s to %s: the kernel bound %q (%v); is the module %s loaded?", address, driver, have, err, driver)
		}
	}
	if during != override {
		return s.setOverride(address, override)
	}
	return nil
}

func (s sysfs) setOverride(address, driver string) error {
	if have, err := s.override(address); err == nil && have == driver {
		return nil
	}
	// A line feed clears it: an empty write would not reach the kernel.
	if err := s.set(s.device(address, "driver_override"), driver+"\n"); err != nil {
		return fmt.Errorf("driver_override of %s: %w", address, err)
	}
	return nil
}

// write writes an attribute for as long as unbindTimeout and ctx allow. What
// the kernel has begun goes on behind; whoever asks for the same once more
// waits for that, and does not begin it again.
func (s sysfs) write(ctx context.Context, path, value string) error {
	ctx, cancel := context.WithTimeout(ctx, unbindTimeout)
	defer cancel()
	key := path + "=" + value
	s.begun.mu.Lock()
	before, going := s.begun.of[key]
	if going {
		s.begun.mu.Unlock()
		select {
		case <-before:
			// What came of it is seen by looking.
			return nil
		case <-ctx.Done():
			return fmt.Errorf("the kernel has not finished what it began before: %w", ctx.Err())
		}
	}
	over := make(chan struct{})
	s.begun.of[key] = over
	s.begun.mu.Unlock()
	done := make(chan error, 1)
	go func() {
		err := s.set(path, value)
		s.begun.mu.Lock()
		delete(s.begun.of, key)
		s.begun.mu.Unlock()
		close(over)
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the kernel has not finished: %w", ctx.Err())
	}
}

// boot identifies the run of the kernel.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
