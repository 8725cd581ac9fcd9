package kubevirt

import (
	"fmt"
	"slices"
	"strings"

	virtv1 "kubevirt.io/api/core/v1"

	"compsc.io/compsc/api/v1alpha1"
)

// FastPaths returns the names of the VMI's interfaces whose guest is to reach
// the doorbells of its VF by itself. It is an error if the annotation names an
// interface that has no VF.
func FastPaths(vmi *virtv1.VirtualMachineInstance) ([]string, error) {
	text, ok := vmi.Annotations[v1alpha1.AnnotationFastPath]
	if !ok || strings.TrimSpace(text) == "" {
		return nil, nil
	}
	ours := BoundInterfaces(vmi)
	var names []string
	for part := range strings.SplitSeq(text, ",") {
		name := strings.TrimSpace(part)
		if !slices.Contains(ours, name) {
			return nil, fmt.Errorf("annotation %s names interface %.63q, and the VMI's interfaces with network binding %s are: %s; correct it and restart the VM",
				v1alpha1.AnnotationFastPath, name, BindingName, strings.Join(ours, ", "))
		}
		names = append(names, name)
	}
	return names, nil
}
