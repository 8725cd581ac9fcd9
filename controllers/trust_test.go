package controllers

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"net/url"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	clocktesting "k8s.io/utils/clock/testing"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/agent/spiffe"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers/authority"
)

// pkiBench is a cluster of nothing but certificates.
type pkiBench struct {
	t      *testing.T
	client client.Client
	clock  *clocktesting.FakePassiveClock
	events *events.FakeRecorder
	trust  *TrustReconciler
	signer *CertificateReconciler
}

func newPKIBench(t *testing.T) *pkiBench {
	t.Helper()
	scheme, err := newScheme()
	must(t, err)
	b := &pkiBench{t: t, clock: clocktesting.NewFakePassiveClock(t0), events: events.NewFakeRecorder(100)}
	b.client = fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(&certificatesv1.CertificateSigningRequest{}).Build()
	b.trust = &TrustReconciler{Client: b.client, Recorder: b.events, Clock: b.clock, Namespace: systemNamespace, Rotate: true, Overlap: time.Minute}
	b.signer = &CertificateReconciler{Client: b.client, Clock: b.clock, Namespace: systemNamespace}
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// settle reconciles the authority as a manager would now.
func (b *pkiBench) settle() ctrl.Result {
	b.t.Helper()
	r, err := b.trust.Reconcile(b.t.Context(), ctrl.Request{})
	must(b.t, err)
	return r
}

func (b *pkiBench) pass(d time.Duration) { b.clock.SetTime(b.clock.Now().Add(d)) }

func (b *pkiBench) trusted() []*x509.Certificate {
	b.t.Helper()
	m := &corev1.ConfigMap{}
	must(b.t, b.client.Get(b.t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: v1alpha1.TrustConfigMap}, m))
	parsed, err := certs.Parse([]byte(m.Data[v1alpha1.TrustKey]))
	must(b.t, err)
	return parsed
}

func (b *pkiBench) secret() *corev1.Secret {
	b.t.Helper()
	s := &corev1.Secret{}
	must(b.t, b.client.Get(b.t.Context(), client.ObjectKey{Namespace: systemNamespace, Name: v1alpha1.AuthoritySecret}, s))
	return s
}

// ask makes a request, reconciles it, and returns it and when that is to be
// repeated.
func (b *pkiBench) ask(name string, change func(*certificatesv1.CertificateSigningRequest)) (*certificatesv1.CertificateSigningRequest, time.Duration) {
	b.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(b.t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{spiffe.NodeURI("n1")}}, key)
	must(b.t, err)
	r := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			SignerName: v1alpha1.CertificateSigner, Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			Usages:   []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth},
			Username: "system:serviceaccount:" + systemNamespace + ":compsc-agent",
			Extra:    map[string]certificatesv1.ExtraValue{claimNode: {"n1"}},
		},
	}
	if change != nil {
		change(r)
	}
	must(b.t, b.client.Create(b.t.Context(), r))
	return r, b.again(r)
}

// again reconciles a request until nothing changes.
func (b *pkiBench) again(r *certificatesv1.CertificateSigningRequest) time.Duration {
	b.t.Helper()
	for {
		res, err := b.signer.Reconcile(b.t.Context(), ctrl.Request{NamespacedName: client.ObjectKeyFromObject(r)})
		must(b.t, err)
		version := r.ResourceVersion
		must(b.t, b.client.Get(b.t.Context(), client.ObjectKeyFromObject(r), r))
		if r.ResourceVersion == version {
			return res.RequeueAfter
		}
	}
}

// issuer is which of the trusted authorities signed the request's certificate.
func (b *pkiBench) issuer(r *certificatesv1.CertificateSigningRequest) int {
	b.t.Helper()
	parsed, err := certs.Parse(r.Status.Certificate)
	if err != nil {
		b.t.Fatalf("%s is not signed: %+v", r.Name, r.Status)
	}
	for i, a := range b.trusted() {
		if parsed[0].CheckSignatureFrom(a) == nil {
			return i
		}
	}
	return -1
}

