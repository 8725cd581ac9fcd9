// Package cluster runs a real kube-apiserver and etcd for a lab, with the
// CRDs of this project and of KubeVirt, the nodes, and this project's RBAC
// in force: manager and agents authenticate as the service accounts that
// they have in production.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/lab"
)

// Identities of the product's parts, those of their service accounts.
const (
	ManagerUser = "system:serviceaccount:" + v1alpha1.SystemNamespace + ":compsc-manager"
	AgentUser   = "system:serviceaccount:" + v1alpha1.SystemNamespace + ":compsc-agent"
)

// startTimeout bounds the start of each part of the control plane, on a
// machine that may be busy.
const startTimeout = 2 * time.Minute

// Options say where things are.
type Options struct {
	// Binaries is the directory of kube-apiserver and etcd.
	Binaries string
	// ConfigDir is the repository's config directory.
	ConfigDir string
	// KubeVirtCRDs is a directory of KubeVirt's CRDs.
	KubeVirtCRDs string
	// Bare leaves out all that is of the product, for a test that installs it:
	// its namespace, CRDs and RBAC, and the kubeconfigs of its parts.
	Bare bool
}

// Cluster is a running control plane.
type Cluster struct {
	// Client acts with all rights. It does not cache.
	Client client.WithWatch
	// Config is its configuration.
	Config *rest.Config
	// AdminKubeconfig is a file for kubectl, with all rights.
	AdminKubeconfig string
	// ManagerKubeconfig and AgentKubeconfig are files with the rights that
	// the product's RBAC gives.
	ManagerKubeconfig, AgentKubeconfig string

	env     *envtest.Environment
	certDir string
}

// Scheme knows every type that the end-to-end code handles.
func Scheme() *runtime.Scheme {
	s := runtime.NewScheme()
	utilruntime.Must(clientgoscheme.AddToScheme(s))
	utilruntime.Must(kubevirtv1.AddToScheme(s))
	utilruntime.Must(v1alpha1.AddToScheme(s))
	return s
}

// Start runs a control plane that the lab's nodes reach. The caller must
// Close it.
func Start(ctx context.Context, l *lab.Lab, o Options) (_ *Cluster, err error) {
	crds := []string{o.KubeVirtCRDs}
	if !o.Bare {
		crds = append(crds, filepath.Join(o.ConfigDir, "crd"))
	}
	for _, d := range append([]string{o.Binaries}, crds...) {
		if _, err := os.Stat(d); err != nil {
			return nil, fmt.Errorf("control plane: %w", err)
		}
	}
	dir := filepath.Join(l.Dir, "cluster")
	c := &Cluster{certDir: filepath.Join(dir, "apiserver")}
	etcdDir := filepath.Join(dir, "etcd")
	for _, d := range []string{c.certDir, etcdDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	c.env = &envtest.Environment{
		BinaryAssetsDirectory:    o.Binaries,
		CRDDirectoryPaths:        crds,
		ErrorIfCRDPathMissing:    true,
		Scheme:                   Scheme(),
		ControlPlaneStartTimeout: startTimeout,
		ControlPlaneStopTimeout:  20 * time.Second,
	}
	c.env.ControlPlane.Etcd = &envtest.Etcd{Path: filepath.Join(o.Binaries, "etcd"), DataDir: etcdDir}
	// The data lives as long as a run: waiting for the disk buys nothing.
	c.env.ControlPlane.Etcd.Configure().Append("unsafe-no-fsync")
	api := &envtest.APIServer{Path: filepath.Join(o.Binaries, "kube-apiserver"), CertDir: c.certDir}
	api.SecureServing.Address = l.RootIP().String()
	api.SecureServing.Port = "6443"
	c.env.ControlPlane.APIServer = api

	if c.Config, err = c.env.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the control plane: %w", err), c.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.Client, err = client.NewWithWatch(c.Config, client.Options{Scheme: Scheme()}); err != nil {
		return nil, err
	}
	if err := c.fill(ctx, l, o); err != nil {
		return nil, err
	}
	groups := []string{"system:serviceaccounts", "system:serviceaccounts:" + v1alpha1.SystemNamespace}
	for _, u := range []struct {
		path *string
		file string
		user envtest.User
	}{
		{&c.AdminKubeconfig, "admin.kubeconfig", envtest.User{Name: "admin", Groups: []string{"system:masters"}}},
		{&c.ManagerKubeconfig, "manager.kubeconfig", envtest.User{Name: ManagerUser, Groups: groups}},
		{&c.AgentKubeconfig, "agent.kubeconfig", envtest.User{Name: AgentUser, Groups: groups}},
	} {
		if o.Bare && u.path != &c.AdminKubeconfig {
			continue
		}
		user, err := c.env.AddUser(u.user, nil)
		if err != nil {
			return nil, fmt.Errorf("user %s: %w", u.user.Name, err)
		}
		b, err := user.KubeConfig()
		if err != nil {
			return nil, fmt.Errorf("user %s: %w", u.user.Name, err)
		}
		*u.path = filepath.Join(dir, u.file)
		if err := os.WriteFile(*u.path, b, 0o600); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Close stops the control plane. It may be called again.
func (c *Cluster) Close() error {
	// A stopped process does not act on a signal to end.
	if err := c.SetAway(false); err != nil && !errors.Is(err, errNoServer) {
		return err
	}
	return c.env.Stop()
}

// fill creates what an administrator and the kubelets would.
func (c *Cluster) fill(ctx context.Context, l *lab.Lab, o Options) error {
	for _, n := range l.Nodes {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{
			Name: n.Name,
			Labels: map[string]string{
				corev1.LabelHostname:       n.Name,
				kubevirtv1.NodeSchedulable: "true",
			},
		}}
		if err := c.Client.Create(ctx, node); err != nil {
			return fmt.Errorf("node %s: %w", n.Name, err)
		}
		node.Status = corev1.NodeStatus{
			Addresses:  []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: n.IP.String()}},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}},
		}
		if err := c.Client.Status().Update(ctx, node); err != nil {
			return fmt.Errorf("node %s: %w", n.Name, err)
		}
	}
	if o.Bare {
		return nil
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SystemNamespace}}
	if err := c.Client.Create(ctx, ns); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return c.apply(ctx, filepath.Join(o.ConfigDir, "rbac"))
}

