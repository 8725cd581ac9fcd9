// Package certs reads and writes certificates as PEM text.
package certs

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// kind is the type of a PEM block with a certificate (RFC 7468, section 5).
const kind = "CERTIFICATE"

// MaxPEM bounds what Parse reads, in bytes.
const MaxPEM = 64 << 10

// Parse reads at least one certificate of PEM text; it refuses anything else
// in it.
func Parse(text []byte) ([]*x509.Certificate, error) {
	if len(text) > MaxPEM {
		return nil, fmt.Errorf("it has %d bytes, at most %d", len(text), MaxPEM)
	}
	var list []*x509.Certificate
	for rest := bytes.TrimSpace(text); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil || block.Type != kind {
			return nil, errors.New("it is not a sequence of PEM certificates")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	if len(list) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	return list, nil
}

// Encode returns a certificate in DER as PEM.
func Encode(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
