package artifacts

import (
	"fmt"
	"os"
	"path/filepath"
)

// SVMQEMU is the QEMU program that hack/svm-qemu makes, whose emulated
// processors KVM can use.
func SVMQEMU() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	path, err := filepath.Abs(filepath.Join(cache, "svm-qemu", "qemu-system-x86_64"))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("a QEMU for nodes with KVM is missing, hack/svm-qemu makes it: %w", err)
	}
	return path, nil
}
