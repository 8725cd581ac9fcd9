// The initramfs of test VMs: an init program and kernel modules, as a
// compressed cpio archive (newc format, see the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst). Equal inputs
// give equal archives.
//
// Usage: mkinitramfs OUTPUT INIT MODULES-DIRECTORY
package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cavaliergopher/cpio"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: mkinitramfs OUTPUT INIT MODULES-DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "mkinitramfs:", err)
		os.Exit(1)
	}
}

func run(output, init, modules string) error {
	image, err := archive(init, modules)
	if err != nil {
		return err
	}
	return os.WriteFile(output, image, 0o644)
}

func archive(init, modules string) ([]byte, error) {
	var image bytes.Buffer
	// The fastest level: the guest spends more time on unpacking than the
	// smaller file would save.
	zip, err := gzip.NewWriterLevel(&image, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	w := cpio.NewWriter(zip)
	for _, dir := range []string{"dev", "proc", "sys", "modules"} {
		if err := w.WriteHeader(&cpio.Header{Name: dir, Mode: cpio.TypeDir | 0o755, Links: 2, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	if err := add(w, "init", init, 0o755); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(modules, "*")) // sorted
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("there are no kernel modules in %s", modules)
	}
	for _, file := range files {
		if err := add(w, "modules/"+filepath.Base(file), file, 0o644); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	if err := zip.Close(); err != nil {
		return nil, err
	}
	return image.Bytes(), nil
}

func add(w *cpio.Writer, name, path string, mode cpio.FileMode) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	header := &cpio.Header{Name: name, Mode: cpio.TypeReg | mode, Size: int64(len(data)), ModTime: time.Unix(0, 0)}
	if err := w.WriteHeader(header); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if _, err := w.Write(data); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
