//go:build e2echart

package chart

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"

	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/helm"
)

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

// runHelm runs Helm without a cluster.
func runHelm(t *testing.T, s artifacts.Set, args ...string) (string, error) {
	t.Helper()
	return helm.Helm{Program: s.Helm, Home: t.TempDir()}.Run(t.Context(), args...)
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
	out, err := runHelm(t, s, append([]string{"template", helm.Release, s.Chart, "--namespace", namespace, "--kube-version", "1.37.0"}, args...)...)
	check(t, err)
	return objects(t, out)
}

// kustomize returns the objects of a directory with a kustomization.
func kustomize(t *testing.T, s artifacts.Set, dir string) []*unstructured.Unstructured {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(s.ControlPlane, "kubectl"), "kustomize", dir)
	var say bytes.Buffer
	cmd.Stderr = &say
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("kustomize %s: %v: %s", dir, err, say.String())
	}
	return objects(t, string(out))
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
