package twin

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/ixgbevf"
)

// enough is how many seeds may pass before a loss must have been noticed.
const enough = 400

// registerLoss leaves registers at zero.
func registerLoss(name string, offsets ...uint32) Loss {
	return Loss{Name: name, State: func(s *compsc.State) {
		for i := range s.Registers {
			if slices.Contains(offsets, s.Registers[i].Offset) {
				s.Registers[i].Value = 0
			}
		}
	}}
}

func queueLoss(name string, d family.Direction, change func(*compsc.QueueState)) Loss {
	return Loss{Name: d.String() + " " + name, State: func(s *compsc.State) {
		for i := range s.Queues {
			if s.Queues[i].Direction == d {
				change(&s.Queues[i])
			}
		}
	}}
}

// unseenLoss changes registers that are not compared: the loss must show in
// what the device does.
func unseenLoss(name string, change func(value uint32) uint32, offsets ...uint32) Loss {
	return Loss{Name: name, Unread: offsets, State: func(s *compsc.State) {
		for i := range s.Registers {
			if slices.Contains(offsets, s.Registers[i].Offset) {
				s.Registers[i].Value = change(s.Registers[i].Value)
			}
		}
	}}
}

// unseenLosses lists what registers make the device do.
func unseenLosses() []Loss {
	nothing := func(uint32) uint32 { return 0 }
	without := func(bits uint32) func(uint32) uint32 { return func(v uint32) uint32 { return v &^ bits } }
	return []Loss{
		unseenLoss("what headers are split after", without(0x1330), ixgbevf.VFPSRTYPE),
		unseenLoss("the size of header buffers", without(0x3f<<8), ixgbevf.VFSRRCTL(0), ixgbevf.VFSRRCTL(1)),
		unseenLoss("header split", func(v uint32) uint32 {
			if v>>25&7 > 1 {
				v = v&^(7<<25) | 1<<25
			}
			return v
		}, ixgbevf.VFSRRCTL(0), ixgbevf.VFSRRCTL(1)),
		unseenLoss("coalescing", without(1), ixgbevf.VFRSCCTL(0), ixgbevf.VFRSCCTL(1)),
		unseenLoss("the longest chain", without(3<<2), ixgbevf.VFRSCCTL(0), ixgbevf.VFRSCCTL(1)),
		unseenLoss("the bound of packets", without(ixgbevf.RXDCTLLength|ixgbevf.RXDCTLLengthEnable), ixgbevf.VFRXDCTL(0), ixgbevf.VFRXDCTL(1)),
		unseenLoss("RSS", without(ixgbevf.MRQCEnable), ixgbevf.VFMRQC),
		unseenLoss("what RSS hashes", without(0x00ff0000), ixgbevf.VFMRQC),
		unseenLoss("the RSS key", nothing, words(ixgbevf.VFRSSRK, ixgbevf.RSSKeyWords)...),
		unseenLoss("the RSS table", nothing, words(ixgbevf.VFRETA, ixgbevf.RSSTableWords)...),
		unseenLoss("interrupt intervals", without(ixgbevf.EITRInterval), ixgbevf.VTEITR(0), ixgbevf.VTEITR(1), ixgbevf.VTEITR(2)),
	}
}

// words are the offsets of n registers.
func words(offset func(int) uint32, n int) (offsets []uint32) {
	for i := range n {
		offsets = append(offsets, offset(i))
	}
	return offsets
}

// losses lists every class of state, and every register on its own.
func losses() []Loss {
	list := []Loss{
		{Name: "causes", State: func(s *compsc.State) { s.Causes = 0 }},
		{Name: "mailbox memory", State: func(s *compsc.State) { clear(s.Mailbox.Memory) }},
		{Name: "mailbox read-clear bits", State: func(s *compsc.State) { s.Mailbox.ReadClear = 0 }},
		{Name: "mailbox held", State: func(s *compsc.State) { s.Mailbox.Held = false }},
	}
	for _, d := range []family.Direction{family.RX, family.TX} {
		list = append(list,
			queueLoss("head", d, func(q *compsc.QueueState) { q.Head = 0 }),
			queueLoss("tail", d, func(q *compsc.QueueState) { q.Tail = q.Head }),
			queueLoss("enable", d, func(q *compsc.QueueState) { q.Enabled = false }))
	}
	list = append(list, queueLoss("contexts", family.TX, func(q *compsc.QueueState) { q.Contexts = nil }))
	f, err := ixgbevf.ForDevice(ixgbevf.VendorID, ixgbevf.DeviceIDX550, 0)
	if err != nil {
		panic(err)
	}
	for i, c := range f.Counters() {
		list = append(list, Loss{Name: "counter " + c.Name, State: func(s *compsc.State) { s.Counters[i].Value = 0 }})
	}
	list = append(list, Loss{Name: "latched halves of counters", State: func(s *compsc.State) {
		for i := range s.Counters {
			s.Counters[i].High = 0
		}
	}})
	for _, message := range []string{"RESET", "API_NEGOTIATE", "GET_QUEUES", "FEATURES_NEGOTIATE", "SET_LPE", "SET_MAC_ADDR", "SET_MACVLAN", "SET_VLAN", "SET_MULTICAST", "UPDATE_XCAST_MODE"} {
		list = append(list, Loss{Name: "mailbox " + message, Message: message})
	}
	tails := map[uint32]bool{}
	for _, q := range f.Queues() {
		tails[q.Tail] = true
	}
	// Of key and table of the RSS, which unseenLosses has whole, one word does.
	rest := append(words(ixgbevf.VFRSSRK, ixgbevf.RSSKeyWords)[1:], words(ixgbevf.VFRETA, ixgbevf.RSSTableWords)[1:]...)
	for _, r := range f.Registers() {
		if r.Class == family.Copy && !tails[r.Offset] && !slices.Contains(rest, r.Offset) {
			list = append(list, registerLoss(r.Name, r.Offset))
		}
	}
	return append(list, unseenLosses()...)
}

// TestEveryLossIsNoticed leaves out of every move one class of state after the
// other: the twins must be told apart then.
func TestEveryLossIsNoticed(t *testing.T) {
	for _, loss := range losses() {
		t.Run(loss.Name, func(t *testing.T) {
			t.Parallel()
			seed, err := noticed(t, loss)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("noticed with seed %d", seed)
		})
	}
}

// noticed returns the first seed that tells the twins apart.
func noticed(t *testing.T, loss Loss) (uint64, error) {
	for seed := uint64(1); seed <= enough; seed++ {
		_, err := Run(t.Context(), Options{Seed: seed, Lose: &loss})
		var d *DifferenceError
		switch {
		case errors.As(err, &d):
			t.Log(d.What)
			return seed, nil
		case err != nil:
			return 0, err
		}
	}
	return 0, fmt.Errorf("%d seeds run as if nothing were lost", enough)
}
