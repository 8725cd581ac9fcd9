// Package v1alpha1 is the API of CompSC, group compsc.io.
// +kubebuilder:object:generate=true
// +groupName=compsc.io
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// SystemNamespace is where CompSC keeps its leases when nothing else is said.
const SystemNamespace = "compsc-system"

var (
	// GroupVersion is this package's group and version.
	GroupVersion = schema.GroupVersion{Group: "compsc.io", Version: "v1alpha1"}

	schemeBuilder = runtime.NewSchemeBuilder(func(s *runtime.Scheme) error {
		s.AddKnownTypes(GroupVersion, &VFMigration{}, &VFMigrationList{}, &VFNode{}, &VFNodeList{})
		metav1.AddToGroupVersion(s, GroupVersion)
		return nil
	})

	// AddToScheme registers this package's types.
	AddToScheme = schemeBuilder.AddToScheme
)
