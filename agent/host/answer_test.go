package host

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/host/journal"
)

// The target of a migration is prepared without its MAC, gets it when it takes
// over, and loses it when it is given up; Release finds all as it was.
func TestSRIOVAnswer(t *testing.T) {
	for _, address := range []string{vf0, vf1} {
		index := map[string]int{vf0: 0, vf1: 1}[address]
		n := newFakeNode(t)
		before := n.picture(address, index)
		mac := func() string { return n.pfs["eth0"].vfs[index].MAC }
		p, err := n.host().Prepare(t.Context(), Request{Address: address, MAC: macA, Silent: true})
		n.must(err)
		p.Close()
		for _, step := range []struct {
			on   bool
			want string
		}{{false, noMAC}, {true, macA}, {true, macA}, {false, noMAC}, {true, macA}} {
			n.must(n.host().Answer(t.Context(), address, step.on))
			if got := mac(); got != step.want {
				t.Errorf("the PF has MAC %s, want %s", got, step.want)
			}
			if damage, err := n.host().Damage(t.Context()); err != nil || len(damage) > 0 {
				t.Errorf("damage %q (%v)", damage, err)
			}
		}
		n.must(n.host().Release(t.Context(), address))
		if after := n.picture(address, index); after != before {
			t.Errorf("was %s\nis  %s", before, after)
		}
		// Nobody answers for what is not prepared, and its PF is not touched.
		n.calls = nil
		if err := n.host().Answer(t.Context(), address, true); err == nil || !strings.Contains(err.Error(), "not prepared") {
			t.Errorf("a VF that was released answers: %v", err)
		}
		n.must(n.host().Answer(t.Context(), address, false))
		if len(n.calls) > 0 {
			t.Errorf("touched: %v", n.calls)
		}
	}
}

func TestSRIOVAnswerRefuses(t *testing.T) {
	n := newFakeNode(t)
	prepare := func(r Request) {
		r.Address = vf0
		p, err := n.host().Prepare(t.Context(), r)
		n.must(err)
		p.Close()
	}
	prepare(Request{MAC: macA, Silent: true})
	// Somebody else has taken the MAC meanwhile.
	n.pfs["eth0"].vfs[1].MAC = macA
	if err := n.host().Answer(t.Context(), vf0, true); err == nil || !strings.Contains(err.Error(), "in use by VF 1") || n.pfs["eth0"].vfs[0].MAC != noMAC {
		t.Errorf("two VFs have MAC %s (%v)", macA, err)
	}
	n.pfs["eth0"].vfs[1].MAC = macB
	n.refuse["mac"] = unix.EIO
	if err := n.host().Answer(t.Context(), vf0, true); err == nil {
		t.Error("a PF's refusal was passed over")
	}
	clear(n.refuse)
	// A VF that was removed, and one that is not the one that was prepared.
	n.setVFs(0)
	n.calls = nil
	n.must(n.host().Answer(t.Context(), vf0, false))
	if err := n.host().Answer(t.Context(), vf0, true); err == nil {
		t.Error("a VF that was removed answers")
	}
	if len(n.calls) > 0 {
		t.Errorf("touched: %v", n.calls)
	}
}

// A MAC that is the guest's own affair stays.
func TestSRIOVAnswerWithoutMAC(t *testing.T) {
	n := newFakeNode(t)
	p, err := n.host().Prepare(t.Context(), Request{Address: vf1})
	n.must(err)
	p.Close()
	n.must(n.host().Answer(t.Context(), vf1, false))
	if got := n.pfs["eth0"].vfs[1].MAC; got != macB {
		t.Errorf("the PF has MAC %s, and had %s", got, macB)
	}
}

// A network plugin may have set the VM's MAC before: it does not come back
// with Release, for the VM has it elsewhere.
func TestSRIOVReleaseKeepsTheVMsMACAway(t *testing.T) {
	n := newFakeNode(t)
	n.pfs["eth0"].vfs[0] = journal.Settings{MAC: macA, SpoofCheck: true}
	p, err := n.host().Prepare(t.Context(), Request{Address: vf0, MAC: macA, Silent: true})
	n.must(err)
	p.Close()
	if got := n.pfs["eth0"].vfs[0].MAC; got != noMAC {
		t.Errorf("prepared in silence, the VF has MAC %s", got)
	}
	n.must(n.host().Release(t.Context(), vf0))
	if got := n.pfs["eth0"].vfs[0]; got != (journal.Settings{MAC: noMAC, SpoofCheck: true}) {
		t.Errorf("released with %+v", got)
	}
}
