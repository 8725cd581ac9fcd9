package compsc

import (
	"context"
	"errors"
	"testing"
)

// What the PF will refuse once the guest's address is set for the VF is known
// beforehand, when it is not set yet.
func TestRehearseKnowsWhatTheAddressTakes(t *testing.T) {
	sd := newFake()
	source, _ := newVF(sd)
	boot(t, source, sd)
	if source.Summary().FurtherAddresses == 0 {
		t.Fatal("the guest has no further addresses: nothing is tested")
	}
	for _, c := range []struct {
		rights Rights
		ok     bool
	}{{Rights{}, true}, {Rights{Trusted: true}, true}, {Rights{Addressed: true}, false}, {Rights{Addressed: true, Trusted: true}, true}} {
		d := newFake()
		target, _ := newVF(d)
		err := target.Rehearse(context.Background(), source.Record(), c.rights)
		var inc *IncompatibleError
		if c.ok && err != nil || !c.ok && (!errors.As(err, &inc) || inc.Reason != ReasonMailboxRefused) {
			t.Errorf("with %+v: %v", c.rights, err)
		}
		if !c.ok && len(d.writes) > 0 {
			t.Errorf("the VF was touched: %v", d.writes)
		}
	}
}
