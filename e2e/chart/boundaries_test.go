//go:build e2echart

package chart

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubevirtv1 "kubevirt.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/peer/peerpb"
	"compsc.io/compsc/agent/privilege"
	"compsc.io/compsc/agent/spiffe"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/e2e/harness"
	"compsc.io/compsc/e2e/helm"
	"compsc.io/compsc/e2e/procstatus"
	"compsc.io/compsc/e2e/wait"
)

// forbidden fails unless the API server refused the call and said the text.
func forbidden(t *testing.T, what string, err error, says string) {
	t.Helper()
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), says) {
		t.Errorf("%s: got %v, want that it is forbidden: %q", what, err, says)
	}
}

func touchStatus(t *testing.T, c client.Client, o client.Object, patch string) error {
	t.Helper()
	return c.Status().Patch(t.Context(), o.DeepCopyObject().(client.Object), client.RawPatch("application/merge-patch+json", []byte(patch)), client.DryRunAll)
}

// managerRights: what the manager must not.
func (w *world) managerRights(t *testing.T) {
	ctx := within(t, time.Minute)
	c := client.NewDryRunClient(w.manager(t))
	check(t, c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: v1alpha1.AuthoritySecret}, &corev1.Secret{}))
	forbidden(t, "list secrets", c.List(ctx, &corev1.SecretList{}, client.InNamespace(namespace)), "secrets")
	forbidden(t, "read Helm's secret", c.Get(ctx, client.ObjectKey{Namespace: namespace, Name: "sh.helm.release.v1." + helm.Release + ".v1"}, &corev1.Secret{}), "secrets")
	forbidden(t, "list secrets of VMs", c.List(ctx, &corev1.SecretList{}, client.InNamespace(harness.Namespace)), "secrets")
	forbidden(t, "create a pod", c.Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "p"},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}), "pods")
	forbidden(t, "write a VFNode", touchStatus(t, c, &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: harness.NodeA}}, `{"status":{}}`), "vfnodes")
	foreign := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "foreign"}, Spec: certificatesv1.CertificateSigningRequestSpec{
		SignerName: "kubernetes.io/kube-apiserver-client", Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth}, Request: request(t, harness.NodeA)}}
	check(t, w.h.Client().Create(ctx, foreign))
	foreign.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Because"}}
	forbidden(t, "approve another signer's certificate", w.manager(t).SubResource("approval").Update(ctx, foreign), "signer")
}

// request is a certificate request for the node's agent, as PEM.
func request(t *testing.T, node string) []byte {
	t.Helper()
	text, _ := requestAndKey(t, node)
	return text
}

func requestAndKey(t *testing.T, node string) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{spiffe.NodeURI(node)}}, key)
	check(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), key
}

