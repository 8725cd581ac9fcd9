//go:build apiserver

package controllers

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/onsi/gomega"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	virtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/api/v1alpha1"
)

// installPolicies applies config/kubevirt until the test ends.
func installPolicies(t *testing.T) {
	t.Helper()
	for _, u := range manifests(t, "kubevirt") {
		if err := admin.Create(t.Context(), u); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := admin.Delete(context.Background(), u); err != nil {
				t.Error(err)
			}
		})
	}
}

func newNamespace(t *testing.T) string {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "policies-"}}
	if err := admin.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	return ns.Name
}

func newMigration(ns, vmi string) *virtv1.VirtualMachineInstanceMigration {
	return &virtv1.VirtualMachineInstanceMigration{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "kubevirt-evacuation-"},
		Spec:       virtv1.VirtualMachineInstanceMigrationSpec{VMIName: vmi},
	}
}

// refusedFor waits for the creation of a migration to be refused, or not, by
// the policy: the API server learns of policies and VMIs a little later.
func refusedFor(t *testing.T, c client.Client, m *virtv1.VirtualMachineInstanceMigration, want string) {
	t.Helper()
	gomega.NewWithT(t).Eventually(func() string {
		err := c.Create(t.Context(), m.DeepCopy(), client.DryRunAll)
		if err != nil && !apierrors.IsForbidden(err) {
			return "another error: " + err.Error()
		}
		if err != nil {
			_, after, _ := strings.Cut(err.Error(), "denied request: ")
			return after
		}
		return ""
	}, patience, 20*time.Millisecond).Should(gomega.Equal(want))
}

// TestMigrationsAreRefused has the API server refuse migrations, whoever creates
// them, before KubeVirt sees them.
func TestMigrationsAreRefused(t *testing.T) {
	installPolicies(t)
	ns, elsewhere := newNamespace(t), newNamespace(t)
	const why = "NoFreeVF: no node has enough free VFs"
	for _, v := range []struct {
		ns, name string
		vf       bool
		blocked  string
	}{
		{ns, "blocked", true, why}, {ns, "free", true, ""}, {ns, "plain", false, why}, {elsewhere, "blocked", true, ""},
	} {
		vmi := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: v.ns, Name: v.name}}
		if v.vf {
			vmi.Labels = map[string]string{kubevirt.LabelVF: "true"}
		}
		if v.blocked != "" {
			vmi.Annotations = map[string]string{kubevirt.AnnotationMigrationBlocked: v.blocked}
		}
		if err := admin.Create(t.Context(), vmi); err != nil {
			t.Fatal(err)
		}
	}
	refusedFor(t, admin, newMigration(ns, "blocked"), "VirtualMachineInstance blocked cannot be moved with its VFs: "+why)
	// From here on the policy is known to work.
	for _, m := range []*virtv1.VirtualMachineInstanceMigration{
		newMigration(ns, "free"), newMigration(ns, "plain"), newMigration(ns, "nobody"), newMigration(elsewhere, "blocked"),
	} {
		if err := admin.Create(t.Context(), m.DeepCopy(), client.DryRunAll); err != nil {
			t.Errorf("%s in %s: %v", m.Spec.VMIName, m.Namespace, err)
		}
	}
	out := newMigration(ns, "free")
	out.Spec.SendTo = &virtv1.VirtualMachineInstanceMigrationSource{MigrationID: "m", ConnectURL: "u"}
	refusedFor(t, admin, out, "VirtualMachineInstance free has VFs, which cannot leave the cluster or namespace: spec.sendTo and spec.receive are not possible")
	out.Spec.VMIName = "plain"
	refusedFor(t, admin, out, "")

	// What a VFMigration starts has passed a check of its own.
	for _, as := range []struct {
		user string
		want string
	}{
		{"system:serviceaccount:compsc-system:compsc-manager", ""},
		{"system:serviceaccount:other:compsc-manager", "VirtualMachineInstance blocked cannot be moved with its VFs: " + why},
	} {
		config := rest.CopyConfig(adminConfig)
		config.Impersonate = rest.ImpersonationConfig{UserName: as.user, Groups: []string{"system:masters"}}
		c, err := client.New(config, client.Options{Scheme: admin.Scheme()})
		if err != nil {
			t.Fatal(err)
		}
		refusedFor(t, c, newMigration(ns, "blocked"), as.want)
	}
}

