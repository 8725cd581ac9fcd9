package controllers

import (
	"context"
	"fmt"
	"slices"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"compsc.io/compsc/agent/certs"
	"compsc.io/compsc/api/v1alpha1"
	"compsc.io/compsc/controllers/authority"
)

// claimNode is where the API server tells on which node the pod runs that the
// requester's token is bound to (Kubernetes 1.32 and newer).
const claimNode = "authentication.kubernetes.io/node-name"

// +kubebuilder:rbac:groups=certificates.k8s.io,resources=certificatesigningrequests,verbs=get;list;watch
// +kubebuilder:rbac:groups=certificates.k8s.io,resources=certificatesigningrequests/approval;certificatesigningrequests/status,verbs=update
// +kubebuilder:rbac:groups=certificates.k8s.io,resources=signers,resourceNames=compsc.io/agent,verbs=approve;sign

// CertificateReconciler is the signer compsc.io/agent: it approves and signs
// what an agent asks for in the name of the node that it runs on, and denies
// everything else. It never makes a key: agents' keys stay on their nodes.
type CertificateReconciler struct {
	// Client reads through the cache, and writes.
	Client client.Client
	// Clock tells the time.
	Clock clock.PassiveClock
	// Namespace is that of the agents, of the Secret and of the ConfigMap.
	Namespace string
}

// Reconcile:
//
//  1. leaves alone what is not for this signer, is denied, failed or signed;
//  2. denies what does not prove to come from the node that it names;
//  3. approves the rest, and signs it once the authority may sign.
func (r *CertificateReconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	c := &certificatesv1.CertificateSigningRequest{}
	if err := r.Client.Get(ctx, req.NamespacedName, c); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if c.Spec.SignerName != v1alpha1.CertificateSigner || len(c.Status.Certificate) > 0 ||
		is(c, certificatesv1.CertificateDenied) || is(c, certificatesv1.CertificateFailed) {
		return ctrl.Result{}, nil
	}
	log := ctrl.LoggerFrom(ctx).WithValues("request", c.Name, "user", c.Spec.Username)
	node, err := r.judge(c)
	if err != nil {
		log.Info("certificate denied", "reason", err.Error())
		return r.decide(ctx, c, certificatesv1.CertificateDenied, "NotThatNodesAgent", err.Error())
	}
	if !is(c, certificatesv1.CertificateApproved) {
		return r.decide(ctx, c, certificatesv1.CertificateApproved, "NodesAgent",
			fmt.Sprintf("the token of the requester is bound to pod %s on node %s", claim(c, "authentication.kubernetes.io/pod-name"), node))
	}
	a, wait, err := r.authority(ctx)
	if err != nil || wait > 0 {
		return ctrl.Result{RequeueAfter: wait}, err
	}
	parsed, err := authority.ParseRequest(c.Spec.Request, node)
	if err != nil {
		return ctrl.Result{}, err
	}
	lifetime := certificateLifetime
	if s := c.Spec.ExpirationSeconds; s != nil {
		lifetime = min(lifetime, time.Duration(*s)*time.Second)
	}
	now := r.Clock.Now()
	if c.Status.Certificate, err = a.Sign(parsed, node, now, lifetime); err != nil {
		return ctrl.Result{}, err
	}
	if err := r.Client.Status().Update(ctx, c); err != nil {
		return again(fmt.Errorf("write CertificateSigningRequest %s: %w", c.Name, err))
	}
	log.Info("certificate signed", "node", node, "until", now.Add(lifetime))
	return ctrl.Result{}, nil
}

// judge returns the node whose agent asks, or why the request is denied.
func (r *CertificateReconciler) judge(c *certificatesv1.CertificateSigningRequest) (string, error) {
	agents := "system:serviceaccount:" + r.Namespace + ":" + v1alpha1.AgentServiceAccount
	if c.Spec.Username != agents {
		return "", fmt.Errorf("user %s is not an agent, which are %s", c.Spec.Username, agents)
	}
	node := claim(c, claimNode)
	if node == "" {
		return "", fmt.Errorf("the requester's token is not bound to a pod on a node (user info has no single %s)", claimNode)
	}
	for _, u := range c.Spec.Usages {
		if !slices.Contains([]certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth, certificatesv1.UsageServerAuth}, u) {
			return "", fmt.Errorf("an agent's certificate is not for %q", u)
		}
	}
	if _, err := authority.ParseRequest(c.Spec.Request, node); err != nil {
		return "", err
	}
	return node, nil
}

