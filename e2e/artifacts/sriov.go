package artifacts

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Node is what a VM that plays a node with SR-IOV cards is made of.
type Node struct {
	// QEMU is a root directory with QEMU. COMPSC_QEMU overrides it.
	QEMU string
	// Kernel and Initrd are what the node boots.
	Kernel, Initrd string
}

// What a node VM boots: directories of the cache, made by the scripts of these
// names in hack.
const (
	// StockNode is Debian's kernel.
	StockNode = "sriov-node"
	// IOMMUFDNode is Ubuntu's kernel, which has iommufd.
	IOMMUFDNode = "iommufd-node"
)

// SRIOV finds what a node VM is made of that boots what this directory of the
// cache has, or says which of it is missing.
func SRIOV(node string) (Node, error) {
	cache, err := cacheDir()
	if err != nil {
		return Node{}, err
	}
	n := Node{
		QEMU:   or(os.Getenv("COMPSC_QEMU"), filepath.Join(cache, "libvirt")),
		Kernel: filepath.Join(cache, node, "vmlinuz"),
		Initrd: filepath.Join(cache, node, "initramfs.gz"),
	}
	var missing []error
	for _, p := range []*string{&n.QEMU, &n.Kernel, &n.Initrd} {
		if *p, err = filepath.Abs(*p); err == nil {
			*p, err = filepath.EvalSymlinks(*p)
		}
		if err != nil {
			missing = append(missing, err)
		}
	}
	if len(missing) > 0 {
		return Node{}, fmt.Errorf("something to run with is missing, hack/qemu-tree, hack/sriov-node and hack/iommufd-node make it: %w", errors.Join(missing...))
	}
	return n, nil
}