// TestBlockedAgainstTheAPIServer takes the target's last VF and gives it back:
// an eviction's migration is refused meanwhile, with the reason, and no
// VFMigration is made for it.
func TestBlockedAgainstTheAPIServer(t *testing.T) {
	p := newPlay(t)
	installPolicies(t)
	hold := func(holder string) {
		t.Helper()
		n := &v1alpha1.VFNode{}
		p.Expect(admin.Get(t.Context(), client.ObjectKey{Name: p.target}, n)).To(gomega.Succeed())
		n.Status.PFs[0].VFs[0].Holder = holder
		n.Status.AgentVersion += "+" // for the manager to look again, whatever holder is
		p.Expect(admin.Status().Update(t.Context(), n)).To(gomega.Succeed())
	}
	p.createHolder("holder", p.target)
	hold(p.ns + "/holder")
	blocked := func() string {
		vmi := &virtv1.VirtualMachineInstance{}
		p.Expect(p.get(vmi, "vm")).To(gomega.Succeed())
		return vmi.Annotations[kubevirt.AnnotationMigrationBlocked]
	}
	p.Eventually(blocked, patience, 20*time.Millisecond).Should(gomega.HavePrefix("NoFreeVF: "))
	refusedFor(t, admin, newMigration(p.ns, "vm"), "VirtualMachineInstance vm cannot be moved with its VFs: "+blocked())
	p.Eventually(p.events, patience, 20*time.Millisecond).Should(gomega.ContainElement("VirtualMachineInstance MigrationBlocked"))
	var list v1alpha1.VFMigrationList
	p.Expect(admin.List(t.Context(), &list, client.InNamespace(p.ns))).To(gomega.Succeed())
	p.Expect(list.Items).To(gomega.BeEmpty())

	// It can be moved once the VF's holder is ending: the migration waits for it.
	p.endHolder("holder")
	hold(p.ns + "/holder")
	p.Eventually(blocked, patience, 20*time.Millisecond).Should(gomega.BeEmpty())
	refusedFor(t, admin, newMigration(p.ns, "vm"), "")

	hold("")
	p.Eventually(blocked, patience, 20*time.Millisecond).Should(gomega.BeEmpty())
	refusedFor(t, admin, newMigration(p.ns, "vm"), "")
}

// createPod has the API server make such a pod as KubeVirt would, and keep
// nothing of it.
func createPod(t *testing.T, ns, label string, containers ...corev1.Container) (*corev1.Pod, error) {
	t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "virt-launcher-", Labels: map[string]string{kubevirt.LabelApp: label}},
		Spec:       corev1.PodSpec{Containers: append([]corev1.Container{{Name: "compute", Image: "virt-launcher"}}, containers...)},
	}
	return pod, admin.Create(t.Context(), pod, client.DryRunAll)
}

func sidecar(n, image string) corev1.Container {
	return corev1.Container{Name: "hook-sidecar-" + n, Image: image}
}

