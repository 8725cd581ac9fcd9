package device

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/device/handoff"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/agent/model"
)

// The PF is asked how many queues a VF has: its mode may give it more than two
// pairs, and its driver tells the guest's so.
func TestQueuesAreCounted(t *testing.T) {
	count := func(t *testing.T, id string, change func(*model.Config)) (deviceType, error) {
		cfg := model.DefaultConfig()
		change(&cfg)
		k := &kernelModel{mapped: map[uint64][]byte{}}
		k.DisconnectAll()
		k.VF = model.New(cfg, k, nullWire{}, k.raise)
		t.Cleanup(k.VF.Close)
		return deviceTypes[id].withQueues(newVFIO(k, nil, slog.New(slog.DiscardHandler)), slog.New(slog.DiscardHandler))
	}
	for name, c := range map[string]struct {
		id     string
		change func(*model.Config)
		pairs  int
	}{
		"64 pools":               {"8086:10ed", func(*model.Config) {}, 2},
		"32 pools":               {"8086:10ed", func(c *model.Config) { c.QueuePairs = 4 }, 4},
		"16 pools":               {"8086:1565", func(c *model.Config) { c.QueuePairs, c.DeviceID = 8, ixgbevf.DeviceIDX550 }, 8},
		"one pair told":          {"8086:10ed", func(c *model.Config) { c.QueuePairs = 1 }, 2},
		"three pairs told":       {"8086:10ed", func(c *model.Config) { c.QueuePairs = 3 }, 4},
		"PF without the message": {"8086:10ed", func(c *model.Config) { c.QueuePairs, c.APIs = 4, []uint32{ixgbevf.API10} }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			dt, err := count(t, c.id, c.change)
			if err != nil {
				t.Fatal(err)
			}
			want, err := ixgbevf.ForDevice(dt.vendor, dt.device, c.pairs)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want.Registers(), dt.family.Registers()); d != "" || len(dt.family.Queues()) != 2*c.pairs {
				t.Errorf("%d queues, want %d pairs:\n%s", len(dt.family.Queues()), c.pairs, d)
			}
		})
	}
	t.Run("silent PF", func(t *testing.T) {
		t.Parallel() // takes the PF's patience
		_, err := count(t, "8086:10ed", func(c *model.Config) { c.PFLatency = time.Hour })
		if err == nil || !strings.Contains(err.Error(), "PF is up") {
			t.Errorf("counted with error %v, want what to do", err)
		}
	})
}

// pairs has the model's PF give its VFs so many queue pairs.
func pairs(n int) func(*Options, *handoff.Handoff) {
	return func(_ *Options, h *handoff.Handoff) { h.Model.QueuePairs = n }
}

// lastRing is where the ring of the last transmit queue of four is.
const lastRing = 0x12000

// useLast sends a frame through transmit queue 3, which it turns on first if it
// was not used yet.
func (n *node) useLast(slot int) {
	n.t.Helper()
	const q = 3
	if slot == 0 {
		n.wr(ixgbevf.VFTDBAL(q), lastRing)
		n.wr(ixgbevf.VFTDLEN(q), ringLen*16)
		n.wr(ixgbevf.VFTXDCTL(q), ixgbevf.QueueEnable)
	}
	f := frame("02:00:00:00:00:01", guestMAC, byte(0xc0+slot))
	copy(n.ram[txBuf+4096*slot:], f)
	d := n.ram[lastRing+16*slot:]
	le.PutUint64(d, uint64(txBuf+4096*slot))
	le.PutUint32(d[8:], uint32(len(f))|1<<24|1<<25|1<<27|1<<29|3<<20)
	le.PutUint32(d[12:], uint32(len(f))<<14)
	n.wr(ixgbevf.VFTDT(q), uint32(slot+1)%ringLen)
	for {
		got := n.recv()
		if bytes.Equal(got, f) {
			return
		}
		if got[12] != 0x80 { // no announcement
			n.t.Fatalf("on the wire: %x, want %x", got, f)
		}
	}
}

// TestEveryQueueMoves shows that a guest that was told of four queue pairs can
// use all of them, and goes on with all of them after a move.
func TestEveryQueueMoves(t *testing.T) {
	p := newPairOf(t, pairs(4), pairs(4))
	p.src.mailbox(ixgbevf.MsgGetQueues, 0, 0, 0, 0)
	if told := p.src.rd(ixgbevf.VFMBMEM + 4); told != 4 {
		t.Fatalf("the guest is told of %d queues, want 4", told)
	}
	p.src.useLast(0)
	p.move()
	if got := p.dst.rd(ixgbevf.VFTDH(3)); got != 1 {
		t.Errorf("VFTDH(3) = %d after the move, want 1", got)
	}
	p.dst.useLast(1)
}

