// Package core has the declarations of kubevirt.io/virt-template-api that
// KubeVirt 1.9's virt-api and virt-controller are compiled against: that module
// is not to be had from a Go module proxy. They use it for exports of
// VirtualMachineTemplates only, which need the feature gate OCIExport and the
// deployment of KubeVirt's virt-template; and of that there are no images here.
package core

// The names of the resource, as its CRD in KubeVirt's manifests has them.
const (
	GroupName            = "template.kubevirt.io"
	SingularResourceName = "virtualmachinetemplate"
	PluralResourceName   = "virtualmachinetemplates"
)
