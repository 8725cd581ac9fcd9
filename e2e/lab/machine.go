package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
)

// Bare returns a lab without a network, to run processes in. The caller must
// Close it.
func Bare() *Lab { return &Lab{procs: map[*Process]struct{}{}} }

// Plug gives the node's place in the network to a machine: it returns the
// machine's end of a tap device that is a port of the node's bridge, which loses
// its own address. The machine is to have the address, which is returned too.
func (l *Lab) Plug(node string) (port *os.File, address netip.Prefix, err error) {
	n := l.Nodes[node]
	if n == nil {
		return nil, address, fmt.Errorf("the lab has no node %s", node)
	}
	address = netip.PrefixFrom(n.IP, l.Subnet.Bits())
	err = n.NS.Do(func() error {
		br, err := netlink.LinkByName(NodeBridge)
		if err != nil {
			return err
		}
		if err := netlink.AddrDel(br, &netlink.Addr{IPNet: &net.IPNet{
			IP: n.IP.AsSlice(), Mask: net.CIDRMask(l.Subnet.Bits(), 32),
		}}); err != nil {
			return fmt.Errorf("address of node %s: %w", node, err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "machine"
		tap := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Queues: 1, NonPersist: true, Flags: netlink.TUNTAP_NO_PI}
		if err := netlink.LinkAdd(tap); err != nil {
			return fmt.Errorf("tap of node %s: %w", node, err)
		}
		port = tap.Fds[0]
		return enslave(attrs.Name)
	})
	if err != nil && port != nil {
		err = errors.Join(err, port.Close())
	}
	return port, address, err
}