// TestOtherNumberOfQueues shows that a guest moves between VFs with unlike
// numbers of queues where it cannot tell, and nowhere else.
func TestOtherNumberOfQueues(t *testing.T) {
	for _, n := range [][2]int{{2, 4}, {4, 2}} {
		p := newPairOf(t, pairs(n[0]), pairs(n[1]))
		p.move()
		p.dst.recv() // the announcement
		want := p.dst.transmit(1)
		if got := p.dst.recv(); !bytes.Equal(got, want) {
			t.Errorf("%d to %d pairs: sent on the target: %x, want %x", n[0], n[1], got, want)
		}
	}
	p := newPairOf(t, pairs(4), pairs(2))
	p.src.mailbox(ixgbevf.MsgGetQueues, 0, 0, 0, 0)
	if d := p.prepare(); d.Accepted || d.Reason != compsc.ReasonMailboxRefused || !strings.Contains(d.Message, "number of VFs") {
		t.Errorf("a guest that was told of 4 queues: verdict %v, want %s", d, compsc.ReasonMailboxRefused)
	}
}

// TestFitQueues compares what becomes of a state with what a VF of the other
// kind would have written.
func TestFitQueues(t *testing.T) {
	of := func(n int, change func(*compsc.State)) *compsc.State {
		f, err := ixgbevf.ForDevice(ixgbevf.VendorID, ixgbevf.DeviceID, n)
		if err != nil {
			t.Fatal(err)
		}
		s := &compsc.State{Family: ixgbevf.Name, VendorID: ixgbevf.VendorID, DeviceID: ixgbevf.DeviceID}
		tails := map[uint32]bool{}
		for _, q := range f.Queues() {
			tails[q.Tail] = true
			s.Queues = append(s.Queues, compsc.QueueState{Direction: q.Direction, Index: q.Index})
			if q.Index < 2 {
				s.Queues[len(s.Queues)-1].Tail = uint32(q.Index + 1)
			}
		}
		for _, r := range f.Registers() {
			if r.Class == family.Copy && !tails[r.Offset] {
				s.Registers = append(s.Registers, compsc.RegValue{Offset: r.Offset})
			}
		}
		for i, r := range s.Registers {
			if r.Offset == ixgbevf.VFTDBAL(1) {
				s.Registers[i].Value = 0x1000
			}
		}
		if change != nil {
			change(s)
		}
		return s
	}
	setRegister := func(s *compsc.State) {
		for i, r := range s.Registers {
			if r.Offset == ixgbevf.VFRDBAL(3) {
				s.Registers[i].Value = 0x2000
			}
		}
	}
	enable := func(s *compsc.State) { s.Queues[3].Enabled = true }
	for name, c := range map[string]struct {
		from *compsc.State
		to   int
		want *compsc.State
	}{
		"same":             {of(4, setRegister), 4, of(4, setRegister)},
		"more":             {of(2, nil), 8, of(8, nil)},
		"fewer":            {of(4, setRegister), 2, of(2, nil)},
		"fewer, one is on": {of(4, enable), 2, of(4, enable)},
		"none":             {&compsc.State{Family: ixgbevf.Name}, 2, &compsc.State{Family: ixgbevf.Name}},
		"another family":   {&compsc.State{Family: "igbvf", Queues: make([]compsc.QueueState, 2)}, 2, &compsc.State{Family: "igbvf", Queues: make([]compsc.QueueState, 2)}},
		"beyond any":       {&compsc.State{Family: ixgbevf.Name, Queues: make([]compsc.QueueState, 64)}, 2, &compsc.State{Family: ixgbevf.Name, Queues: make([]compsc.QueueState, 64)}},
	} {
		f, err := ixgbevf.ForDevice(ixgbevf.VendorID, ixgbevf.DeviceID, c.to)
		if err != nil {
			t.Fatal(err)
		}
		deviceType{ixgbevf.VendorID, ixgbevf.DeviceID, f}.fitQueues(c.from)
		if d := cmp.Diff(c.want, c.from); d != "" {
			t.Errorf("%s: (-want +got)\n%s", name, d)
		}
	}
}
