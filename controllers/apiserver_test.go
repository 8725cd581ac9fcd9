//go:build apiserver

package controllers

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// The tests of this file and its neighbours run against a real API server,
// which TestMain starts: admin is its administrator, managerConfig a user with
// exactly the rights of config/rbac's manager.
var (
	admin         client.Client
	adminConfig   *rest.Config
	managerConfig *rest.Config
)

func TestMain(m *testing.M) {
	ctrl.SetLogger(logr.Discard())
	code, err := withAPIServer(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// assets returns the directory that an environment variable names, or its
// default, provided that it holds all of files.
func assets(variable, name string, files ...string) (string, error) {
	dir := os.Getenv(variable)
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(home, ".cache", "compsc", name)
	}
	for _, pattern := range files {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return "", err
		}
		if len(found) == 0 {
			return "", fmt.Errorf("no %s in %s: `make test` provides it and sets %s", pattern, dir, variable)
		}
	}
	return dir, nil
}

func withAPIServer(run func() int) (code int, err error) {
	binaries, err := assets("KUBEBUILDER_ASSETS", filepath.Join("kube", "bin"), "etcd", "kube-apiserver")
	if err != nil {
		return 0, err
	}
	kubevirtCRDs, err := assets("COMPSC_KUBEVIRT_CRDS", "kubevirt-crds", "*.yaml")
	if err != nil {
		return 0, err
	}
	scheme, err := newScheme()
	if err != nil {
		return 0, err
	}
	env := &envtest.Environment{
		BinaryAssetsDirectory: binaries,
		CRDDirectoryPaths:     []string{filepath.Join("..", "config", "crd"), kubevirtCRDs},
		ErrorIfCRDPathMissing: true,
	}
	if adminConfig, err = env.Start(); err != nil {
		return 0, fmt.Errorf("start the API server: %w", err)
	}
	defer func() {
		if e := env.Stop(); err == nil && e != nil {
			err = fmt.Errorf("stop the API server: %w", e)
		}
	}()
	if admin, err = client.New(adminConfig, client.Options{Scheme: scheme}); err != nil {
		return 0, err
	}
	user, err := env.AddUser(envtest.User{Name: "manager"}, nil)
	if err != nil {
		return 0, fmt.Errorf("add the manager's user: %w", err)
	}
	managerConfig = user.Config()
	if err := grant(context.Background()); err != nil {
		return 0, fmt.Errorf("grant the manager's rights: %w", err)
	}
	return run(), nil
}

// grant gives the user "manager" the roles that config/rbac has for the manager.
func grant(ctx context.Context) error {
	if err := admin.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: systemNamespace}}); err != nil {
		return err
	}
	f, err := os.Open(filepath.Join("..", "config", "rbac", "compsc-manager.yaml"))
	if err != nil {
		return err
	}
	defer f.Close()
	docs := yaml.NewYAMLOrJSONDecoder(f, 4096)
	clusterRole, role := &rbacv1.ClusterRole{}, &rbacv1.Role{}
	for _, into := range []client.Object{clusterRole, role} {
		if err := docs.Decode(into); err != nil {
			return err
		}
	}
	user := []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "manager"}}
	for _, obj := range []client.Object{
		clusterRole, role,
		&rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: "manager"}, Subjects: user,
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: clusterRole.Name},
		},
		&rbacv1.RoleBinding{
			ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: "manager"}, Subjects: user,
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name},
		},
	} {
		if err := admin.Create(ctx, obj); err != nil {
			return err
		}
	}
	return nil
}
