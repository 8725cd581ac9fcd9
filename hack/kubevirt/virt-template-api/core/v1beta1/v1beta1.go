// Package v1beta1 has what KubeVirt reads of a VirtualMachineTemplate: see the
// package above.
package v1beta1

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

// ConditionReady is the type of the condition that a template can be used.
const ConditionReady = "Ready"

// VirtualMachineTemplate is a VirtualMachine with parameters.
type VirtualMachineTemplate struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitzero"`

	Spec   VirtualMachineTemplateSpec   `json:"spec"`
	Status VirtualMachineTemplateStatus `json:"status,omitzero"`
}

// VirtualMachineTemplateSpec is its content.
type VirtualMachineTemplateSpec struct {
	VirtualMachine *runtime.RawExtension `json:"virtualMachine"`
	Parameters     []Parameter           `json:"parameters,omitempty"`
}

// Parameter is a name that stands for a value.
type Parameter struct {
	Name  string `json:"name"`
	Value string `json:"value,omitempty"`
}

// VirtualMachineTemplateStatus is its state.
type VirtualMachineTemplateStatus struct {
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// DeepCopy copies all of it.
func (t *VirtualMachineTemplate) DeepCopy() *VirtualMachineTemplate {
	c := *t
	c.ObjectMeta = *t.ObjectMeta.DeepCopy()
	c.Spec.VirtualMachine = t.Spec.VirtualMachine.DeepCopy()
	c.Spec.Parameters = slices.Clone(t.Spec.Parameters)
	c.Status.Conditions = slices.Clone(t.Status.Conditions)
	return &c
}

// DeepCopyObject is DeepCopy for runtime.Object.
func (t *VirtualMachineTemplate) DeepCopyObject() runtime.Object { return t.DeepCopy() }
