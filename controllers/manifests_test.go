//go:build apiserver

package controllers

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// manifests reads all objects of config's directories, but kustomize's own.
func manifests(t *testing.T, dirs ...string) []*unstructured.Unstructured {
	t.Helper()
	var objs []*unstructured.Unstructured
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join("..", "config", dir, "*.yaml"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if filepath.Base(file) != "kustomization.yaml" {
				objs = append(objs, readObjects(t, file)...)
			}
		}
		if len(objs) == 0 {
			t.Fatalf("no manifest in %s", dir)
		}
	}
	return objs
}

func readObjects(t *testing.T, file string) []*unstructured.Unstructured {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var objs []*unstructured.Unstructured
	for docs := yaml.NewYAMLOrJSONDecoder(f, 4096); ; {
		u := &unstructured.Unstructured{}
		err := docs.Decode(u)
		if errors.Is(err, io.EOF) {
			return objs
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if len(u.Object) > 0 {
			objs = append(objs, u)
		}
	}
}

// The API server takes every manifest, and knows every field in it.
func TestManifests(t *testing.T) {
	strict := client.WithFieldValidation(admin, metav1.FieldValidationStrict)
	for _, u := range manifests(t, "namespace", "rbac", "admission", "manager", "agent", "samples", "kubevirt", filepath.Join("kubevirt", "plugin")) {
		t.Run(u.GetKind()+" "+u.GetName(), func(t *testing.T) {
			if err := strict.Apply(t.Context(), client.ApplyConfigurationFromUnstructured(u), client.DryRunAll,
				client.FieldOwner("test"), client.ForceOwnership); err != nil {
				t.Error(err)
			}
		})
	}
}

// The manager's pods keep to the restricted profile.
func TestManagerIsRestricted(t *testing.T) {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		GenerateName: "restricted-", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}
	if err := admin.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	found := false
	for _, u := range manifests(t, "manager") {
		if u.GetKind() != "Deployment" {
			continue
		}
		found = true
		var d appsv1.Deployment
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &d); err != nil {
			t.Fatal(err)
		}
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: "manager"}, Spec: d.Spec.Template.Spec}
		if err := admin.Create(t.Context(), pod, client.DryRunAll); err != nil {
			t.Error(err)
		}
	}
	if !found {
		t.Error("no Deployment")
	}
}
