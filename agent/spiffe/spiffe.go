// Package spiffe is how a certificate names the node whose agent it belongs
// to: by its one URI name, spiffe://compsc.io/node/<node name>. Host names play
// no part: addresses of agents are read from VFNodes and prove nothing.
package spiffe

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"strings"
)

const (
	trustDomain = "compsc.io"
	nodePath    = "/node/"
)

// NodeURI returns the URI that the certificate of the node's agent must carry
// as its only URI name.
func NodeURI(node string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: nodePath + node}
}

// NodeOf returns the node whose agent the certificate belongs to. It does not
// verify the certificate.
func NodeOf(cert *x509.Certificate) (string, error) {
	node, err := nodeOf(cert.URIs)
	if err != nil {
		return "", fmt.Errorf("certificate of %q: %w", cert.Subject, err)
	}
	return node, nil
}

// NodeOfRequest returns the node whose agent a certificate is asked for. It
// does not verify the request.
func NodeOfRequest(r *x509.CertificateRequest) (string, error) {
	node, err := nodeOf(r.URIs)
	if err != nil {
		return "", fmt.Errorf("certificate request of %q: %w", r.Subject, err)
	}
	return node, nil
}

func nodeOf(uris []*url.URL) (string, error) {
	if len(uris) != 1 {
		return "", fmt.Errorf("it has %d URI names, want one: spiffe://compsc.io/node/<node name>", len(uris))
	}
	u := uris[0]
	node, ok := strings.CutPrefix(u.Path, nodePath)
	if !ok || node == "" || strings.Contains(node, "/") || u.String() != NodeURI(node).String() {
		return "", fmt.Errorf("its name %q is not of the form spiffe://compsc.io/node/<node name>", u)
	}
	return node, nil
}