// TestAuthorityRotates: at every moment, what was signed is trusted, and nothing
// is signed by an authority that is not known for a while.
func TestAuthorityRotates(t *testing.T) {
	b := newPKIBench(t)
	next := b.settle().RequeueAfter
	first := b.trusted()
	if len(first) != 1 || next <= 0 || next > 24*time.Hour {
		t.Fatalf("%d authorities, next look after %s", len(first), next)
	}
	r, _ := b.ask("one", nil)
	if i := b.issuer(r); i != 0 {
		t.Fatalf("signed by authority %d", i)
	}
	// Nothing changes for eleven months.
	version := b.secret().ResourceVersion
	b.pass(authorityLifetime - authorityRenewal - time.Hour)
	b.settle()
	if b.secret().ResourceVersion != version {
		t.Error("the authority was renewed too early")
	}
	b.pass(time.Hour)
	b.settle()
	both := b.trusted()
	if len(both) != 2 || both[0].Equal(first[0]) || !both[1].Equal(first[0]) {
		t.Fatalf("%d authorities are trusted, want the new one before the old one", len(both))
	}
	r, wait := b.ask("two", nil)
	if len(r.Status.Certificate) > 0 || wait != time.Minute {
		t.Errorf("signed before the new authority is known: %v; next look after %s, want the overlap", len(r.Status.Certificate) > 0, wait)
	}
	b.pass(time.Minute)
	b.again(r)
	if i := b.issuer(r); i != 0 {
		t.Errorf("signed by authority %d, want the new one", i)
	}
	// The old one is trusted until the last that it signed has ended.
	b.settle()
	b.pass(certificateLifetime)
	b.settle()
	if n := len(b.trusted()); n != 2 {
		t.Errorf("%d authorities are trusted a day later, want both", n)
	}
	b.pass(trustMargin)
	b.settle()
	if now := b.trusted(); len(now) != 1 || !now[0].Equal(both[0]) {
		t.Errorf("%d authorities are trusted at last, want the new one", len(now))
	}
}

// TestAuthorityIsMadeAnew: one that is useless is replaced, unless it is
// somebody else's.
func TestAuthorityIsMadeAnew(t *testing.T) {
	for name, spoil := range map[string]func(b *pkiBench){
		"lost": func(b *pkiBench) { must(t, b.client.Delete(t.Context(), b.secret())) },
		"no key": func(b *pkiBench) {
			s := b.secret()
			delete(s.Data, "tls.key")
			must(t, b.client.Update(t.Context(), s))
		},
		"ended": func(b *pkiBench) { b.pass(2 * authorityLifetime) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newPKIBench(t)
			b.settle()
			old := b.trusted()[0]
			spoil(b)
			b.settle()
			if b.trusted()[0].Equal(old) {
				t.Error("the old authority signs")
			}
			b.pass(time.Minute)
			if r, _ := b.ask("one", nil); b.issuer(r) != 0 {
				t.Error("the new authority does not sign")
			}

			b = newPKIBench(t)
			b.settle()
			old = b.trusted()[0]
			b.trust.Rotate = false
			spoil(b)
			if r := b.settle(); r.RequeueAfter != authorityRetry {
				t.Errorf("next look after %s", r.RequeueAfter)
			}
			if !b.trusted()[0].Equal(old) {
				t.Error("it was replaced, though it is somebody else's")
			}
			if r, _ := b.ask("two", nil); len(r.Status.Certificate) > 0 {
				t.Error("a useless authority signs")
			}
		})
	}
}

