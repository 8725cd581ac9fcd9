package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/events"
	virtv1 "kubevirt.io/api/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"compsc.io/compsc/agent/kubevirt"
	"compsc.io/compsc/agent/kubevirt/launcher"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/spiffe"
	"compsc.io/compsc/api/v1alpha1"
)

const (
	ns        = "default"
	mac       = "52:54:00:00:00:0a"
	waitLimit = 30 * time.Second
)

func itoa(n uintptr) string { return strconv.Itoa(int(n)) }

// eventually waits for a condition, and fails the test if it does not come.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: not within %s", what, waitLimit)
		}
	}
}

// lab is an API server and two nodes.
type lab struct {
	t      *testing.T
	client client.WithWatch
	vmiUID types.UID
	ca     *x509.Certificate
	caKey  *ecdsa.PrivateKey
	// hold is the limit of its migrations' holds, 0 for the default.
	hold time.Duration

	mu      sync.Mutex
	apiDown error
	nodes   map[string]*labNode
}

// labNode is a node; its agent can be killed and started again.
type labNode struct {
	// podResources is the socket of the node's kubelet, empty if it has none.
	podResources string
	lab          *lab
	name         string
	podsDir      string
	procDir      string // without processes
	files        peer.Files
	host         *fakeHost
	address      string
	// newHost, if set, returns what each agent has instead of host; limits, if
	// set, are for a node that is slow.
	newHost func() Host
	limits  *limits
	// logLevel is of what the agent reports.
	logLevel slog.Level

	mu    sync.Mutex
	agent *agent
	kill  func()
}

func newLab(t *testing.T) *lab {
	t.Helper()
	scheme, err := newScheme()
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t}
	down := func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.apiDown
	}
	l.client = fake.NewClientBuilder().WithScheme(scheme).
		// The default tracker cannot hold a VMI, which has an unsigned field.
		WithObjectTracker(clienttesting.NewObjectTracker(scheme, serializer.NewCodecFactory(scheme).UniversalDecoder())).
		WithStatusSubresource(&vfMigration{}, &v1alpha1.VFNode{}).
		WithInterceptorFuncs(interceptor.Funcs{
			Get: func(ctx context.Context, c client.WithWatch, k client.ObjectKey, o client.Object, opts ...client.GetOption) error {
				if err := down(); err != nil {
					return err
				}
				return c.Get(ctx, k, o, opts...)
			},
			SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
				if err := down(); err != nil {
					return err
				}
				return c.SubResource(sub).Patch(ctx, o, p, opts...)
			},
		}).Build()
	l.addNodes()
	return l
}

// addNodes makes the nodes a, b and c, with certificates; nothing runs there.
func (l *lab) addNodes() {
	l.t.Helper()
	l.nodes = map[string]*labNode{}
	l.caKey = newKey(l.t)
	l.ca = l.sign(&x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		Subject: pkix.Name{CommonName: "CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}, nil, l.caKey)
	for _, n := range []string{"a", "b", "c"} {
		l.nodes[n] = l.newNode(n)
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func (l *lab) sign(tmpl, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	l.t.Helper()
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, l.caKey)
	if err != nil {
		l.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		l.t.Fatal(err)
	}
	return c
}

func (l *lab) newNode(name string) *labNode {
	l.t.Helper()
	dir := l.t.TempDir()
	n := &labNode{lab: l, name: name, podsDir: filepath.Join(dir, "pods"), procDir: l.t.TempDir(), logLevel: slog.LevelDebug, host: &fakeHost{prepared: map[string]string{}},
		files: peer.Files{Cert: filepath.Join(dir, "crt"), Key: filepath.Join(dir, "key"), CA: filepath.Join(dir, "ca")}}
	key := newKey(l.t)
	cert := l.sign(&x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{spiffe.NodeURI(name)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, l.ca, key)
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		l.t.Fatal(err)
	}
	for path, b := range map[string]*pem.Block{n.files.Cert: {Type: "CERTIFICATE", Bytes: cert.Raw},
		n.files.Key: {Type: "EC PRIVATE KEY", Bytes: der}, n.files.CA: {Type: "CERTIFICATE", Bytes: l.ca.Raw}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(b), 0o600); err != nil {
			l.t.Fatal(err)
		}
	}
	return n
}

// start runs the node's agent: what run.go does with a manager is done here by
// reconciling everything all the time.
func (n *labNode) start() {
	t := n.lab.t
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	creds, err := peer.NewCredentials(n.name, n.files)
	if err != nil {
		t.Fatal(err)
	}
	listen := n.address
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	tcp, err := net.Listen("tcp", listen)
	if err != nil {
		t.Fatal(err)
	}
	l := &trackedListener{Listener: tcp}
	n.address = l.Addr().String()
	log := slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: n.logLevel})).With("node", n.name)
	a := &agent{node: n.name, namespace: v1alpha1.SystemNamespace, version: "test", advertise: n.address,
		client: n.lab.client, live: n.lab.client, host: n.host, peers: peer.NewClient(creds), devices: newDevices(n.podsDir),
		events: events.NewFakeRecorder(1000), log: log, work: newWorkers(log), tries: newTries(),
		creds: creds, pokes: make(chan event.GenericEvent, 1), found: found{qemus: launcher.New(n.procDir)},
		limits: limits{retry: 3 * time.Second, pause: 10 * time.Millisecond, call: 2 * time.Second, watch: 200 * time.Millisecond}}
	if n.newHost != nil {
		a.host = n.newHost()
	}
	if n.limits != nil {
		a.limits = *n.limits
	}
	a.podResources = n.podResources
	n.agent = a
	creds.OnRefused(a.peerRefused)
	var dead atomic.Bool
	a.client = interceptor.NewClient(n.lab.client, interceptor.Funcs{
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, p client.Patch, opts ...client.SubResourcePatchOption) error {
			if dead.Load() {
				return errAPIDown
			}
			return c.SubResource(sub).Patch(ctx, o, p, opts...)
		},
	})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	server := peer.NewServer(&service{agent: a}, a, creds, log)
	wg.Go(func() {
		if err := server.Serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() { n.drive(ctx, a) })
	var once sync.Once
	n.kill = func() {
		once.Do(func() {
			// What a killed process cannot do any more: its connections end at
			// once, and nothing is finished.
			dead.Store(true)
			l.sever()
			a.devices.sever()
			cancel()
			stop, done := context.WithTimeout(context.Background(), waitLimit)
			defer done()
			if err := a.work.close(stop); err != nil {
				t.Error(err)
			}
			wg.Wait()
		})
	}
	t.Cleanup(n.kill)
}

