//go:build e2esriov

package tests

import (
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/device"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/vfio"
	"compsc.io/compsc/agent/vfiouser"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/driver"
	"compsc.io/compsc/e2e/sriov/job"
	"compsc.io/compsc/e2e/sriov/sidecar"
)

// iface is the VM's interface, place its device number in the guest.
const iface, place = "net1", 0x10

// mediated is a VF that a device process mediates for a vfio-user client,
// which does as QEMU does. It is a driver.Bus.
type mediated struct {
	*testing.T
	host    *host.SRIOV
	vf      card.VF
	process *exec.Cmd
	client  *vfiouser.Client
	events  []*os.File
	control string // the device process's control socket
}

// mediate prepares the VF, starts a device process for it and connects to
// that; memory is the guest's.
func mediate(t *testing.T, h *host.SRIOV, vf card.VF, memory *os.File) *mediated {
	t.Helper()
	return mediateAs(t, h, vf, memory, false)
}

// mediateAs is mediate with the fast path or the complete one.
func mediateAs(t *testing.T, h *host.SRIOV, vf card.VF, memory *os.File, fast bool) *mediated {
	t.Helper()
	m := &mediated{T: t, host: h, vf: vf}
	dir, err := sidecar.Dir()
	m.must(err)
	t.Cleanup(func() { m.must(os.RemoveAll(dir)) })
	socket := func(name string) string { return filepath.Join(dir, filepath.Base(kubevirt.SidecarDeviceDir()), name) }
	m.control = socket(device.ControlSocket)
	m.process = exec.Command(filepath.Join(job.Dir, "compsc"), "device", "--sidecar", "hook-sidecar-0", "--hooks-dir", dir)
	m.process.Stdout, m.process.Stderr = t.Output(), t.Output()
	m.must(sidecar.Start(m.process))
	t.Cleanup(m.kill)
	// As the agent does, or nothing of the guest's memory could be mapped.
	m.must(sidecar.Limit(m.process.Process.Pid, unix.RLIM_INFINITY))

	prepared, err := h.Prepare(t.Context(), host.Request{Address: vf.Address, MAC: guestMAC.String()})
	m.must(err)
	defer prepared.Close()
	m.until("the device process to listen", func() bool {
		_, err := os.Stat(socket(device.HandoffSocket))
		return err == nil
	})
	m.must(handoff.Send(t.Context(), socket(device.HandoffSocket), handoff.Handoff{
		Interface: iface, Slot: place, Of: 1, VF: vf.Address, PF: prepared.PF, Family: prepared.VF.Family, DeviceID: prepared.VF.DeviceID,
		Backend: prepared.Backend, MAC: guestMAC.String(), Epoch: 1, Role: handoff.RolePrimary, VFIO: handoff.VFIO{API: prepared.API}, FastPath: fast,
	}, prepared.Files))

	m.client, err = vfiouser.Dial(t.Context(), socket(device.VFSocket(place)), nil)
	m.must(err)
	t.Cleanup(m.client.Close)
	m.must(m.client.DMAMap(t.Context(), vfiouser.DMAMap{Addr: base, Size: driver.MemorySize, Readable: true, Writable: true, File: memory}))
	info, err := m.client.Info(t.Context())
	m.must(err)
	for range info.IRQs[vfiouser.IRQIndexMSIX].Count {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		m.must(err)
		event := os.NewFile(uintptr(fd), "eventfd")
		t.Cleanup(func() { event.Close() })
		m.events = append(m.events, event)
	}
	m.must(m.client.SetIRQs(t.Context(), vfiouser.IRQAssign, vfiouser.IRQIndexMSIX, 0, uint32(len(m.events)), m.events...))
	m.usedBy(prepared.API)
	m.must(sidecar.Check(m.process.Process.Pid))
	return m
}