// agentBoundaries: an agent writes only what names its node.
func (w *world) agentBoundaries(t *testing.T) {
	ctx := within(t, time.Minute)
	a := w.agent(t, harness.NodeA)
	empty := `{"status":{"peerAddress":"198.18.0.1:1"}}`
	node := func(name string) client.Object { return &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: name}} }
	// The API server begins to enforce a policy some time after it is there.
	check(t, wait.Until(ctx, "the policy to be in force", func(ctx context.Context) (bool, error) {
		return apierrors.IsForbidden(touchStatus(t, a, node(harness.NodeB), empty)), nil
	}))
	check(t, touchStatus(t, a, node(harness.NodeA), empty))
	forbidden(t, "another node's VFNode", touchStatus(t, a, node(harness.NodeB), empty), "the agent of node a may not write VFNode b")
	forbidden(t, "create another node's VFNode", a.Create(ctx, node("c"), client.DryRunAll), "may not write VFNode c")
	forbidden(t, "delete a VFNode", a.Delete(ctx, node(harness.NodeA), client.DryRunAll), "vfnodes")
	unbound := w.client(t, namespace, "compsc-agent", nil)
	forbidden(t, "a token that is bound to no pod", touchStatus(t, unbound, node(harness.NodeA), empty), "not bound to a pod on a node")

	// Made without the manager, which would end them at once.
	w.endManager(t, ctx)
	defer func() { check(t, w.h.StartManager()) }()
	migration := func(name, from, to string) *v1alpha1.VFMigration {
		t.Helper()
		m := harness.NewMigration(name, to)
		m.Spec.VMIName = "nobody"
		check(t, w.h.Client().Create(ctx, m))
		m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: from, PodName: "p", PodUID: noUID}
		m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: to, PodName: "q", PodUID: noUID}
		// Over, so that no agent acts.
		m.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionSucceeded, Status: metav1.ConditionFalse, Reason: "Test", LastTransitionTime: metav1.Now()}}
		check(t, w.h.Client().Status().Update(ctx, m))
		return m
	}
	status := `{"status":{"steps":[{"name":"source/x","took":"1s"}]}}`
	check(t, touchStatus(t, a, migration("from-a", "a", "c"), status))
	check(t, touchStatus(t, a, migration("to-a", "c", "a"), status))
	foreign := migration("foreign", "b", "c")
	forbidden(t, "a migration of other nodes", touchStatus(t, a, foreign, status), "VFMigration foreign does not name node a")
	forbidden(t, "take over a migration of other nodes", touchStatus(t, a, foreign, `{"status":{"target":{"nodeName":"a"}}}`), "does not name node a")
	own := migration("own", "a", "b")
	forbidden(t, "change the target", touchStatus(t, a, own, `{"status":{"target":{"nodeName":"c"}}}`), "may not change which nodes")
	forbidden(t, "change the source's pod", touchStatus(t, a, own, `{"status":{"source":{"podName":"other"}}}`), "may not change which nodes")
	forbidden(t, "take the target away", touchStatus(t, a, own, `{"status":{"target":null}}`), "may not change which nodes")
	for what, patch := range map[string]string{
		"say that it is over":           `{"status":{"conditions":[{"type":"Succeeded","status":"True","reason":"Succeeded","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`,
		"say what the target is to say": `{"status":{"conditions":[{"type":"Verified","status":"True","reason":"Verified","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`,
		"take the end back":             `{"status":{"conditions":null}}`,
	} {
		forbidden(t, what, touchStatus(t, a, own, patch), "the agent of node a may write Prepared, Captured, RolledBack only")
	}
	captured := own.DeepCopy()
	captured.Status.Conditions = append(captured.Status.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionCaptured, Status: metav1.ConditionTrue, Reason: v1alpha1.ConditionCaptured, LastTransitionTime: metav1.Now()})
	check(t, a.Status().Patch(ctx, captured, client.MergeFrom(own), client.DryRunAll))
	for what, patch := range map[string]string{
		"undo it":                       `{"status":{"failure":{"reason":"Aborted","message":"because","time":"2026-01-01T00:00:00Z"}}}`,
		"end it":                        `{"status":{"completionTime":"2026-01-01T00:00:00Z"}}`,
		"say its phase":                 `{"status":{"phase":"Succeeded"}}`,
		"say when it began":             `{"status":{"startTime":"2026-01-01T00:00:00Z"}}`,
		"give it a migration":           `{"status":{"migrationRef":{"name":"x","uid":"y"}}}`,
		"say which spec was considered": `{"status":{"observedGeneration":7}}`,
	} {
		forbidden(t, what, touchStatus(t, a, own, patch), "an agent may not say when a VFMigration began or ended")
	}
	forbidden(t, "write a migration's spec", a.Patch(ctx, own, client.RawPatch("application/merge-patch+json", []byte(`{"spec":{"abort":true}}`)), client.DryRunAll), "vfmigrations")

	lease := func(name, node string) *coordinationv1.Lease {
		return &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"compsc.io/node": node}}}
	}
	check(t, a.Create(ctx, lease("vf-a-0000-01-10-7", "a"), client.DryRunAll))
	for what, l := range map[string]*coordinationv1.Lease{
		"another node's VF": lease("vf-b-0000-01-10-7", "b"), "another node's VF under the own label": lease("vf-b-0000-01-10-7", "a"),
		"the own name under another label": lease("vf-a-0000-01-10-7", "b"), "the manager's": lease("manager.compsc.io.new", "a"),
	} {
		forbidden(t, "lease: "+what, a.Create(ctx, l, client.DryRunAll), "its agent may not write it")
	}
	theirs := &coordinationv1.Lease{}
	check(t, a.Get(ctx, client.ObjectKey{Namespace: namespace, Name: v1alpha1.AgentLeaseName(harness.NodeB)}, theirs))
	forbidden(t, "another agent's lease", a.Update(ctx, theirs, client.DryRunAll), "Lease agent-b is not one of node a's")

	w.eventBoundaries(t, a)
	w.capabilities(t)

	forbidden(t, "the authority's key", a.Get(ctx, client.ObjectKey{Namespace: namespace, Name: v1alpha1.AuthoritySecret}, &corev1.Secret{}), "secrets")
	forbidden(t, "change who is trusted", a.Patch(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: v1alpha1.TrustConfigMap}},
		client.RawPatch("application/merge-patch+json", []byte(`{"data":{}}`)), client.DryRunAll), "configmaps")
	vmi := &kubevirtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: harness.Namespace, Name: harness.VMI}}
	forbidden(t, "change a VMI", a.Patch(ctx, vmi, client.RawPatch("application/merge-patch+json", []byte(`{}`)), client.DryRunAll), "virtualmachineinstances")
	for _, m := range []string{"from-a", "to-a", "foreign", "own"} {
		check(t, w.h.Client().Delete(ctx, harness.NewMigration(m, "")))
	}
}

