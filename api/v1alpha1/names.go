package v1alpha1

import "time"

// LabelAgent marks, with the value "true", the lease by which an agent shows
// that it is alive.
const LabelAgent = "compsc.io/agent"

// AgentLeaseName is the name of the lease that the agent of a node renews
// while it lives, in the namespace CompSC is installed in.
func AgentLeaseName(node string) string { return "agent-" + node }

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
