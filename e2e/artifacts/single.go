package artifacts

import (
	"fmt"
	"os"
	"path/filepath"
)

// IPXE is the file ipxe.lkrn that hack/ipxe makes. COMPSC_IPXE overrides it.
func IPXE() (string, error) {
	return single("iPXE", "hack/ipxe", os.Getenv("COMPSC_IPXE"), "ipxe/ipxe.lkrn")
}

// SVMQEMU is the QEMU program that hack/svm-qemu makes, whose emulated
// processors KVM can use.
func SVMQEMU() (string, error) {
	return single("a QEMU for nodes with KVM", "hack/svm-qemu", "", "svm-qemu/qemu-system-x86_64")
}

// single returns the path of a file, which a script makes below the cache,
// unless it is given.
func single(what, script, given string, below string) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	path, err := filepath.Abs(or(given, filepath.Join(cache, below)))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%s is missing, %s makes it: %w", what, script, err)
	}
	return path, nil
}
