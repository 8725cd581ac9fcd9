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
	// Kernel and Initrd are what the node boots, as hack/sriov-node makes them.
	Kernel, Initrd string
}

// SRIOV finds what a node VM is made of, or says which of it is missing.
func SRIOV() (Node, error) {
	cache, err := cacheDir()
	if err != nil {
		return Node{}, err
	}
	n := Node{
		QEMU:   or(os.Getenv("COMPSC_QEMU"), filepath.Join(cache, "libvirt")),
		Kernel: filepath.Join(cache, "sriov-node", "vmlinuz"),
		Initrd: filepath.Join(cache, "sriov-node", "initramfs.gz"),
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
		return Node{}, fmt.Errorf("something to run with is missing, hack/qemu-tree and hack/sriov-node make it: %w", errors.Join(missing...))
	}
	return n, nil
}
