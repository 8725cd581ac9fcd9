package device

// takeFilters is the fault of that name.
func (p *process) takeFilters() {
	for _, i := range p.interfaces() {
		if vf, ok := i.get().silicon.(interface{ SetFree(macvlans, vlans int) }); ok {
			vf.SetFree(0, 0)
		}
	}
}
