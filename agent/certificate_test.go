package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/spiffe"
	"compsc.io/compsc/api/v1alpha1"
)

// certBench is a certifier of node a, without files yet, at a time of its own,
// and the authority that the test plays.
type certBench struct {
	*lab
	c      *certifier
	events *events.FakeRecorder
	at     time.Time
}

func newCertBench(t *testing.T) *certBench {
	t.Helper()
	l := newLab(t)
	dir := t.TempDir()
	b := &certBench{lab: l, events: events.NewFakeRecorder(100), at: time.Now()}
	files := peer.Files{Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), CA: filepath.Join(dir, "ca.crt")}
	b.c = &certifier{signer: v1alpha1.CertificateSigner, files: files, now: func() time.Time { return b.at },
		agent: &agent{node: "a", namespace: v1alpha1.SystemNamespace, client: l.client, live: l.client, events: b.events,
			creds: peer.AwaitCredentials("a", files), pokes: make(chan event.GenericEvent, 1),
			log: slog.New(slog.NewTextHandler(testWriter{t}, nil)), limits: defaultLimits}}
	return b
}

// trusts writes down which authorities agents trust, the newest first.
func (b *certBench) trusts(text string) {
	b.t.Helper()
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: v1alpha1.SystemNamespace, Name: v1alpha1.TrustConfigMap}, Data: map[string]string{v1alpha1.TrustKey: text}}
	err := b.client.Create(b.t.Context(), m)
	if err != nil {
		err = b.client.Update(b.t.Context(), m)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

func certPEM(certs ...*x509.Certificate) string {
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return string(text)
}

// replaceAuthority makes another authority, which nobody knows yet.
func (b *certBench) replaceAuthority() {
	b.t.Helper()
	b.caKey = newKey(b.t)
	b.ca = b.sign(&x509.Certificate{SerialNumber: big.NewInt(9), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		Subject: pkix.Name{CommonName: "another CA"}, NotBefore: b.at.Add(-time.Hour), NotAfter: b.at.Add(time.Hour)}, nil, b.caKey)
}

// step reconciles once and returns when it asks to be called again.
func (b *certBench) step() time.Duration {
	b.t.Helper()
	r, err := b.c.reconcile(b.t.Context(), ctrl.Request{})
	if err != nil {
		b.t.Fatal(err)
	}
	return r.RequeueAfter
}

// asked is the one request that was not there before.
func (b *certBench) asked() *certificatesv1.CertificateSigningRequest {
	b.t.Helper()
	if b.c.pending == nil {
		b.t.Fatal("it asks for nothing")
	}
	r := &certificatesv1.CertificateSigningRequest{}
	if err := b.client.Get(b.t.Context(), client.ObjectKey{Name: b.c.pending.name}, r); err != nil {
		b.t.Fatal(err)
	}
	return r
}

// answers writes an answer to a request.
func (b *certBench) answers(r *certificatesv1.CertificateSigningRequest) {
	b.t.Helper()
	if err := b.client.Status().Update(b.t.Context(), r); err != nil {
		b.t.Fatal(err)
	}
}

// issue is a certificate of the bench's authority.
func (b *certBench) issue(node string, key any, lifetime time.Duration) *x509.Certificate {
	b.t.Helper()
	public, ok := key.(*ecdsa.PublicKey)
	if !ok {
		b.t.Fatalf("a key of type %T", key)
	}
	return b.sign(&x509.Certificate{SerialNumber: big.NewInt(b.at.UnixNano()), URIs: []*url.URL{spiffe.NodeURI(node)}, NotBefore: b.at, NotAfter: b.at.Add(lifetime),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, b.ca, &ecdsa.PrivateKey{PublicKey: *public})
}

// signs signs the request as the manager does.
func (b *certBench) signs(r *certificatesv1.CertificateSigningRequest, lifetime time.Duration) {
	b.t.Helper()
	block, _ := pem.Decode(r.Spec.Request)
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		b.t.Fatal(err)
	}
	if len(req.URIs) != 1 {
		b.t.Fatalf("it asks for %v", req.URIs)
	}
	r.Status.Certificate = []byte(certPEM(b.issue(strings.TrimPrefix(req.URIs[0].Path, "/node/"), req.PublicKey, lifetime)))
	b.answers(r)
}

// troubled fails unless the certifier told in an event that says the text.
func (b *certBench) troubled(says string) {
	b.t.Helper()
	select {
	case e := <-b.events.Events:
		if !strings.Contains(e, v1alpha1.ReasonCertificateUnavailable) || !strings.Contains(e, says) {
			b.t.Errorf("the event is %q, want %q", e, says)
		}
	default:
		b.t.Errorf("no event, want one that says %q", says)
	}
}

// TestCertificate: the agent asks for its certificate, takes it, and asks again
// when two thirds of its life are over, keeping the old one meanwhile.
func TestCertificate(t *testing.T) {
	b := newCertBench(t)
	if again := b.step(); again != certificateRetry {
		t.Errorf("without a trusted authority it comes again in %s, want %s", again, certificateRetry)
	}
	b.troubled("which the compsc manager writes")
	if b.c.pending != nil {
		t.Fatal("it asks before there is an authority")
	}

	b.trusts(certPEM(b.ca))
	if again := b.step(); again != certificateLook {
		t.Errorf("it looks for an answer in %s, want %s", again, certificateLook)
	}
	r := b.asked()
	if r.Spec.SignerName != v1alpha1.CertificateSigner || r.Labels[labelNode] != "a" || len(r.Spec.Usages) != 3 || *r.Spec.ExpirationSeconds != certificateSeconds {
		t.Errorf("it asks for %+v", r.Spec)
	}
	if got, err := os.ReadFile(b.c.files.CA); err != nil || string(got) != certPEM(b.ca) {
		t.Errorf("the trusted authorities are %q, %v", got, err)
	}
	b.step()
	if b.asked().Name != r.Name || b.c.creds.Check(b.at) == nil {
		t.Error("it has a certificate, or asked again, before the answer")
	}

	b.signs(r, time.Hour)
	if again := b.step(); again < 39*time.Minute || again > 40*time.Minute {
		t.Errorf("it comes again in %s, want after two thirds of an hour", again)
	}
	if err := b.c.creds.Check(b.at); err != nil {
		t.Error(err)
	}
	info, err := os.Stat(b.c.files.Key)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v, want that only its owner reads it", info, err)
	}
	select {
	case <-b.c.pokes:
	default:
		t.Error("the VFNode is not brought up to date")
	}
	if b.step(); b.c.pending != nil {
		t.Error("it asks again at once")
	}

	b.at = b.at.Add(41 * time.Minute)
	b.step()
	second := b.asked()
	if second.Name == r.Name {
		t.Error("it asks with the old request")
	}
	if err := b.c.creds.Check(b.at); err != nil {
		t.Errorf("the old certificate is gone: %v", err)
	}
	old, err := os.ReadFile(b.c.files.Cert)
	if err != nil {
		t.Fatal(err)
	}
	b.signs(second, time.Hour)
	b.step()
	if now, err := os.ReadFile(b.c.files.Cert); err != nil || string(now) == string(old) {
		t.Errorf("the certificate is the old one, %v", err)
	}
	if n := len(b.events.Events); n != 0 {
		t.Errorf("%d more events", n)
	}
}

