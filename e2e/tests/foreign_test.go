//go:build e2e

package tests

import (
	"context"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/standin"
	"compsc.io/compsc/e2e/wait"
)

// evacuate creates what KubeVirt's evacuation controller creates for a drained
// node, and makes m the VFMigration that the manager adopts it with.
func evacuate(ctx context.Context, m *v1alpha1.VFMigration) error {
	k := &kubevirtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: harness.Namespace, GenerateName: "kubevirt-evacuation-",
			Annotations: map[string]string{kubevirtv1.EvacuationMigrationAnnotation: "drained"}},
		Spec: kubevirtv1.VirtualMachineInstanceMigrationSpec{VMIName: harness.VMI,
			AddedNodeSelector: map[string]string{corev1.LabelHostname: m.Spec.Target.NodeName}},
	}
	if err := h.Client().Create(ctx, k); err != nil {
		return err
	}
	return wait.Until(ctx, "VirtualMachineInstanceMigration "+k.Name+" to be adopted", func(ctx context.Context) (bool, error) {
		var list v1alpha1.VFMigrationList
		err := h.Client().List(ctx, &list, client.InNamespace(harness.Namespace), client.MatchingLabels{kubevirt.LabelMigrationUID: string(k.UID)})
		if err != nil || len(list.Items) != 1 {
			return false, err
		}
		*m = list.Items[0]
		return true, nil
	})
}

// TestForeignMigration: somebody else has KubeVirt move the VM. All that holds
// for a VFMigration's hop holds for this one.
func TestForeignMigration(t *testing.T) {
	ctx := within(t, bound)
	source := vmNode(t, ctx)
	m := newMigration(t, ctx)
	r, err := vm.Hop(ctx, m, evacuate, nil)
	check(t, err)
	if !r.StreamIntact || r.DriverResets != 0 || r.StateBytes <= 0 {
		t.Errorf("hop: %+v", r)
	}
	undisturbed(t, ctx, harness.Other(source), harness.VFsPerNode)
}

// TestForeignMigrationDeleted: the deletion of KubeVirt's object undoes the
// migration, also where KubeVirt does not act upon it.
func TestForeignMigrationDeleted(t *testing.T) {
	for _, at := range []standin.Point{standin.InScheduled, standin.InPreparingTarget, standin.InTargetReady} {
		t.Run(string(at), func(t *testing.T) {
			ctx := within(t, time.Minute)
			source := vmNode(t, ctx)
			release := h.StandIn.Hold(at)
			defer release()
			m := newMigration(t, ctx)
			check(t, evacuate(ctx, m))
			reach(t, ctx, m, fmt.Sprint("to be prepared and in ", at), inPhase(kubevirtv1.VirtualMachineInstanceMigrationPhase(at), v1alpha1.ConditionPrepared))
			check(t, h.Client().Delete(ctx, &kubevirtv1.VirtualMachineInstanceMigration{
				ObjectMeta: metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Spec.MigrationRef.Name}}))
			refused(t, ctx, m, source, harness.VFsPerNode, v1alpha1.ReasonAborted, "was deleted")
		})
	}
}
