package device

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/vfiouser"
	"compsc.io/compsc/e2e/nbd"
)

const (
	ramSize   = 1 << 20
	tableAddr = 0xfe000000 // where the guest's firmware put BAR3
	ecam      = 0xb0000000 + 5<<15
	guestMAC  = "52:54:00:00:00:01"
	testTime  = 10 * time.Second
)

var le = binary.LittleEndian

// node plays everything around one device process: the agent that hands the
// VF over, and QEMU with its monitor, its gate client and its memory. What it
// does with the sockets is what QEMU does, in QEMU's order.
type node struct {
	t    *testing.T
	dir  string
	proc *Process
	ctl  pb.DeviceClient
	wire int // the other end of the VF's wire

	client *vfiouser.Client
	ram    []byte
	memfd  *os.File
	gate   *nbd.Client
	mon    *fakeMonitor
	irq    []*os.File

	log    *eventLog
	mu     sync.Mutex
	table  [48]byte
	marked map[uint64]bool
}

// eventLog counts the QEMU events that the process says it has taken in.
type eventLog struct {
	slog.Handler
	mu   sync.Mutex
	seen map[string]int
}

func (l *eventLog) Enabled(context.Context, slog.Level) bool { return true }

func (l *eventLog) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.Attrs(func(a slog.Attr) bool {
		if r.Message == "QEMU event" && a.Key == "status" {
			l.seen[a.Value.String()]++
		}
		return true
	})
	return nil
}

func (l *eventLog) has(status string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen[status] > 0
}