// capabilities: of what a privileged container has, the agents have given up what
// they do not need, and still do their work here.
func (w *world) capabilities(t *testing.T) {
	var want uint64
	for _, c := range privilege.Kept {
		want |= 1 << c.Number
	}
	// Where the tests run some may be missing that a node has.
	ours := capabilitySet(t, os.Getpid(), "CapBnd")
	if want &= ours; want == ours {
		t.Fatalf("the tests have no capability that an agent would give up: %016x", ours)
	}
	for node := range w.h.Lab.Nodes {
		for _, name := range []string{"CapEff", "CapPrm", "CapBnd"} {
			if got := capabilitySet(t, w.h.Agent(node).PID(), name); got != want {
				t.Errorf("node %s's agent has %s %016x, want %016x: %s", node, name, got, want, privilege.Names())
			}
		}
	}
}

// capabilitySet returns one of a process' sets of capabilities.
func capabilitySet(t *testing.T, pid int, name string) uint64 {
	t.Helper()
	status, err := procstatus.Read(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	check(t, err)
	set, err := strconv.ParseUint(status[name], 16, 64)
	check(t, err)
	return set
}

// eventBoundaries: what agent a says of other objects is known to be its word.
func (w *world) eventBoundaries(t *testing.T, a client.Client) {
	ctx := within(t, time.Minute)
	node := func(name string) *corev1.ObjectReference {
		return &corev1.ObjectReference{APIVersion: v1alpha1.GroupVersion.String(), Kind: "VFNode", Name: name}
	}
	pod := func(name string) *corev1.ObjectReference {
		return &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: harness.Namespace, Name: name}
	}
	event := func(name string, regarding, related *corev1.ObjectReference) *eventsv1.Event {
		e := &eventsv1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: regarding.Namespace, Name: name}, EventTime: metav1.NowMicro(),
			ReportingController: "compsc-agent", ReportingInstance: "compsc-agent-x", Type: corev1.EventTypeWarning, Reason: "Test", Action: "Test", Note: "a test",
			Regarding: *regarding, Related: related}
		if e.Namespace == "" {
			e.Namespace = metav1.NamespaceDefault
		}
		return e
	}
	check(t, a.Create(ctx, event("own", node("a"), nil), client.DryRunAll))
	check(t, a.Create(ctx, event("pod", pod("virt-launcher-vm-x"), node("a")), client.DryRunAll))
	posing := event("posing", node("a"), nil)
	posing.ReportingController = "kubelet"
	for what, e := range map[string]*eventsv1.Event{
		"another node":              event("e", node("b"), nil),
		"another node, as the own":  event("e", node("b"), node("a")),
		"a VM's pod, nobody's word": event("e", pod("virt-launcher-vm-x"), nil),
		"a VM's pod, as another":    event("e", pod("virt-launcher-vm-x"), node("b")),
		"another pod":               event("e", pod("coredns"), node("a")),
		"a VFMigration": event("e", &corev1.ObjectReference{APIVersion: v1alpha1.GroupVersion.String(), Kind: "VFMigration",
			Namespace: harness.Namespace, Name: "m"}, node("a")),
		"as the kubelet": posing,
	} {
		forbidden(t, "event: "+what, a.Create(ctx, e, client.DryRunAll), "must be of the agent of node a, and about its VFNode")
	}
	theirs := event("theirs", node("b"), nil)
	check(t, w.h.Client().Create(ctx, theirs))
	forbidden(t, "another agent's event", a.Patch(ctx, theirs.DeepCopy(), client.RawPatch("application/merge-patch+json",
		[]byte(`{"series":{"count":2,"lastObservedTime":"2026-01-01T00:00:00.000000Z"}}`)), client.DryRunAll), "must be of the agent of node a")
	check(t, w.h.Client().Delete(ctx, theirs))
	forbidden(t, "an event of the core group", a.Create(ctx, &corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceDefault, Name: "core"},
		InvolvedObject: *node("a")}, client.DryRunAll), "events")
}

