//go:build e2echart

package chart

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/e2e/artifacts"
	"compsc.io/compsc/e2e/cluster"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/helm"
)

// namespace is where the chart is installed.
const namespace = "compsc-system"

// installation plays Helm's user, and the controllers and kubelets that make
// pods of what is installed: every process has the arguments, the environment
// and the service account of its pod template, and a token bound to a pod.
type installation struct {
	set artifacts.Set
	h   *harness.Harness
	dir string

	// metricsPort is the manager's.
	metricsPort int

	mu   sync.Mutex
	pods map[string]*corev1.Pod // by what they stand for
	n    int
	// updated are the processes whose image is the new version's: what starts
	// under any other name is of the version before.
	updated map[string]bool
}

func newInstallation(t *testing.T, s artifacts.Set) *installation {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	return &installation{set: s, dir: t.TempDir(), pods: map[string]*corev1.Pod{}, updated: map[string]bool{},
		metricsPort: l.Addr().(*net.TCPAddr).Port}
}

// previous is the program of the version before.
func (i *installation) previous() string { return filepath.Join(i.set.Previous, "compsc") }

// binary is the program in the image that a process is started from.
func (i *installation) binary(process string) string {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.updated[process] {
		return i.set.Compsc
	}
	return i.previous()
}

// update has the processes of these names start from the new version's image.
func (i *installation) update(processes ...string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, p := range processes {
		i.updated[p] = true
	}
}

// helm runs Helm with all rights.
func (i *installation) helm(ctx context.Context, args ...string) (string, error) {
	h := helm.Helm{Program: i.set.Helm, Home: i.dir, Kubeconfig: i.h.Cluster.AdminKubeconfig}
	return h.Run(ctx, append(args, "--namespace", namespace)...)
}

// Manager implements harness.Installation.
func (i *installation) Manager(ctx context.Context) ([]string, error) {
	d := &appsv1.Deployment{}
	if err := i.h.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: "compsc-manager"}, d); err != nil {
		return nil, err
	}
	args, err := i.start(ctx, "manager", &d.Spec.Template, harness.NodeA, metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("Deployment")))
	// It has no network of its own here.
	return append(args, "--metrics-bind-address=127.0.0.1:"+strconv.Itoa(i.metricsPort), "--health-probe-bind-address=0"), err
}

// Agent implements harness.Installation.
func (i *installation) Agent(ctx context.Context, node string) ([]string, error) {
	d := &appsv1.DaemonSet{}
	if err := i.h.Client().Get(ctx, client.ObjectKey{Namespace: namespace, Name: "compsc-agent"}, d); err != nil {
		return nil, err
	}
	args, err := i.start(ctx, "agent-"+node, &d.Spec.Template, node, metav1.NewControllerRef(d, appsv1.SchemeGroupVersion.WithKind("DaemonSet")))
	if err != nil {
		return nil, err
	}
	// Its volumes; a pod's are new with each pod.
	f := i.files(node)
	if err := os.RemoveAll(filepath.Dir(f.Cert)); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(f.Cert), 0o700); err != nil {
		return nil, err
	}
	return append(args, "--tls-cert", f.Cert, "--tls-key", f.Key, "--tls-ca", f.CA, "--hook-socket", ""), nil
}

// files are those that the node's agent keeps its certificate in.
func (i *installation) files(node string) peer.Files {
	d := filepath.Join(i.dir, "tls", node)
	return peer.Files{Cert: filepath.Join(d, "tls.crt"), Key: filepath.Join(d, "tls.key"), CA: filepath.Join(d, "ca.crt")}
}

// start makes a new pod for one of the processes, in the place of its last one,
// and returns the arguments of its container.
func (i *installation) start(ctx context.Context, what string, template *corev1.PodTemplateSpec, node string, owner *metav1.OwnerReference) ([]string, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if old := i.pods[what]; old != nil {
		delete(i.pods, what)
		if err := i.h.Client().Delete(ctx, old, client.GracePeriodSeconds(0)); err != nil {
			return nil, err
		}
	}
	i.n++
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("compsc-%s-%d", what, i.n), Labels: template.Labels,
			Annotations: template.Annotations, OwnerReferences: []metav1.OwnerReference{*owner}},
		Spec: *template.Spec.DeepCopy(),
	}
	pod.Spec.NodeName = node
	if err := i.h.Client().Create(ctx, pod); err != nil {
		return nil, fmt.Errorf("pod of %s: %w", what, err)
	}
	i.pods[what] = pod
	kubeconfig, err := i.kubeconfig(ctx, pod.Name, namespace, pod.Spec.ServiceAccountName, pod)
	if err != nil {
		return nil, err
	}
	c := pod.Spec.Containers[0]
	env := map[string]string{}
	for _, e := range c.Env {
		switch e.ValueFrom.FieldRef.FieldPath {
		case "spec.nodeName":
			env[e.Name] = node
		case "metadata.namespace":
			env[e.Name] = namespace
		case "status.hostIP":
			env[e.Name] = i.h.Lab.Nodes[node].IP.String()
		default:
			return nil, fmt.Errorf("%s: variable %s comes from %s", what, e.Name, e.ValueFrom.FieldRef.FieldPath)
		}
	}
	args := slices.Clone(c.Args)
	for n := range args {
		for k, v := range env {
			args[n] = strings.ReplaceAll(args[n], "$("+k+")", v)
		}
	}
	return append(args, "--kubeconfig", kubeconfig), nil
}

// kubeconfig writes one of a name with a token of the service account, bound to
// the pod if there is one, as the kubelet would ask for.
func (i *installation) kubeconfig(ctx context.Context, name, ns, account string, pod *corev1.Pod) (string, error) {
	cfg, err := i.as(ctx, ns, account, pod)
	if err != nil {
		return "", err
	}
	file := filepath.Join(i.dir, name+".kubeconfig")
	return file, clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: cfg.Host, CertificateAuthorityData: cfg.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: cfg.BearerToken}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, file)
}

// as is how a process with the service account's token reaches the API server.
func (i *installation) as(ctx context.Context, ns, account string, pod *corev1.Pod) (*rest.Config, error) {
	r := &authenticationv1.TokenRequest{}
	if pod != nil {
		r.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: account}}
	if err := i.h.Client().SubResource("token").Create(ctx, sa, r); err != nil {
		return nil, fmt.Errorf("token of service account %s: %w", account, err)
	}
	cfg := rest.AnonymousClientConfig(i.h.Cluster.Config)
	cfg.BearerToken = r.Status.Token
	return cfg, nil
}

// client acts as a process with the service account's token.
func (i *installation) client(t *testing.T, ns, account string, pod *corev1.Pod) client.Client {
	t.Helper()
	cfg, err := i.as(t.Context(), ns, account, pod)
	check(t, err)
	c, err := client.New(cfg, client.Options{Scheme: cluster.Scheme()})
	check(t, err)
	return c
}

// agent acts as the node's agent.
func (i *installation) agent(t *testing.T, node string) client.Client {
	t.Helper()
	i.mu.Lock()
	pod := i.pods["agent-"+node]
	i.mu.Unlock()
	return i.client(t, namespace, "compsc-agent", pod)
}

// manager acts as the manager.
func (i *installation) manager(t *testing.T) client.Client {
	t.Helper()
	i.mu.Lock()
	pod := i.pods["manager"]
	i.mu.Unlock()
	return i.client(t, namespace, "compsc-manager", pod)
}

// uid makes what is not there.
const noUID = types.UID("00000000-0000-0000-0000-000000000000")
