//go:build e2echart

package chart

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	"compsc.io/compsc/e2e/artifacts"
)

// release is the name of the chart's release in the tests.
const release = "compsc"

// set finds what the tests run.
func set(t *testing.T) artifacts.Set {
	t.Helper()
	s, err := artifacts.Find(os.Getenv("COMPSC_BINARY"))
	check(t, err)
	if _, err := os.Stat(s.Helm); err != nil {
		t.Fatalf("`make e2e-chart` provides Helm: %v", err)
	}
	return s
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run runs a program and returns what it prints; its error has what it says.
func run(ctx context.Context, dir, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	// Nothing of the user's is read, nothing is left behind.
	cmd.Env = []string{"HOME=" + dir, "PATH=" + os.Getenv("PATH"),
		"HELM_CACHE_HOME=" + dir + "/cache", "HELM_CONFIG_HOME=" + dir + "/config", "HELM_DATA_HOME=" + dir + "/data"}
	var out, say bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &say
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err, strings.TrimSpace(say.String()))
	}
	return out.String(), nil
}

// values are flags that set values of the chart.
func values(v ...string) []string {
	var args []string
	for _, s := range v {
		args = append(args, "--set", s)
	}
	return args
}

// render returns the objects of the chart, as they would be installed.
func render(t *testing.T, s artifacts.Set, namespace string, args ...string) []*unstructured.Unstructured {
	t.Helper()
	out, err := run(t.Context(), t.TempDir(), s.Helm, append([]string{"template", release, s.Chart, "--namespace", namespace, "--kube-version", "1.37.0"}, args...)...)
	check(t, err)
	return objects(t, out)
}

// objects parses a YAML stream.
func objects(t *testing.T, text string) []*unstructured.Unstructured {
	t.Helper()
	var all []*unstructured.Unstructured
	for dec := utilyaml.NewYAMLOrJSONDecoder(strings.NewReader(text), 4096); ; {
		u := &unstructured.Unstructured{}
		if err := dec.Decode(&u.Object); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("%v in:\n%s", err, text)
		}
		if len(u.Object) > 0 {
			all = append(all, u)
		}
	}
}

func keyOf(u *unstructured.Unstructured) string {
	return u.GetKind() + " " + strings.TrimPrefix(u.GetNamespace()+"/"+u.GetName(), "/")
}

func byKey(t *testing.T, all []*unstructured.Unstructured) map[string]*unstructured.Unstructured {
	t.Helper()
	m := map[string]*unstructured.Unstructured{}
	for _, u := range all {
		if m[keyOf(u)] != nil {
			t.Errorf("%s is there twice", keyOf(u))
		}
		m[keyOf(u)] = u
	}
	return m
}
