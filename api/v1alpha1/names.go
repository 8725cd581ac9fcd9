package v1alpha1

import "time"

// LabelAgent marks, with the value "true", the lease by which an agent shows
// that it is alive.
const LabelAgent = "compsc.io/agent"

// AgentLeaseName is the name of the lease that the agent of a node renews
// while it lives, in the namespace CompSC is installed in.
func AgentLeaseName(node string) string { return "agent-" + node }

// AnnotationFastPath names, on a VirtualMachineInstance, the interfaces with the
// compsc network binding whose guest is to reach the doorbells of its VF by
// itself, separated by commas: the fast path. All others have the complete path,
// on which every access to a register passes the device process. It counts when
// the VM starts. The fast path takes a real VF, its counters on these pages are
// the device's own, and it can be moved only where the node's IOMMU records what
// the VF writes; see docs/concepts.md.
const AnnotationFastPath = "compsc.io/fast-path"

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
