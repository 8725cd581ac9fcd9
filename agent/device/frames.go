package device

import (
	"time"

	pb "compsc.io/compsc/agent/device/controlpb"
)

const (
	// frameWait is how long after the VM's start its first frames are waited for.
	frameWait = time.Second
	// frameLook is how often they are looked for.
	frameLook = 2 * time.Millisecond
)

// watchFrames notes when the VFs of a target that were just started have each
// passed a frame: only then does the network reach the VM again. It ends when
// they have, some time after the VM's start, or with the migration.
func (p *process) watchFrames(uid string) {
	var waiting []*iface
	before := map[*iface]uint64{}
	for _, i := range p.interfaces() {
		if vf := i.get(); vf != nil {
			waiting = append(waiting, i)
			before[i] = vf.engine.Frames()
		}
	}
	look := time.NewTicker(frameLook)
	defer look.Stop()
	for over := false; len(waiting) > 0 && !over; {
		<-look.C
		left := waiting[:0]
		for _, i := range waiting {
			if vf := i.get(); vf != nil && vf.engine.Frames() == before[i] {
				left = append(left, i)
			}
		}
		waiting = left
		p.get(func() {
			resumed := p.target.resumedAt
			over = p.uid != uid || p.phase != pb.Phase_PHASE_TARGET_ACTIVE && p.phase != pb.Phase_PHASE_RUNNING ||
				!resumed.IsZero() && time.Since(resumed) > frameWait
		})
	}
	p.set(func() {
		if p.uid != uid {
			return
		}
		if len(waiting) == 0 {
			p.target.passedAt = time.Now()
		}
		p.target.watched = true
	})
}
