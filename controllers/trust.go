package controllers

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers/authority"
)

const (
	// authorityLifetime is that of an authority that the manager makes, which
	// it renews authorityRenewal before the end.
	authorityLifetime = 365 * 24 * time.Hour
	authorityRenewal  = 30 * 24 * time.Hour
	// certificateLifetime is the longest that an agent's certificate is valid.
	certificateLifetime = 24 * time.Hour
	// trustMargin is how much longer than the last certificate that it signed
	// an authority is trusted.
	trustMargin = time.Hour
	// maxAuthorities bounds how many are trusted; the oldest gives way.
	maxAuthorities = 8
	// authorityRetry is when an authority that cannot be used is looked at again.
	authorityRetry = time.Minute
	// annotationSigns tells from when the first of the trusted authorities
	// signs, RFC 3339: the others are known to all agents by then.
	annotationSigns = "compsc.io/signs-from"
)

// The Secret and the ConfigMap are created by name, which RBAC cannot express.
//
// +kubebuilder:rbac:groups="",namespace=compsc-system,resources=secrets;configmaps,verbs=create
// +kubebuilder:rbac:groups="",namespace=compsc-system,resources=secrets,resourceNames=compsc-ca,verbs=get;list;watch;update
// +kubebuilder:rbac:groups="",namespace=compsc-system,resources=configmaps,resourceNames=compsc-trust,verbs=get;list;watch;update

// TrustReconciler keeps the authority of the agents' certificates, and makes
// known which authorities agents trust. A new authority is made known before it
// signs, an old one is trusted until all that it signed has ended, so that
// agents never refuse each other because one learnt of it later.
type TrustReconciler struct {
	// Client reads the two objects through the cache, and writes.
	Client client.Client
	// Recorder takes the events.
	Recorder events.EventRecorder
	// Clock tells the time.
	Clock clock.PassiveClock
	// Namespace is where the Secret and the ConfigMap are.
	Namespace string
	// Rotate has the manager make and renew the authority. Without it somebody
	// else writes the Secret.
	Rotate bool
	// Overlap is how long a new authority is known before it signs.
	Overlap time.Duration
}

// Reconcile:
//
//  1. reads the authority, and makes a new one if that is missing, useless or
//     near its end;
//  2. writes which authorities are trusted, the one that signs first.
func (r *TrustReconciler) Reconcile(ctx context.Context, _ ctrl.Request) (ctrl.Result, error) {
	now := r.Clock.Now()
	a, err := r.authority(ctx, now)
	if apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	if a == nil {
		return ctrl.Result{RequeueAfter: authorityRetry}, nil
	}
	next, err := r.publish(ctx, a.Certificate(), now)
	if apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	if err != nil {
		return ctrl.Result{}, err
	}
	if renew := r.renewal(a.Certificate()); r.Rotate && renew.Before(next) {
		next = renew
	}
	return ctrl.Result{RequeueAfter: max(next.Sub(now), time.Second)}, nil
}

// renewal is when an authority is renewed.
func (r *TrustReconciler) renewal(c *x509.Certificate) time.Time {
	return c.NotAfter.Add(-authorityRenewal)
}

// authority returns the authority of the Secret, nil if there is none that can
// be used and somebody else is to write it.
func (r *TrustReconciler) authority(ctx context.Context, now time.Time) (*authority.Authority, error) {
	s := &corev1.Secret{}
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: v1alpha1.AuthoritySecret}, s)
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return nil, fmt.Errorf("read Secret %s/%s: %w", r.Namespace, v1alpha1.AuthoritySecret, err)
	}
	why := "there is none"
	if !missing {
		a, err := authority.Parse(s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey])
		switch {
		case err != nil:
			why = err.Error()
		case !a.Certificate().NotAfter.After(now):
			why = fmt.Sprintf("it ended at %s", a.Certificate().NotAfter.UTC().Format(time.RFC3339))
		case r.Rotate && !r.renewal(a.Certificate()).After(now):
			why = fmt.Sprintf("it ends at %s", a.Certificate().NotAfter.UTC().Format(time.RFC3339))
		default:
			return a, nil
		}
	}
	log := ctrl.LoggerFrom(ctx)
	if !r.Rotate {
		log.Info("agents get no certificates: the authority cannot be used", "secret", v1alpha1.AuthoritySecret, "reason", why)
		if !missing {
			r.Recorder.Eventf(s, nil, corev1.EventTypeWarning, "AuthorityUnusable", "SignCertificates", "agents get no certificates: %s", why)
		}
		return nil, nil
	}
	cert, key, err := authority.New(now, authorityLifetime)
	if err != nil {
		return nil, err
	}
	s.Data = map[string][]byte{corev1.TLSCertKey: cert, corev1.TLSPrivateKeyKey: key}
	if missing {
		s.ObjectMeta = metav1.ObjectMeta{Namespace: r.Namespace, Name: v1alpha1.AuthoritySecret, Labels: partOf}
		s.Type = corev1.SecretTypeTLS
		err = r.Client.Create(ctx, s)
	} else {
		err = r.Client.Update(ctx, s)
	}
	if err != nil {
		return nil, fmt.Errorf("write Secret %s/%s: %w", r.Namespace, v1alpha1.AuthoritySecret, err)
	}
	log.Info("new authority of the agents' certificates", "secret", v1alpha1.AuthoritySecret, "because", why)
	r.Recorder.Eventf(s, nil, corev1.EventTypeNormal, "AuthorityRenewed", "SignCertificates", "new authority of the agents' certificates: %s", why)
	return authority.Parse(cert, key)
}

