package kubevirt

import (
	"slices"
	"strings"
	"testing"

	virtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/api/v1alpha1"
)

func TestFastPaths(t *testing.T) {
	plain := virtv1.Interface{Name: "plain"}
	gone := iface("gone", "")
	gone.State = virtv1.InterfaceStateAbsent
	for text, want := range map[string]string{
		"": "", "  ": "", "blue": "blue", "red, blue": "red blue", "blue,blue": "blue blue",
		"plain":      `names interface "plain"`,
		"gone":       `names interface "gone"`,
		"blue,":      `names interface ""`,
		"blue green": `names interface "blue green"`,
		"*":          "are: blue, red; correct it and restart the VM",
	} {
		vmi := newVMI(iface("blue", ""), iface("red", ""), plain, gone)
		vmi.Annotations = map[string]string{v1alpha1.AnnotationFastPath: text}
		got, err := FastPaths(vmi)
		if err != nil && (got != nil || !strings.Contains(err.Error(), want) || want == "") ||
			err == nil && !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q gives %q, %v; want %q", text, got, err, want)
		}
	}
	if got, err := FastPaths(newVMI(iface("blue", ""))); got != nil || err != nil {
		t.Errorf("without the annotation: %q, %v", got, err)
	}
}

// Only the interface that is named has the fast path.
func TestInterfacesHaveFastPaths(t *testing.T) {
	vmi := withNetwork(withNetwork(newVMI(iface("red", ""), iface("blue", "")), "red", "ns/fast"), "blue", "fast")
	vmi.Annotations = map[string]string{v1alpha1.AnnotationFastPath: "blue"}
	got, err := Interfaces(newPod(list(entryRed, entryBlue), ""), vmi)
	if err != nil || len(got) != 2 || got[0].FastPath || !got[1].FastPath {
		t.Errorf("got %+v, %v", got, err)
	}
}
