package controllers

import (
	"errors"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"compsc.io/compsc/api/v1alpha1"
)

// realNodes makes the fixture's nodes ones with an igb each.
func realNodes(f *fixture) *fixture {
	for _, n := range f.vfnodes {
		pf := &n.Status.PFs[0]
		pf.Name, pf.Driver, pf.DriverVersion, pf.FirmwareVersion = "eth0", "igb", "6.12", "2.1.0"
		for i := range pf.VFs {
			pf.VFs[i].DeviceID, pf.VFs[i].Family = "8086:10ca", "igbvf"
		}
	}
	return f
}

// What is known of a VF, its PF and its node decides before anything starts.
func TestPreflightOfRealVFs(t *testing.T) {
	const noIOMMU = "it has no IOMMU group: turn the IOMMU on"
	target := func(f *fixture) *v1alpha1.PFStatus { return &f.vfnodes["node-b"].Status.PFs[0] }
	for name, c := range map[string]struct {
		arrange         func(*fixture)
		reason, message string // reason empty: accepted
	}{
		"alike": {func(*fixture) {}, "", "Everything known beforehand allows the migration."},
		"one of two is of use": {func(f *fixture) { target(f).VFs[0].Obstacle = noIOMMU }, "",
			"Everything known beforehand allows the migration."},
		"another driver version": {func(f *fixture) { target(f).DriverVersion = "6.1" }, "",
			"Everything known beforehand allows the migration. Node node-b judges before anything is stopped whether these matter: its PF eth0 has driver igb 6.1, here 6.12."},
		"another firmware": {func(f *fixture) { target(f).FirmwareVersion = "3.30" }, "",
			"Everything known beforehand allows the migration. Node node-b judges before anything is stopped whether these matter: its PF eth0 has firmware 3.30, here 2.1.0."},
		"no IOMMU": {func(f *fixture) { target(f).VFs[0].Obstacle, target(f).VFs[1].Obstacle = noIOMMU, noIOMMU }, v1alpha1.ReasonIncompatible,
			"no node can run the VM with its VFs (node-b: 0 free of 1 needed with device ID 8086:10ca (VF 0000:01:10.0 cannot be used: " + noIOMMU + "; VF 0000:01:10.2 cannot be used: " + noIOMMU + "))"},
		"another PF driver":           {func(f *fixture) { target(f).Driver = "igb_uio" }, v1alpha1.ReasonIncompatible, "with driver igb_uio, the VM's VF 0000:01:10.0 one with driver igb: their mailboxes differ"},
		"another family":              {func(f *fixture) { target(f).VFs[0].Family, target(f).VFs[1].Family = "x", "x" }, v1alpha1.ReasonIncompatible, "is of family x, the VM's VF 0000:01:10.0 of family igbvf"},
		"in use, the other of no use": {func(f *fixture) { target(f).VFs[0].Holder, target(f).VFs[1].Obstacle = "vms/x", noIOMMU }, v1alpha1.ReasonIncompatible, "VF 0000:01:10.2 cannot be used"},
		"all in use":                  {func(f *fixture) { f.occupied() }, v1alpha1.ReasonNoFreeVF, "0 free of 1 needed with device ID 8086:10ca"},
		"other VFs changed":           {func(f *fixture) { damaged(f, 1, "it was removed") }, "", "Everything known beforehand allows the migration."},
		"the VM's VF gone":            {func(f *fixture) { damaged(f, 0, "it was removed") }, v1alpha1.ReasonDeviceUnavailable, "VFs on the source node node-a are not as they were prepared: VF 0000:01:10.0: it was removed"},
		"nobody knows whether the VM's VF is there": {func(f *fixture) {
			f.vfnodes["node-a"].Status.Conditions = append(f.vfnodes["node-a"].Status.Conditions,
				metav1.Condition{Type: v1alpha1.ConditionIntact, Status: metav1.ConditionUnknown, Reason: v1alpha1.ReasonInventoryFailed, Message: "journal: no such directory"})
		}, v1alpha1.ReasonDeviceUnavailable, "is not known: journal: no such directory"},
		"the target's are damaged": {func(f *fixture) { target(f).VFs[0].Damage, target(f).VFs[1].Damage = "x", "y" }, v1alpha1.ReasonIncompatible, "VF 0000:01:10.2 cannot be used: y"},
	} {
		t.Run(name, func(t *testing.T) {
			f := realNodes(newFixture())
			c.arrange(f)
			cl := f.start(t)
			_, _, err := cl.r.preflight(t.Context(), f.vfm)
			no := (*refusal)(nil)
			switch {
			case c.reason == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.reason == "":
				for range 3 { // finalizer, adoption, acceptance
					if _, err := cl.reconcile(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				a := meta.FindStatusCondition(cl.vfm(t).Status.Conditions, v1alpha1.ConditionAccepted)
				if a == nil || a.Status != metav1.ConditionTrue || a.Message != c.message {
					t.Errorf("condition %+v, want message %q", a, c.message)
				}
			case !errors.As(err, &no) || no.reason != c.reason || !strings.Contains(no.message, c.message):
				t.Errorf("%v, want %s with %q", err, c.reason, c.message)
			}
		})
	}
}

// damaged has node-a tell of damage to one of its VFs, and of more than a
// condition's message has room for.
func damaged(f *fixture, vf int, what string) {
	n := f.vfnodes["node-a"]
	n.Status.Conditions = append(n.Status.Conditions,
		metav1.Condition{Type: v1alpha1.ConditionIntact, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonReconfigured, Message: "VF 0000:0f:10.0: much, ..."})
	n.Status.PFs[0].VFs[vf].Damage = what
}

// Two VFs do not move to one.
func TestFitTakesEachOnce(t *testing.T) {
	pf := &v1alpha1.PFStatus{Name: "eth0"}
	vf := func(address, id string) placedVF {
		return placedVF{v1alpha1.VFStatus{Address: address, DeviceID: id}, pf}
	}
	needed := []placedVF{vf("a", "x"), vf("b", "x"), vf("c", "y")}
	if f := fit(needed, []placedVF{vf("1", "x"), vf("2", "y"), vf("3", "x")}); f.missing != "" || f.unfit {
		t.Errorf("%+v", f)
	}
	if f := fit(needed, []placedVF{vf("1", "x"), vf("3", "x")}); f.missing != "0 free of 1 needed with device ID y" || f.unfit {
		t.Errorf("%+v", f)
	}
	if f := fit(needed, []placedVF{vf("1", "x"), vf("2", "y")}); f.missing != "1 free of 2 needed with device ID x" || f.unfit {
		t.Errorf("%+v", f)
	}
}