// partOf are the labels of what the manager makes.
var partOf = map[string]string{"app.kubernetes.io/name": "compsc", "app.kubernetes.io/component": "manager"}

// publish writes the trusted authorities, current first, and returns when that
// is to be looked at again.
func (r *TrustReconciler) publish(ctx context.Context, current *x509.Certificate, now time.Time) (time.Time, error) {
	m := &corev1.ConfigMap{}
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: v1alpha1.TrustConfigMap}, m)
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return time.Time{}, fmt.Errorf("read ConfigMap %s/%s: %w", r.Namespace, v1alpha1.TrustConfigMap, err)
	}
	// What is not certificates has been trusted by nobody.
	old, _ := certs.Parse([]byte(m.Data[v1alpha1.TrustKey]))
	signs := signsFrom(m)
	trusted := []*x509.Certificate{current}
	if len(old) == 0 || !old[0].Equal(current) {
		signs = now
		if len(old) > 0 {
			signs = now.Add(r.Overlap)
		}
	}
	// When all has ended that others than current have signed.
	ended := signs.Add(certificateLifetime + trustMargin)
	next := now.Add(24 * time.Hour)
	for _, c := range old {
		if c.Equal(current) || len(trusted) == maxAuthorities || !c.NotAfter.After(now) || !ended.After(now) {
			continue
		}
		trusted = append(trusted, c)
		next = ended
	}
	var text bytes.Buffer
	for _, c := range trusted {
		text.Write(certs.Encode(c.Raw))
	}
	if m.Data[v1alpha1.TrustKey] == text.String() && signsFrom(m).Equal(signs) {
		return next, nil
	}
	m.Data = map[string]string{v1alpha1.TrustKey: text.String()}
	if m.Annotations == nil {
		m.Annotations = map[string]string{}
	}
	m.Annotations[annotationSigns] = signs.UTC().Format(time.RFC3339Nano)
	if missing {
		m.Namespace, m.Name, m.Labels = r.Namespace, v1alpha1.TrustConfigMap, partOf
		err = r.Client.Create(ctx, m)
	} else {
		err = r.Client.Update(ctx, m)
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("write ConfigMap %s/%s: %w", r.Namespace, v1alpha1.TrustConfigMap, err)
	}
	ctrl.LoggerFrom(ctx).Info("agents trust", "authorities", len(trusted), "theNewestSignsFrom", signs)
	return next, nil
}

// signsFrom is when the first of the trusted authorities begins to sign, zero
// if that is not told.
func signsFrom(m *corev1.ConfigMap) time.Time {
	t, err := time.Parse(time.RFC3339Nano, m.Annotations[annotationSigns])
	if err != nil {
		return time.Time{}
	}
	return t
}

// SetupWithManager has Reconcile called at the start, and when one of the two
// objects changes.
func (r *TrustReconciler) SetupWithManager(mgr ctrl.Manager) error {
	request := reconcile.Request{NamespacedName: client.ObjectKey{Namespace: r.Namespace, Name: v1alpha1.AuthoritySecret}}
	one := handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return []reconcile.Request{request}
	})
	only := func(name string) builder.Predicates {
		return builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetName() == name }))
	}
	return ctrl.NewControllerManagedBy(mgr).Named("trust").
		Watches(&corev1.Secret{}, one, only(v1alpha1.AuthoritySecret)).
		Watches(&corev1.ConfigMap{}, one, only(v1alpha1.TrustConfigMap)).
		WatchesRawSource(source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
			q.Add(request)
			return nil
		})).
		Complete(r)
}
