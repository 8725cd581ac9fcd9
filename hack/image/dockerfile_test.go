package main

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// instruction is one of a Dockerfile, its continued lines joined.
type instruction struct{ name, args string }

// stages are the instructions of each stage of the project's Dockerfile; those
// before the first FROM are a stage of their own.
func stages(t *testing.T) [][]instruction {
	t.Helper()
	b, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	all := [][]instruction{nil}
	text := regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(string(b), "")
	for line := range strings.Lines(strings.ReplaceAll(text, "\\\n", "")) {
		name, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "" {
			continue
		}
		if name == "FROM" {
			all = append(all, nil)
		}
		all[len(all)-1] = append(all[len(all)-1], instruction{name, strings.TrimSpace(args)})
	}
	return all
}

// named are the arguments of a stage's instructions of that name.
func named(stage []instruction, name string) (args []string) {
	for _, i := range stage {
		if i.name == name {
			args = append(args, i.args)
		}
	}
	return args
}

// tree describes what is below a directory: mode, and content of files.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == root {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(b)
		}
		out[strings.TrimPrefix(path, root)] = text
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestDockerfile: the Dockerfile makes the image that compsc.yaml describes.
// What it runs to make the files is run here.
func TestDockerfile(t *testing.T) {
	t.Setenv("IMAGE", "i")
	t.Setenv("ARCH", "amd64")
	t.Setenv("VERSION", "$VERSION")
	t.Setenv("BINARY", "/compsc")
	text, err := os.ReadFile("compsc.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	all := stages(t)
	build, last := all[1], all[len(all)-1]

	if diff := cmp.Diff([]string{"--from=build /rootfs/ /", "--from=build /compsc /compsc"}, named(last, "COPY")); diff != "" {
		t.Errorf("what it copies (-want +got):\n%s", diff)
	}
	dir := t.TempDir()
	made, packed := filepath.Join(dir, "rootfs"), filepath.Join(dir, "packed")
	for _, script := range named(build, "RUN") {
		if !strings.Contains(script, "/rootfs") {
			continue
		}
		if out, err := exec.CommandContext(t.Context(), "sh", "-c", "umask 022; "+strings.ReplaceAll(script, "/rootfs", made)).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	if err := os.Mkdir(packed, 0o755); err != nil {
		t.Fatal(err)
	}
	layer, err := want.Layers[0].blob(filepath.Join(dir, "layer"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "tar", "-C", packed, "--no-same-owner", "-xpf", layer.file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if diff := cmp.Diff(tree(t, packed), tree(t, made)); diff != "" {
		t.Errorf("files of compsc.yaml (-) and of the Dockerfile (+):\n%s", diff)
	}
	for _, l := range want.Layers {
		for _, f := range l.Files {
			if f.UID != 0 || f.GID != 0 {
				t.Errorf("%s belongs to %d:%d, in the Dockerfile's image to root", f.Path, f.UID, f.GID)
			}
		}
	}

	if got := strings.Join(named(last, "USER"), " "); got != want.User {
		t.Errorf("USER %s, want %s", got, want.User)
	}
	var entry []string
	if err := json.Unmarshal([]byte(strings.Join(named(last, "ENTRYPOINT"), " ")), &entry); err != nil || !slices.Equal(entry, want.Entrypoint) {
		t.Errorf("ENTRYPOINT %q, want %q: %v", entry, want.Entrypoint, err)
	}
	if diff := cmp.Diff(want.Env, named(last, "ENV")); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	labels := map[string]string{}
	for _, l := range named(last, "LABEL") {
		k, v, _ := strings.Cut(l, "=")
		labels[k] = v
	}
	if diff := cmp.Diff(want.Labels, labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
}

// TestDockerfilePins: nothing that it builds with can change by itself, and
// its Go is one that the module asks for.
func TestDockerfilePins(t *testing.T) {
	all := stages(t)
	version := regexp.MustCompile(`^GO_IMAGE=golang:(\d+\.\d+)\.\d+$`).FindStringSubmatch(strings.Join(named(all[0], "ARG"), " "))
	if version == nil {
		t.Fatalf("before the first stage: %v, want GO_IMAGE with an exact version", all[0])
	}
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(mod), "\ngo "+version[1]+".") {
		t.Errorf("it builds with Go %s, which is not go.mod's", version[1])
	}
	var from []string
	for _, s := range all[1:] {
		from = append(from, named(s, "FROM")...)
	}
	if diff := cmp.Diff([]string{"--platform=$BUILDPLATFORM $GO_IMAGE AS build", "scratch"}, from); diff != "" {
		t.Errorf("base images (-want +got):\n%s", diff)
	}
	b, err := os.ReadFile("../../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(string(b), "# syntax=") {
		t.Error("it has a frontend of its own, which is an image too")
	}
}