// trackedListener knows its connections.
type trackedListener struct {
	net.Listener
	mu      sync.Mutex
	severed bool
	conns   []net.Conn
}

func (l *trackedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, c)
	if l.severed {
		c.Close()
	}
	return c, nil
}

// sever closes all connections, and those to come.
func (l *trackedListener) sever() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.severed = true
	for _, c := range l.conns {
		c.Close()
	}
}

// sever closes the connections under everybody's hands.
func (d *devices) sever() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.conns {
		c.conn.Close()
	}
}

// testWriter logs to the test as long as it runs.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Logf("%s", p)
	}
	return len(p), nil
}

func (n *labNode) drive(ctx context.Context, a *agent) {
	tick := time.NewTicker(max(3*time.Millisecond, a.limits.look))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, err := range n.reconcileAll(ctx, a) {
			if ctx.Err() == nil && !errors.Is(err, errAPIDown) {
				a.log.Debug("reconcile", "error", err)
			}
		}
	}
}

func (n *labNode) reconcileAll(ctx context.Context, a *agent) []error {
	var errs []error
	note := func(_ ctrl.Result, err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	note(a.reconcileNode(ctx, ctrl.Request{}))
	seen := map[types.NamespacedName]bool{}
	var pods corev1.PodList
	if err := n.lab.client.List(ctx, &pods); err != nil {
		return append(errs, err)
	}
	for i := range pods.Items {
		if pods.Items[i].Spec.NodeName == n.name {
			seen[client.ObjectKeyFromObject(&pods.Items[i])] = true
		}
	}
	var leases coordinationv1.LeaseList
	if err := n.lab.client.List(ctx, &leases, client.MatchingLabels{labelNode: n.name}); err != nil {
		return append(errs, err)
	}
	for i := range leases.Items {
		for _, r := range podOfLease(ctx, &leases.Items[i]) {
			seen[r.NamespacedName] = true
		}
	}
	for k := range seen {
		note(a.reconcilePod(ctx, ctrl.Request{NamespacedName: k}))
	}
	var migrations v1alpha1.VFMigrationList
	if err := n.lab.client.List(ctx, &migrations); err != nil {
		return append(errs, err)
	}
	for i := range migrations.Items {
		note(a.reconcileMigration(ctx, ctrl.Request{NamespacedName: client.ObjectKeyFromObject(&migrations.Items[i])}))
	}
	return errs
}

func (n *labNode) restart() {
	n.kill()
	n.start()
}

var errAPIDown = errors.New("the API server is away")

func (l *lab) api(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.apiDown = err
}

func (l *lab) create(o client.Object) {
	l.t.Helper()
	if err := l.client.Create(context.Background(), o); err != nil {
		l.t.Fatal(err)
	}
}

// vmi creates the VMI "vm" with one interface with a VF.
func (l *lab) vmi(annotations map[string]string) {
	l.t.Helper()
	v := &virtv1.VirtualMachineInstance{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "vm", UID: "vmi-uid", Annotations: annotations}}
	v.Spec.Domain.Devices.Interfaces = []virtv1.Interface{{Name: interfaceName, MacAddress: mac, Binding: &virtv1.PluginBinding{Name: kubevirt.BindingName}}}
	v.Spec.Networks = []virtv1.Network{{Name: interfaceName, NetworkSource: virtv1.NetworkSource{Multus: &virtv1.MultusNetwork{NetworkName: "fast"}}}}
	l.create(v)
	l.vmiUID = v.UID
}

