package device

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"compsc.io/compsc/agent/vfiouser"
)

// DMAMap implements vfiouser.Device: what this process reaches of the guest's
// memory, the VF reaches too.
func (i *iface) DMAMap(m vfiouser.DMAMap) error {
	i.dma.Lock()
	defer i.dma.Unlock()
	if err := i.memory.Map(m); err != nil {
		return err
	}
	vf := i.get()
	if vf == nil {
		return nil
	}
	if err := i.reach(vf.silicon, m.Addr); err != nil {
		i.p.fail(fmt.Errorf("interface %s: VF %s: %w", i.cfg.Name, vf.handoff.VF, err))
		return errors.Join(err, i.memory.Unmap(vfiouser.DMAUnmap{Addr: m.Addr, Size: m.Size}))
	}
	return nil
}

// reach lets the VF reach the range of guest memory that begins at addr. One
// that comes without a descriptor is no RAM.
func (i *iface) reach(s silicon, addr uint64) error {
	r, mem, ok := i.memory.View(addr)
	if !ok || !r.Mapped {
		return nil
	}
	return s.Map(r.Addr, mem, r.Readable, r.Writable)
}

// reachAll lets a VF that is being attached reach all of guest memory. Called
// with dma held.
func (i *iface) reachAll(s silicon) error {
	for _, r := range i.memory.Ranges() {
		if err := i.reach(s, r.Addr); err != nil {
			return err
		}
	}
	return nil
}

// DMAUnmap implements vfiouser.Device: the VF loses the memory first.
func (i *iface) DMAUnmap(u vfiouser.DMAUnmap) error {
	i.dma.Lock()
	defer i.dma.Unlock()
	if vf := i.get(); vf != nil {
		for _, r := range i.memory.Ranges() {
			if !r.Mapped || !u.All && (r.Addr < u.Addr || r.Size > u.Size || r.Addr-u.Addr > u.Size-r.Size) {
				continue
			}
			if err := vf.silicon.Unmap(r.Addr, r.Size); err != nil {
				return err
			}
		}
	}
	return i.memory.Unmap(u)
}

// track begins to record which pages of the guest the VF writes.
func (i *iface) track() error {
	vf := i.get()
	if vf.immovable() != "" {
		return nil // the target refuses it
	}
	i.pages.Start()
	if !vf.silicon.TellsWrites() {
		vf.engine.Track(i.wrote)
		return nil
	}
	return vf.silicon.TrackWrites(true)
}

// pageSize is the granularity in which writes are recorded.
const pageSize = 4096

// wrote records the pages of guest memory among n bytes at addr. A guest may
// name any address in its rings; the IOMMU keeps the VF from what it does not
// have, and the record must not grow with it.
func (i *iface) wrote(addr uint64, n int) {
	for end := addr + uint64(n); addr < end; {
		if i.memory.Writable(addr) {
			i.pages.Add(addr, 1)
		}
		next := addr&^(pageSize-1) + pageSize
		if next < addr {
			return // the end of all addresses
		}
		addr = next
	}
}

// untrack ends that.
func (i *iface) untrack() {
	i.pages.Stop()
	vf := i.get()
	vf.engine.Untrack()
	if err := vf.silicon.TrackWrites(false); err != nil {
		i.log.Warn("the IOMMU goes on recording writes", "error", err)
	}
}

// written returns the pages that the quiet VF has written since track, by
// address.
func (i *iface) written() ([]uint64, error) {
	i.dma.Lock()
	defer i.dma.Unlock()
	vf := i.get()
	if why := vf.immovable(); why != "" {
		return nil, errors.New(why)
	}
	if !vf.silicon.TellsWrites() {
		if err := vf.engine.FlushTracked(); err != nil {
			return nil, err
		}
		// Firmware may have taken memory out of the guest since.
		return slices.DeleteFunc(i.pages.Addresses(), func(addr uint64) bool { return !i.memory.Writable(addr) }), nil
	}
	for _, r := range i.memory.Ranges() {
		if !r.Mapped || !r.Writable {
			continue
		}
		if err := vf.silicon.Writes(r.Addr, r.Size, func(addr uint64) { i.pages.Add(addr, 1) }); err != nil {
			return nil, err
		}
	}
	return i.pages.Addresses(), nil
}

// markPages has QEMU mark each page that the device wrote as dirty, by
// writing one byte of it unchanged, and returns how many there were. DMA
// through the shared mapping leaves no trace in QEMU's migration bitmap.
func (i *iface) markPages(ctx context.Context) (uint64, error) {
	var n uint64
	var b [1]byte
	pages, err := i.written()
	if err != nil || len(pages) == 0 {
		return 0, err
	}
	for _, addr := range pages {
		if err := i.memory.ReadAt(addr, b[:]); err != nil {
			return n, fmt.Errorf("page %#x: %w", addr, err)
		}
		if err := i.server.PostWrite(addr, b[:]); err != nil {
			return n, fmt.Errorf("page %#x: %w", addr, err)
		}
		n++
	}
	if err := i.server.Fence(ctx, pages[0]); err != nil {
		return n, err
	}
	if i.p.opts.Marked != nil {
		_, uid := i.p.current()
		return n, i.p.opts.Marked(uid, i.cfg.Name, pages)
	}
	return n, nil
}