// apply creates the objects of a directory's YAML files, kustomize's own
// left out.
func (c *Cluster) apply(ctx context.Context, dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("%s holds no YAML", dir)
	}
	for _, f := range files {
		if filepath.Base(f) == "kustomization.yaml" {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		dec := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(b), 4096)
		for {
			u := &unstructured.Unstructured{}
			if err := dec.Decode(&u.Object); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return fmt.Errorf("%s: %w", f, err)
			}
			if len(u.Object) == 0 {
				continue
			}
			if err := c.create(ctx, u); err != nil {
				return fmt.Errorf("%s: %s %s: %w", f, u.GetKind(), u.GetName(), err)
			}
		}
	}
	return nil
}

// create puts namespaced objects that name no namespace into the system's,
// as kustomize does.
func (c *Cluster) create(ctx context.Context, u *unstructured.Unstructured) error {
	namespaced, err := c.Client.IsObjectNamespaced(u)
	if err != nil {
		return err
	}
	if namespaced && u.GetNamespace() == "" {
		u.SetNamespace(v1alpha1.SystemNamespace)
	}
	if g := u.GroupVersionKind().Group; g == rbacv1.GroupName {
		if err := defaultSubjects(u); err != nil {
			return err
		}
	}
	err = c.Client.Create(ctx, u)
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func defaultSubjects(u *unstructured.Unstructured) error {
	subjects, found, err := unstructured.NestedSlice(u.Object, "subjects")
	if err != nil || !found {
		return err
	}
	for _, s := range subjects {
		if m, ok := s.(map[string]any); ok && m["kind"] == rbacv1.ServiceAccountKind && m["namespace"] == nil {
			m["namespace"] = v1alpha1.SystemNamespace
		}
	}
	return unstructured.SetNestedSlice(u.Object, subjects, "subjects")
}

var errNoServer = errors.New("no kube-apiserver is running")

// SetAway makes the API server stop answering, with its connections left
// open, or go on.
func (c *Cluster) SetAway(away bool) error {
	pid, err := c.serverPID()
	if err != nil {
		return err
	}
	sig := unix.SIGCONT
	if away {
		sig = unix.SIGSTOP
	}
	return unix.Kill(pid, sig)
}

// serverPID finds the API server by its directory: envtest does not tell.
func (c *Cluster) serverPID() (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue // it ended meanwhile
		}
		args := strings.Split(string(b), "\x00")
		if filepath.Base(args[0]) == "kube-apiserver" && strings.Contains(string(b), "--cert-dir="+c.certDir+"\x00") {
			return pid, nil
		}
	}
	return 0, errNoServer
}