// TestTargetsAreHeld looks at the pods that KubeVirt makes.
func TestTargetsAreHeld(t *testing.T) {
	installPolicies(t)
	ns := newNamespace(t)
	probe := &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/compsc", "ready"}}},
		PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 3900, SuccessThreshold: 1,
	}
	own := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"own"}}},
		PeriodSeconds: 7, TimeoutSeconds: 1, FailureThreshold: 3, SuccessThreshold: 1}
	create := func(label string, containers ...corev1.Container) (map[string]*corev1.Probe, error) {
		pod, err := createPod(t, ns, label, containers...)
		if err != nil {
			return nil, err
		}
		got := map[string]*corev1.Probe{}
		for _, c := range pod.Spec.Containers {
			got[c.Name] = c.StartupProbe
			if c.ReadinessProbe != nil || c.LivenessProbe != nil || c.Image == "" {
				t.Errorf("container %+v", c)
			}
		}
		return got, nil
	}
	gomega.NewWithT(t).Eventually(func() bool {
		got, err := create(kubevirt.AppLauncher, sidecar("0", "compsc"))
		return err == nil && got["hook-sidecar-0"] != nil
	}, patience, 20*time.Millisecond).Should(gomega.BeTrue())

	withOwn := sidecar("2", "compsc")
	withOwn.StartupProbe = own
	for name, tc := range map[string]struct {
		label      string
		containers []corev1.Container
		want       map[string]*corev1.Probe
	}{
		"ours by tag": {kubevirt.AppLauncher, []corev1.Container{sidecar("0", "registry.example:5000/tools/compsc:v1")}, map[string]*corev1.Probe{"compute": nil, "hook-sidecar-0": probe}},
		"ours by digest": {kubevirt.AppLauncher, []corev1.Container{sidecar("0", "compsc.io/compsc@sha256:"+strings.Repeat("a", 64))},
			map[string]*corev1.Probe{"compute": nil, "hook-sidecar-0": probe}},
		"beside another's, and one with a probe": {kubevirt.AppLauncher, []corev1.Container{sidecar("0", "passt-binding"), sidecar("1", "compsc"), withOwn},
			map[string]*corev1.Probe{"compute": nil, "hook-sidecar-0": nil, "hook-sidecar-1": probe, "hook-sidecar-2": own}},
		"similar names": {kubevirt.AppLauncher, []corev1.Container{sidecar("0", "not-compsc"), sidecar("1", "compsc/other"), {Name: "web", Image: "compsc"}},
			map[string]*corev1.Probe{"compute": nil, "hook-sidecar-0": nil, "hook-sidecar-1": nil, "web": nil}},
		"no VM":      {"virt-handler", []corev1.Container{sidecar("0", "compsc")}, map[string]*corev1.Probe{"compute": nil, "hook-sidecar-0": nil}},
		"no sidecar": {kubevirt.AppLauncher, nil, map[string]*corev1.Probe{"compute": nil}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := create(tc.label, tc.containers...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("startup probes (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDevicesAreConfined looks at what the pods that KubeVirt makes may do.
func TestDevicesAreConfined(t *testing.T) {
	installPolicies(t)
	ns := newNamespace(t)
	gomega.NewWithT(t).Eventually(func() bool {
		pod, err := createPod(t, ns, kubevirt.AppLauncher, sidecar("0", "compsc"))
		return err == nil && pod.Spec.Containers[1].SecurityContext != nil
	}, patience, 20*time.Millisecond).Should(gomega.BeTrue())

	confined := corev1.SecurityContext{
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}, ReadOnlyRootFilesystem: new(true),
		AllowPrivilegeEscalation: new(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	// KubeVirt's own, of a VM that is not root's.
	kubevirts := corev1.SecurityContext{RunAsUser: new(int64(107)), RunAsGroup: new(int64(107)), RunAsNonRoot: new(true),
		AllowPrivilegeEscalation: new(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	both := kubevirts
	both.SeccompProfile, both.ReadOnlyRootFilesystem = confined.SeccompProfile, confined.ReadOnlyRootFilesystem
	lax := corev1.SecurityContext{ReadOnlyRootFilesystem: new(false), AllowPrivilegeEscalation: new(true),
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeUnconfined}, Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}}}
	with := func(c corev1.Container, s corev1.SecurityContext) corev1.Container {
		c.SecurityContext = s.DeepCopy()
		return c
	}
	probed := sidecar("0", "compsc")
	probed.StartupProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"own"}}}}
	// Another policy's containers, such as those of disks, may come before.
	var disks []corev1.Container
	for i := range 40 {
		disks = append(disks, corev1.Container{Name: "disk-" + string(rune('a'+i/26)) + string(rune('a'+i%26)), Image: "disk"})
	}
	for name, tc := range map[string]struct {
		label      string
		containers []corev1.Container
		// want is of the last container; all others keep what they have.
		want *corev1.SecurityContext
	}{
		"as KubeVirt makes it":  {kubevirt.AppLauncher, []corev1.Container{with(sidecar("0", "registry.example:5000/tools/compsc:v1"), kubevirts)}, &both},
		"without any":           {kubevirt.AppLauncher, []corev1.Container{sidecar("0", "compsc")}, &confined},
		"laxer":                 {kubevirt.AppLauncher, []corev1.Container{with(sidecar("0", "compsc"), lax)}, &confined},
		"with a probe":          {kubevirt.AppLauncher, []corev1.Container{probed}, &confined},
		"after another's":       {kubevirt.AppLauncher, []corev1.Container{with(sidecar("0", "passt-binding"), lax), sidecar("1", "compsc")}, &confined},
		"after many containers": {kubevirt.AppLauncher, append(slices.Clone(disks), sidecar("0", "compsc")), &confined},
		"another's":             {kubevirt.AppLauncher, []corev1.Container{with(sidecar("0", "not-compsc"), lax)}, &lax},
		"no VM's":               {"virt-handler", []corev1.Container{with(sidecar("0", "compsc"), lax)}, &lax},
	} {
		t.Run(name, func(t *testing.T) {
			pod, err := createPod(t, ns, tc.label, tc.containers...)
			if err != nil {
				t.Fatal(err)
			}
			got := pod.Spec.Containers[1:]
			last := len(got) - 1
			if diff := cmp.Diff(tc.want, got[last].SecurityContext); diff != "" {
				t.Errorf("security context (-want +got):\n%s", diff)
			}
			for i := range last {
				if diff := cmp.Diff(tc.containers[i].SecurityContext, got[i].SecurityContext); diff != "" {
					t.Errorf("container %s is not ours (-want +got):\n%s", got[i].Name, diff)
				}
			}
		})
	}
}

