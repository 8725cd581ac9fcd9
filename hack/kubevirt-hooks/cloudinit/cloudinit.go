// Package cloudinit stands in for kubevirt.io/kubevirt/pkg/cloud-init, as far as
// KubeVirt's caller of sidecars names it: CompSC's sidecar has no hook for it.
package cloudinit

// DataSourceType is a kind of source.
type DataSourceType string

// CloudInitData is what a sidecar could change.
type CloudInitData struct {
	DataSource            DataSourceType
	UserData, NetworkData string
}

// IsValidCloudInitData is not asked here.
func IsValidCloudInitData(d *CloudInitData) bool { return d != nil && d.UserData != "" }
