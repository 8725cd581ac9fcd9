package demo

import (
	"fmt"
	"text/tabwriter"

	"compsc.io/compsc/e2e/harness"
)

// table prints the results.
func (d *show) table() {
	fmt.Fprintln(d.Stdout)
	w := tabwriter.NewWriter(d.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "hop\tVM stopped\tdevice stopped\tpings lost\tstream\tdriver resets\tstate\tpages marked\t")
	for i, h := range d.result.Hops {
		fmt.Fprintf(w, "%d\t%.1f ms\t%.1f ms\t%d\t%s\t%d\t%d B\t%d\t\n", i+1,
			h.VMStoppedMs, h.DeviceStoppedMs, h.PingsLost, streamWord(h), h.DriverResets, h.StateBytes, h.PagesMarked)
	}
	w.Flush()

	fmt.Fprintln(d.Stdout)
	w = tabwriter.NewWriter(d.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "step")
	for i := range d.result.Hops {
		fmt.Fprintf(w, "\thop %d", i+1)
	}
	fmt.Fprintln(w)
	for _, name := range stepNames(d.result.Hops) {
		fmt.Fprint(w, name)
		for _, h := range d.result.Hops {
			fmt.Fprintf(w, "\t%s", took(h, name))
		}
		fmt.Fprintln(w)
	}
	w.Flush()

	fmt.Fprintln(d.Stdout)
	w = tabwriter.NewWriter(d.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "process\tresident memory\tCPU while idle")
	f := d.result.Footprint
	for _, p := range f.all() {
		fmt.Fprintf(w, "%s\t%.1f MiB\t%.1f %%\n", p.name, p.ResidentMiB, p.IdleCPUPercent)
	}
	w.Flush()
	fmt.Fprintln(d.Stdout)
}

func streamWord(h *harness.Hop) string {
	if !h.StreamIntact {
		return "CORRUPTED"
	}
	return fmt.Sprintf("intact, %d MB", h.StreamBytes/1e6)
}

// stepNames are the steps of all hops, each once, in the order of the first
// hop that has them.
func stepNames(hops []*harness.Hop) []string {
	var names []string
	seen := map[string]bool{}
	for _, h := range hops {
		for _, s := range h.Steps {
			if !seen[s.Name] {
				seen[s.Name] = true
				names = append(names, s.Name)
			}
		}
	}
	return names
}

func took(h *harness.Hop, name string) string {
	for _, s := range h.Steps {
		if s.Name == name {
			return fmt.Sprintf("%.2f ms", s.Ms)
		}
	}
	return "-"
}
