package device

import (
	"time"

	pb "compsc.io/compsc/agent/device/controlpb"
)

func (i *iface) setRunning(on bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	select {
	case <-i.running:
		if !on {
			i.running = make(chan struct{})
			i.waitUntil = time.Time{}
		}
	default:
		if on {
			close(i.running)
		}
	}
}

// watchDriver waits for the guest's next access to the VF.
func (i *iface) watchDriver() {
	i.driverSeen.Store(false)
	i.watching.Store(true)
}

// stoppedAccess bounds how long the guest's accesses wait for a stopped VF to
// run, all together for each stop: the VM resumed a moment before the VF. QEMU
// gives the device up when an answer takes 5 s (x-msg-timeout).
const stoppedAccess = 2 * time.Second

// noteDriver notes that the guest uses the VF.
func (i *iface) noteDriver() {
	if i.watching.Load() && i.watching.CompareAndSwap(true, false) {
		i.driverSeen.Store(true)
		i.p.set(func() {})
	}
}

// touched is called before each access of the guest.
func (i *iface) touched() {
	i.noteDriver()
	i.mu.Lock()
	ch := i.running
	i.mu.Unlock()
	select {
	case <-ch:
		return
	default:
	}
	if phase, _ := i.p.current(); phase == pb.Phase_PHASE_RELINQUISHED {
		// Running again takes a word of the target. Until then the engine
		// keeps what the guest writes.
		return
	}
	// The VM runs although the VF is stopped: its migration has failed, and
	// QEMU's event is still on its way or the monitor is gone.
	go i.p.resumed()
	i.mu.Lock()
	if i.waitUntil.IsZero() {
		i.waitUntil = time.Now().Add(stoppedAccess)
	}
	left := time.Until(i.waitUntil)
	i.mu.Unlock()
	select {
	case <-ch:
	case <-time.After(left):
		i.log.Error("the guest uses a VF that is stopped")
	}
}