// startNode starts a device process and hands it a VF.
func startNode(t *testing.T, role string, epoch uint64, change func(*Options, *handoff.Handoff)) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir(), marked: map[uint64]bool{}, log: &eventLog{Handler: slog.DiscardHandler, seen: map[string]int{}}}
	// QEMU sees the sockets at the same place on both nodes.
	o := Options{Dir: n.dir, QEMUDir: "/vm", Log: slog.New(n.log)}
	h := handoff.Handoff{
		Interface: "net1", Slot: 5, Of: 1, VF: "0000:03:10.0", PF: "pf0", Family: "ixgbevf", DeviceID: "8086:10ed",
		Backend: handoff.BackendModel, MAC: guestMAC, Epoch: epoch, Role: role,
	}
	if change != nil {
		change(&o, &h)
	}
	proc, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	n.proc = proc
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- proc.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	for _, s := range []string{ControlSocket, HandoffSocket} {
		eventually(t, "socket "+s, func() bool { _, err := os.Stat(filepath.Join(n.dir, s)); return err == nil })
	}
	cc, err := grpc.NewClient("unix:"+filepath.Join(n.dir, ControlSocket), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	n.ctl = pb.NewDeviceClient(cc)

	// A datagram socket keeps frame boundaries as a tap does.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	n.wire = fds[0]
	t.Cleanup(func() { unix.Close(fds[0]) })
	theirs := os.NewFile(uintptr(fds[1]), "wire")
	defer theirs.Close()
	// The socket's file is there a moment before it is listened at.
	eventually(t, "handoff", func() bool {
		err = handoff.Send(t.Context(), filepath.Join(n.dir, HandoffSocket), h, []*os.File{theirs})
		return !errors.Is(err, syscall.ECONNREFUSED)
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// startQEMU connects as QEMU does: gate, VF, monitor, in this order.
func (n *node) startQEMU(status string) {
	n.t.Helper()
	n.mon = startMonitor(n.t, filepath.Join(n.dir, MonitorSocket), status, n.configWrite)
	gate, err := nbd.Dial(filepath.Join(n.dir, GateSocket))
	n.must(err)
	n.t.Cleanup(func() { gate.Close() })
	n.gate = gate
	if e := n.gate.Read(); e != 0 {
		n.t.Fatalf("opening the gate image: %v", e)
	}
	fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
	if err != nil {
		n.t.Fatal(err)
	}
	n.memfd = os.NewFile(uintptr(fd), "ram")
	n.t.Cleanup(func() { n.memfd.Close() })
	if err := n.memfd.Truncate(ramSize); err != nil {
		n.t.Fatal(err)
	}
	if n.ram, err = unix.Mmap(fd, 0, ramSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	if n.client, err = vfiouser.Dial(ctx, filepath.Join(n.dir, VFSocket(5)), n); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(n.client.Close)
	n.must(n.client.DMAMap(ctx, vfiouser.DMAMap{Size: ramSize, Readable: true, Writable: true, File: n.memfd}))
	n.must(n.client.Reset(ctx))
	for range 3 {
		fd, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
		if err != nil {
			n.t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "eventfd")
		n.t.Cleanup(func() { f.Close() })
		n.irq = append(n.irq, f)
	}
	n.must(n.client.SetIRQs(ctx, vfiouser.IRQAssign, vfiouser.IRQIndexMSIX, 0, 3, n.irq...))
	close(n.mon.up)
	eventually(n.t, "monitor followed", func() bool { return n.mon.connected() })
}

func (n *node) must(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// ReadAt and WriteAt are QEMU's address space as the server reaches it.
func (n *node) ReadAt(addr uint64, p []byte) error { return n.access(addr, p, false) }

func (n *node) WriteAt(addr uint64, p []byte) error { return n.access(addr, p, true) }

func (n *node) access(addr uint64, p []byte, write bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	move := func(mem []byte) error {
		if write {
			copy(mem, p)
		} else {
			copy(p, mem)
		}
		return nil
	}
	end := addr + uint64(len(p))
	switch {
	case end <= ramSize:
		if write {
			if !bytes.Equal(n.ram[addr:end], p) {
				return syscall.EPERM // marking must not change memory
			}
			n.marked[addr>>12<<12] = true
		}
		return move(n.ram[addr:end])
	case addr >= tableAddr && end <= tableAddr+48:
		return move(n.table[addr-tableAddr : end-tableAddr])
	case addr >= ecam && end <= ecam+256 && write:
		go n.configWrite(uint32(addr-ecam), p) //nolint:errcheck // as QEMU: no answer
		return nil
	}
	return syscall.EFAULT
}

func (n *node) configWrite(off uint32, p []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	return n.client.RegionWrite(ctx, vfiouser.RegionConfig, uint64(off), p)
}

func (n *node) config(off uint64, size int) uint32 {
	n.t.Helper()
	var b [4]byte
	n.must(n.client.RegionRead(n.t.Context(), vfiouser.RegionConfig, off, b[:size]))
	return le.Uint32(b[:])
}

// rd and wr are the guest's accesses to BAR0; writes are posted.
func (n *node) rd(off uint32) uint32 {
	n.t.Helper()
	var b [4]byte
	n.must(n.client.RegionRead(n.t.Context(), vfiouser.RegionBAR0, uint64(off), b[:]))
	return le.Uint32(b[:])
}

func (n *node) wr(off, v uint32) {
	n.t.Helper()
	n.must(n.client.PostRegionWrite(vfiouser.RegionBAR0, uint64(off), le.AppendUint32(nil, v)))
}

// send puts a frame on the VF's wire, and recv takes one off it.
func (n *node) send(frame []byte) {
	n.t.Helper()
	n.must(unix.Sendto(n.wire, frame, 0, nil))
}

func (n *node) recv() []byte {
	n.t.Helper()
	b := make([]byte, 2048)
	var got int
	eventually(n.t, "a frame on the wire", func() bool {
		k, _, err := unix.Recvfrom(n.wire, b, 0)
		got = k
		return err == nil
	})
	return b[:got]
}

func (n *node) wireSilent() bool {
	_, _, err := unix.Recvfrom(n.wire, make([]byte, 2048), 0)
	return errors.Is(err, unix.EAGAIN)
}

// seen returns what QEMU's side has seen: the MSI-X table and the pages marked.
func (n *node) seen() (table [48]byte, marked []uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.table, slices.Sorted(maps.Keys(n.marked))
}

func (n *node) phase() pb.Phase {
	n.t.Helper()
	s, err := n.ctl.Status(n.t.Context(), &pb.StatusRequest{})
	n.must(err)
	return s.Phase
}

func (n *node) wantPhase(want pb.Phase) {
	n.t.Helper()
	eventually(n.t, want.String(), func() bool { return n.phase() == want })
}

func (n *node) interrupts() (fired [3]bool) {
	for v, f := range n.irq {
		var b [8]byte
		_, err := unix.Read(int(f.Fd()), b[:])
		fired[v] = err == nil
	}
	return fired
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(testTime); !cond(); {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within %v", what, testTime)
		}
		<-time.After(time.Millisecond)
	}
}

// fakeMonitor is QEMU's second monitor.
type fakeMonitor struct {
	up     chan struct{}
	mu     sync.Mutex
	conn   net.Conn
	status string
	addr   uint32
	ran    []string // commands but for queries and config writes
}

func startMonitor(t *testing.T, path, status string, config func(uint32, []byte) error) *fakeMonitor {
	t.Helper()
	m := &fakeMonitor{status: status, up: make(chan struct{})}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		// QEMU answers once it is set up, with its devices connected.
		<-m.up
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprintln(c, `{"QMP":{"version":{"qemu":{"micro":3,"minor":1,"major":11}},"capabilities":[]}}`)
		for s := bufio.NewScanner(c); s.Scan(); {
			var cmd struct {
				Execute   string
				Arguments map[string]string
			}
			if json.Unmarshal(s.Bytes(), &cmd) != nil {
				return
			}
			var unit string
			var port, val uint32
			n, _ := fmt.Sscanf(cmd.Arguments["command-line"], "o /%1s 0x%x 0x%x", &unit, &port, &val)
			switch {
			case cmd.Execute == "query-status":
				fmt.Fprintf(c, "{\"return\":{\"status\":%q}}\n", m.status)
				continue
			case n == 3 && port == 0xcf8:
				m.addr = val & 0xfc
			case n == 3:
				b := le.AppendUint32(nil, val)[:map[string]int{"b": 1, "h": 2, "w": 4}[unit]]
				if config(m.addr+port&3, b) != nil {
					return
				}
			}
			if n == 3 {
				fmt.Fprintln(c, `{"return":""}`)
			} else {
				fmt.Fprintln(c, `{"return":{}}`)
				m.mu.Lock()
				m.conn = c
				m.ran = append(m.ran, cmd.Execute)
				m.mu.Unlock()
			}
		}
	}()
	return m
}

func (m *fakeMonitor) connected() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conn != nil
}

// did tells how often QEMU was given a command.
func (m *fakeMonitor) did(command string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.ran {
		if c == command {
			n++
		}
	}
	return n
}

func (m *fakeMonitor) event(name, status string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fmt.Fprintf(m.conn, "{\"event\":%q,\"data\":{\"status\":%q},\"timestamp\":{\"seconds\":1,\"microseconds\":1}}\n", name, status)
}

// Rings and buffers of the guest's driver, in its RAM.
const (
	ringLen = 32
	txRing  = 0x10000
	rxRing  = 0x11000
	txBuf   = 0x20000
	rxBuf   = 0x40000
)

// boot does what firmware and ixgbevf do until traffic flows.
func (n *node) boot() {
	n.t.Helper()
	for off, v := range map[uint32]uint32{cfgBAR0: 0xfd000000, cfgBAR3: tableAddr, cfgMSIX: 0x80020000} {
		n.must(n.configWrite(off, le.AppendUint32(nil, v)))
	}
	n.must(n.configWrite(cfgCommand, []byte{6, 0}))
	n.mu.Lock()
	for i := range n.table {
		n.table[i] = byte(i + 1)
	}
	n.mu.Unlock()
	n.wr(ixgbevf.VFCTRL, ixgbevf.CtrlRST)
	n.mailbox(ixgbevf.MsgReset)
	n.mailbox(ixgbevf.MsgAPINegotiate, ixgbevf.API14)
	n.wr(ixgbevf.VFTDBAL(0), txRing)
	n.wr(ixgbevf.VFTDLEN(0), ringLen*16)
	n.wr(ixgbevf.VFTXDCTL(0), ixgbevf.QueueEnable)
	n.wr(ixgbevf.VFRDBAL(0), rxRing)
	n.wr(ixgbevf.VFRDLEN(0), ringLen*16)
	n.wr(ixgbevf.VFSRRCTL(0), 1<<25|2)
	n.wr(ixgbevf.VFRXDCTL(0), ixgbevf.QueueEnable)
	for i := range ringLen {
		le.PutUint64(n.ram[rxRing+16*i:], uint64(rxBuf+4096*i))
	}
	n.wr(ixgbevf.VFRDT(0), ringLen-1)
	n.wr(ixgbevf.VTIVAR(0), 0x8080)
	n.wr(ixgbevf.VTIVARMisc, 0x81)
	n.wr(ixgbevf.VTEIAC, 3)
	n.wr(ixgbevf.VTEIAM, 3)
	n.wr(ixgbevf.VTEIMS, 3)
}

func (n *node) mailbox(words ...uint32) {
	n.t.Helper()
	n.wr(ixgbevf.VFMAILBOX, ixgbevf.MailboxVFU)
	for i, w := range words {
		n.wr(ixgbevf.VFMBMEM+4*uint32(i), w)
	}
	n.wr(ixgbevf.VFMAILBOX, ixgbevf.MailboxREQ)
	eventually(n.t, "reply of the PF", func() bool { return n.rd(ixgbevf.VFMAILBOX)&ixgbevf.MailboxPFSTS != 0 })
	if r := n.rd(ixgbevf.VFMBMEM); r&ixgbevf.MsgACK == 0 {
		n.t.Fatalf("the PF answered message %#x with %#x", words[0], r)
	}
	n.wr(ixgbevf.VFMAILBOX, ixgbevf.MailboxACK)
}

// transmit sends one frame through ring slot i, and returns it.
func (n *node) transmit(i int) []byte {
	n.t.Helper()
	f := frame("02:00:00:00:00:01", guestMAC, byte(i))
	copy(n.ram[txBuf+4096*i:], f)
	d := n.ram[txRing+16*i:]
	le.PutUint64(d, uint64(txBuf+4096*i))
	le.PutUint32(d[8:], uint32(len(f))|1<<24|1<<25|1<<27|1<<29|3<<20)
	le.PutUint32(d[12:], uint32(len(f))<<14)
	n.wr(ixgbevf.VFTDT(0), uint32(i+1)%ringLen)
	return f
}

// received waits for the write-back in receive ring slot i and returns the frame.
func (n *node) received(i int) []byte {
	n.t.Helper()
	d := n.ram[rxRing+16*i:]
	eventually(n.t, fmt.Sprintf("write-back in slot %d", i), func() bool {
		n.rd(ixgbevf.VFSTATUS) // orders our view of memory behind the device's
		return le.Uint32(d[8:])&1 != 0
	})
	return bytes.Clone(n.ram[rxBuf+4096*i : rxBuf+4096*i+int(le.Uint16(d[12:]))])
}

func frame(dst, src string, fill byte) []byte {
	d, _ := net.ParseMAC(dst)
	s, _ := net.ParseMAC(src)
	f := append(append(append([]byte{}, d...), s...), 0x88, 0xb5)
	return append(f, bytes.Repeat([]byte{fill}, 86)...)
}
