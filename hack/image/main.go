// Image makes a container image without a container engine: an OCI image
// layout (OCI image specification 1.1, image-layout.md) in a tar archive, with
// the manifest.json that docker reads beside it, so that `ctr images import`,
// `podman load`, `docker load` and `skopeo copy oci-archive:` all take it.
// Equal inputs give equal archives, byte for byte.
//
// Usage: image RECIPE OUTPUT
//
// The recipe is a YAML file, see type Recipe; $NAME and ${NAME} in it stand
// for environment variables, which must be set. Relative paths are relative
// to the working directory. The manifest's digest is written to standard
// output.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: image RECIPE OUTPUT")
		os.Exit(2)
	}
	digest, err := run(os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	fmt.Println(digest)
}

func run(recipe, output string) (digest string, err error) {
	b, err := os.ReadFile(recipe)
	if err != nil {
		return "", err
	}
	r, err := parse(b)
	if err != nil {
		return "", fmt.Errorf("%s: %w", recipe, err)
	}
	// In its place only when it is complete.
	if err := os.MkdirAll(filepath.Dir(output), 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(filepath.Dir(output), ".image-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	archive := filepath.Join(work, "archive")
	if digest, err = build(r, work, archive); err != nil {
		return "", fmt.Errorf("%s: %w", recipe, err)
	}
	return digest, os.Rename(archive, output)
}

// Recipe describes an image.
type Recipe struct {
	// Names are full references such as registry.example/compsc:v1.
	Names []string `json:"names"`
	// Architecture is Go's name of the image's, such as amd64.
	Architecture string `json:"architecture"`
	// User is who its processes run as, such as "65532:65532"; empty for root.
	User string `json:"user,omitempty"`
	// Entrypoint, Env and Labels are those of the image's configuration.
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Env        []string          `json:"env,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	// Layers from the lowest up.
	Layers []Layer `json:"layers"`
}

// Layer is either a tar archive that exists or a list of files.
type Layer struct {
	// Tar is the path of an archive that is taken as it is.
	Tar string `json:"tar,omitempty"`
	// Files are packed in this order. Directories above them are added.
	Files []File `json:"files,omitempty"`
}

// File is a file, a directory or a symbolic link of a layer. All belong to
// root unless said otherwise, and are as old as the epoch.
type File struct {
	// Path is absolute, in the image.
	Path string `json:"path"`
	// One of the following four says what it is: Source is a file to copy,
	// Content its text, Link a link's target, Directory an empty directory.
	Source    string  `json:"source,omitempty"`
	Content   *string `json:"content,omitempty"`
	Link      string  `json:"link,omitempty"`
	Directory bool    `json:"directory,omitempty"`
	// Mode is octal, such as "0755"; by default that of a source's owner's
	// right to execute it, "0644" for content, "0755" for a directory.
	Mode string `json:"mode,omitempty"`
	// UID and GID are the owner's.
	UID int `json:"uid,omitempty"`
	GID int `json:"gid,omitempty"`
	// Capabilities are numbers of capabilities (capability.h) that the file's
	// program has when it is run, permitted and effective.
	Capabilities []uint `json:"capabilities,omitempty"`
}

func parse(b []byte) (*Recipe, error) {
	var unset []error
	text := os.Expand(string(b), func(name string) string {
		value, ok := os.LookupEnv(name)
		if !ok {
			unset = append(unset, fmt.Errorf("the environment variable %s is not set", name))
		}
		return value
	})
	if err := errors.Join(unset...); err != nil {
		return nil, err
	}
	r := &Recipe{}
	if err := yaml.UnmarshalStrict([]byte(text), r); err != nil {
		return nil, err
	}
	switch {
	case len(r.Names) == 0:
		return nil, errors.New("names: an image needs a name")
	case r.Architecture == "":
		return nil, errors.New("architecture: missing")
	case len(r.Layers) == 0:
		return nil, errors.New("layers: an image needs one")
	}
	for i, l := range r.Layers {
		if (l.Tar == "") == (len(l.Files) == 0) {
			return nil, fmt.Errorf("layers[%d]: either tar or files", i)
		}
	}
	return r, nil
}
