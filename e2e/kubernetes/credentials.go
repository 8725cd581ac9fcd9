package kubernetes

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/pki"
)

// credentials are the certificates and keys of the cluster. Everybody has the
// identity that Kubernetes' own roles are bound to.
type credentials struct {
	dir    string
	server string // URL of the API server
	ca     *pki.Authority

	api, kubelet, proxy          pki.Files // what the API server is, to kubelets, to aggregated APIs
	serviceAccounts              string    // key of the tokens
	admin, controller, scheduler string    // kubeconfigs
}

func newCredentials(dir string, l *lab.Lab) (*credentials, error) {
	c := &credentials{dir: dir, server: "https://" + net.JoinHostPort(l.HubIP().String(), apiPort)}
	var err error
	if c.ca, err = pki.New(); err != nil {
		return nil, err
	}
	front, err := pki.New()
	if err != nil {
		return nil, err
	}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if c.api, err = c.ca.Certify(dir, "apiserver", &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"},
		IPAddresses: []net.IP{l.HubIP().AsSlice(), net.ParseIP(apiService), net.IPv4(127, 0, 0, 1)},
	}); err != nil {
		return nil, err
	}
	if c.kubelet, err = c.ca.Certify(dir, "kubelet-client", &x509.Certificate{
		Subject: pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}, ExtKeyUsage: client,
	}); err != nil {
		return nil, err
	}
	if c.proxy, err = front.Certify(filepath.Join(dir, "front"), "proxy-client", &x509.Certificate{
		Subject: pkix.Name{CommonName: "front-proxy-client"}, ExtKeyUsage: client,
	}); err != nil {
		return nil, err
	}
	c.serviceAccounts = filepath.Join(dir, "service-accounts.key")
	if err := writeKey(c.serviceAccounts); err != nil {
		return nil, err
	}
	for _, u := range []struct {
		file        *string
		name, group string
	}{
		{&c.admin, "admin", "system:masters"},
		{&c.controller, "system:kube-controller-manager", ""},
		{&c.scheduler, "system:kube-scheduler", ""},
	} {
		if *u.file, err = c.kubeconfig(dir, u.name, u.group); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// kubeconfig writes into dir a file that reaches the API server as the user,
// and holds all it needs.
func (c *credentials) kubeconfig(dir, user, group string) (string, error) {
	subject := pkix.Name{CommonName: user}
	if group != "" {
		subject.Organization = []string{group}
	}
	name := filepath.Base(user)
	f, err := c.ca.Certify(filepath.Join(c.dir, "users"), name, &x509.Certificate{
		Subject: subject, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return "", err
	}
	var data [3][]byte
	for i, path := range []string{f.CA, f.Cert, f.Key} {
		if data[i], err = os.ReadFile(path); err != nil {
			return "", err
		}
	}
	k := clientcmdapi.NewConfig()
	k.Clusters["lab"] = &clientcmdapi.Cluster{Server: c.server, CertificateAuthorityData: data[0]}
	k.AuthInfos["user"] = &clientcmdapi.AuthInfo{ClientCertificateData: data[1], ClientKeyData: data[2]}
	k.Contexts["lab"] = &clientcmdapi.Context{Cluster: "lab", AuthInfo: "user"}
	k.CurrentContext = "lab"
	path := filepath.Join(dir, name+".kubeconfig")
	if err := clientcmd.WriteToFile(*k, path); err != nil {
		return "", fmt.Errorf("kubeconfig of %s: %w", user, err)
	}
	return path, nil
}

func writeKey(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}