// ask asks for a certificate as c, and waits for the answer.
func (w *world) ask(t *testing.T, c client.Client, text []byte) *certificatesv1.CertificateSigningRequest {
	t.Helper()
	ctx := within(t, time.Minute)
	r := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}, Spec: certificatesv1.CertificateSigningRequestSpec{
		SignerName: v1alpha1.CertificateSigner, Request: text,
		Usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth}}}
	check(t, c.Create(ctx, r))
	check(t, wait.Until(ctx, "an answer", func(ctx context.Context) (bool, error) {
		err := w.h.Client().Get(ctx, client.ObjectKeyFromObject(r), r)
		return len(r.Status.Certificate) > 0 || len(r.Status.Conditions) > 0 && r.Status.Conditions[0].Type == certificatesv1.CertificateDenied, err
	}))
	return r
}

// certificateBoundaries: nobody gets a certificate of a node but its agent.
func (w *world) certificateBoundaries(t *testing.T) {
	a := w.agent(t, harness.NodeA)
	for what, test := range map[string]struct {
		client.Client
		text []byte
		says string
	}{
		"another node":              {a, request(t, harness.NodeB), "for the agent of node b, and comes from node a"},
		"an administrator":          {w.h.Client(), request(t, harness.NodeA), "is not an agent"},
		"a name that is not a node": {a, request(t, "a/b"), "not of the form"},
	} {
		r := w.ask(t, test.Client, test.text)
		if len(r.Status.Certificate) > 0 || !strings.Contains(r.Status.Conditions[0].Message, test.says) {
			t.Errorf("%s: got %+v, want a denial that says %q", what, r.Status, test.says)
		}
	}
	asks := func(signer string) *certificatesv1.CertificateSigningRequest {
		return &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: signer, Request: request(t, harness.NodeA), Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth}}}
	}
	forbidden(t, "another signer", a.Create(t.Context(), asks("kubernetes.io/kube-apiserver-client"), client.DryRunAll), "compsc.io/agent only")
	unbound := w.client(t, namespace, "compsc-agent", nil)
	forbidden(t, "a token that is bound to no pod", unbound.Create(t.Context(), asks(v1alpha1.CertificateSigner), client.DryRunAll), "not bound to a pod on a node")
}

// credentials are a certificate that the agent of node a asked for.
func (w *world) credentials(t *testing.T) *peer.Credentials {
	t.Helper()
	text, key := requestAndKey(t, harness.NodeA)
	r := w.ask(t, w.agent(t, harness.NodeA), text)
	if len(r.Status.Certificate) == 0 {
		t.Fatalf("no certificate: %+v", r.Status)
	}
	c, err := peer.NewCredentials(harness.NodeA, w.writeFiles(t, r.Status.Certificate, key))
	check(t, err)
	return c
}