// TestSomebodyElsesAuthority: one that cert-manager has replaced takes over as
// the manager's own does.
func TestSomebodyElsesAuthority(t *testing.T) {
	b := newPKIBench(t)
	b.trust.Rotate = false
	b.settle() // nothing there
	write := func(name string) {
		cert, key, err := authority.New(b.clock.Now(), authorityLifetime)
		must(t, err)
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: v1alpha1.AuthoritySecret}}
		if name == "new" {
			s = b.secret()
		}
		s.Data = map[string][]byte{"tls.crt": cert, "tls.key": key}
		if name == "new" {
			must(t, b.client.Update(t.Context(), s))
		} else {
			must(t, b.client.Create(t.Context(), s))
		}
	}
	write("first")
	b.settle()
	if r, _ := b.ask("one", nil); b.issuer(r) != 0 {
		t.Error("not signed")
	}
	old := b.trusted()[0]
	write("new")
	if r, wait := b.ask("two", nil); len(r.Status.Certificate) > 0 || wait != time.Second {
		t.Errorf("an authority signs that nobody knows: %v, %s", len(r.Status.Certificate) > 0, wait)
	}
	b.settle()
	if now := b.trusted(); len(now) != 2 || !now[1].Equal(old) {
		t.Errorf("%d are trusted", len(now))
	}
}

// TestDenials: whatever does not prove to be the node's agent is denied.
func TestDenials(t *testing.T) {
	b := newPKIBench(t)
	b.settle()
	for name, test := range map[string]struct {
		change func(*certificatesv1.CertificateSigningRequest)
		says   string
	}{
		"another-user":  {func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Username = "system:admin" }, "is not an agent"},
		"other-account": {func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Username += "s" }, "is not an agent"},
		"no-node":       {func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Extra = nil }, "not bound to a pod on a node"},
		"two-nodes": {func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Extra[claimNode] = certificatesv1.ExtraValue{"n1", "n2"}
		}, "not bound"},
		"another-node": {func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Extra[claimNode] = certificatesv1.ExtraValue{"n2"}
		}, "for the agent of node n1, and comes from node n2"},
		"another-usage": {func(r *certificatesv1.CertificateSigningRequest) {
			r.Spec.Usages = append(r.Spec.Usages, certificatesv1.UsageCertSign)
		}, `not for "cert sign"`},
		"not-a-request":  {func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Request = []byte("x") }, "not one PEM block"},
		"human-approved": {func(r *certificatesv1.CertificateSigningRequest) { r.Spec.Extra = nil; r.Status.Conditions = approved }, "not bound"},
	} {
		r, _ := b.ask(name, test.change)
		last := certificatesv1.CertificateSigningRequestCondition{}
		if n := len(r.Status.Conditions); n > 0 {
			last = r.Status.Conditions[n-1]
		}
		if len(r.Status.Certificate) > 0 || last.Type != certificatesv1.CertificateDenied || !strings.Contains(last.Message, test.says) {
			t.Errorf("%s: got %+v, want a denial that says %q", name, r.Status, test.says)
		}
	}
	other, _ := b.ask("other-signer", func(r *certificatesv1.CertificateSigningRequest) {
		r.Spec.SignerName = "example.com/x"
		r.Spec.Username = "u"
	})
	if len(other.Status.Conditions) > 0 {
		t.Errorf("it touched a request for another signer: %+v", other.Status)
	}
	denied, _ := b.ask("denied", func(r *certificatesv1.CertificateSigningRequest) {
		r.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateDenied, Status: corev1.ConditionTrue}}
	})
	must(t, b.client.Status().Update(t.Context(), denied))
	b.again(denied)
	if len(denied.Status.Certificate) > 0 {
		t.Error("it signed what somebody denied")
	}
	short, _ := b.ask("short", func(r *certificatesv1.CertificateSigningRequest) { r.Spec.ExpirationSeconds = new(int32(600)) })
	parsed, err := certs.Parse(short.Status.Certificate)
	must(t, err)
	if want := t0.Add(10 * time.Minute); !parsed[0].NotAfter.Equal(want) {
		t.Errorf("it ends at %s, want %s", parsed[0].NotAfter, want)
	}
}

var approved = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue}}
