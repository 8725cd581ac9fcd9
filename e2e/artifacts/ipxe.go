package artifacts

import (
	"fmt"
	"os"
	"path/filepath"
)

// IPXE is the file ipxe.lkrn that hack/ipxe makes. COMPSC_IPXE overrides it.
func IPXE() (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	path, err := filepath.Abs(or(os.Getenv("COMPSC_IPXE"), filepath.Join(cache, "ipxe", "ipxe.lkrn")))
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("iPXE is missing, hack/ipxe makes it: %w", err)
	}
	return path, nil
}
