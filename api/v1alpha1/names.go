package v1alpha1

import "time"

// LabelAgent marks, with the value "true", the lease by which an agent shows
// that it is alive.
const LabelAgent = "compsc.io/agent"

// AgentLeaseName is the name of the lease that the agent of a node renews
// while it lives, in the namespace CompSC is installed in.
func AgentLeaseName(node string) string { return "agent-" + node }

// Of the certificates with which agents prove their node to each other.
const (
	// CertificateSigner is the signer of the CertificateSigningRequests with
	// which agents ask for theirs. The manager is that signer.
	CertificateSigner = "compsc.io/agent"
	// AuthoritySecret holds, in the namespace CompSC is installed in, the
	// authority that signs them: tls.crt and tls.key.
	AuthoritySecret = "compsc-ca"
	// TrustConfigMap holds there, under TrustKey, the certificates of the
	// authorities that agents trust, as PEM. The first is the one that signs.
	TrustConfigMap = "compsc-trust"
	TrustKey       = "ca.crt"
	// AgentServiceAccount is the service account of the agents there.
	AgentServiceAccount = "compsc-agent"
)

// Defaults of spec.timeouts. They equal those in the CRD, and serve objects
// that no API server has defaulted.
const (
	DefaultPrepareTimeout = 3 * time.Minute
	DefaultMigrateTimeout = 15 * time.Minute
	DefaultHoldTimeout    = 5 * time.Second
)

// PrepareTimeout is t.Prepare, or its default.
func (t *VFMigrationTimeouts) PrepareTimeout() time.Duration {
	if t.Prepare == nil {
		return DefaultPrepareTimeout
	}
	return t.Prepare.Duration
}

// MigrateTimeout is t.Migrate, or its default.
func (t *VFMigrationTimeouts) MigrateTimeout() time.Duration {
	if t.Migrate == nil {
		return DefaultMigrateTimeout
	}
	return t.Migrate.Duration
}

// HoldTimeout is t.Hold, or its default.
func (t *VFMigrationTimeouts) HoldTimeout() time.Duration {
	if t.Hold == nil {
		return DefaultHoldTimeout
	}
	return t.Hold.Duration
}
