package family

import "slices"

// PageSize is the size of the pages in which BAR0 can be mapped into a guest.
const PageSize = 4096

// DoorbellPages returns the offsets of the pages of BAR0 that a guest can be
// given without taking from whoever mediates the VF what nothing else tells:
// those with doorbells, and with none of the registers of interrupts, of the
// mailbox and of the reset. What else is on them is out of sight then: the
// rings, and counters that share them.
func DoorbellPages(f Family) []uint32 {
	var pages []uint32
	for _, q := range f.Queues() {
		if p := pageOf(q.Tail); !slices.Contains(pages, p) {
			pages = append(pages, p)
		}
	}
	slices.Sort(pages)
	irq, box := f.Interrupts(), f.Mailbox()
	reset, _ := f.ResetRegister()
	seen := append([]uint32{reset, box.Memory, box.Control, irq.Cause, irq.CauseSet, irq.MaskSet, irq.MaskClear, irq.AutoClear, irq.AutoMask}, irq.Assign...)
	return slices.DeleteFunc(pages, func(p uint32) bool {
		return slices.ContainsFunc(seen, func(off uint32) bool { return pageOf(off) == p })
	})
}

func pageOf(off uint32) uint32 { return off &^ (PageSize - 1) }

// OnPages tells whether the register at off is on one of the pages.
func OnPages(pages []uint32, off uint32) bool { return slices.Contains(pages, pageOf(off)) }
