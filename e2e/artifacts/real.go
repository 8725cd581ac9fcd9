package artifacts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Real is what a Kubernetes with real nodes and KubeVirt consists of, made by
// hack/kubevirt.
type Real struct {
	// Repository is the root of the source tree.
	Repository string
	// ControlPlane is the directory of etcd, kube-apiserver and kubectl,
	// Programs that of the rest of Kubernetes.
	ControlPlane, Programs string
	// NodeTree is a root directory with containerd, runc and CNI plugins.
	NodeTree string
	// Store is a root directory of containerd's with the images that do not change
	// with this project, and Images are archives of those that do.
	Store  string
	Images []string
	// KubeVirt and Multus are the manifests that install them, Release is
	// KubeVirt's, such as 1.8. COMPSC_KUBEVIRT chooses another.
	KubeVirt, Multus, Release string
	// Helm is the program, Chart the repository's chart.
	Helm, Chart string
}

// FindReal returns the artefacts' places, or says which are missing. It heeds
// the same environment variables as Find.
func FindReal() (Real, error) {
	root, err := repository()
	if err != nil {
		return Real{}, err
	}
	cache, err := cacheDir()
	if err != nil {
		return Real{}, err
	}
	release := or(os.Getenv("COMPSC_KUBEVIRT"), "1.8")
	r := Real{
		Repository:   root,
		Release:      release,
		ControlPlane: or(os.Getenv("KUBEBUILDER_ASSETS"), filepath.Join(cache, "kube", "bin")),
		Programs:     filepath.Join(cache, "kube-node", "bin"),
		NodeTree:     filepath.Join(cache, "kubevirt-node"),
		Store:        filepath.Join(cache, "kubevirt-store-"+release),
		KubeVirt:     filepath.Join(cache, "kubevirt-"+release, "operator.yaml"),
		Multus:       filepath.Join(cache, "multus", "daemonset.yaml"),
		Helm:         or(os.Getenv("COMPSC_HELM"), filepath.Join(cache, "helm", "helm")),
		Chart:        filepath.Join(root, "charts", "compsc"),
	}
	var missing []error
	for _, p := range []*string{&r.ControlPlane, &r.Programs, &r.NodeTree, &r.Store, &r.KubeVirt, &r.Multus, &r.Helm, &r.Chart} {
		if *p, err = filepath.Abs(*p); err == nil {
			*p, err = filepath.EvalSymlinks(*p)
		}
		if err != nil {
			missing = append(missing, err)
		}
	}
	// What changes with this project is built beside it.
	for _, name := range []string{"compsc", "deviceplugin"} {
		image := filepath.Join(root, "out", "kubevirt", name+".tar")
		if _, err := os.Stat(image); err != nil {
			missing = append(missing, err)
		}
		r.Images = append(r.Images, image)
	}
	if len(missing) > 0 {
		return Real{}, fmt.Errorf("something to run with is missing, `make kubevirt KUBEVIRT=%s` builds it: %w", release, errors.Join(missing...))
	}
	return r, nil
}
