package device

import (
	"fmt"
	"math/bits"

	"compsc.io/compsc/agent/vfiouser"
)

// fire raises a vector.
func (i *iface) fire(vector int) {
	if vf := i.get(); vf != nil {
		vf.engine.Interrupt(vector) // the guest shall find what the vector tells of
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if vector < 0 || vector >= len(i.vectors) {
		return
	}
	if fd := i.vectors[vector]; fd == nil {
		i.missed[vector] = true
	} else if err := fd.Signal(); err != nil {
		i.log.Error("interrupt lost", "vector", vector, "error", err)
	}
}

// kick raises the vectors once that the engine says shall not be lost.
func (i *iface) kick() {
	vf := i.get()
	if vf == nil {
		return
	}
	for vectors := vf.engine.Kick(); vectors != 0; vectors &= vectors - 1 {
		i.fire(bits.TrailingZeros32(vectors))
	}
}

func (i *iface) disconnectVectors() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.vf != nil {
		if err := i.vf.silicon.DisconnectAll(); err != nil {
			i.log.Error("the VF's vectors stay connected", "error", err)
		}
	}
	for v, fd := range i.vectors {
		if fd != nil {
			fd.Close()
		}
		i.vectors[v] = nil
	}
}

func closeEventfds(list []*vfiouser.Eventfd) {
	for _, fd := range list {
		fd.Close()
	}
}

// SetIRQs implements vfiouser.Device.
func (i *iface) SetIRQs(r vfiouser.IRQRequest) error {
	if r.Index != vfiouser.IRQIndexMSIX {
		// Error and request interrupts are never raised.
		closeEventfds(r.Eventfds)
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	start, end := int(r.Start), int(r.Start)+int(r.Count)
	if r.Op == vfiouser.IRQDisable {
		start, end = 0, len(i.vectors)
		if i.vf != nil {
			if err := i.vf.silicon.DisconnectAll(); err != nil {
				return err
			}
		}
	}
	if end > len(i.vectors) {
		closeEventfds(r.Eventfds)
		return fmt.Errorf("vectors %d to %d, the VF has %d", start, end-1, len(i.vectors))
	}
	for v := start; v < end; v++ {
		switch r.Op {
		case vfiouser.IRQAssign, vfiouser.IRQDeassign, vfiouser.IRQDisable:
			old := i.vectors[v]
			i.vectors[v] = nil
			if r.Op == vfiouser.IRQAssign {
				i.vectors[v] = r.Eventfds[v-start]
			}
			var err error
			if r.Op != vfiouser.IRQDisable {
				err = i.vf.silicon.Connect(v, i.vectors[v])
			}
			if old != nil {
				old.Close()
			}
			if err != nil {
				closeEventfds(r.Eventfds[min(v-start+1, len(r.Eventfds)):])
				return err
			}
			if r.Op != vfiouser.IRQAssign {
				continue
			}
			if i.missed[v] {
				i.missed[v] = false
				if err := i.vectors[v].Signal(); err != nil {
					i.log.Error("interrupt lost", "vector", v, "error", err)
				}
			}
		case vfiouser.IRQTrigger:
			if fd := i.vectors[v]; fd != nil {
				if err := fd.Signal(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}