// TestCertificateOfNewAuthority: a new authority has the certificate renewed,
// while the old authority goes on being trusted.
func TestCertificateOfNewAuthority(t *testing.T) {
	b := newCertBench(t)
	b.trusts(certPEM(b.ca))
	b.step()
	b.signs(b.asked(), time.Hour)
	b.step()
	old := b.ca
	b.replaceAuthority()
	b.trusts(certPEM(b.ca, old))
	b.step()
	r := b.asked()
	if err := b.c.creds.Check(b.at); err != nil {
		t.Errorf("meanwhile: %v", err)
	}
	b.signs(r, time.Hour)
	if b.step(); b.c.pending != nil {
		t.Error("it still asks")
	}
	if why, _ := b.c.need([]*x509.Certificate{b.ca}); why != "" {
		t.Errorf("it needs another one: %s", why)
	}
}

// TestCertificateRefused: what is not a certificate of this node and key by a
// trusted authority is not taken; the agent says so and asks again.
func TestCertificateRefused(t *testing.T) {
	denied := func(kind certificatesv1.RequestConditionType) func(*certBench, *certificatesv1.CertificateSigningRequest) {
		return func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			r.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: kind, Status: corev1.ConditionTrue, Reason: "Because", Message: "for a test"}}
			b.answers(r)
		}
	}
	for name, test := range map[string]struct {
		answer func(*certBench, *certificatesv1.CertificateSigningRequest)
		says   string
	}{
		"denied": {denied(certificatesv1.CertificateDenied), "is Denied (Because): for a test"},
		"failed": {denied(certificatesv1.CertificateFailed), "is Failed (Because): for a test"},
		"gone": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			if err := b.client.Delete(b.t.Context(), r); err != nil {
				b.t.Fatal(err)
			}
		}, "not found"},
		"late": {func(b *certBench, _ *certificatesv1.CertificateSigningRequest) {
			b.at = b.at.Add(certificateAnswer)
		}, "is not signed after 10m0s"},
		"not PEM": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			r.Status.Certificate = []byte("x")
			b.answers(r)
		}, "not a sequence of PEM"},
		"not a certificate": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			r.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})
			b.answers(r)
		}, "its certificate: x509"},
		"another key": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			r.Status.Certificate = []byte(certPEM(b.issue("a", &newKey(b.t).PublicKey, time.Hour)))
			b.answers(r)
		}, "for another key"},
		"another node": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			r.Status.Certificate = []byte(certPEM(b.issue("b", b.c.pending.key.Public(), time.Hour)))
			b.answers(r)
		}, `for node "b"`},
		"untrusted": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			b.replaceAuthority()
			b.signs(r, time.Hour)
		}, "do not trust"},
		"expired": {func(b *certBench, r *certificatesv1.CertificateSigningRequest) {
			b.signs(r, time.Minute)
			b.at = b.at.Add(2 * time.Minute)
		}, "is valid from"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newCertBench(t)
			b.trusts(certPEM(b.ca))
			b.step()
			first := b.asked()
			test.answer(b, first)
			if again := b.step(); again != certificateRetry {
				t.Errorf("it comes again in %s, want %s", again, certificateRetry)
			}
			b.troubled(test.says)
			if b.c.creds.Check(b.at) == nil {
				t.Error("it has a certificate")
			}
			b.step()
			if second := b.asked(); second.Name == first.Name {
				t.Error("it asks with the old request")
			}
		})
	}
}

