//go:build e2echart

package chart

import (
	"archive/tar"
	"bytes"
	"debug/elf"
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

	"compsc.io/compsc/e2e/artifacts"
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

// compile does in a directory what the Dockerfile's first stage does to make the
// program, for an architecture, and returns the program.
func compile(t *testing.T, s artifacts.Set, dir, arch, version string) string {
	t.Helper()
	root := filepath.Dir(s.Config)
	b, err := os.ReadFile(filepath.Join(root, "Dockerfile"))
	check(t, err)
	stage, _, _ := strings.Cut(strings.ReplaceAll(string(b), "\\\n", ""), "\nFROM scratch\n")
	check(t, os.MkdirAll(dir, 0o755))
	program, built := filepath.Join(dir, "compsc"), false
	for line := range strings.Lines(stage) {
		switch words := strings.Fields(line); {
		case len(words) == 0:
		case words[0] == "COPY":
			for _, pattern := range words[1 : len(words)-1] {
				from, err := filepath.Glob(filepath.Join(root, pattern))
				check(t, err)
				for _, f := range from {
					if strings.HasSuffix(f, "_test.go") {
						continue
					}
					to := filepath.Join(dir, words[len(words)-1])
					if words[len(words)-1] == "./" {
						to = filepath.Join(dir, filepath.Base(f))
					}
					if out, err := exec.CommandContext(t.Context(), "cp", "-r", f, to).CombinedOutput(); err != nil {
						t.Fatalf("%s: %v: %s", line, err, out)
					}
				}
			}
		case words[0] == "RUN" && strings.Contains(line, "go build"):
			command := strings.TrimPrefix(strings.TrimSpace(line), "RUN ")
			for strings.HasPrefix(command, "--mount=") {
				_, command, _ = strings.Cut(command, " ")
				command = strings.TrimSpace(command)
			}
			if strings.Count(command, " -o /compsc ") != 1 {
				t.Fatalf("the Dockerfile makes something else than /compsc: %s", command)
			}
			c := exec.CommandContext(t.Context(), "sh", "-c", strings.Replace(command, " -o /compsc ", " -o "+program+" ", 1))
			c.Dir, c.Env = dir, append(os.Environ(), "TARGETOS=linux", "TARGETARCH="+arch, "VERSION="+version, "GOTOOLCHAIN=local", "GOFLAGS=")
			if out, err := c.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", command, err, out)
			}
			built = true
		}
	}
	if !built {
		t.Fatal("the Dockerfile compiles nothing")
	}
	return program
}

// TestImageIsReproducible: the program is static, and the same bytes whatever
// directory it is compiled in, by the Dockerfile's commands and by `make build`.
// What it imports from others may come from Go's cache.
func TestImageIsReproducible(t *testing.T) {
	s := set(t)
	version := versionOf(t, s.Compsc)
	made, err := os.ReadFile(s.Compsc)
	check(t, err)
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		t.Run(arch, func(t *testing.T) {
			first := compile(t, s, t.TempDir(), arch, version)
			second := compile(t, s, filepath.Join(t.TempDir(), "to", "another", "directory"), arch, version)
			a, err := os.ReadFile(first)
			check(t, err)
			b, err := os.ReadFile(second)
			check(t, err)
			if !bytes.Equal(a, b) {
				t.Errorf("compiled in two directories it differs: %d and %d bytes", len(a), len(b))
			}
			if arch == runtime.GOARCH && !bytes.Equal(a, made) {
				t.Errorf("the Dockerfile's commands make other bytes than `make build`: %d and %d of them", len(a), len(made))
			}
			f, err := elf.NewFile(bytes.NewReader(a))
			check(t, err)
			if f.Machine != machine || f.Type != elf.ET_EXEC {
				t.Errorf("it is %s for %s, want an executable for %s", f.Type, f.Machine, machine)
			}
			for _, p := range f.Progs {
				if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
					t.Errorf("it is not static: it has a %s", p.Type)
				}
			}
		})
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
