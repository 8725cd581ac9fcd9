//go:build apiserver

package agent

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-logr/logr"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	pb "compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/api/v1alpha1"
)

// assets returns the directory that an environment variable names, or its
// default.
func assets(t *testing.T, variable, name string) string {
	t.Helper()
	dir := os.Getenv(variable)
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(home, ".cache", "compsc", name)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("%v: `make test` provides it and sets %s", err, variable)
	}
	return dir
}

// apiServer starts a real one, and returns its administrator, and users with
// exactly the rights of config/rbac's agent and manager.
func apiServer(t *testing.T) (admin client.WithWatch, agent, manager *rest.Config) {
	t.Helper()
	ctrl.SetLogger(logr.Discard())
	env := &envtest.Environment{
		BinaryAssetsDirectory: assets(t, "KUBEBUILDER_ASSETS", filepath.Join("kube", "bin")),
		CRDDirectoryPaths:     []string{filepath.Join("..", "config", "crd"), assets(t, "COMPSC_KUBEVIRT_CRDS", "kubevirt-crds")},
		ErrorIfCRDPathMissing: true,
	}
	config, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	scheme, err := newScheme()
	if err != nil {
		t.Fatal(err)
	}
	if err := rbacv1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	if admin, err = client.NewWithWatch(config, client.Options{Scheme: scheme}); err != nil {
		t.Fatal(err)
	}
	if err := admin.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SystemNamespace}}); err != nil {
		t.Fatal(err)
	}
	users := map[string]*rest.Config{}
	for _, name := range []string{"agent", "manager"} {
		user, err := env.AddUser(envtest.User{Name: name}, nil)
		if err != nil {
			t.Fatal(err)
		}
		grantRole(t, admin, name)
		users[name] = user.Config()
	}
	return admin, users["agent"], users["manager"]
}

// grantRole gives the user of that name the roles that config/rbac has for it.
func grantRole(t *testing.T, admin client.Client, name string) {
	t.Helper()
	f, err := os.Open(filepath.Join("..", "config", "rbac", "compsc-"+name+".yaml"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	docs := yaml.NewYAMLOrJSONDecoder(f, 4096)
	clusterRole, role := &rbacv1.ClusterRole{}, &rbacv1.Role{}
	for _, into := range []client.Object{clusterRole, role} {
		if err := docs.Decode(into); err != nil {
			t.Fatal(err)
		}
	}
	subjects := []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name}}
	for _, o := range []client.Object{clusterRole, role,
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: name}, Subjects: subjects,
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: clusterRole.Name}},
		&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: role.Namespace, Name: name}, Subjects: subjects,
			RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: role.Name}},
	} {
		if err := admin.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
}

// runAgent runs a node's agent as the command does. The returned function
// ends it, and is called at the test's end at the latest.
func runAgent(t *testing.T, n *labNode, config *rest.Config) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Options{NodeName: n.name, Config: config, PodsDir: n.podsDir, ProcDir: n.procDir,
			HookSocket: filepath.Join(filepath.Dir(n.procDir), n.name+".sock"), PeerListen: "127.0.0.1:0", TLS: n.files, Host: n.host,
			Version: "v1", Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)).With("node", n.name)})
	}()
	stop := func() {
		cancel()
		select {
		case err, ok := <-done:
			if ok && err != nil {
				t.Error(err)
			}
			if ok {
				close(done)
			}
		case <-time.After(waitLimit):
			t.Error("the agent does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

func setPhase(t *testing.T, c client.Client, p *corev1.Pod, phase corev1.PodPhase) {
	t.Helper()
	base := p.DeepCopy()
	p.Status.Phase = phase
	if err := c.Status().Patch(t.Context(), p, client.MergeFrom(base)); err != nil {
		t.Fatal(err)
	}
}

// TestRun moves a VM between two agents as they are started by the command,
// on a real API server, with no more than their rights.
func TestRun(t *testing.T) {
	admin, config, _ := apiServer(t)
	l := &lab{t: t, client: admin}
	l.addNodes()
	s := &scene{from: l.nodes["a"], to: l.nodes["b"], migration: &migration{lab: l}}
	stopA := runAgent(t, s.from, config)
	runAgent(t, s.to, config)

	// Each node is registered, and its agent known to be alive.
	for _, name := range []string{"a", "b"} {
		eventually(t, "node "+name+" is registered", func() bool {
			n := &v1alpha1.VFNode{}
			err := admin.Get(t.Context(), client.ObjectKey{Name: name}, n)
			return err == nil && len(n.Status.PFs) == 1 && len(n.Status.PFs[0].VFs) == 2 && n.Status.PeerAddress != "" && n.Status.AgentVersion == "v1"
		})
		lease := &coordinationv1.Lease{}
		eventually(t, "the agent's lease", func() bool {
			return admin.Get(t.Context(), client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: v1alpha1.AgentLeaseName(name)}, lease) == nil
		})
		renewed := lease.Spec.RenewTime.Time
		if identity(lease) == "" || *lease.Spec.LeaseDurationSeconds != 10 || lease.Labels[v1alpha1.LabelAgent] != "true" {
			t.Errorf("lease of agent %s: %+v", name, lease)
		}
		eventually(t, "the agent's lease is renewed", func() bool {
			return admin.Get(t.Context(), client.ObjectKeyFromObject(lease), lease) == nil && lease.Spec.RenewTime.After(renewed)
		})
	}

	l.vmi(nil)
	s.sPod = l.pod("launcher-source", "a", vfA, "")
	s.src, s.stopSrc = startDevice(t, s.from.podsDir, s.sPod.UID)
	setPhase(t, admin, s.sPod, corev1.PodRunning)
	eventually(t, "the VM's VF is attached", func() bool { return s.src.is(pb.Phase_PHASE_RUNNING) })
	eventually(t, "the VFNode shows the holder", func() bool {
		n := &v1alpha1.VFNode{}
		if err := admin.Get(t.Context(), client.ObjectKey{Name: "a"}, n); err != nil {
			t.Fatal(err)
		}
		vf := n.Status.PFs[0].VFs[0]
		return vf.Holder == ns+"/launcher-source" && vf.Epoch == 1
	})

	s.begin()
	setPhase(t, admin, s.tPod, corev1.PodRunning)
	s.switchOver()
	s.succeed()

	// The source pod ends and is removed while its agent is away.
	stopA()
	s.stopSrc()
	if err := admin.Delete(t.Context(), s.sPod, client.GracePeriodSeconds(0)); err != nil {
		t.Fatal(err)
	}
	runAgent(t, s.from, config)
	eventually(t, "the source's VF is free", func() bool { return s.lease(s.from, vfA) == "" && !s.from.host.has(vfA) })
	if h := s.lease(s.to, vfB); !strings.HasSuffix(h, string(s.tPod.UID)) {
		t.Errorf("the target's VF is leased to %q", h)
	}

	// A pod that cannot get its VF tells why. Its VF is the one in use.
	other := l.pod("launcher-other", "b", vfB, "")
	startDevice(t, s.to.podsDir, other.UID)
	eventually(t, "an event tells who holds the VF", func() bool {
		var list corev1.EventList
		if err := admin.List(t.Context(), &list, client.InNamespace(ns)); err != nil {
			t.Fatal(err)
		}
		for _, e := range list.Items {
			if e.InvolvedObject.Name == "launcher-other" && e.Reason == v1alpha1.ReasonPinFailed && strings.Contains(e.Message, "launcher-target") {
				return true
			}
		}
		return false
	})
}
