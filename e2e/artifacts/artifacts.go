// Package artifacts finds what the demonstration and the end-to-end tests run
// and what hack/ builds: QEMU, guest kernels, the control plane's binaries,
// KubeVirt's CRDs, and this project's own binary.
package artifacts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Set holds absolute paths.
type Set struct {
	// Config is the repository's config directory.
	Config string
	// Compsc is the product's binary, empty if nobody needs it.
	Compsc string
	// ControlPlane is the directory of kube-apiserver, etcd and kubectl.
	// KUBEBUILDER_ASSETS overrides it.
	ControlPlane string
	// KubeVirtCRDs is a directory. COMPSC_KUBEVIRT_CRDS overrides it.
	KubeVirtCRDs string
	// QEMU is a root directory with QEMU and libvirt. COMPSC_QEMU overrides it.
	QEMU string
	// Helm is the program, Chart the repository's chart, which Find does not
	// look for.
	Helm, Chart string
	// Previous is a directory with the program compsc and the chart of the
	// version before, which Find does not look for either.
	Previous string
	// Kernel and Initrd are what guests boot, of the Debian release that
	// COMPSC_GUEST names, bookworm by default.
	Kernel, Initrd string
}

// Find returns the artefacts' places, or says which are missing. COMPSC_CACHE
// overrides the cache directory below the user's, as it does for hack/. The
// product's binary is the caller's to know.
func Find(compsc string) (Set, error) {
	root, err := repository()
	if err != nil {
		return Set{}, err
	}
	cache, err := cacheDir()
	if err != nil {
		return Set{}, err
	}
	guest := filepath.Join(cache, "guest", or(os.Getenv("COMPSC_GUEST"), "bookworm"))
	s := Set{
		Config:       filepath.Join(root, "config"),
		Compsc:       compsc,
		ControlPlane: or(os.Getenv("KUBEBUILDER_ASSETS"), filepath.Join(cache, "kube", "bin")),
		KubeVirtCRDs: or(os.Getenv("COMPSC_KUBEVIRT_CRDS"), filepath.Join(cache, "kubevirt-crds")),
		QEMU:         or(os.Getenv("COMPSC_QEMU"), filepath.Join(cache, "libvirt")),
		Helm:         or(os.Getenv("COMPSC_HELM"), filepath.Join(cache, "helm", "helm")),
		Chart:        filepath.Join(root, "charts", "compsc"),
		Previous:     or(os.Getenv("COMPSC_PREVIOUS"), filepath.Join(cache, "previous")),
		Kernel:       filepath.Join(guest, "vmlinuz"),
		Initrd:       filepath.Join(guest, "initramfs.gz"),
	}
	var missing []error
	for _, p := range []*string{&s.Config, &s.Compsc, &s.ControlPlane, &s.KubeVirtCRDs, &s.QEMU, &s.Kernel, &s.Initrd} {
		if p == &s.Compsc && compsc == "" {
			continue
		}
		if *p, err = filepath.Abs(*p); err == nil {
			*p, err = filepath.EvalSymlinks(*p)
		}
		if err != nil {
			missing = append(missing, err)
		}
	}
	if len(missing) > 0 {
		return Set{}, fmt.Errorf("something to run with is missing, `make artifacts` builds it: %w", errors.Join(missing...))
	}
	return s, nil
}

// cacheDir is where hack/ puts what it builds.
func cacheDir() (string, error) {
	if cache := os.Getenv("COMPSC_CACHE"); cache != "" {
		return cache, nil
	}
	user, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(user, "compsc"), nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// repository is the directory above the working directory that holds the
// module.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("%s is not inside the repository: CRDs and RBAC are read from it", dir)
		}
	}
}
