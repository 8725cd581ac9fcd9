// Package virttemplate has the declarations of kubevirt.io/virt-template-client-go
// that KubeVirt 1.9's virt-controller is compiled against, and none of its
// function: as the stand-in for virt-template-api says, it is not called here.
package virttemplate

import (
	"errors"

	"k8s.io/client-go/rest"
)

// Clientset is a client that cannot be had.
type Clientset struct{}

// NewForConfig refuses.
func NewForConfig(*rest.Config) (*Clientset, error) {
	return nil, errors.New("this build has no client of virt-template")
}

// TemplateV1beta1 is the client of a version of the API.
func (*Clientset) TemplateV1beta1() *TemplateV1beta1 { return &TemplateV1beta1{} }

// TemplateV1beta1 is a client that cannot be had either.
type TemplateV1beta1 struct{}

// RESTClient returns none.
func (*TemplateV1beta1) RESTClient() rest.Interface { return nil }
