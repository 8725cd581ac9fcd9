package device

import (
	"testing"
	"time"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/family/ixgbevf"
	"compsc.io/compsc/e2e/nbd"
)

// TestStoppedVFAnswersInTime: a VM that runs while its VF is given up (its
// target failed, and the agents are still about to take the VF back) uses it.
// However many accesses queue up, QEMU must get its answers: it gives the
// device up for good after 5 s without one (x-msg-timeout).
func TestStoppedVFAnswersInTime(t *testing.T) {
	p := newPair(t, nil)
	p.precopy()
	flushed := nbd.Held(p.src.gate.Flush)
	p.deliver(p.capture())
	_, err := p.src.ctl.ReleaseSource(t.Context(), &pb.ReleaseSourceRequest{MigrationUid: uid})
	p.src.must(err)
	<-flushed
	_, err = p.src.ctl.Relinquish(t.Context(), &pb.RelinquishRequest{MigrationUid: uid})
	p.src.must(err)
	p.src.mon.event("RESUME", "")
	begin := time.Now()
	for range 3 {
		p.src.wr(ixgbevf.VTEIMS, 1)
	}
	p.src.rd(ixgbevf.VFLINKS)
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("a read behind three writes took %v; QEMU waits for 5 s", took)
	}
}
