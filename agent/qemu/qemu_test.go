package qemu

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// fakeQEMU answers QMP on a socket and emulates the two I/O ports of PCI
// configuration mechanism #1.
type fakeQEMU struct {
	path string
	conn chan net.Conn

	mu     sync.Mutex
	silent bool // stops answering
	addr   uint32
	config map[uint32]uint32 // written values by port address and byte lane
	order  []uint32
}

func startQEMU(t *testing.T) *fakeQEMU {
	t.Helper()
	q := &fakeQEMU{path: filepath.Join(t.TempDir(), "qmp"), conn: make(chan net.Conn, 1), config: map[uint32]uint32{}}
	l, err := net.Listen("unix", q.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		q.conn <- c
		q.serve(c)
	}()
	return q
}

func (q *fakeQEMU) serve(c net.Conn) {
	fmt.Fprintln(c, `{"QMP":{"version":{"qemu":{"micro":3,"minor":1,"major":11}},"capabilities":[]}}`)
	for s := bufio.NewScanner(c); s.Scan(); {
		var cmd struct {
			Execute   string
			Arguments map[string]string
		}
		if json.Unmarshal(s.Bytes(), &cmd) != nil {
			return
		}
		q.mu.Lock()
		silent := q.silent
		q.mu.Unlock()
		if silent {
			continue
		}
		switch cmd.Execute {
		case "query-status":
			fmt.Fprintln(c, `{"return":{"status":"inmigrate","running":false}}`)
		case "human-monitor-command":
			b, _ := json.Marshal(map[string]string{"return": q.hmp(cmd.Arguments["command-line"])})
			fmt.Fprintln(c, string(b))
		case "refuse":
			fmt.Fprintln(c, `{"error":{"class":"GenericError","desc":"no such thing"}}`)
		default:
			fmt.Fprintln(c, `{"return":{}}`)
		}
	}
}

func (q *fakeQEMU) hmp(line string) string {
	q.mu.Lock()
	defer q.mu.Unlock()
	var unit string
	var port, val uint32
	if n, _ := fmt.Sscanf(line, "o /%1s 0x%x 0x%x", &unit, &port, &val); n != 3 {
		return "unknown command: " + line
	}
	switch {
	case port == cfgPortAddr:
		q.addr = val
	case port >= cfgPortData && port < cfgPortData+4:
		at := q.addr | (port - cfgPortData)
		q.config[at] = val
		q.order = append(q.order, at&0xff)
	}
	return ""
}

type fakeDMA struct {
	q      *fakeQEMU
	writes map[uint64][]byte
	order  []uint64
	err    error
}

func (d *fakeDMA) DMARead(context.Context, uint64, []byte) error { return d.err }
func (d *fakeDMA) DMAWrite(_ context.Context, addr uint64, p []byte) error {
	if d.err != nil {
		return d.err
	}
	if d.writes == nil {
		d.writes = map[uint64][]byte{}
	}
	d.writes[addr] = slices.Clone(p)
	d.order = append(d.order, addr)
	return nil
}

