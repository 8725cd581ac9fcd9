package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// nameAnnotation is where containerd looks for an image's full name in the
// index of an archive.
const nameAnnotation = "io.containerd.image.name"

// epoch is the creation time of every image.
var epoch = time.Unix(0, 0).UTC()

// blob is a part of an image: a file, or bytes.
type blob struct {
	v1.Descriptor
	file string
	data []byte
}

// build makes the archive, with work as a directory for temporary files, and
// returns the manifest's digest.
func build(r *Recipe, work, archive string) (string, error) {
	var layers []blob
	for i, l := range r.Layers {
		b, err := l.blob(filepath.Join(work, fmt.Sprintf("layer-%d", i)))
		if err != nil {
			return "", fmt.Errorf("layers[%d]: %w", i, err)
		}
		layers = append(layers, b)
	}
	config := v1.Image{
		Created:  &epoch,
		Platform: v1.Platform{Architecture: r.Architecture, OS: "linux"},
		Config:   v1.ImageConfig{User: r.User, Entrypoint: r.Entrypoint, Env: r.Env, Labels: r.Labels},
		RootFS:   v1.RootFS{Type: "layers"},
	}
	manifest := v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest}
	// What docker calls a manifest.
	type dockerManifest struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	docker := dockerManifest{RepoTags: r.Names}
	for _, l := range layers {
		// Layers are not compressed, so their digests are those of their contents.
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.Digest)
		manifest.Layers = append(manifest.Layers, l.Descriptor)
		docker.Layers = append(docker.Layers, l.path())
	}
	configBlob, err := jsonBlob(v1.MediaTypeImageConfig, config)
	if err != nil {
		return "", err
	}
	manifest.Config, docker.Config = configBlob.Descriptor, configBlob.path()
	manifestBlob, err := jsonBlob(v1.MediaTypeImageManifest, manifest)
	if err != nil {
		return "", err
	}
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for _, name := range r.Names {
		d := manifestBlob.Descriptor
		d.Platform = &config.Platform
		d.Annotations = map[string]string{nameAnnotation: name, v1.AnnotationRefName: name}
		index.Manifests = append(index.Manifests, d)
	}
	f, err := os.Create(archive)
	if err != nil {
		return "", err
	}
	blobs := append(layers, configBlob, manifestBlob)
	err = writeArchive(f, blobs, map[string]any{
		v1.ImageLayoutFile: v1.ImageLayout{Version: v1.ImageLayoutVersion},
		v1.ImageIndexFile:  index,
		"manifest.json":    []dockerManifest{docker},
	})
	return manifestBlob.Digest.String(), errors.Join(err, f.Close())
}

// writeArchive writes small files first, so that a reader of the stream knows
// what is to come.
func writeArchive(w io.Writer, blobs []blob, files map[string]any) error {
	t := tar.NewWriter(w)
	for _, name := range []string{v1.ImageLayoutFile, v1.ImageIndexFile, "manifest.json"} {
		data, err := json.Marshal(files[name])
		if err != nil {
			return err
		}
		if err := writeFile(t, name, int64(len(data)), bytes.NewReader(data)); err != nil {
			return err
		}
	}
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: epoch}); err != nil {
			return err
		}
	}
	written := map[digest.Digest]bool{}
	for _, b := range blobs {
		if written[b.Digest] {
			continue
		}
		written[b.Digest] = true
		if err := b.write(t); err != nil {
			return err
		}
	}
	return t.Close()
}

func (b blob) path() string { return "blobs/sha256/" + b.Digest.Encoded() }

func (b blob) write(t *tar.Writer) error {
	if b.file == "" {
		return writeFile(t, b.path(), b.Size, bytes.NewReader(b.data))
	}
	f, err := os.Open(b.file)
	if err != nil {
		return err
	}
	defer f.Close()
	return writeFile(t, b.path(), b.Size, f)
}

func writeFile(t *tar.Writer, name string, size int64, body io.Reader) error {
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size, ModTime: epoch}); err != nil {
		return err
	}
	if _, err := io.Copy(t, body); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func jsonBlob(mediaType string, v any) (blob, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return blob{}, err
	}
	return blob{
		Descriptor: v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))},
		data:       data,
	}, nil
}

// blob packs the layer, into the given file unless it is an archive already.
func (l Layer) blob(file string) (_ blob, err error) {
	if l.Tar != "" {
		file = l.Tar
	} else {
		f, err := os.Create(file)
		if err != nil {
			return blob{}, err
		}
		if err := errors.Join(writeLayer(f, l.Files), f.Close()); err != nil {
			return blob{}, err
		}
	}
	f, err := os.Open(file)
	if err != nil {
		return blob{}, err
	}
	defer f.Close()
	sum := sha256.New()
	size, err := io.Copy(sum, f)
	if err != nil {
		return blob{}, fmt.Errorf("%s: %w", file, err)
	}
	return blob{
		Descriptor: v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: digest.NewDigest(digest.SHA256, sum), Size: size},
		file:       file,
	}, nil
}
