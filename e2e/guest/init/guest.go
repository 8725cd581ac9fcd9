package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/safchain/ethtool"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"compsc.io/compsc/e2e/guest/proto"
	"compsc.io/compsc/e2e/pid1"
	"compsc.io/compsc/e2e/stream"
)

// guest is what the commands work on. handle is called by one goroutine only.
type guest struct {
	config config
	log    *kernelLog
	frames *frames

	mu        sync.Mutex
	broken    error // why the network could not be set up
	streams   []guestStream
	multicast map[string]*atomic.Uint64 // datagrams, by interface

	joining sync.Mutex // held while groups are joined and left
	groups  map[membership]*net.UDPConn
}

// membership is a multicast group that is joined on an interface.
type membership struct{ device, group string }

type guestStream struct {
	peer string
	*stream.Stream
}

// start brings up the network and the services on it.
func (g *guest) start() error {
	if err := pid1.LoadModules(nil); err != nil {
		return err
	}
	// Before the network: whoever reaches the address finds the port open.
	listener, err := net.Listen("tcp", fmt.Sprintf(":%d", stream.Port))
	if err != nil {
		return err
	}
	go g.serveStreams(listener)
	if err := configureNetwork(g.config); err != nil {
		return err
	}
	return g.listenMulticast()
}

func (g *guest) setBroken(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.broken = err
}

func (g *guest) serveStreams(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			g.setBroken(fmt.Errorf("streams: %w", err))
			return
		}
		go func() {
			s, err := stream.Serve(context.Background(), conn)
			if err != nil {
				fmt.Fprintln(os.Stderr, "init:", err)
				return
			}
			g.mu.Lock()
			defer g.mu.Unlock()
			g.streams = append(g.streams, guestStream{conn.RemoteAddr().String(), s})
		}()
	}
}

// listenMulticast joins the test's multicast group on every PCI interface.
func (g *guest) listenMulticast() error {
	devices, err := pciNetDevices()
	if err != nil {
		return err
	}
	for _, device := range devices {
		if err := g.setGroup(device.name, proto.MulticastGroup, true); err != nil {
			return err
		}
	}
	return nil
}

// setGroup joins or leaves a multicast group, and counts the datagrams of
// proto.MulticastGroup.
func (g *guest) setGroup(device, group string, join bool) error {
	g.joining.Lock()
	defer g.joining.Unlock()
	member := membership{device, group}
	conn := g.groups[member]
	switch {
	case join == (conn != nil):
		return nil
	case !join:
		delete(g.groups, member)
		return conn.Close()
	}
	ip := net.ParseIP(group).To4()
	if ip == nil || !ip.IsMulticast() {
		return fmt.Errorf("%q is not the address of an IPv4 multicast group", group)
	}
	ifi, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	if conn, err = net.ListenMulticastUDP("udp4", ifi, &net.UDPAddr{IP: ip, Port: proto.MulticastPort}); err != nil {
		return fmt.Errorf("%s: joining %s: %w", device, group, err)
	}
	if g.groups == nil {
		g.groups = map[membership]*net.UDPConn{}
	}
	g.groups[member] = conn
	n := &atomic.Uint64{}
	if group == proto.MulticastGroup {
		n = g.multicastCounter(device)
	}
	go count(conn, n)
	return nil
}

// leaveGroups leaves all groups: their sockets would not join on interfaces
// to come, but receive from them.
func (g *guest) leaveGroups() {
	g.joining.Lock()
	defer g.joining.Unlock()
	for member, conn := range g.groups {
		delete(g.groups, member)
		_ = conn.Close() // the group is left even so
	}
}

func (g *guest) multicastCounter(name string) *atomic.Uint64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.multicast == nil {
		g.multicast = map[string]*atomic.Uint64{}
	}
	if g.multicast[name] == nil {
		g.multicast[name] = &atomic.Uint64{}
	}
	return g.multicast[name]
}

func count(conn *net.UDPConn, n *atomic.Uint64) {
	defer conn.Close()
	buf := make([]byte, 64<<10)
	for {
		if _, _, err := conn.ReadFromUDP(buf); err != nil {
			return
		}
		n.Add(1)
	}
}

