package agent

import (
	"context"
	"fmt"
	"strings"

	"compsc.io/compsc/agent/device/controlpb"
	"compsc.io/compsc/agent/host"
	"compsc.io/compsc/api/v1alpha1"
)

// The VFs that a VM moves between have the same settings on their PFs: on each
// node they are its administrator's, or its network plugin's, and no other
// node's word changes them. Where they differ the VM would find itself in
// another VLAN, or with other rights, and is refused before anything starts.

// addAdministration tells the target what is set for the source's VFs.
func (a *agent) addAdministration(ctx context.Context, st *controlpb.StatusReply, interfaces []*controlpb.SourceInterface) error {
	for _, i := range interfaces {
		s, err := a.settings(ctx, st, i.GetName())
		if err != nil {
			return err
		}
		if s == nil {
			continue
		}
		i.Administration = &controlpb.Administration{Vlan: uint32(s.VLAN), Qos: uint32(s.QoS), Protocol: uint32(s.Proto), SpoofCheck: s.SpoofCheck,
			Trust: s.Trust, MinRate: uint32(s.MinRate), MaxRate: uint32(s.MaxRate), LinkState: s.LinkState}
	}
	return nil
}

// checkAdministration refuses a VM whose VFs have other settings than those
// here. A source that does not tell, as before there was this message, is not
// refused.
func (a *agent) checkAdministration(ctx context.Context, st *controlpb.StatusReply, interfaces []*controlpb.SourceInterface) (*failure, error) {
	var all []string
	for _, i := range interfaces {
		from := i.GetAdministration()
		if from == nil {
			continue
		}
		to, err := a.settings(ctx, st, i.GetName())
		if err != nil {
			return nil, err
		}
		if to == nil {
			continue
		}
		if list := host.Differences(host.Settings{VLAN: int(from.GetVlan()), QoS: int(from.GetQos()), Proto: int(from.GetProtocol()), SpoofCheck: from.GetSpoofCheck(),
			Trust: from.GetTrust(), MinRate: int(from.GetMinRate()), MaxRate: int(from.GetMaxRate()), LinkState: from.GetLinkState()}, *to); len(list) > 0 {
			all = append(all, fmt.Sprintf("the PF of interface %s's VF has set %s", i.GetName(), strings.Join(list, ", ")))
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	return failed(v1alpha1.ReasonIncompatible, "%s; have the network's definition, or ip link set PF vf N, say the same on both nodes", strings.Join(all, "; ")), nil
}

// settings are those of the VF that the device process has for an interface.
func (a *agent) settings(ctx context.Context, st *controlpb.StatusReply, iface string) (*host.Settings, error) {
	for _, i := range st.GetInterfaces() {
		if i.GetName() != iface || i.GetVf() == "" {
			continue
		}
		s, err := a.host.Settings(ctx, i.GetVf())
		if err != nil {
			return nil, fmt.Errorf("settings of interface %s's VF: %w", iface, err)
		}
		return s, nil
	}
	return nil, fmt.Errorf("the device process has no VF for interface %s", iface)
}
