package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/agent/peer"
	"compsc.io/compsc/agent/spiffe"
	"compsc.io/compsc/api/v1alpha1"
)

// +kubebuilder:rbac:groups=certificates.k8s.io,resources=certificatesigningrequests,verbs=create;get
// +kubebuilder:rbac:groups="",namespace=compsc-system,resources=configmaps,resourceNames=compsc-trust,verbs=get;list;watch

const (
	// certificateAnswer bounds how long an answer to a request is waited for;
	// a new authority may not sign for a while.
	certificateAnswer = 10 * time.Minute
	// certificateRetry is when a certificate is asked for again that was refused.
	certificateRetry = 30 * time.Second
	// certificateLook is how often an answer is looked for.
	certificateLook = 250 * time.Millisecond
	// certificateSeconds is the lifetime that is asked for.
	certificateSeconds = 24 * 60 * 60
)

// certifier gets the node's certificate and renews it: it makes a key, which
// never leaves the node, asks for a certificate with a
// CertificateSigningRequest, and writes both, and the authorities that agents
// trust, into the files that Credentials reads. Used by one goroutine.
type certifier struct {
	*agent
	signer string
	files  peer.Files
	now    func() time.Time
	// pending is the request that is not answered yet.
	pending *pendingRequest
}

type pendingRequest struct {
	name  string
	key   *ecdsa.PrivateKey
	since time.Time
}

// reconcile:
//
//  1. writes down the authorities that agents trust;
//  2. looks whether the certificate is there, is of the newest authority, and is
//     not near its end;
//  3. if not, asks for one, and writes it down when it is signed.
func (c *certifier) reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	trusted, err := c.trust(ctx)
	if err != nil {
		return c.trouble(ctx, err)
	}
	why, again := c.need(trusted)
	if why == "" {
		c.pending = nil
		return ctrl.Result{RequeueAfter: again}, nil
	}
	if c.pending == nil {
		if err := c.ask(ctx); err != nil {
			return c.trouble(ctx, err)
		}
		c.log.Info("asking for a certificate", "request", c.pending.name, "because", why)
		return ctrl.Result{RequeueAfter: certificateLook}, nil
	}
	done, err := c.answer(ctx, trusted)
	if err != nil {
		c.pending = nil
		return c.trouble(ctx, err)
	}
	if !done {
		return ctrl.Result{RequeueAfter: certificateLook}, nil
	}
	c.pending = nil
	c.poke()
	_, again = c.need(trusted)
	return ctrl.Result{RequeueAfter: again}, nil
}

// trouble tells why there is no new certificate.
func (c *certifier) trouble(ctx context.Context, err error) (ctrl.Result, error) {
	c.log.Warn("no new certificate", "error", err)
	c.warn(ctx, v1alpha1.ReasonCertificateUnavailable, "RenewCertificate", "no new certificate: "+err.Error())
	return ctrl.Result{RequeueAfter: certificateRetry}, nil
}

// trust writes the trusted authorities into their file, and returns them.
func (c *certifier) trust(ctx context.Context) ([]*x509.Certificate, error) {
	m := &corev1.ConfigMap{}
	key := client.ObjectKey{Namespace: c.namespace, Name: v1alpha1.TrustConfigMap}
	if err := c.client.Get(ctx, key, m); err != nil {
		return nil, fmt.Errorf("which authorities agents trust: ConfigMap %s, which the compsc manager writes: %w", key, err)
	}
	text := []byte(m.Data[v1alpha1.TrustKey])
	trusted, err := certs.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("ConfigMap %s: key %s: %w", key, v1alpha1.TrustKey, err)
	}
	if old, err := os.ReadFile(c.files.CA); err == nil && bytes.Equal(old, text) {
		return trusted, nil
	}
	if err := replaceFile(c.files.CA, text, 0o644); err != nil {
		return nil, err
	}
	c.log.Info("trusted authorities changed", "authorities", len(trusted))
	return trusted, nil
}

