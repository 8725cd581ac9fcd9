package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFaults(t *testing.T) {
	log := []string{
		"DMAR: IOMMU enabled",
		"DMAR: DRHD: handling fault status reg 2",
		"DMAR: [DMA Read NO_PASID] Request device [01:10.0] fault addr 0x1000 [fault reason 0x06] PTE Read access is not set",
		"DMAR: [DMA Write NO_PASID] Request device [02:10.2] fault addr 0x2000 [fault reason 0x05] PTE Write access is not set",
		"DMAR: [INTR-REMAP] Request device [01:00.0] fault index 0x8 [fault reason 0x22] Present field in the IRTE entry is clear",
		"vfio-pci 0000:01:10.0: enabling device (0000 -> 0002)",
	}
	if diff := cmp.Diff(log[2:5], faults(log, nil)); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{log[2], log[4]}, faults(log, []string{"0000:02:10.2"})); diff != "" {
		t.Errorf("faults but those of 0000:02:10.2 (-want +got):\n%s", diff)
	}
}
