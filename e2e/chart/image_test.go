//go:build e2echart

package chart

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// TestImageStarts builds the image, without a container engine, and starts what
// is in it as a container runtime does: its entry point as its user, with nothing
// around it but its own files. It says who it is, and ends with a clear error
// where there is no cluster.
func TestImageStarts(t *testing.T) {
	s := set(t)
	archive := filepath.Join(t.TempDir(), "image.tar")
	build := exec.CommandContext(t.Context(), "go", "run", "./hack/image", "hack/image/compsc.yaml", archive)
	build.Dir = filepath.Join("..", "..")
	build.Env = append(os.Environ(), "IMAGE=localhost/compsc:test", "ARCH="+runtime.GOARCH, "VERSION=test", "BINARY="+s.Compsc)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	root := t.TempDir()
	check(t, os.Chmod(root, 0o755))
	entry := unpack(t, archive, root)
	start := func(args ...string) (string, error) {
		c := exec.CommandContext(t.Context(), entry[0], append(entry[1:], args...)...)
		c.Dir, c.Env = "/", []string{"PATH=/"}
		c.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
		out, err := c.CombinedOutput()
		return string(out), err
	}
	out, err := start("--version")
	if err != nil || !strings.HasPrefix(out, "compsc version ") {
		t.Errorf("--version: %v: %s", err, out)
	}
	out, err = start("manager")
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || !strings.Contains(out, "kubeconfig") || strings.Contains(out, "goroutine") {
		t.Errorf("without a cluster: %v: %s", err, out)
	}
}

// unpack lays the files of an image's archive below root, layer by layer, and
// returns its entry point.
func unpack(t *testing.T, archive, root string) []string {
	t.Helper()
	blobs := map[string]string{}
	dir := t.TempDir()
	f, err := os.Open(archive)
	check(t, err)
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		check(t, err)
		if h.Typeflag != tar.TypeReg {
			continue
		}
		blobs[h.Name] = filepath.Join(dir, filepath.Base(h.Name))
		w, err := os.Create(blobs[h.Name])
		check(t, err)
		_, err = io.Copy(w, r)
		check(t, errors.Join(err, w.Close()))
	}
	var manifest []struct {
		Config string
		Layers []string
	}
	b, err := os.ReadFile(blobs["manifest.json"])
	check(t, err)
	check(t, json.Unmarshal(b, &manifest))
	for _, layer := range manifest[0].Layers {
		if out, err := exec.CommandContext(t.Context(), "tar", "-C", root, "-xpf", blobs[layer]).CombinedOutput(); err != nil {
			t.Fatalf("layer %s: %v: %s", layer, err, out)
		}
	}
	var config struct{ Config struct{ Entrypoint []string } }
	b, err = os.ReadFile(blobs[manifest[0].Config])
	check(t, err)
	check(t, json.Unmarshal(b, &config))
	return config.Config.Entrypoint
}