// need says in words why a new certificate is needed; it is empty if none is,
// and then it returns when one will be.
func (c *certifier) need(trusted []*x509.Certificate) (string, time.Duration) {
	text, err := os.ReadFile(c.files.Cert)
	if errors.Is(err, os.ErrNotExist) {
		return "there is none", 0
	}
	if err != nil {
		return err.Error(), 0
	}
	list, err := certs.Parse(text)
	if err != nil {
		return c.files.Cert + ": " + err.Error(), 0
	}
	cert := list[0]
	if err := c.creds.Check(c.now()); err != nil {
		return err.Error(), 0
	}
	if cert.CheckSignatureFrom(trusted[0]) != nil {
		return "the authority is new", 0
	}
	// Two thirds through, so that there is time for somebody to help.
	renew := cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) * 2 / 3)
	if left := renew.Sub(c.now()); left > 0 {
		return "", left
	}
	return "the present one ends at " + cert.NotAfter.UTC().Format(time.RFC3339), 0
}

// ask makes a key and asks for its certificate.
func (c *certifier) ask(ctx context.Context) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "compsc-agent"}, URIs: []*url.URL{spiffe.NodeURI(c.node)},
	}, key)
	if err != nil {
		return fmt.Errorf("certificate request: %w", err)
	}
	seconds := int32(certificateSeconds)
	r := &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "compsc-agent-" + c.node + "-", Labels: map[string]string{labelNode: c.node}},
		Spec: certificatesv1.CertificateSigningRequestSpec{
			Request:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			SignerName: c.signer, ExpirationSeconds: &seconds,
			Usages: []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth},
		},
	}
	if err := c.client.Create(ctx, r); err != nil {
		return fmt.Errorf("CertificateSigningRequest: %w", err)
	}
	c.pending = &pendingRequest{name: r.Name, key: key, since: c.now()}
	return nil
}

// answer writes the key and the certificate down if that has been signed. An
// error means that it will not be.
func (c *certifier) answer(ctx context.Context, trusted []*x509.Certificate) (bool, error) {
	r := &certificatesv1.CertificateSigningRequest{}
	err := c.live.Get(ctx, client.ObjectKey{Name: c.pending.name}, r)
	waited := c.now().Sub(c.pending.since)
	if err != nil && !apierrors.IsNotFound(err) && waited < certificateAnswer {
		c.log.Warn("looking for the certificate", "request", c.pending.name, "error", err)
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("CertificateSigningRequest %s: %w", c.pending.name, err)
	}
	for _, cond := range r.Status.Conditions {
		if cond.Type == certificatesv1.CertificateDenied || cond.Type == certificatesv1.CertificateFailed {
			return false, fmt.Errorf("CertificateSigningRequest %s is %s (%s): %s", r.Name, cond.Type, cond.Reason, cut(cond.Message, maxMessage))
		}
	}
	if len(r.Status.Certificate) == 0 {
		if waited >= certificateAnswer {
			return false, fmt.Errorf("CertificateSigningRequest %s is not signed after %s; see the compsc manager's log", r.Name, waited.Round(time.Second))
		}
		return false, nil
	}
	if err := c.fits(r.Status.Certificate, trusted); err != nil {
		return false, fmt.Errorf("CertificateSigningRequest %s: %w", r.Name, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(c.pending.key)
	if err != nil {
		return false, fmt.Errorf("key: %w", err)
	}
	// Whoever reads between the two keeps what he had.
	if err := replaceFile(c.files.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return false, err
	}
	if err := replaceFile(c.files.Cert, r.Status.Certificate, 0o644); err != nil {
		return false, err
	}
	if err := c.creds.Check(c.now()); err != nil {
		return false, err
	}
	c.log.Info("new certificate", "request", r.Name)
	return true, nil
}

// fits refuses a certificate that others would refuse.
func (c *certifier) fits(text []byte, trusted []*x509.Certificate) error {
	list, err := certs.Parse(text)
	if err != nil {
		return fmt.Errorf("its certificate: %w", err)
	}
	cert := list[0]
	if !c.pending.key.PublicKey.Equal(cert.PublicKey) {
		return errors.New("its certificate is for another key")
	}
	if node, err := spiffe.NodeOf(cert); err != nil || node != c.node {
		return fmt.Errorf("its certificate is for node %q: %w", node, err)
	}
	if !slices.ContainsFunc(trusted, func(a *x509.Certificate) bool { return cert.CheckSignatureFrom(a) == nil }) {
		return errors.New("its certificate is from an authority that agents do not trust")
	}
	return nil
}

// start has reconcile called once, whether or not there is anything to see.
func (c *certifier) start(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
	q.Add(reconcile.Request{})
	return nil
}

// replaceFile writes a file as a whole.
func replaceFile(path string, text []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // in vain when all went well
	_, err = f.Write(text)
	if err := errors.Join(err, f.Chmod(mode), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(f.Name(), path)
}