// TestCertificateWaits: while the API server does not answer, the request is
// kept.
func TestCertificateWaits(t *testing.T) {
	b := newCertBench(t)
	b.trusts(certPEM(b.ca))
	b.step()
	r := b.asked()
	b.signs(r, time.Hour)
	live := b.c.live
	b.c.live = deafReader{live}
	if again := b.step(); again != certificateLook || b.c.pending == nil || b.c.pending.name != r.Name {
		t.Errorf("it comes again in %s and waits for %+v", again, b.c.pending)
	}
	b.c.live = live
	b.step()
	if err := b.c.creds.Check(b.at); err != nil {
		t.Error(err)
	}
}

// deafReader is an API server that does not answer.
type deafReader struct{ client.Reader }

func (deafReader) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("no answer")
}

// TestTrustUnreadable: what is not a list of certificates is not taken as the
// authorities to trust; those known before are kept.
func TestTrustUnreadable(t *testing.T) {
	b := newCertBench(t)
	b.trusts(certPEM(b.ca))
	b.step()
	for text, says := range map[string]string{
		"":                     "holds no certificate",
		"x":                    "not a sequence of PEM certificates",
		certPEM(b.ca) + "rest": "not a sequence of PEM certificates",
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})): "x509",
	} {
		b.trusts(text)
		if again := b.step(); again != certificateRetry {
			t.Errorf("%q: it comes again in %s", text, again)
		}
		b.troubled(says)
		if got, err := os.ReadFile(b.c.files.CA); err != nil || string(got) != certPEM(b.ca) {
			t.Errorf("%q: the trusted authorities are now %q, %v", text, got, err)
		}
	}
}

// TestNeed: a certificate that cannot be used is replaced.
func TestNeed(t *testing.T) {
	b := newCertBench(t)
	b.trusts(certPEM(b.ca))
	b.step()
	b.signs(b.asked(), time.Hour)
	b.step()
	good, err := os.ReadFile(b.c.files.Cert)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, text, why string
		after           time.Duration
	}{
		{"good", string(good), "", 0},
		{"not PEM", "x", "sequence of PEM", 0},
		{"not a certificate", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})), "x509", 0},
		{"at its end", string(good), "ends at", 45 * time.Minute},
		{"over", string(good), "is valid from", 2 * time.Hour},
	} {
		if err := os.WriteFile(b.c.files.Cert, []byte(test.text), 0o600); err != nil {
			t.Fatal(err)
		}
		b.c.now = func() time.Time { return b.at.Add(test.after) }
		if why, again := b.c.need([]*x509.Certificate{b.ca}); (test.why == "") != (why == "") || !strings.Contains(why, test.why) || (why == "") != (again > 0) {
			t.Errorf("%s: %q in %s, want %q", test.name, why, again, test.why)
		}
	}
	if err := os.Remove(b.c.files.Cert); err != nil {
		t.Fatal(err)
	}
	if why, _ := b.c.need([]*x509.Certificate{b.ca}); why != "there is none" {
		t.Errorf("without a file: %q", why)
	}
}