// pod creates a virt-launcher pod of the VMI, with the given VF.
func (l *lab) pod(name, node, vf, migration string) *corev1.Pod {
	l.t.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(name + "-uid"),
		Labels: map[string]string{kubevirt.LabelApp: kubevirt.AppLauncher, kubevirt.LabelCreatedBy: string(l.vmiUID), kubevirt.LabelVMIName: "vm"},
		Annotations: map[string]string{kubevirt.AnnotationNetworkStatus: fmt.Sprintf(
			`[{"name":"default/fast","interface":"net1","mac":%q,"device-info":{"type":"pci","pci":{"pci-address":%q}}}]`, mac, vf)}},
		Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "compute", Image: "x"}},
			TerminationGracePeriodSeconds: new(int64)}, // there is no kubelet to end it
		Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	if migration != "" {
		p.Labels[kubevirt.LabelMigrationJobUID] = migration
	}
	l.create(p)
	return p
}

func (l *lab) lease(node, vf string) (holder string, epoch int64) {
	l.t.Helper()
	lease := &coordinationv1.Lease{}
	if err := l.client.Get(context.Background(), client.ObjectKey{Namespace: v1alpha1.SystemNamespace, Name: vfLeaseName(node, vf)}, lease); err != nil {
		return "", 0
	}
	return identity(lease), int64(*lease.Spec.LeaseTransitions)
}

// migration is the manager's part of one.
type migration struct {
	*lab
	name string
}

func (l *lab) migrate(name string, from, to *corev1.Pod) *migration {
	l.t.Helper()
	m := &vfMigration{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, UID: types.UID(name + "-uid"), Generation: 1}, Spec: v1alpha1.VFMigrationSpec{VMIName: "vm"}}
	if l.hold > 0 {
		m.Spec.Timeouts.Hold = &metav1.Duration{Duration: l.hold}
	}
	l.create(m)
	x := &migration{l, name}
	x.status(func(m *vfMigration) {
		setTrue(m, v1alpha1.ConditionAccepted, "accepted")
		setUnknown(m, v1alpha1.ConditionSucceeded, v1alpha1.ReasonProgressing, "under way")
		m.Status.Source = &v1alpha1.VFMigrationEndpoint{NodeName: from.Spec.NodeName, PodName: from.Name, PodUID: from.UID}
		m.Status.Target = &v1alpha1.VFMigrationEndpoint{NodeName: to.Spec.NodeName, PodName: to.Name, PodUID: to.UID}
	})
	return x
}

// status changes the migration's status as the manager.
func (x *migration) status(f func(*vfMigration)) {
	x.t.Helper()
	eventually(x.t, "status written", func() bool {
		m := &vfMigration{}
		if err := x.client.Get(context.Background(), client.ObjectKey{Namespace: ns, Name: x.name}, m); err != nil {
			x.t.Fatal(err)
		}
		base := m.DeepCopy()
		f(m)
		return x.client.Status().Patch(context.Background(), m, client.MergeFromWithOptions(base, client.MergeFromWithOptimisticLock{})) == nil
	})
}

func (x *migration) fail(reason, message string) {
	x.t.Helper()
	x.status(func(m *vfMigration) {
		m.Status.Failure = &v1alpha1.VFMigrationFailure{Reason: reason, Message: message, Time: metav1.Now()}
	})
}

func (x *migration) get() *vfMigration {
	x.t.Helper()
	m := &vfMigration{}
	if err := x.client.Get(context.Background(), client.ObjectKey{Namespace: ns, Name: x.name}, m); err != nil && !errors.Is(err, errAPIDown) {
		x.t.Fatal(err)
	}
	return m
}

// expect waits for a condition and returns it.
func (x *migration) expect(typ string, s metav1.ConditionStatus, reason string) metav1.Condition {
	x.t.Helper()
	var got *metav1.Condition
	ctx, cancel := context.WithTimeout(x.t.Context(), waitLimit)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		got = meta.FindStatusCondition(x.get().Status.Conditions, typ)
		if got != nil && got.Status == s && got.Reason == reason {
			return *got
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			x.t.Fatalf("condition %s is %+v, want %s for %s", typ, got, s, reason)
		}
	}
}
