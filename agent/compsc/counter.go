package compsc

import "compsc.io/compsc/agent/family"

// counter is one statistics counter as the guest sees it: the hardware's
// value plus an offset, modulo its width. For one that a read clears the
// offset is what the engine has read and the guest has not.
type counter struct {
	family.Counter
	offset uint64
	// high is the upper half of the sample whose lower half the guest read
	// last; latched until the guest has read it.
	high    uint32
	latched bool
	// direct tells that the guest reads it by itself: it is the device's, and
	// one that a read clears is left alone.
	direct bool
}

func (c *counter) mask() uint64 { return 1<<c.Width - 1 }

// sample reads the hardware's value. The lower half is read first and last:
// where reading it latches the upper half, as drivers assume, all three are
// of one moment, and elsewhere a wrap in between shows.
func (v *VF) sample(c *counter) uint64 {
	if c.High == 0 {
		return uint64(v.b.Read(c.Low)) & c.mask()
	}
	low, high := v.b.Read(c.Low), v.b.Read(c.High)
	if again := v.b.Read(c.Low); again < low {
		low, high = again, v.b.Read(c.High)
	}
	return (uint64(high)<<32 | uint64(low)) & c.mask()
}

// value is what the guest would read.
func (v *VF) value(c *counter) uint64 {
	if c.direct && c.ReadClears {
		return 0 // what it has is the guest's to read
	}
	if c.ReadClears {
		c.offset = min(c.offset+v.sample(c), c.mask())
		return c.offset
	}
	return (v.sample(c) + c.offset) & c.mask()
}

// state is the counter with that value, as another VF goes on with it.
func (c *counter) state(value uint64) CounterValue {
	s := CounterValue{Offset: c.Low, Value: value, Latched: c.latched}
	if c.latched {
		s.High = c.high
	}
	return s
}

// Frames is how many frames the guest has received and sent, modulo 2^32 for
// each: what differs between two calls has passed meanwhile. Frames that the
// engine had looped to the VF are not among them.
func (v *VF) Frames() uint64 {
	v.mu.Lock()
	defer v.unlock()
	var n uint64
	for _, c := range v.counters {
		if c.Frames {
			n += v.value(c)
		}
	}
	return n
}

// readCounter serves a guest's read of either half: the lower one takes a
// sample, the upper one belongs to the sample taken before.
func (v *VF) readCounter(c *counter, off uint32) uint32 {
	if off == c.High && c.latched {
		c.latched = false
		return c.high
	}
	value := v.value(c)
	if c.direct {
		value = v.sample(c)
	}
	if c.ReadClears {
		c.offset = 0
	}
	if off == c.High {
		return uint32(value >> 32)
	}
	c.high, c.latched = uint32(value>>32), c.High != 0
	return uint32(value)
}

// rebase makes the guest see value from now on, unless it looks by itself, and
// but for an upper half of which it has read the lower one.
func (v *VF) rebase(c *counter, value uint64) {
	if c.direct {
		return
	}
	hardware := v.sample(c)
	if c.ReadClears {
		hardware = 0 // now it is
	}
	c.offset = (value - hardware) & c.mask()
}