// TestDomainHookIsMounted: CompSC's sidecars, and no others, get the directory of
// KubeVirt's plugins in which virt-launcher looks for their domain hook, where
// KubeVirt has plugins.
func TestDomainHookIsMounted(t *testing.T) {
	for _, u := range readObjects(t, filepath.Join("..", "config", "kubevirt", "plugin", "mount_domain_hook.yaml")) {
		if err := admin.Create(t.Context(), u); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := admin.Delete(context.Background(), u); err != nil {
				t.Error(err)
			}
		})
	}
	ns := newNamespace(t)
	const volume = "kubevirt-plugin-sockets"
	own := corev1.VolumeMount{Name: "hook-sidecar-sockets", MountPath: kubevirt.HooksDir, SubPath: "hook-sidecar-0"}
	plugin := corev1.VolumeMount{Name: volume, MountPath: kubevirt.PluginDir, SubPath: "compsc"}
	mounts := func(image string, volumes ...string) ([]corev1.VolumeMount, error) {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, GenerateName: "virt-launcher-", Labels: map[string]string{kubevirt.LabelApp: kubevirt.AppLauncher}}}
		c := sidecar("0", image)
		c.VolumeMounts = []corev1.VolumeMount{own}
		pod.Spec.Containers = []corev1.Container{{Name: "compute", Image: "virt-launcher"}, c}
		for _, v := range append(volumes, own.Name) {
			pod.Spec.Volumes = append(pod.Spec.Volumes, corev1.Volume{Name: v, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
		}
		err := admin.Create(t.Context(), pod, client.DryRunAll)
		if len(pod.Spec.Containers[0].VolumeMounts) > 0 {
			t.Errorf("compute has the mounts %+v", pod.Spec.Containers[0].VolumeMounts)
		}
		return pod.Spec.Containers[1].VolumeMounts, err
	}
	gomega.NewWithT(t).Eventually(func() ([]corev1.VolumeMount, error) { return mounts("registry.example/tools/compsc:v1", volume) },
		patience, 20*time.Millisecond).Should(gomega.Equal([]corev1.VolumeMount{own, plugin}))
	for name, got := range map[string]func() ([]corev1.VolumeMount, error){
		"another's":       func() ([]corev1.VolumeMount, error) { return mounts("passt-binding", volume) },
		"without plugins": func() ([]corev1.VolumeMount, error) { return mounts("compsc") },
	} {
		m, err := got()
		if diff := cmp.Diff([]corev1.VolumeMount{own}, m); err != nil || diff != "" {
			t.Errorf("%s: %v, mounts (-want +got):\n%s", name, err, diff)
		}
	}
}

// The policies name the same things as the code.
func TestPoliciesAgree(t *testing.T) {
	text := ""
	for _, u := range manifests(t, "kubevirt", filepath.Join("kubevirt", "plugin")) {
		raw, err := u.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		text += string(raw)
	}
	for _, want := range []string{
		kubevirt.LabelVF, kubevirt.AnnotationMigrationBlocked, "system:serviceaccount:" + systemNamespace + ":compsc-manager",
		`i.binding.name == \"` + kubevirt.BindingName + `\"`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in config/kubevirt", want)
		}
	}
}
