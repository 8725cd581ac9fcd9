package agent

import (
	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/protocol"
	"compsc.io/compsc/api/v1alpha1"
)

// ownProtocols is what this agent tells others that it speaks.
func ownProtocols() *controlpb.Protocols {
	return &controlpb.Protocols{Oldest: protocol.Oldest, Newest: protocol.Newest}
}

// understands fails if another part of CompSC and this agent have no version of
// what they say to each other in common.
func (a *agent) understands(p *controlpb.Protocols, who string) *failure {
	other := protocol.Range{Oldest: p.GetOldest(), Newest: p.GetNewest()}
	if protocol.Own().Meets(other) {
		return nil
	}
	return failed(v1alpha1.ReasonVersionMismatch, "%s speaks version %s of CompSC's protocol, the agent of node %s version %s; "+
		"bring agents to versions in a row, and restart a VM whose device process is older", who, other, a.node, protocol.Own())
}
