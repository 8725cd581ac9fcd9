// KubeVirt's CRDs as files, one each, named after the resource. KubeVirt
// publishes them only as Go code of its operator.
//
// Usage: kubevirt-crds DIRECTORY
package main

import (
	"fmt"
	"os"
	"path/filepath"

	extv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"compsc.io/compsc/hack/kubevirt-crds/components"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: kubevirt-crds DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "kubevirt-crds:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	for _, create := range []func() (*extv1.CustomResourceDefinition, error){
		components.NewKubeVirtCrd,
		components.NewMigrationPolicyCrd,
		components.NewPluginCrd,
		components.NewVirtualMachineCrd,
		components.NewVirtualMachineInstanceCrd,
		components.NewVirtualMachineInstanceMigrationCrd,
	} {
		crd, err := create()
		if err != nil {
			return err
		}
		text, err := yaml.Marshal(crd)
		if err != nil {
			return fmt.Errorf("%s: %w", crd.Name, err)
		}
		if err := os.WriteFile(filepath.Join(dir, crd.Name+".yaml"), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
