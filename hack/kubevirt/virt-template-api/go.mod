// A stand-in for kubevirt.io/virt-template-api: see core/core.go.
module kubevirt.io/virt-template-api

go 1.26.0

require k8s.io/apimachinery v0.34.3
