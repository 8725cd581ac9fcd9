package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// ours makes the product's image, with a given program in place of the
// product's, and returns the archive and the digest that was printed.
func ours(t *testing.T, arch, program string) ([]byte, string) {
	t.Helper()
	dir := t.TempDir()
	binary := filepath.Join(dir, "compsc")
	if err := os.WriteFile(binary, []byte(program), 0o700); err != nil {
		t.Fatal(err)
	}
	// What the machine says about the file must not matter.
	if at := time.Unix(rand.Int64N(1e9), 0); os.Chtimes(binary, at, at) != nil {
		t.Fatal("cannot set the time of the file")
	}
	if err := os.Chmod(binary, 0o700|os.FileMode(rand.IntN(8))); err != nil {
		t.Fatal(err)
	}
	t.Setenv("IMAGE", "registry.example/compsc:v1")
	t.Setenv("ARCH", arch)
	t.Setenv("VERSION", "v1")
	t.Setenv("BINARY", binary)
	archive := filepath.Join(dir, "out", "image.tar")
	d, err := run("compsc.yaml", archive)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(filepath.Dir(archive))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the archive: %v, %v", left, err)
	}
	return b, d
}

func TestReproducible(t *testing.T) {
	a, digestA := ours(t, "amd64", "program")
	b, digestB := ours(t, "amd64", "program")
	if !bytes.Equal(a, b) || digestA != digestB {
		t.Errorf("two builds of the same differ: %s, %s", digestA, digestB)
	}
	if c, digestC := ours(t, "amd64", "another"); bytes.Equal(a, c) || digestA == digestC {
		t.Error("images of different programs are equal")
	}
	if _, digestC := ours(t, "arm64", "program"); digestA == digestC {
		t.Error("images for different architectures are equal")
	}
}

// contents are the regular files of a tar archive, and its headers.
func contents(t *testing.T, archive []byte) (map[string][]byte, map[string]*tar.Header) {
	t.Helper()
	files, headers := map[string][]byte{}, map[string]*tar.Header{}
	r := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, headers
		}
		if err != nil {
			t.Fatal(err)
		}
		if headers[h.Name] != nil {
			t.Errorf("%s is in the archive twice", h.Name)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name], headers[h.Name] = b, h
	}
}

func decode[T any](t *testing.T, b []byte) (v T) {
	t.Helper()
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return v
}

// TestImage reads the archive as a container runtime does.
func TestImage(t *testing.T) {
	archive, printed := ours(t, "arm64", "program")
	files, _ := contents(t, archive)
	blobOf := func(d v1.Descriptor) []byte {
		t.Helper()
		b := files["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(b) != d.Digest || int64(len(b)) != d.Size {
			t.Fatalf("%s: the blob is %d bytes with digest %s, want %d", d.Digest, len(b), digest.FromBytes(b), d.Size)
		}
		return b
	}
	if l := decode[v1.ImageLayout](t, files["oci-layout"]); l.Version != "1.0.0" {
		t.Errorf("layout %+v", l)
	}
	index := decode[v1.Index](t, files["index.json"])
	if len(index.Manifests) != 1 || index.Manifests[0].Digest.String() != printed {
		t.Fatalf("index %+v, printed %s", index, printed)
	}
	if got := index.Manifests[0].Annotations[nameAnnotation]; got != "registry.example/compsc:v1" {
		t.Errorf("name %q", got)
	}
	if p := index.Manifests[0].Platform; p.Architecture != "arm64" || p.OS != "linux" {
		t.Errorf("platform %+v", p)
	}
	manifest := decode[v1.Manifest](t, blobOf(index.Manifests[0]))
	config := decode[v1.Image](t, blobOf(manifest.Config))
	if config.Config.User != "65532:65532" || config.Architecture != "arm64" {
		t.Errorf("configuration %+v", config)
	}
	if diff := cmp.Diff([]string{"/compsc"}, config.Config.Entrypoint); diff != "" {
		t.Error("entrypoint", diff)
	}
	docker := decode[[]struct {
		Config           string
		RepoTags, Layers []string
	}](t, files["manifest.json"])
	all := map[string]*tar.Header{}
	for i, l := range manifest.Layers {
		b := blobOf(l)
		if config.RootFS.DiffIDs[i] != digest.FromBytes(b) || docker[0].Layers[i] != "blobs/sha256/"+l.Digest.Encoded() {
			t.Errorf("layer %d: %s, docker's %s", i, config.RootFS.DiffIDs[i], docker[0].Layers[i])
		}
		layer, headers := contents(t, b)
		if p, ok := layer["compsc"]; ok && string(p) != "program" {
			t.Errorf("/compsc is %q", p)
		}
		for name, h := range headers {
			all[name] = h
		}
	}
	if h := all["compsc"]; h == nil || h.Mode != 0o755 || h.Uid != 0 || h.Gid != 0 || !h.ModTime.Equal(time.Unix(0, 0)) || h.Uname != "" {
		t.Errorf("/compsc: %+v", h)
	}
	if h := all["tmp/"]; h == nil || h.Mode != 0o1777 {
		t.Errorf("/tmp: %+v", h)
	}
	for _, name := range []string{"etc/passwd", "etc/group", "etc/nsswitch.conf", "etc/"} {
		if all[name] == nil {
			t.Errorf("no %s", name)
		}
	}
}

