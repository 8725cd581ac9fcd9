package compsc

// goneBackend is a device that is gone.
type goneBackend struct{}

func (goneBackend) Read(uint32) uint32 { return allOnes }
func (goneBackend) Write(_, _ uint32)  {}

// Lose gives the device up for good: it calls release, which ends the
// backend's use, and touches the backend no more from then on. The guest finds
// a VF whose PF is being reset and whose link is down, which its driver takes
// for what may pass, and not a device that answers nothing; its counters stand
// still. All else that is asked of the engine fails with ErrGone. Nothing is
// asked of the PF, which may be on its way out; what it keeps for a VF goes
// with the VF. A second call does nothing.
func (v *VF) Lose(release func()) {
	v.mu.Lock()
	defer v.unlock()
	if v.lost != nil {
		return
	}
	lost := map[uint32]uint32{v.box.Control: v.box.RstI}
	for _, c := range v.counters {
		value := v.value(c)
		lost[c.Low] = uint32(value)
		if c.High != 0 {
			lost[c.High] = uint32(value >> 32)
		}
	}
	v.trackReset()
	v.lost, v.b = lost, goneBackend{}
	v.forget()
	release()
}