// claim is the one value that the API server tells of the requester, or empty.
func claim(c *certificatesv1.CertificateSigningRequest, key string) string {
	if v := c.Spec.Extra[key]; len(v) == 1 {
		return v[0]
	}
	return ""
}

// authority returns what signs now, or how long to wait until it is asked again.
func (r *CertificateReconciler) authority(ctx context.Context) (*authority.Authority, time.Duration, error) {
	s, m := &corev1.Secret{}, &corev1.ConfigMap{}
	for name, o := range map[string]client.Object{v1alpha1.AuthoritySecret: s, v1alpha1.TrustConfigMap: m} {
		err := r.Client.Get(ctx, client.ObjectKey{Namespace: r.Namespace, Name: name}, o)
		if apierrors.IsNotFound(err) {
			return nil, time.Second, nil // it is being made
		}
		if err != nil {
			return nil, 0, fmt.Errorf("read %s: %w", name, err)
		}
	}
	a, err := authority.Parse(s.Data[corev1.TLSCertKey], s.Data[corev1.TLSPrivateKeyKey])
	if err != nil || !a.Certificate().NotAfter.After(r.Clock.Now()) {
		return nil, authorityRetry, nil // TrustReconciler has told
	}
	trusted, err := certs.Parse([]byte(m.Data[v1alpha1.TrustKey]))
	if err != nil || !trusted[0].Equal(a.Certificate()) {
		return nil, time.Second, nil // it is being made known
	}
	if wait := signsFrom(m).Sub(r.Clock.Now()); wait > 0 {
		return nil, wait, nil
	}
	return a, 0, nil
}

// decide writes an approval or denial.
func (r *CertificateReconciler) decide(ctx context.Context, c *certificatesv1.CertificateSigningRequest, t certificatesv1.RequestConditionType, reason, message string) (ctrl.Result, error) {
	c.Status.Conditions = append(c.Status.Conditions, certificatesv1.CertificateSigningRequestCondition{
		Type: t, Status: corev1.ConditionTrue, Reason: reason, Message: message,
	})
	if err := r.Client.SubResource("approval").Update(ctx, c); err != nil {
		return again(fmt.Errorf("write CertificateSigningRequest %s: %w", c.Name, err))
	}
	return ctrl.Result{}, nil
}

// again has a reconcile that lost against another writer repeated.
func again(err error) (ctrl.Result, error) {
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return ctrl.Result{RequeueAfter: conflictRetry}, nil
	}
	return ctrl.Result{}, err
}

func is(c *certificatesv1.CertificateSigningRequest, t certificatesv1.RequestConditionType) bool {
	return slices.ContainsFunc(c.Status.Conditions, func(x certificatesv1.CertificateSigningRequestCondition) bool { return x.Type == t })
}

// SetupWithManager has Reconcile called for the requests to this signer, and
// for all of them when what signs changes.
func (r *CertificateReconciler) SetupWithManager(mgr ctrl.Manager) error {
	all := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
		var list certificatesv1.CertificateSigningRequestList
		if err := r.Client.List(ctx, &list); err != nil {
			ctrl.LoggerFrom(ctx).Error(err, "list CertificateSigningRequests")
			return nil
		}
		var requests []reconcile.Request
		for i := range list.Items {
			requests = append(requests, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&list.Items[i])})
		}
		return requests
	})
	return ctrl.NewControllerManagedBy(mgr).Named("certificate").
		For(&certificatesv1.CertificateSigningRequest{}).
		Watches(&corev1.ConfigMap{}, all, builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool {
			return o.GetName() == v1alpha1.TrustConfigMap
		}))).
		Complete(r)
}