func TestCapabilities(t *testing.T) {
	var b bytes.Buffer
	text := "x"
	if err := writeLayer(&b, []File{{Path: "/usr/bin/p", Content: &text, Mode: "0755", Capabilities: []uint{10, 40}}}); err != nil {
		t.Fatal(err)
	}
	_, headers := contents(t, b.Bytes())
	// As `setcap cap_net_bind_service,cap_checkpoint_restore=ep` writes it.
	want := "\x01\x00\x00\x02" + "\x00\x04\x00\x00" + "\x00\x00\x00\x00" + "\x00\x01\x00\x00" + "\x00\x00\x00\x00"
	if got := headers["usr/bin/p"].PAXRecords["SCHILY.xattr.security.capability"]; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRefusals(t *testing.T) {
	t.Setenv("SET", "x")
	dir := t.TempDir()
	const head = "names: [a]\narchitecture: amd64\n"
	for name, c := range map[string]struct{ recipe, want string }{
		"unset variable": {head + "layers: [{tar: $UNSET_HERE}]", "UNSET_HERE is not set"},
		"no name":        {"architecture: amd64\nlayers: [{tar: $SET}]", "names"},
		"no platform":    {"names: [a]\nlayers: [{tar: $SET}]", "architecture"},
		"no layer":       {head, "layers"},
		"empty layer":    {head + "layers: [{}]", "layers[0]"},
		"unknown field":  {head + "layer: []", "layer"},
		"relative":       {head + "layers: [{files: [{path: etc/x, content: y}]}]", "clean absolute path"},
		"climbing":       {head + "layers: [{files: [{path: /../x, content: y}]}]", "clean absolute path"},
		"twice":          {head + "layers: [{files: [{path: /x, content: y}, {path: /x, content: y}]}]", "twice"},
		"two kinds":      {head + "layers: [{files: [{path: /x, content: y, link: z}]}]", "exactly one"},
		"no kind":        {head + "layers: [{files: [{path: /x}]}]", "exactly one"},
		"mode":           {head + `layers: [{files: [{path: /x, content: y, mode: "99"}]}]`, "octal"},
		"capability":     {head + `layers: [{files: [{path: /x, content: y, capabilities: [64]}]}]`, "capability 64"},
		"no source":      {head + "layers: [{files: [{path: /x, source: " + dir + "/none}]}]", "no such file"},
		"a directory":    {head + "layers: [{files: [{path: /x, source: " + dir + "}]}]", "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			recipe := filepath.Join(dir, "recipe.yaml")
			if err := os.WriteFile(recipe, []byte(c.recipe), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := run(recipe, filepath.Join(dir, "out"))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}
