// Package lab builds the network that the demonstration and the end-to-end
// tests run on: two nodes and a hub, each a network namespace of this
// machine, and runs processes in them.
//
//	root namespace             hub                      node a, node b
//	kube-apiserver, manager    prober, stream peer      agent, device, QEMU
//	  veth .2 ---------------- bridge br0 .1 ---------- bridge br0 .11 / .12
//
// The bridge of a node is the switch behind its physical function's uplink:
// the VFs' taps join it, so that a guest's frames cross the hub on their way
// to everybody but its own node.
//
// Names and addresses are unique for each lab, so that several run side by
// side. What a lab leaves behind when its process dies without closing it is
// removed by the next New.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// StateDir holds one directory for each living lab, named like it.
	StateDir = "/var/tmp/compsc-lab"
	// NodeBridge is the name of the bridge in a node's and in the hub's
	// namespace.
	NodeBridge = "br0"

	hubHost, rootHost, firstNodeHost, guestHost = 1, 2, 11, 100
)

// addresses is RFC 2544's range for benchmarking networks, which is routed
// nowhere. Each lab takes one /24 of it.
var addresses = netip.MustParsePrefix("198.18.0.0/15")

// Lab is a hub and its nodes. Its methods are safe for concurrent use.
type Lab struct {
	// ID is the lab's unique name, and the prefix of its namespaces' names.
	ID string
	// Dir is a directory of the lab's own, removed by Close. Its path, which
	// is short enough for unix sockets some levels below it, appears in the
	// arguments of the lab's processes, which is how a later lab recognises
	// processes that outlived their lab.
	Dir string
	// Subnet is the lab's network.
	Subnet netip.Prefix
	// Hub is where the guest's peers live.
	Hub *NS
	// Nodes are the nodes by name.
	Nodes map[string]*Node

	rootLink string

	mu      sync.Mutex
	procs   map[*Process]struct{}
	cgroups bool // whether there may be control groups
}

// Node is one node of a lab.
type Node struct {
	// Name is the node's name, as in Kubernetes.
	Name string
	// NS is its network namespace.
	NS *NS
	// IP is its address, on its bridge.
	IP netip.Addr
}

var sequence atomic.Int64

// New builds a lab with nodes of the given names (at most 80). It needs root. Leftovers of
// dead labs are removed first. The caller must Close it.
func New(ctx context.Context, nodes ...string) (_ *Lab, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab needs root: network namespaces, mounts and tap devices are its parts")
	}
	if len(nodes) > guestHost-firstNodeHost-1 {
		return nil, fmt.Errorf("a lab of %d nodes: at most %d", len(nodes), guestHost-firstNodeHost-1)
	}
	if err := os.MkdirAll(StateDir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(StateDir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(); err != nil {
		return nil, fmt.Errorf("leftovers of an earlier run: %w", err)
	}
	id, err := ownID(sequence.Add(1))
	if err != nil {
		return nil, err
	}
	subnet, err := freeSubnet()
	if err != nil {
		return nil, err
	}
	l := &Lab{
		ID: id, Dir: filepath.Join(StateDir, id), Subnet: subnet,
		Nodes: map[string]*Node{}, procs: map[*Process]struct{}{},
	}
	if err := os.Mkdir(l.Dir, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if l.Hub, err = newNS(id + "-hub"); err != nil {
		return nil, err
	}
	if err := l.buildHub(); err != nil {
		return nil, fmt.Errorf("hub: %w", err)
	}
	for i, name := range nodes {
		if err := l.buildNode(name, i); err != nil {
			return nil, fmt.Errorf("node %s: %w", name, err)
		}
	}
	return l, l.introduceNodes()
}

// Address returns the host-th address of the lab's network.
func (l *Lab) address(host int) netip.Addr {
	b := l.Subnet.Addr().As4()
	b[3] = byte(host)
	return netip.AddrFrom4(b)
}

// HubIP is the hub's address, where the guest's peers are.
func (l *Lab) HubIP() netip.Addr { return l.address(hubHost) }

// RootIP is the address of the root namespace on the lab's network, where
// the API server listens.
func (l *Lab) RootIP() netip.Addr { return l.address(rootHost) }

// GuestIP is the address for the guest, its length that of Subnet.
func (l *Lab) GuestIP() netip.Prefix { return l.GuestAddress(0) }

// GuestAddress is the address for the n-th guest, 0 to 99; the first is GuestIP.
func (l *Lab) GuestAddress(n int) netip.Prefix {
	return netip.PrefixFrom(l.address(guestHost+n), l.Subnet.Bits())
}

func (l *Lab) buildHub() error {
	if err := l.Hub.newBridge(netip.PrefixFrom(l.HubIP(), l.Subnet.Bits())); err != nil {
		return err
	}
	l.rootLink = fmt.Sprintf("cl%x", os.Getpid())
	if n := sequence.Load(); n > 1 {
		l.rootLink += fmt.Sprintf("-%x", n)
	}
	if err := joinHub(l.Hub, nil, l.rootLink, "root"); err != nil {
		return err
	}
	link, err := netlink.LinkByName(l.rootLink)
	if err != nil {
		return err
	}
	return addAddress(link, netip.PrefixFrom(l.RootIP(), l.Subnet.Bits()))
}

func (l *Lab) buildNode(name string, i int) error {
	ns, err := newNS(l.ID + "-" + name)
	if err != nil {
		return err
	}
	n := &Node{Name: name, NS: ns, IP: l.address(firstNodeHost + i)}
	l.Nodes[name] = n
	if err := ns.newBridge(netip.PrefixFrom(n.IP, l.Subnet.Bits())); err != nil {
		return err
	}
	return joinHub(l.Hub, ns, "uplink", "to-"+name)
}

// Close stops every process of the lab and removes its namespaces, links and
// directory. It may be called again.
func (l *Lab) Close() error {
	l.mu.Lock()
	procs := make([]*Process, 0, len(l.procs))
	for p := range l.procs {
		procs = append(procs, p)
	}
	l.mu.Unlock()
	var wg sync.WaitGroup
	for _, p := range procs {
		wg.Go(func() { p.Stop(3 * time.Second) })
	}
	wg.Wait()

	var errs []error
	if l.rootLink != "" {
		if link, err := netlink.LinkByName(l.rootLink); err == nil {
			errs = append(errs, netlink.LinkDel(link))
		}
	}
	for _, n := range l.Nodes {
		errs = append(errs, n.NS.close())
	}
	if l.Hub != nil {
		errs = append(errs, l.Hub.close())
	}
	if l.cgroups {
		errs = append(errs, removeCgroups(l.ID))
	}
	return errors.Join(append(errs, os.RemoveAll(l.Dir))...)
}

// lock takes an exclusive lock on the file, waiting until ctx ends.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for {
		// Without blocking: a flock cannot be interrupted by ctx.
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: another lab is being built: %w", path, ctx.Err())
		}
	}
}

// freeSubnet returns a /24 of addresses that no interface of the root
// namespace uses. Every living lab has an interface there.
func freeSubnet() (netip.Prefix, error) {
	used, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	if err != nil {
		return netip.Prefix{}, err
	}
	for n := range 512 {
		b := addresses.Addr().As4()
		b[1] += byte(n >> 8)
		b[2] = byte(n)
		p := netip.PrefixFrom(netip.AddrFrom4(b), 24)
		free := true
		for _, a := range used {
			if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && p.Contains(ip) {
				free = false
				break
			}
		}
		if free {
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("no free /24 in %s", addresses)
}