// usedBy looks whether the VF is used by the interface that the host chose, and
// whether that is the one that the node has.
func (m *mediated) usedBy(chosen string) {
	m.Helper()
	api, err := card.API()
	m.must(err)
	if chosen != string(api) {
		m.Errorf("the host chose interface %s, want %s", chosen, api)
	}
	var want map[string]int
	if api == vfio.IOMMUFD {
		name, err := m.vf.Cdev()
		m.must(err)
		want = map[string]int{"/dev/iommu": 1, filepath.Join(vfio.Dir, "devices", name): 1}
	} else {
		group, err := m.vf.Group()
		m.must(err)
		// The device itself has no node.
		want = map[string]int{filepath.Join(vfio.Dir, "vfio"): 1, filepath.Join(vfio.Dir, strconv.Itoa(group)): 1}
	}
	got, err := card.Nodes(m.process.Process.Pid)
	m.must(err)
	if diff := cmp.Diff(want, got); diff != "" {
		m.Errorf("device nodes that the device process has open (-want +got):\n%s", diff)
	}
}

func (m *mediated) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatalf("VF %s: %v", m.vf.Address, err)
	}
}

func (m *mediated) until(what string, ok func() bool) {
	m.Helper()
	ctx, cancel := context.WithTimeout(m.Context(), slow)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for !ok() {
		select {
		case <-again.C:
		case <-ctx.Done():
			m.Fatalf("waiting for %s: not within %v", what, slow)
		}
	}
}

// Read is a read of a register by the guest.
func (m *mediated) Read(off uint32) uint32 {
	var b [4]byte
	m.must(m.client.RegionRead(m.Context(), vfiouser.RegionBAR0, uint64(off), b[:]))
	return binary.LittleEndian.Uint32(b[:])
}

// Write is a write to a register by the guest, posted as QEMU's are.
func (m *mediated) Write(off, v uint32) {
	m.must(m.client.PostRegionWrite(vfiouser.RegionBAR0, uint64(off), binary.LittleEndian.AppendUint32(nil, v)))
}

// kill ends the device process as the kernel would. It may be called again.
func (m *mediated) kill() {
	_ = m.process.Process.Kill()
	_ = m.process.Wait()
}

// sharedRAM is memory of a guest that a device process can map too.
func sharedRAM(t *testing.T) (*os.File, ram) {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "guest")
	t.Cleanup(func() { file.Close() })
	if err := file.Truncate(driver.MemorySize); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, driver.MemorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	})
	return file, mem
}

// TestDevice: a guest uses a VF through a device process, which is killed; the
// VF is silent then, goes back to how it was, and serves the next.
func TestDevice(t *testing.T) {
	h, err := host.NewSRIOV(host.SRIOVOptions{Journal: filepath.Join(t.TempDir(), "journal"), Families: map[string]string{"8086:10ca": "igbvf"}})
	if err != nil {
		t.Fatal(err)
	}
	vf := vfs[0][0]
	peer := newPeer(t)
	if err := peer.Start(peerMAC); err != nil {
		t.Fatal(err)
	}
	before := state(t, vf)
	file, mem := sharedRAM(t)
	for range 2 {
		m := mediate(t, h, vf, file)
		guest := driver.New(m, mem, base)
		m.must(guest.Start(guestMAC))
		m.must(exchange(guest, peer, driver.RingSize+1, "from the guest"))
		m.must(exchange(peer, guest, driver.RingSize+1, "to the guest"))
		withPF(t, guest, cards[0])
		withPF(t, guest, cards[1])
		for _, vector := range []int{driver.VectorRX, driver.VectorTX} {
			m.must(await(int(m.events[vector].Fd()), slow))
		}
		if is := state(t, vf); is == before {
			t.Errorf("the VF in use is as it was before, %s: to put it back is no work", is)
		}

		m.kill()
		// Without a process the kernel resets the VF and takes the memory away.
		snapshot := append(ram{}, mem...)
		peer.Send(guestMAC, "into the void")
		m.must(peer.Sent())
		if string(snapshot) != string(mem) {
			t.Error("the VF wrote into the guest's memory after its device process was killed")
		}
		m.must(h.Release(t.Context(), vf.Address))
		if is := state(t, vf); is != before {
			t.Errorf("the VF was %s, and is %s after its release", before, is)
		}
		if held, err := h.Held(t.Context()); err != nil || len(held) > 0 {
			t.Errorf("VFs are held after all were released: %q, %v", held, err)
		}
	}
}
