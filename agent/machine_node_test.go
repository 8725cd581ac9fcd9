//go:build e2esriov

package agent

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/vfiouser"
	"compsc.io/compsc/e2e/nbd"
	"compsc.io/compsc/e2e/sriov/driver"
	"compsc.io/compsc/e2e/sriov/sidecar"
)

const (
	// guestBase is where the VF finds the guest's memory.
	guestBase = 5 << 32
	// tableAddr is where the guest's firmware put the MSI-X table, BAR3.
	tableAddr = 0xfe000000
	tableSize = 3 * 16
	// ecam is the VF's configuration space in QEMU's memory.
	ecam = 0xb0000000 + kubevirt.FirstSlot<<15
	// Names of sockets, as package device has them.
	gateSocket, monitorSocket = "gate.sock", "qmp.sock"
)

// vfSocket is the socket of the VM's VF.
var vfSocket = fmt.Sprintf("vf%02x.sock", kubevirt.FirstSlot)

// machine stands in for QEMU at the sockets of a real device process: it has a
// guest's memory and eventfds, the gate's client and a monitor. It is the
// driver.Bus of a guest's driver. What it asks of a process that was killed
// reads all ones.
type machine struct {
	t      *testing.T
	dir    string
	client *vfiouser.Client
	gate   *nbd.Client
	ready  chan struct{} // closed once it is set up: the monitor answers then
	status string

	mu      sync.Mutex
	monitor net.Conn // nil until the device process has connected
	table   [tableSize]byte
}

// plugMachine connects as QEMU does, in QEMU's order: gate, VF, monitor.
// memory is the guest's, shared by all machines it ever has.
func plugMachine(t *testing.T, dir, status string, memory *os.File) (*machine, error) {
	m := &machine{t: t, dir: dir, status: status, ready: make(chan struct{})}
	l, err := listenFor(sidecar.User, filepath.Join(dir, monitorSocket))
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { l.Close() })
	go m.serveMonitor(l)
	if m.gate, err = nbd.Dial(filepath.Join(dir, gateSocket)); err != nil {
		return nil, err
	}
	t.Cleanup(func() { m.gate.Close() })
	if e := m.gate.Read(); e != 0 {
		return nil, fmt.Errorf("opening the gate's image: %w", e)
	}
	if m.client, err = vfiouser.Dial(t.Context(), filepath.Join(dir, vfSocket), m); err != nil {
		return nil, err
	}
	t.Cleanup(m.client.Close)
	if err := m.client.DMAMap(t.Context(), vfiouser.DMAMap{Addr: guestBase, Size: driver.MemorySize, Readable: true, Writable: true, File: memory}); err != nil {
		return nil, err
	}
	var events []*os.File
	for range tableSize / 16 {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return nil, err
		}
		f := os.NewFile(uintptr(fd), "eventfd")
		t.Cleanup(func() { f.Close() })
		events = append(events, f)
	}
	if err := m.client.SetIRQs(t.Context(), vfiouser.IRQAssign, vfiouser.IRQIndexMSIX, 0, uint32(len(events)), events...); err != nil {
		return nil, err
	}
	close(m.ready)
	return m, nil
}

// listenFor listens on a socket that a user may connect to as soon as it is there:
// QEMU, which makes it in a pod, is of that user itself.
func listenFor(user int, path string) (net.Listener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path + ".new", Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chown(path+".new", user, user), os.Rename(path+".new", path)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// firmware gives the VF its addresses, as a machine does that boots.
func (m *machine) firmware() error {
	for _, w := range []struct {
		off   uint32
		value []byte
	}{{0x10, le32(0xfd000000)}, {0x1c, le32(tableAddr)}, {0x70, le32(0x80020000)}, {0x04, []byte{6, 0}}} {
		if err := m.configWrite(w.off, w.value); err != nil {
			return err
		}
	}
	return nil
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

func (m *machine) configWrite(off uint32, p []byte) error {
	return m.client.RegionWrite(m.t.Context(), vfiouser.RegionConfig, uint64(off), p)
}

// Read is a read of a register by the guest.
func (m *machine) Read(off uint32) uint32 {
	var b [4]byte
	if err := m.client.RegionRead(m.t.Context(), vfiouser.RegionBAR0, uint64(off), b[:]); err != nil {
		return ^uint32(0)
	}
	return binary.LittleEndian.Uint32(b[:])
}

// Write is a write to a register by the guest, posted as QEMU's are.
func (m *machine) Write(off, v uint32) {
	_ = m.client.PostRegionWrite(vfiouser.RegionBAR0, uint64(off), le32(v)) // lost with the process
}

// ReadAt is the device process's read of QEMU's memory, of which the test of a
// fault has little.
func (m *machine) ReadAt(addr uint64, p []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if addr >= tableAddr && addr+uint64(len(p)) <= tableAddr+tableSize {
		copy(p, m.table[addr-tableAddr:])
	}
	return nil
}

// WriteAt is its write: to the MSI-X table, to configuration space, or, of one
// byte unchanged, to mark a page.
func (m *machine) WriteAt(addr uint64, p []byte) error {
	switch {
	case addr >= tableAddr && addr+uint64(len(p)) <= tableAddr+tableSize:
		m.mu.Lock()
		defer m.mu.Unlock()
		copy(m.table[addr-tableAddr:], p)
	case addr >= ecam && addr+uint64(len(p)) <= ecam+256:
		go m.configWrite(uint32(addr-ecam), p) //nolint:errcheck // as QEMU: no answer
	}
	return nil
}

// serveMonitor serves the second QMP monitor, once the machine is set up.
func (m *machine) serveMonitor(l net.Listener) {
	<-m.ready
	c, err := l.Accept()
	if err != nil {
		return
	}
	defer c.Close()
	fmt.Fprintln(c, `{"QMP":{"version":{"qemu":{"micro":3,"minor":1,"major":11}},"capabilities":[]}}`)
	var port uint32
	for s := bufio.NewScanner(c); s.Scan(); {
		var cmd struct {
			Execute   string
			Arguments map[string]string
		}
		if json.Unmarshal(s.Bytes(), &cmd) != nil {
			return
		}
		var unit string
		var at, value uint32
		outs, _ := fmt.Sscanf(cmd.Arguments["command-line"], "o /%1s 0x%x 0x%x", &unit, &at, &value)
		switch {
		case cmd.Execute == "query-status":
			fmt.Fprintf(c, "{\"return\":{\"status\":%q}}\n", m.status)
			continue
		case outs == 3 && at == 0xcf8:
			port = value & 0xfc
		case outs == 3:
			if m.configWrite(port+at&3, le32(value)[:map[string]int{"b": 1, "h": 2, "w": 4}[unit]]) != nil {
				return
			}
		}
		if outs == 3 {
			fmt.Fprintln(c, `{"return":""}`)
			continue
		}
		fmt.Fprintln(c, `{"return":{}}`)
		m.mu.Lock()
		m.monitor = c
		m.mu.Unlock()
	}
}

// followed tells whether the device process follows the monitor.
func (m *machine) followed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.monitor != nil
}

// tell sends an event.
func (m *machine) tell(name, status string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.monitor != nil {
		fmt.Fprintf(m.monitor, "{\"event\":%q,\"data\":{\"status\":%q},\"timestamp\":{\"seconds\":1,\"microseconds\":1}}\n", name, status)
	}
}