func dial(t *testing.T, q *fakeQEMU, onEvent func(Event), onClose func()) *Monitor {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	m, err := Dial(ctx, q.path, onEvent, onClose)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func sample() PCIState {
	c := make([]byte, cfgSize)
	le := binary.LittleEndian
	le.PutUint32(c[cfgBAR0:], 0xfebd000c)
	le.PutUint32(c[cfgBAR3:], 0xfebd400c)
	le.PutUint32(c[cfgBAR4:], 0x00000007)
	le.PutUint16(c[cfgCommand:], 0x0507)
	le.PutUint16(c[cfgMSIXCtl:], 0x8002)
	le.PutUint16(c[cfgDevCtl:], 0x2810)
	c[cfgIntLine] = 10
	m := make([]byte, 48)
	for i := range m {
		m[i] = byte(i + 1)
	}
	return PCIState{Config: c, MSIX: m}
}

func TestArmReplaysInOrder(t *testing.T) {
	q := startQEMU(t)
	m := dial(t, q, func(Event) {}, func() {})
	dma := &fakeDMA{q: q}
	s := sample()
	binary.LittleEndian.PutUint16(s.Config[cfgCommand:], 0x0500) // guest has DMA off
	if err := Arm(t.Context(), m, Function{Slot: 5}, dma, s); err != nil {
		t.Fatal(err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	want := []uint32{cfgBAR0, cfgBAR0 + 4, cfgBAR3, cfgBAR4, cfgIntLine, cfgDevCtl, cfgCommand, cfgMSIXCtl}
	if !slices.Equal(q.order, want) {
		t.Errorf("order %#x, want %#x", q.order, want)
	}
	for off, v := range map[uint32]uint32{cfgBAR0: 0xfebd000c, cfgBAR4: 7, cfgIntLine: 10, cfgDevCtl: 0x2810, cfgMSIXCtl: 0x8002, cfgCommand: 0x0506} {
		if got := q.config[0x80002800|off]; got != v {
			t.Errorf("register %#x of slot 5 = %#x, want %#x", off, got, v)
		}
	}
	if got := dma.writes[0x7febd4000]; !slices.Equal(got, s.MSIX) {
		t.Errorf("MSI-X table at BAR3 = %x, want %x", got, s.MSIX)
	}
}

func TestFinishWritesOnlyWhatDiffers(t *testing.T) {
	const ecam = ecamQ35 + 5<<15
	for name, c := range map[string]struct {
		change func(*PCIState)
		want   []uint64
	}{
		"nothing":         {func(*PCIState) {}, nil},
		"MSI-X table":     {func(s *PCIState) { s.MSIX[8] ^= 1 }, []uint64{0x7febd4000}},
		"MSI-X control":   {func(s *PCIState) { s.Config[cfgMSIXCtl+1] ^= 0x40 }, []uint64{ecam + cfgMSIXCtl}},
		"DMA off is last": {func(s *PCIState) { s.Config[cfgCommand] = 0; s.Config[cfgIntLine] = 9 }, []uint64{ecam + cfgIntLine, ecam + cfgCommand}},
	} {
		t.Run(name, func(t *testing.T) {
			final := sample()
			c.change(&final)
			dma := &fakeDMA{}
			if err := Finish(t.Context(), Function{Slot: 5}, dma, sample(), final); err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(dma.order, c.want) {
				t.Errorf("wrote %#x, want %#x", dma.order, c.want)
			}
			for _, a := range c.want {
				if len(dma.writes[a]) == 0 {
					t.Errorf("empty write at %#x", a)
				}
			}
		})
	}
	t.Run("armed with DMA forced on", func(t *testing.T) {
		armed := sample()
		armed.Config[cfgCommand] = 0
		dma := &fakeDMA{}
		if err := Finish(t.Context(), Function{Slot: 5}, dma, armed, armed); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(dma.order, []uint64{ecam + cfgCommand}) {
			t.Errorf("wrote %#x: the guest's own command register was not put back", dma.order)
		}
	})
	t.Run("failure is reported", func(t *testing.T) {
		final := sample()
		final.Config[cfgIntLine]++
		err := Finish(t.Context(), Function{Slot: 5}, &fakeDMA{err: errors.New("gone")}, sample(), final)
		if err == nil || !strings.Contains(err.Error(), "0x3c") {
			t.Errorf("error %v, want one naming the register", err)
		}
	})
}

func TestReadTableNeedsBusMaster(t *testing.T) {
	off := sample()
	off.Config[cfgCommand] = commandMem
	table, err := ReadTable(t.Context(), &fakeDMA{err: errors.New("must not be asked")}, off.Config, 3)
	if err != nil || !slices.Equal(table, make([]byte, 48)) {
		t.Errorf("ReadTable = %x, %v; want 48 zeros", table, err)
	}
	if _, err := ReadTable(t.Context(), &fakeDMA{err: errors.New("gone")}, sample().Config, 3); err == nil {
		t.Error("a failed read went unnoticed")
	}
}

func TestPCIStateValid(t *testing.T) {
	if err := sample().Valid(3); err != nil {
		t.Error(err)
	}
	if err := sample().Valid(2); err == nil {
		t.Error("a table of 3 vectors passed for 2")
	}
	if err := (PCIState{Config: make([]byte, 64), MSIX: make([]byte, 48)}).Valid(3); err == nil {
		t.Error("64 bytes of configuration space passed")
	}
}

func TestMonitor(t *testing.T) {
	q := startQEMU(t)
	events := make(chan Event, 4)
	closed := make(chan struct{})
	m := dial(t, q, func(e Event) { events <- e }, func() { close(closed) })
	if s, err := m.Status(t.Context()); err != nil || s != "inmigrate" {
		t.Errorf("Status = %q, %v", s, err)
	}
	if err := m.Run(t.Context(), "refuse", nil, nil); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("a refused command gave %v", err)
	}
	c := <-q.conn
	fmt.Fprintln(c, `{"timestamp":{"seconds":1,"microseconds":2},"event":"MIGRATION","data":{"status":"active"}}`)
	fmt.Fprintln(c, `{"timestamp":{"seconds":1,"microseconds":3},"event":"RESUME"}`)
	for _, want := range []Event{{Name: EventMigration, MigrationStatus: "active"}, {Name: EventResume}} {
		select {
		case got := <-events:
			if got != want {
				t.Errorf("event %+v, want %+v", got, want)
			}
		case <-time.After(5 * time.Second):
			t.Fatalf("no %s event", want.Name)
		}
	}
	c.Close()
	select {
	case <-closed:
	case <-time.After(5 * time.Second):
		t.Fatal("the end of the connection was not noticed")
	}
	if err := m.Run(t.Context(), "query-status", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("a command after the end gave %v, want ErrClosed", err)
	}
}

func TestMonitorCommandIsBounded(t *testing.T) {
	q := startQEMU(t)
	m := dial(t, q, func(Event) {}, func() {})
	q.mu.Lock()
	q.silent = true
	q.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := m.Status(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command that is never answered gave %v", err)
	}
	// Its answer could still come: the monitor is of no use any more.
	if _, err := m.Status(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("the next command gave %v, want ErrClosed", err)
	}
}

func TestDialGivesUp(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, filepath.Join(t.TempDir(), "none"), func(Event) {}, func() {}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Dial without a socket gave %v", err)
	}
}
