package device

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "compsc.io/compsc/agent/device/controlpb"
)

// What the target's PF would not do is said before anything is stopped.
func TestVerdictRehearses(t *testing.T) {
	p := newPair(t, nil)
	hold := durationpb.New(2 * time.Second)
	s, err := p.src.ctl.PrepareSource(t.Context(), &pb.PrepareSourceRequest{MigrationUid: uid, HoldTimeout: hold})
	p.src.must(err)
	if len(s.Interfaces) != 1 || len(s.Interfaces[0].MailboxRecord) == 0 {
		t.Fatalf("the source tells no record: %+v", s.Interfaces)
	}
	good := s.Interfaces[0].MailboxRecord
	s.Interfaces[0].MailboxRecord = good[:len(good)-1]
	d, err := p.dst.ctl.PrepareTarget(t.Context(), &pb.PrepareTargetRequest{MigrationUid: uid, Interfaces: s.Interfaces, HoldTimeout: hold})
	p.dst.must(err)
	if d.Accepted || d.Reason != "StateInvalid" {
		t.Errorf("verdict %+v", d)
	}
	s.Interfaces[0].MailboxRecord = good
	if d, err = p.dst.ctl.PrepareTarget(t.Context(), &pb.PrepareTargetRequest{MigrationUid: uid, Interfaces: s.Interfaces, HoldTimeout: hold}); err != nil || !d.Accepted {
		t.Errorf("verdict %+v (%v)", d, err)
	}
}
