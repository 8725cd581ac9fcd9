//go:build e2eiommufd

package vfio_test

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/vfio"
	"compsc.io/compsc/e2e/sriov/card"
)

// These run on a machine whose kernel has iommufd, with real VFs behind an IOMMU
// without dirty bits.

const page = 4096

// boundVFs returns the VFs that vfio-pci has.
func boundVFs(t *testing.T) []card.VF {
	t.Helper()
	cards, err := card.List()
	if err != nil || len(cards) == 0 {
		t.Fatalf("cards %v (%v)", cards, err)
	}
	vfs, err := cards[0].VFs()
	must(t, err)
	if len(vfs) == 0 {
		must(t, cards[0].Up())
		vfs, err = cards[0].MakeVFs(2)
		must(t, err)
		for _, vf := range vfs {
			must(t, vf.Bind())
		}
	}
	return vfs
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openCdev(t *testing.T, vf card.VF) []*os.File {
	t.Helper()
	name, err := vf.Cdev()
	must(t, err)
	files, err := vfio.OpenCdev(name)
	must(t, err)
	return files
}

func take(t *testing.T, vf card.VF) *vfio.Device {
	t.Helper()
	d, err := vfio.Use(vfio.IOMMUFD, openCdev(t, vf))
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

// memory is what a VF can be given to reach.
func memory(t *testing.T, size int) []byte {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Munmap(mem)) })
	return mem
}

// TestNodeOneUser: who has the VF keeps it from others, by either interface.
func TestNodeOneUser(t *testing.T) {
	vf := boundVFs(t)[0]
	group, err := vf.Group()
	must(t, err)
	d := take(t, vf)
	if id := make([]byte, 2); d.ReadConfig(0, id) != nil || id[0] != 0x86 || id[1] != 0x80 {
		t.Errorf("vendor % x", id)
	}
	second, err := vfio.Use(vfio.IOMMUFD, openCdev(t, vf))
	if !errors.Is(err, vfio.ErrBusy) || second != nil {
		t.Errorf("a second user by the cdev: %v", err)
	}
	if files, err := vfio.OpenGroup(group, vf.Address); !errors.Is(err, vfio.ErrBusy) || files != nil {
		t.Errorf("a second user by the group: %v", err)
	}
	must(t, d.Reset())
	if got := d.Read(8); got == 1<<32-1 { // STATUS
		t.Errorf("STATUS after a reset is %#x", got)
	}
}

// TestNodeGroupKeepsCdev: who has the VF by its group keeps it from others.
func TestNodeGroupKeepsCdev(t *testing.T) {
	vf := boundVFs(t)[0]
	group, err := vf.Group()
	must(t, err)
	files, err := vfio.OpenGroup(group, vf.Address)
	must(t, err)
	d, err := vfio.Use(vfio.Group, files)
	must(t, err)
	other, err := vfio.Use(vfio.IOMMUFD, openCdev(t, vf))
	if !errors.Is(err, vfio.ErrBusy) || other != nil {
		t.Errorf("a second user by the cdev: %v", err)
	}
	must(t, d.Close())
	take(t, vf) // and nobody does once he has let it go
}

// TestNodeMap maps and unmaps what the kernel allows, and nothing else.
func TestNodeMap(t *testing.T) {
	d := take(t, boundVFs(t)[0])
	ranges, err := d.Ranges()
	must(t, err)
	const messages = 0xfee00000 // where interrupts are written to
	for _, r := range ranges {
		if r.Start <= messages && messages <= r.Last {
			t.Errorf("the range %#x to %#x has the interrupts' address", r.Start, r.Last)
		}
	}
	last := ranges[len(ranges)-1].Last
	if ranges[0].Start != 0 || last < 1<<38 {
		t.Errorf("ranges %#x", ranges)
	}
	const size = 8 * page
	mem := memory(t, size)
	// Everywhere from the first address to the last, and beyond 4 GiB.
	at := []uint64{0, messages - size, 5 << 32, last + 1 - size}
	for _, iova := range at {
		must(t, d.Map(iova, mem, true, true))
	}
	for _, iova := range at {
		if err := d.Map(iova, mem, true, true); !errors.Is(err, unix.EEXIST) {
			t.Errorf("mapped at %#x twice: %v", iova, err)
		}
		if err := d.Unmap(iova, size/2); err == nil {
			t.Errorf("half of what is mapped at %#x was unmapped", iova)
		}
		must(t, d.Unmap(iova, size))
		if err := d.Unmap(iova, size); !errors.Is(err, unix.ENOENT) {
			t.Errorf("unmapped at %#x twice: %v", iova, err)
		}
	}
	must(t, d.Map(0, mem, true, false))
	must(t, d.Unmap(0, size))
	for _, iova := range []uint64{messages, last + 1} {
		if err := d.Map(iova, mem, true, true); !errors.Is(err, unix.EINVAL) {
			t.Errorf("mapped at %#x: %v", iova, err)
		}
	}
	s, err := d.NewScratch(2 * page)
	must(t, err)
	if addr, n := s.Range(); addr+uint64(n)-1 != last {
		t.Errorf("scratch memory at %#x, want it to end at %#x", addr, last)
	}
	must(t, s.Close())
}

// TestNodeNoDirtyBits: the emulated IOMMU has none, which is found out.
func TestNodeNoDirtyBits(t *testing.T) {
	d := take(t, boundVFs(t)[0])
	if d.HasDirtyBits() || !errors.Is(d.TrackDirty(true), unix.EOPNOTSUPP) {
		t.Error("dirty bits that are none")
	}
}

// TestNodeMemlock: what all processes of a user lock is counted together, and
// the error says so.
func TestNodeMemlock(t *testing.T) {
	const limit, part = 64 * page, 40 * page
	first, second := take(t, boundVFs(t)[0]), take(t, boundVFs(t)[1])
	mem := memory(t, part)
	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old))
	must(t, unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: limit, Max: old.Max}))
	t.Cleanup(func() { must(t, unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old)) })
	asNobody(t, func() {
		if err := first.Map(0, mem, true, true); err != nil {
			t.Errorf("less than the limit: %v", err)
		}
		err := second.Map(0, mem, true, true)
		var lock *vfio.MemlockError
		if !errors.As(err, &lock) || *lock != (vfio.MemlockError{Needed: part, Limit: limit, PerUser: true}) {
			t.Errorf("more than the limit: %v", err)
		}
		if err == nil || !strings.Contains(err.Error(), "other processes of its user") {
			t.Errorf("the error does not say whose memory counts: %v", err)
		}
		if err := first.Unmap(0, part); err != nil {
			t.Error(err)
		}
		if err := second.Map(0, mem, true, true); err != nil {
			t.Errorf("less than the limit, after the other has unmapped: %v", err)
		}
	})
}

// asNobody calls do on a thread of a user without privileges.
func asNobody(t *testing.T, do func()) {
	t.Helper()
	const nobody = 65534
	done := make(chan syscall.Errno)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		// Of this thread alone, which package unix does not do.
		_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody)
		if errno == 0 {
			do()
		}
		done <- errno
	}()
	if errno := <-done; errno != 0 {
		t.Fatalf("another user: %v", errno)
	}
}
