//go:build e2esriov

package tests

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/compsc"
	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/driver"
	"compsc.io/compsc/e2e/sriov/job"
)

var (
	guestMAC = net.HardwareAddr{0x52, 0x54, 0, 0xaa, 0, 1}
	peerMAC  = net.HardwareAddr{0x52, 0x54, 0, 0xaa, 0, 2}
)

// What a guest sees go wrong.
var (
	errPending    = errors.New("the frames that the guest had posted before the move")
	errReceive    = errors.New("frames to the guest")
	errSend       = errors.New("frames of the guest")
	errInterrupts = errors.New("interrupts")
	errCounters   = errors.New("counters")
)

// late are frames that the guest posts while its VF is stopped.
var late = []string{"late 0", "late 1", "late 2"}

// rig is a guest and its peer on VFs of the first card.
type rig struct {
	*testing.T
	mem         ram
	source      *slot
	guest, peer *driver.NIC
}

func newRig(t *testing.T) *rig {
	r := &rig{T: t, mem: newRAM(t)}
	r.source = plug(t, vfs[0][0], r.mem)
	r.peer = newPeer(t)
	r.guest = driver.New(nil, r.mem, base)
	return r
}

// newPeer returns somebody to exchange frames with, not started yet.
func newPeer(t *testing.T) *driver.NIC {
	mem := newRAM(t)
	return driver.New(plug(t, vfs[0][1], mem), mem, base)
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// boot has both drivers start, and brings the guest's rings past their begin.
func (r *rig) boot() {
	r.Helper()
	r.guest.Bus = r.source
	r.must(r.guest.Start(guestMAC))
	r.must(r.peer.Start(peerMAC))
	r.must(exchange(r.guest, r.peer, 3, "before the move"))
	r.must(exchange(r.peer, r.guest, 5, "before the move"))
}

// exchange sends frames one at a time, each to be received before the next.
func exchange(from, to *driver.NIC, n int, text string) error {
	for i := range n {
		want := fmt.Sprintf("%s %d", text, i)
		from.Send(to.MAC, want)
		if got, err := to.Receive(); err != nil || got != want {
			return fmt.Errorf("%q was sent, %q came: %v", want, got, err)
		}
	}
	return from.Sent()
}

// stop takes the state of the guest's VF with frames that were not sent, and
// lets the VF go. The heads of the rings are not where they began.
func (r *rig) stop() *compsc.State {
	r.Helper()
	r.must(r.source.Quiesce(r.Context()))
	for _, text := range late {
		r.guest.Send(peerMAC, text)
	}
	s, err := r.source.Capture(r.Context())
	r.must(err)
	for _, q := range s.Queues[:1] {
		if q.Head == 0 {
			r.Fatalf("the head of %s queue %d is 0: to restore it is no work", q.Direction, q.Index)
		}
	}
	tx := queue(s, family.TX)
	if want := (tx.Head + uint32(len(late))) % driver.RingSize; tx.Head == 0 || tx.Tail != want {
		r.Fatalf("the transmit ring is at %d to %d, want other than 0, and %d frames", tx.Head, tx.Tail, len(late))
	}
	r.must(r.source.Scrub(r.Context()))
	return s
}

func queue(s *compsc.State, d family.Direction) *compsc.QueueState {
	return &s.Queues[slices.IndexFunc(s.Queues, func(q compsc.QueueState) bool { return q.Direction == d && q.Index == 0 })]
}

// verify looks whether the guest finds everything as it left it. Before has
// its counters from when it was stopped.
func (r *rig) verify(target *slot, before *compsc.State) error {
	for _, want := range late {
		if got, err := r.peer.Receive(); err != nil || got != want {
			return fmt.Errorf("%w: %q came, want %q: %v", errPending, got, want, err)
		}
	}
	greetings, err := r.greet()
	if err != nil {
		return fmt.Errorf("%w: %w", errReceive, err)
	}
	const frames = driver.RingSize + 3 // around the ring
	if err = exchange(r.peer, r.guest, frames-1, "to the target"); err == nil {
		err = exchange(r.peer, r.guest, 1, strings.Repeat("long ", driver.BufferSize/4))
	}
	if err != nil {
		return fmt.Errorf("%w: %w", errReceive, err)
	}
	if err := exchange(r.guest, r.peer, frames, "from the target"); err != nil {
		return fmt.Errorf("%w: %w", errSend, err)
	}
	for _, vector := range []int{driver.VectorRX, driver.VectorTX} {
		if err := target.awaitFired(vector, r.guest.Patience); err != nil {
			return fmt.Errorf("%w: %w", errInterrupts, err)
		}
	}
	for off, n := range map[uint32]uint64{igbvf.VFGPRC: frames + greetings, igbvf.VFGPTC: frames + uint64(len(late))} {
		i := slices.IndexFunc(before.Counters, func(c compsc.CounterValue) bool { return c.Offset == off })
		if got, want := uint64(target.Read(off)), before.Counters[i].Value+n; got != want {
			return fmt.Errorf("%w: %#x is %d, want %d", errCounters, off, got, want)
		}
	}
	return nil
}

// greet has the peer send frames until one arrives, and returns how many did:
// the driver of the source's card takes a while to notice that the guest's
// address is not there any more.
func (r *rig) greet() (arrived uint64, err error) {
	const text = "greeting"
	patience := r.guest.Patience
	defer func() { r.guest.Patience = patience }()
	r.guest.Patience = greetTime
	sent := 0
	for deadline := time.Now().Add(patience); ; {
		r.peer.Send(guestMAC, fmt.Sprintf("%s %d", text, sent))
		sent++
		got, err := r.guest.Receive()
		switch {
		case err != nil && time.Now().After(deadline):
			return 0, err
		case err != nil:
		case got == fmt.Sprintf("%s %d", text, sent-1):
			return arrived + 1, nil // what was sent before has arrived or is lost
		case strings.HasPrefix(got, text):
			arrived++
		default:
			return 0, fmt.Errorf("%q came, and was not sent", got)
		}
	}
}

// greetTime is how long a greeting may take before the next is sent.
const greetTime = 200 * time.Millisecond

// move restores the state, with a part of it left out, onto a VF that nobody
// used before, and returns what the guest sees go wrong.
func (r *rig) move(to card.VF, leaveOut func(*compsc.State)) error {
	r.Helper()
	r.boot()
	state := r.stop()
	encoded, err := state.Encode()
	r.must(err)
	moved, err := compsc.Decode(encoded)
	r.must(err)
	leaveOut(moved)
	target := plug(r.T, to, r.mem)
	caps, err := target.Probe(r.Context())
	r.must(err)
	r.must(target.Check(moved, caps))
	_, err = target.Restore(r.Context(), moved)
	r.must(err)
	r.Cleanup(func() { r.must(target.Scrub(context.Background())) })
	r.guest.Bus = target
	return r.verify(target, state)
}

// zero gives registers of a state the value 0.
func zero(offsets ...uint32) func(*compsc.State) {
	return func(s *compsc.State) {
		for i := range s.Registers {
			if slices.Contains(offsets, s.Registers[i].Offset) {
				s.Registers[i].Value = 0
			}
		}
	}
}

func TestMove(t *testing.T) {
	for name, to := range map[string]card.VF{"to a VF of the same card": vfs[0][2], "to a VF of the other card": vfs[1][0]} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.must(r.move(to, func(*compsc.State) {}))
			for _, c := range cards {
				withPF(t, r.guest, c)
			}
		})
	}
}

