// The program of a node VM that belongs to a cluster: it gives the node's own
// port to the wire an address and a card its VFs, and then serves whoever runs
// processes there, which is what agent and pods are to it, and is the kubelet that
// the agent asks. Outside the node it
// runs one of these, as if that ran there.
//
// Usage: member serve MAC ADDRESS/BITS VFS
//
//	member look
//	member run HOST:PORT PROCESS
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"

	"compsc.io/compsc/e2e/lab"
	"compsc.io/compsc/e2e/remote"
	"compsc.io/compsc/e2e/sriov/card"
	"compsc.io/compsc/e2e/sriov/kubelet"
)

// journal is where an agent keeps it by default.
const journal = "/var/lib/compsc/vfs"

func main() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 4 && args[0] == "serve":
		err = serve(args[1], args[2], args[3])
	case len(args) == 3 && args[0] == "run":
		err = run(args[1], args[2])
	case len(args) == 1 && args[0] == "look":
		err = look()
	default:
		err = errors.New("usage: member serve MAC ADDRESS/BITS VFS, member look, or member run HOST:PORT PROCESS")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "member:", err)
		os.Exit(1)
	}
}

func run(address, encoded string) error {
	var p remote.Process
	if err := json.Unmarshal([]byte(encoded), &p); err != nil {
		return err
	}
	return remote.Run(address, &p, os.Stdout)
}

func serve(mac, address, vfs string) (err error) {
	own, err := netip.ParsePrefix(address)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(vfs)
	if err != nil {
		return err
	}
	if err := join(mac, own); err != nil {
		return err
	}
	if err := prepareCard(n); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := kubelet.Start(ctx); err != nil {
		return err
	}
	processes := lab.Bare()
	defer func() { err = errors.Join(err, processes.Close()) }()
	l, err := net.Listen("tcp", netip.AddrPortFrom(own.Addr(), remote.Port).String())
	if err != nil {
		return err
	}
	return remote.Serve(ctx, l, processes)
}

// join gives the port with the MAC the address, and has only the port answer for
// it: the cards are on the same wire.
func join(mac string, own netip.Prefix) error {
	for name, value := range map[string]string{"ipv4/conf/all/arp_ignore": "1", "ipv6/conf/all/disable_ipv6": "1"} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, link := range links {
		if link.Attrs().HardwareAddr.String() != mac {
			continue
		}
		a := &netlink.Addr{IPNet: &net.IPNet{IP: own.Addr().AsSlice(), Mask: net.CIDRMask(own.Bits(), 32)}}
		return errors.Join(netlink.AddrAdd(link, a), netlink.LinkSetUp(link))
	}
	return fmt.Errorf("none of the node's %d interfaces has the address %s", len(links), mac)
}

// prepareCard gives the first card its VFs, as an administrator does.
func prepareCard(vfs int) error {
	cards, err := card.List()
	if err != nil || len(cards) == 0 {
		return fmt.Errorf("the node has no card: %w", err)
	}
	if err := cards[0].Up(); err != nil {
		return err
	}
	_, err = cards[0].MakeVFs(vfs)
	return err
}

// look prints how the node is.
func look() error {
	n, err := card.Look(journal)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(n)
}