// handle carries out one request.
func (g *guest) handle(request proto.Request) proto.Response {
	response, err := g.dispatch(request)
	if err != nil {
		response.Error = err.Error()
	}
	return response
}

func (g *guest) dispatch(request proto.Request) (proto.Response, error) {
	var response proto.Response
	var err error
	switch request.Op {
	case proto.OpInfo:
		response.Info, err = g.info()
	case proto.OpStats:
		response.Stats, err = g.stats()
	case proto.OpResets:
		response.Resets = g.log.signs()
	case proto.OpStreams:
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, s := range g.streams {
			response.Streams = append(response.Streams, proto.Stream{Peer: s.peer, Stats: s.Stats()})
		}
	case proto.OpFrames:
		response.Frames = g.frames.seen()
	case proto.OpSettings:
		var devices []netDevice
		if devices, err = pciNetDevices(); err == nil && len(devices) == 0 {
			err = errors.New("the guest has no PCI network interface")
		}
		if err == nil {
			response.Settings, err = settings(devices[0].name)
		}
	case proto.OpRun:
		if request.Action == nil {
			return response, errors.New("no action is named")
		}
		err = g.act(*request.Action)
	default:
		err = fmt.Errorf("there is no operation %q", request.Op)
	}
	return response, err
}

func (g *guest) info() (*proto.Info, error) {
	g.mu.Lock()
	broken := g.broken
	g.mu.Unlock()
	if broken != nil {
		return nil, fmt.Errorf("the guest could not be set up: %w", broken)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return nil, err
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	devices, err := pciNetDevices()
	if err != nil {
		return nil, err
	}
	info := &proto.Info{Uptime: time.Duration(now.Nano()), Kernel: unix.ByteSliceToString(name.Release[:])}
	for _, device := range devices {
		described, err := describe(device)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", device.name, err)
		}
		info.Interfaces = append(info.Interfaces, described)
	}
	found, err := os.ReadDir("/sys/bus/pci/devices")
	for _, device := range found {
		info.PCI = append(info.PCI, device.Name())
	}
	return info, err
}

func describe(device netDevice) (proto.Interface, error) {
	link, err := netlink.LinkByName(device.name)
	if err != nil {
		return proto.Interface{}, err
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return proto.Interface{}, err
	}
	defer tool.Close()
	driver, err := tool.DriverInfo(device.name)
	if err != nil {
		return proto.Interface{}, err
	}
	downs, err := readCounter(filepath.Join("/sys/class/net", device.name, "carrier_down_count"))
	if err != nil {
		return proto.Interface{}, err
	}
	attrs := link.Attrs()
	described := proto.Interface{
		Name: device.name, PCI: device.pci, Driver: driver.Driver, DriverVersion: driver.Version,
		MAC: attrs.HardwareAddr.String(), MTU: attrs.MTU,
		Up: attrs.RawFlags&unix.IFF_UP != 0, Carrier: attrs.RawFlags&unix.IFF_LOWER_UP != 0,
		CarrierDowns: downs,
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return proto.Interface{}, err
	}
	for _, address := range addresses {
		described.Addresses = append(described.Addresses, address.IPNet.String())
	}
	return described, nil
}

func (g *guest) stats() ([]proto.Stats, error) {
	devices, err := pciNetDevices()
	if err != nil {
		return nil, err
	}
	table, err := os.ReadFile("/proc/interrupts")
	if err != nil {
		return nil, err
	}
	tool, err := ethtool.NewEthtool()
	if err != nil {
		return nil, err
	}
	defer tool.Close()
	var all []proto.Stats
	for _, device := range devices {
		s := proto.Stats{
			Interface: device.name, Kernel: map[string]uint64{},
			Interrupts: interrupts(string(table), device.name, device.pci),
			Multicast:  g.multicastCounter(device.name).Load(),
		}
		if s.Driver, err = tool.Stats(device.name); err != nil {
			return nil, fmt.Errorf("%s: statistics of the driver: %w", device.name, err)
		}
		files, err := filepath.Glob(filepath.Join("/sys/class/net", device.name, "statistics/*"))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			if s.Kernel[filepath.Base(file)], err = readCounter(file); err != nil {
				return nil, err
			}
		}
		all = append(all, s)
	}
	return all, nil
}

func readCounter(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}