// withPF exchanges a frame with a card's own network interface.
func withPF(t *testing.T, nic *driver.NIC, pf card.PF) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("frames between %s and the VF: %v", pf.Name, err)
		}
	}
	link, err := pf.Link()
	must(err)
	fd, err := pf.Listen()
	must(err)
	defer unix.Close(fd)
	nic.Send(link.Attrs().HardwareAddr, "to "+pf.Name)
	buffer := make([]byte, 2048)
	for got := ""; got != "to "+pf.Name; {
		must(await(fd, nic.Patience))
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		must(err)
		got = driver.Text(buffer[:n])
	}
	_, err = unix.Write(fd, driver.Frame(nic.MAC, link.Attrs().HardwareAddr, "from "+pf.Name))
	must(err)
	if got, err := nic.Receive(); err != nil || got != "from "+pf.Name {
		t.Fatalf("%s sent a frame to the VF, %q came: %v", pf.Name, got, err)
	}
}

// TestLeftOut: each class of state is seen to be needed, by what a guest finds
// if it is left out. Each case has a VF that was not used before, because the
// resets of an emulated VF leave most registers as they are.
func TestLeftOut(t *testing.T) {
	cases := []struct {
		name  string
		leave func(*compsc.State)
		want  error
		// faults tells that the device is sent to where it may not go.
		faults bool
	}{
		{"addresses of rings", zero(igbvf.RDBAL(0), igbvf.RDBAH(0), igbvf.TDBAL(0), igbvf.TDBAH(0)), errPending, true},
		{"size of receive buffers", zero(igbvf.SRRCTL(0)), errReceive, false},
		{"transmit head", func(s *compsc.State) { queue(s, family.TX).Head = 0 }, errPending, false},
		{"receive head", func(s *compsc.State) { queue(s, family.RX).Head = 0 }, errReceive, false},
		{"transmit tail", func(s *compsc.State) { queue(s, family.TX).Tail = queue(s, family.TX).Head }, errPending, false},
		{"switches of queues", func(s *compsc.State) { queue(s, family.RX).Enabled, queue(s, family.TX).Enabled = false, false }, errPending, false},
		{"record of the mailbox", func(s *compsc.State) { s.Log = igbvf.New().NewLog().Marshal() }, errPending, false},
		{"vectors", zero(igbvf.IVAR0), errInterrupts, false},
		{"interrupt mask", zero(igbvf.EIMS), errInterrupts, false},
		{"counters", func(s *compsc.State) { clearCounters(s.Counters) }, errCounters, false},
	}
	fresh := slices.Concat(vfs[1][1:], vfs[0][3:])
	if len(cases) > len(fresh) {
		t.Fatalf("there are %d cases, and %d VFs that nobody used", len(cases), len(fresh))
	}
	var faulty []string
	for i, c := range cases {
		if c.faults {
			faulty = append(faulty, fresh[i].Address)
		}
	}
	if err := os.WriteFile(job.Faulty, []byte(strings.Join(faulty, "\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			r.guest.Patience, r.peer.Patience = time.Second, time.Second
			err := r.move(fresh[i], c.leave)
			t.Logf("the guest sees: %v", err)
			if !errors.Is(err, c.want) {
				t.Errorf("the guest sees %v, want: %v", err, c.want)
			}
		})
	}
}

func clearCounters(counters []compsc.CounterValue) {
	for i := range counters {
		counters[i].Value = 0
	}
}
