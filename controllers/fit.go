package controllers

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"compsc.io/compsc/api/v1alpha1"
)

// placedVF is a VF with the PF that it is of.
type placedVF struct {
	v1alpha1.VFStatus
	pf *v1alpha1.PFStatus
}

// vfsOf returns the VFs of a node that are in the hands of holder, or free
// when holder is empty.
func vfsOf(n *v1alpha1.VFNode, holder string) []placedVF {
	var out []placedVF
	for i := range n.Status.PFs {
		pf := &n.Status.PFs[i]
		for _, vf := range pf.VFs {
			if vf.Holder == holder {
				out = append(out, placedVF{vf, pf})
			}
		}
	}
	return out
}

// checkIntact refuses when VFs that the VM has were changed or taken away, or
// nobody knows whether they were.
func checkIntact(n *v1alpha1.VFNode, held []placedVF) error {
	c := meta.FindStatusCondition(n.Status.Conditions, v1alpha1.ConditionIntact)
	if c != nil && c.Status == metav1.ConditionUnknown {
		return refuse(v1alpha1.ReasonDeviceUnavailable, "whether the VFs on the source node %s are as they were prepared is not known: %s", n.Name, c.Message)
	}
	var damaged []string
	for _, vf := range held {
		if vf.Damage != "" {
			damaged = append(damaged, fmt.Sprintf("VF %s: %s", vf.Address, vf.Damage))
		}
	}
	if len(damaged) == 0 {
		return nil
	}
	return refuse(v1alpha1.ReasonDeviceUnavailable, "VFs on the source node %s are not as they were prepared: %s", n.Name, strings.Join(damaged, "; "))
}

// checkMovable refuses when a VF that the VM has cannot be moved anywhere.
func checkMovable(n *v1alpha1.VFNode, held []placedVF) error {
	for _, vf := range held {
		if vf.Immovable != "" {
			return refuse(v1alpha1.ReasonImmovable, "VF %s on the source node %s cannot be moved: %s", vf.Address, n.Name, vf.Immovable)
		}
	}
	return nil
}

// fitting is what came of looking for VFs that the VM's could move to.
type fitting struct {
	// missing says in words what is not there; empty if each VF finds its own.
	missing string
	// unfit tells that there would be enough free VFs, were it not for what
	// missing says of them.
	unfit bool
	// differs says what is no reason to refuse and cannot be judged from here.
	differs []string
}

// open is what is left to the verdict of the node, as the end of a message.
func (f fitting) open(node string) string {
	if len(f.differs) == 0 {
		return ""
	}
	return fmt.Sprintf(" Node %s judges before anything is stopped whether these matter: %s.", node, strings.Join(f.differs, "; "))
}

// fit looks for a free VF for each that the VM has.
func fit(needed, free []placedVF) fitting {
	var f fitting
	var missing []string
	taken := map[string]bool{}
	short := map[string]int{} // by device ID
	wanted := map[string]int{}
	usable := map[string]int{}
	blocked := map[string]map[string]string{}
	for _, want := range needed {
		id := want.DeviceID
		wanted[id]++
		found := false
		usable[id] = 0
		for _, have := range free {
			if have.DeviceID != id {
				continue
			}
			if why := blocks(want, have); why != "" {
				if blocked[id] == nil {
					blocked[id] = map[string]string{}
				}
				blocked[id][have.Address] = why
				continue
			}
			usable[id]++
			if !found && !taken[have.Address] {
				found, taken[have.Address] = true, true
				if d := differs(want, have); d != "" && !slices.Contains(f.differs, d) {
					f.differs = append(f.differs, d)
				}
			}
		}
		if !found {
			short[id]++
		}
	}
	for id := range short {
		text := fmt.Sprintf("%d free of %d needed with device ID %s", usable[id], wanted[id], id)
		var why []string
		for address, w := range blocked[id] {
			why = append(why, fmt.Sprintf("VF %s %s", address, w))
		}
		slices.Sort(why)
		if len(why) > 0 {
			text += " (" + strings.Join(why, "; ") + ")"
			f.unfit = f.unfit || usable[id]+len(why) >= wanted[id]
		}
		missing = append(missing, text)
	}
	slices.Sort(missing)
	f.missing = strings.Join(missing, ", ")
	return f
}

// blocks says why a VM's VF cannot move to another with the same device ID;
// empty if it can.
func blocks(from, to placedVF) string {
	switch {
	case to.Obstacle != "":
		return "cannot be used: " + to.Obstacle
	case to.Damage != "":
		return "cannot be used: " + to.Damage
	case from.Family != "" && to.Family != "" && from.Family != to.Family:
		return fmt.Sprintf("is of family %s, the VM's VF %s of family %s", to.Family, from.Address, from.Family)
	case from.pf.Driver != "" && to.pf.Driver != "" && from.pf.Driver != to.pf.Driver:
		return fmt.Sprintf("has a PF %s with driver %s, the VM's VF %s one with driver %s: their mailboxes differ",
			to.pf.Name, to.pf.Driver, from.Address, from.pf.Driver)
	}
	return ""
}

// differs says in words what of two PFs differs and may matter.
func differs(from, to placedVF) string {
	var out []string
	if a, b := from.pf.DriverVersion, to.pf.DriverVersion; a != b && a != "" && b != "" {
		out = append(out, fmt.Sprintf("driver %s %s, here %s", to.pf.Driver, b, a))
	}
	if a, b := from.pf.FirmwareVersion, to.pf.FirmwareVersion; a != b && a != "" && b != "" {
		out = append(out, fmt.Sprintf("firmware %s, here %s", b, a))
	}
	if len(out) == 0 {
		return ""
	}
	return fmt.Sprintf("its PF %s has %s", to.pf.Name, strings.Join(out, " and "))
}
