//go:build e2edrivers

package drivers

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/lab"
)

const (
	streamVLAN = 100
	etherVLAN  = 0x8100
	tagSize    = 4
	macs       = 12 // bytes of both addresses of a frame
)

// The two ends of VLAN streamVLAN.
var (
	vlanHub   = netip.MustParseAddr("192.0.2.1")
	vlanGuest = netip.MustParseAddr("192.0.2.100")
)

// trunk is a port of the hub's bridge that this process holds: it sends any
// frame, and leads the tagged ones of streamVLAN to an interface of the hub. A
// kernel without 8021q has no other way.
type trunk struct {
	port, access *os.File
}

// widen makes the lab's wires carry packets of mtu bytes.
func widen(l *lab.Lab, mtu int) error {
	links := map[*lab.NS][]string{l.Hub: nil}
	for name, n := range l.Nodes {
		links[l.Hub] = append(links[l.Hub], "to-"+name)
		links[n.NS] = []string{"uplink", lab.NodeBridge}
	}
	links[l.Hub] = append(links[l.Hub], lab.NodeBridge)
	for ns, names := range links {
		if err := ns.Do(func() error {
			for _, name := range names {
				link, err := netlink.LinkByName(name)
				if err == nil {
					err = netlink.LinkSetMTU(link, mtu)
				}
				if err != nil {
					return fmt.Errorf("%s: MTU %d: %w", name, mtu, err)
				}
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func openTrunk(l *lab.Lab) (_ *trunk, err error) {
	k := &trunk{}
	defer func() {
		if err != nil {
			k.Close()
		}
	}()
	err = l.Hub.Do(func() error {
		bridge, err := netlink.LinkByName(lab.NodeBridge)
		if err != nil {
			return err
		}
		var port, access netlink.Link
		if k.port, port, err = openTap("trunk"); err != nil {
			return err
		}
		if k.access, access, err = openTap("access"); err != nil {
			return err
		}
		address := &netlink.Addr{IPNet: &net.IPNet{IP: vlanHub.AsSlice(), Mask: net.CIDRMask(24, 32)}}
		return errors.Join(netlink.LinkSetMaster(port, bridge), netlink.LinkSetMTU(port, jumbo), netlink.LinkSetUp(port),
			netlink.AddrAdd(access, address), netlink.LinkSetUp(access))
	})
	if err != nil {
		return nil, fmt.Errorf("trunk: %w", err)
	}
	go pump(k.port, k.access, untag)
	go pump(k.access, k.port, func(f []byte) []byte { return tag(f, streamVLAN) })
	return k, nil
}

// openTap makes a tap device in the calling thread's network namespace, which
// lives as long as its file is open.
func openTap(name string) (*os.File, netlink.Link, error) {
	// Non-blocking before NewFile, so that Close ends a Read.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("tap device %s: %w", name, err)
	}
	file := os.NewFile(uintptr(fd), name)
	link, err := netlink.LinkByName(name)
	return file, link, err
}

// Close removes the trunk's interfaces.
func (k *trunk) Close() {
	for _, f := range []*os.File{k.port, k.access} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// send puts a frame on the hub's bridge.
func (k *trunk) send(frame []byte) error {
	_, err := k.port.Write(frame)
	return err
}

// pump leads frames from one file to the other, changed by through, which
// returns nil for those to drop, until the files are closed.
func pump(from, to *os.File, through func([]byte) []byte) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if f := through(buf[:n]); f != nil {
			_, _ = to.Write(f) // as on a wire, what cannot be delivered is lost
		}
	}
}

// untag takes the tag off a frame of streamVLAN.
func untag(f []byte) []byte {
	if len(f) < macs+tagSize || binary.BigEndian.Uint16(f[macs:]) != etherVLAN || binary.BigEndian.Uint16(f[macs+2:])&0xfff != streamVLAN {
		return nil
	}
	return slices.Concat(f[:macs], f[macs+tagSize:])
}

func tag(f []byte, id int) []byte {
	t := binary.BigEndian.AppendUint16(nil, etherVLAN)
	return slices.Concat(f[:macs], binary.BigEndian.AppendUint16(t, uint16(id)), f[macs:])
}
