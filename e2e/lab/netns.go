package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// nsDir is where iproute2 keeps named network namespaces, so that
// "ip netns exec NAME" works with a lab's.
const nsDir = "/run/netns"

// NS is a named network namespace.
type NS struct {
	// Name is its name for iproute2.
	Name   string
	handle netns.NsHandle
}

func newNS(name string) (*NS, error) {
	var ns *NS
	// NewNamed leaves the thread in the new namespace.
	err := onThread(func() error {
		h, err := netns.NewNamed(name)
		if err != nil {
			return fmt.Errorf("network namespace %s: %w", name, err)
		}
		ns = &NS{Name: name, handle: h}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		// The guest's multicast counter is compared with what was sent on
		// purpose: nothing in the lab may announce itself by IPv6.
		disableIPv6()
		return netlink.LinkSetUp(lo)
	})
	if err != nil && ns != nil {
		err = errors.Join(err, ns.close())
	}
	return ns, err
}

// disableIPv6 is best effort: a machine without IPv6 has nothing to disable.
func disableIPv6() {
	for _, c := range []string{"all", "default"} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+c+"/disable_ipv6", []byte("1"), 0)
	}
}

// Do runs fn on an operating system thread that is in the namespace. Sockets
// that fn makes stay in it; goroutines that fn starts do not run in it.
func (n *NS) Do(fn func() error) error {
	return onThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", n.Name, err)
		}
		return fn()
	})
}

// onThread runs fn on a thread of its own, which ends with it, so that
// whatever fn does to the thread's namespaces touches nobody else.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- fn()
	}()
	return <-done
}

func (n *NS) close() error {
	n.handle.Close()
	if err := netns.DeleteNamed(n.Name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", n.Name, err)
	}
	return nil
}

// newBridge makes the namespace's bridge, with an address.
func (n *NS) newBridge(a netip.Prefix) error {
	return n.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = NodeBridge
		// Without an address of its own a bridge takes the lowest of its
		// ports', which changes when a VF's tap joins or leaves, and everybody
		// who knew the old one loses it for a while.
		attrs.HardwareAddr = bridgeMAC(a.Addr())
		// Snooping would ask the guests for their groups, and forget them
		// for a while when a guest moves.
		off := false
		br := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}
		if err := netlink.LinkAdd(br); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		if err := addAddress(br, a); err != nil {
			return err
		}
		return netlink.LinkSetUp(br)
	})
}

// bridgeMAC is the address of the bridge that has the IP address.
func bridgeMAC(a netip.Addr) net.HardwareAddr {
	ip := a.As4()
	return net.HardwareAddr{0x02, 0xc5, ip[0], ip[1], ip[2], ip[3]}
}

// introduceNodes tells the nodes each other's addresses: they need not ask for
// them by broadcast, which guests would get, and count, too.
func (l *Lab) introduceNodes() error {
	for _, n := range l.Nodes {
		if err := n.NS.Do(func() error {
			br, err := netlink.LinkByName(NodeBridge)
			if err != nil {
				return err
			}
			for _, other := range l.Nodes {
				if other == n {
					continue
				}
				if err := netlink.NeighSet(&netlink.Neigh{
					LinkIndex: br.Attrs().Index, State: netlink.NUD_PERMANENT, IP: other.IP.AsSlice(), HardwareAddr: bridgeMAC(other.IP),
				}); err != nil {
					return fmt.Errorf("node %s: neighbour %s: %w", n.Name, other.Name, err)
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func addAddress(link netlink.Link, a netip.Prefix) error {
	err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{
		IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), 32),
	}})
	if err != nil {
		return fmt.Errorf("address %s on %s: %w", a, link.Attrs().Name, err)
	}
	return netlink.LinkSetUp(link)
}

// joinHub connects the hub's bridge with ns: with its bridge, or, for the
// root namespace (nil), with a bare interface called name.
func joinHub(hub, ns *NS, name, hubName string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = hubName
	veth := netlink.NewVeth(attrs)
	veth.PeerName = name
	if ns != nil {
		veth.PeerNamespace = netlink.NsFd(ns.handle)
	} else {
		root, err := netns.Get()
		if err != nil {
			return err
		}
		defer root.Close()
		veth.PeerNamespace = netlink.NsFd(root)
	}
	if err := hub.Do(func() error {
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("veth %s: %w", name, err)
		}
		return enslave(hubName)
	}); err != nil || ns == nil {
		return err
	}
	return ns.Do(func() error { return enslave(name) })
}

func enslave(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	br, err := netlink.LinkByName(NodeBridge)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetMaster(link, br); err != nil {
		return fmt.Errorf("%s into %s: %w", name, NodeBridge, err)
	}
	return netlink.LinkSetUp(link)
}