// writeFiles writes a certificate and its key, with the authorities that the
// agents trust.
func (w *world) writeFiles(t *testing.T, cert []byte, key *ecdsa.PrivateKey) peer.Files {
	t.Helper()
	d := t.TempDir()
	f := peer.Files{Cert: filepath.Join(d, "tls.crt"), Key: filepath.Join(d, "tls.key"), CA: w.files(harness.NodeB).CA}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	check(t, os.WriteFile(f.Cert, cert, 0o600))
	check(t, os.WriteFile(f.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	return f
}

// peerBoundaries: an agent acts for a peer only in the migrations that name
// both, in the roles that they give.
func (w *world) peerBoundaries(t *testing.T) {
	ctx := within(t, time.Minute)
	b := w.h.Lab.Nodes[harness.NodeB].IP.String() + ":9443"
	conn, err := peer.NewClient(w.credentials(t)).Connect(harness.NodeB, b)
	check(t, err)
	defer conn.Close()
	check(t, conn.WaitReady(ctx))
	moved := &v1alpha1.VFMigrationList{}
	check(t, w.h.Client().List(ctx, moved, client.InNamespace(harness.Namespace)))
	for what, test := range map[string]struct {
		m    *peerpb.Migration
		code codes.Code
		says string
	}{
		"a migration that is not": {&peerpb.Migration{Namespace: harness.Namespace, Name: "none", Uid: string(noUID)}, codes.PermissionDenied, "knows no such VFMigration"},
		"another one's UID":       {&peerpb.Migration{Namespace: harness.Namespace, Name: moved.Items[0].Name, Uid: string(noUID)}, codes.PermissionDenied, "knows no such VFMigration"},
	} {
		_, err := conn.Prepare(ctx, &peerpb.PrepareRequest{Migration: test.m})
		if status.Code(err) != test.code || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got %v, want %v: %q", what, err, test.code, test.says)
		}
	}
	// One that is under way, from the node that the VM is on: the other way
	// round, node a may not ask node b what only the other may.
	m, release := w.held(t, ctx)
	named := &peerpb.Migration{Namespace: m.Namespace, Name: m.Name, Uid: string(m.UID)}
	if m.Status.Source.NodeName == harness.NodeA {
		_, err = conn.Commit(ctx, &peerpb.CommitRequest{Migration: named})
	} else {
		_, err = conn.Prepare(ctx, &peerpb.PrepareRequest{Migration: named})
	}
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "that is for node b to call at node a") {
		t.Errorf("the other's role: got %v", err)
	}
	release()
	w.moved(t, ctx, m)
}

// deviceBoundaries: the device process is in the VM's pod, whose service account
// may do nothing.
func (w *world) deviceBoundaries(t *testing.T) {
	ctx := within(t, time.Minute)
	check(t, client.IgnoreAlreadyExists(w.h.Client().Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: harness.Namespace, Name: "default"}})))
	// KubeVirt mounts no token into such a pod; this is what a stolen one could do.
	c := w.client(t, harness.Namespace, "default", nil)
	for _, s := range []client.ObjectKey{{Namespace: namespace, Name: v1alpha1.AuthoritySecret}, {Namespace: harness.Namespace, Name: "any"}} {
		forbidden(t, "secret "+s.String(), c.Get(ctx, s, &corev1.Secret{}), "secrets")
	}
	forbidden(t, "a VFMigration", c.List(ctx, &v1alpha1.VFMigrationList{}), "vfmigrations")
	forbidden(t, "a VFNode", touchStatus(t, c, &v1alpha1.VFNode{ObjectMeta: metav1.ObjectMeta{Name: harness.NodeA}}, `{"status":{}}`), "vfnodes")
	err := c.Create(ctx, &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: certificatesv1.CertificateSigningRequestSpec{
		SignerName: v1alpha1.CertificateSigner, Request: request(t, harness.NodeA), Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth}}})
	forbidden(t, "a certificate", err, "certificatesigningrequests")
}
