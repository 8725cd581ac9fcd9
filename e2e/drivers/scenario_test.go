//go:build e2edrivers

package drivers

import (
	"context"
	"testing"

	"compsc.io/compsc/e2e/guest/proto"
)

// Names of the kernel's features, as `ethtool -k` has them behind its own.
const (
	featureTSO        = "tx-tcp-segmentation"
	featureTSO6       = "tx-tcp6-segmentation"
	featureTXSum      = "tx-checksum-ip-generic"
	featureRXSum      = "rx-checksum"
	featureGRO        = "rx-gro"
	featureVLANInsert = "tx-vlan-hw-insert"
	featureVLANStrip  = "rx-vlan-hw-parse"
	featureVLANFilter = "rx-vlan-filter"
)

// mostUsecs is the longest interval between interrupts that the driver takes.
const mostUsecs = 1022

// withTrust is five hops on VFs that their PFs trust. What was set before one
// hop stays for the next ones unless it is taken back.
func withTrust(t *testing.T, ctx context.Context, r *rig) {
	r.verify(ctx)
	r.hop(ctx, "as it booted") // the baseline: what fails here fails everywhere

	r.do(ctx, "VLANs added, one with a stream")
	r.vlan(ctx, streamVLAN, true)
	r.vlan(ctx, 7, true)
	r.vlan(ctx, 4094, true)
	r.openStream(ctx, "VLAN", vlanGuest, normalMTU)
	r.do(ctx, "multicast groups joined, ethtool -G and -C")
	for _, group := range []string{"239.1.1.10", "239.1.1.11", "239.1.1.12"} {
		r.group(ctx, group, true)
	}
	// Not fewer receive descriptors than at boot: the PF drops what finds none,
	// and an emulated guest on a busy machine comes late.
	r.ring(ctx, 1000, 256)
	r.coalesce(ctx, 200)
	r.hop(ctx, "VLANs, multicast groups, other rings, moderated interrupts")

	r.do(ctx, "a VLAN and a group taken back, others added; allmulti; other moderation; TSO and GRO off")
	r.vlan(ctx, 7, false)
	r.vlan(ctx, 8, true)
	r.group(ctx, "239.1.1.11", false)
	r.group(ctx, "239.1.1.13", true)
	r.allMulti(ctx, true)
	r.coalesce(ctx, 20)
	r.feature(ctx, featureTSO, false)
	r.feature(ctx, featureTSO6, false)
	r.feature(ctx, featureGRO, false)
	r.hop(ctx, "all-multicast, without TSO and GRO")

	r.do(ctx, "promisc; MTU %d with a stream; checksums off; most moderation", jumbo)
	r.promisc(ctx, true)
	r.mtu(ctx, jumbo)
	r.openStream(ctx, "jumbo", r.h.Lab.GuestIP().Addr(), jumbo)
	r.feature(ctx, featureTXSum, false)
	r.feature(ctx, featureRXSum, false)
	r.coalesce(ctx, mostUsecs)
	r.hop(ctx, "promiscuous, jumbo frames, without checksums")

	r.do(ctx, "all offloads on again, promisc and allmulti off, down and up, large rings, no moderation")
	r.feature(ctx, featureTXSum, true)
	r.feature(ctx, featureRXSum, true)
	r.feature(ctx, featureTSO, true)
	r.feature(ctx, featureTSO6, true)
	r.feature(ctx, featureGRO, true)
	r.fixed(ctx, featureVLANInsert, featureVLANStrip, featureVLANFilter)
	r.promisc(ctx, false)
	r.allMulti(ctx, false)
	r.link(ctx, false)
	r.link(ctx, true)
	r.ring(ctx, 2048, 512)
	r.coalesce(ctx, 0)
	r.hop(ctx, "jumbo frames with TSO, after down and up")

	r.do(ctx, "the module is loaded again before a hop")
	r.reload(ctx)
	r.vlan(ctx, streamVLAN, true)
	r.openStream(ctx, "VLAN", vlanGuest, normalMTU)
	r.hop(ctx, "a fresh module")

	r.do(ctx, "the module is loaded again after a hop")
	r.reload(ctx)
	r.verify(ctx)
	r.stop(ctx)
}

// withoutTrust is a hop on VFs that their PFs do not trust.
func withoutTrust(t *testing.T, ctx context.Context, r *rig) {
	r.do(ctx, "allmulti and promisc, which are not granted")
	r.group(ctx, "239.1.1.10", true)
	r.allMulti(ctx, true)
	r.verify(ctx)
	r.promisc(ctx, true)
	r.hop(ctx, "without trust")
	r.promisc(ctx, false)
	r.allMulti(ctx, false)
	r.verify(ctx)
	r.stop(ctx)
}

func (r *rig) vlan(ctx context.Context, id int, add bool) {
	r.t.Helper()
	action := proto.Action{Name: proto.ActionVLAN, VLAN: id, Up: add}
	if id == streamVLAN {
		action.Address = vlanGuest.String() + "/24"
	}
	r.act(ctx, action)
	r.want.vlans[id] = add
}

func (r *rig) group(ctx context.Context, group string, join bool) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionMulticast, Group: group, Up: join})
	r.want.groups[group] = join
}

func (r *rig) allMulti(ctx context.Context, on bool) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionAllMulti, Up: on})
	r.want.allMulti = on
	r.want.askMode()
}

func (r *rig) promisc(ctx context.Context, on bool) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionPromisc, Up: on})
	r.want.promisc = on
	r.want.askMode()
}

func (r *rig) mtu(ctx context.Context, mtu int) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionMTU, MTU: mtu})
	r.want.mtu = mtu
	r.verify(ctx)
}

func (r *rig) ring(ctx context.Context, rx, tx int) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionRing, RX: rx, TX: tx})
	r.want.rx, r.want.tx = rx, tx
}

func (r *rig) coalesce(ctx context.Context, usecs int) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionCoalesce, Usecs: usecs})
	r.want.usecs = usecs
}

func (r *rig) feature(ctx context.Context, name string, on bool) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionFeature, Feature: name, Up: on})
	r.want.features[name] = on
}

func (r *rig) link(ctx context.Context, up bool) {
	r.t.Helper()
	r.act(ctx, proto.Action{Name: proto.ActionLink, Up: up})
}

// fixed fails unless the features are on and cannot be turned off, as is so
// with ixgbevf's VLAN offloads: the VLAN stream uses them all the time.
func (r *rig) fixed(ctx context.Context, features ...string) {
	r.t.Helper()
	s := r.settings(ctx)
	for _, f := range features {
		if !s.Features[f] || !s.Fixed[f] {
			r.t.Errorf("%s: on: %v, fixed: %v; turn it off and on here if the driver has learnt to", f, s.Features[f], s.Fixed[f])
		}
	}
}

// reload loads the driver's module again, which forgets all but what the
// guest does at boot.
func (r *rig) reload(ctx context.Context) {
	r.t.Helper()
	r.closeStreams(ctx)
	r.act(ctx, proto.Action{Name: proto.ActionReload})
	r.want.forget()
	r.verify(ctx)
}
