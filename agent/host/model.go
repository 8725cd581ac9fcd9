package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// An 82599 has 64 VFs at most, of which the PF keeps one pool to itself.
	maxModelVFs = 63
	maxModelPFs = 32
	// The largest frame of the 82599 is 9728 bytes with header and CRC.
	defaultMTU = 9000
	maxMTU     = 9700
	// IFNAMSIZ without the terminating zero.
	maxIfName = 15
	// Device of an 82599 VF, and the driver family that serves it.
	modelDeviceID = "8086:10ed"
	modelFamily   = "ixgbevf"
	// IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
	addrGenModeNone = 1
	// The prefix of the alias that marks a tap device as ours.
	aliasPrefix = "compsc"
)

// ModelPF configures one modelled PF.
type ModelPF struct {
	// Name is the PF's name, at most 12 characters.
	Name string
	// VFs is how many VFs it has, 1 to 63.
	VFs int
	// Bridge is the existing bridge that its VFs are wired to.
	Bridge string
	// MTU of the VFs' tap devices, 1280 to 9700.
	MTU int
	// Traits are those of its silicon.
	Traits ModelTraits
}

// ParseModelPF reads a flag's value: comma-separated name=value with name,
// vfs and bridge, and optionally mtu (9000), rx-head-writable (true),
// tx-head-writable (true), multicast-filter-type (0), trust (false) and pf-mtu (1500).
func ParseModelPF(s string) (ModelPF, error) {
	p := ModelPF{MTU: defaultMTU}
	seen := map[string]bool{}
	for _, field := range strings.Split(s, ",") {
		key, value, ok := strings.Cut(field, "=")
		if !ok {
			return p, fmt.Errorf("model PF %q: %q is not name=value", s, field)
		}
		if seen[key] {
			return p, fmt.Errorf("model PF %q: %s is set twice", s, key)
		}
		seen[key] = true
		if err := p.set(key, value); err != nil {
			return p, fmt.Errorf("model PF %q: %s: %w", s, key, err)
		}
	}
	for _, key := range []string{"name", "vfs", "bridge"} {
		if !seen[key] {
			return p, fmt.Errorf("model PF %q: %s is missing", s, key)
		}
	}
	return p, p.validate()
}

func (p *ModelPF) set(key, value string) error {
	number := func(into *int) error {
		n, err := strconv.Atoi(value)
		*into = n
		return err
	}
	boolean := func(into *bool, not bool) error {
		b, err := strconv.ParseBool(value)
		*into = b != not
		return err
	}
	switch key {
	case "name":
		p.Name = value
	case "bridge":
		p.Bridge = value
	case "vfs":
		return number(&p.VFs)
	case "mtu":
		return number(&p.MTU)
	case "rx-head-writable":
		return boolean(&p.Traits.ReadOnlyRXHead, true)
	case "tx-head-writable":
		return boolean(&p.Traits.ReadOnlyTXHead, true)
	case "trust":
		return boolean(&p.Traits.Trust, false)
	case "multicast-filter-type":
		n, err := strconv.ParseUint(value, 10, 2)
		p.Traits.MulticastFilterType = uint32(n)
		return err
	case "pf-mtu":
		return number(&p.Traits.MTU)
	default:
		return errors.New("no such setting")
	}
	return nil
}

func (p *ModelPF) validate() error {
	switch {
	case !ifName(p.Name) || len(p.Name) > maxIfName-len("v62"):
		return fmt.Errorf("model PF name %q: want 1 to %d letters, digits, '-' or '_'", p.Name, maxIfName-len("v62"))
	case !ifName(p.Bridge):
		return fmt.Errorf("model PF %s: bridge %q is no interface name", p.Name, p.Bridge)
	case p.VFs < 1 || p.VFs > maxModelVFs:
		return fmt.Errorf("model PF %s: %d VFs, want 1 to %d", p.Name, p.VFs, maxModelVFs)
	case p.MTU < 1280 || p.MTU > maxMTU:
		return fmt.Errorf("model PF %s: mtu %d, want 1280 to %d", p.Name, p.MTU, maxMTU)
	case p.Traits.MTU != 0 && (p.Traits.MTU < 1280 || p.Traits.MTU > maxMTU):
		return fmt.Errorf("model PF %s: pf-mtu %d, want 1280 to %d", p.Name, p.Traits.MTU, maxMTU)
	}
	return nil
}

func ifName(s string) bool {
	return s != "" && len(s) <= maxIfName && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
}

// Model is a node whose PFs are modelled. It works on the network namespace
// of the thread that calls it, and remembers nothing: what is prepared is
// read from the node's tap devices, so it survives its process. It is safe
// for concurrent use.
type Model struct {
	mu  sync.Mutex
	pfs []ModelPF
	vfs map[string]modelVF
}

type modelVF struct {
	VF
	pf  *ModelPF
	tap string
}

// NewModel returns a node with these PFs. PFs that share a bus are the two
// ports of one 82599: their VFs' addresses interleave, as its VF stride of 2
// has it (0000:03:10.0, 10.2, ... and 10.1, 10.3, ...).
func NewModel(pfs ...ModelPF) (*Model, error) {
	if len(pfs) > maxModelPFs {
		return nil, fmt.Errorf("%d model PFs, at most %d", len(pfs), maxModelPFs)
	}
	m := &Model{pfs: pfs, vfs: map[string]modelVF{}}
	names := map[string]bool{}
	for i := range m.pfs {
		p := &m.pfs[i]
		if err := p.validate(); err != nil {
			return nil, err
		}
		if names[p.Name] {
			return nil, fmt.Errorf("two model PFs are named %s", p.Name)
		}
		names[p.Name] = true
		for n := range p.VFs {
			a := modelAddress(i, n)
			m.vfs[a] = modelVF{VF: VF{Address: a, DeviceID: modelDeviceID, Family: modelFamily}, pf: p, tap: fmt.Sprintf("%sv%d", p.Name, n)}
		}
	}
	return m, nil
}

// modelAddress is the address of the n-th VF of the pf-th port: first VF
// offset 0x80, stride 2 (82599 datasheet, section 9.4.4.5).
func modelAddress(pf, n int) string {
	devfn := 0x80 + 2*n + pf%2
	return fmt.Sprintf("0000:%02x:%02x.%x", 3+pf/2, devfn>>3, devfn&7)
}

// Inventory returns the node's PFs.
func (m *Model) Inventory(context.Context) ([]PF, error) {
	var out []PF
	for i := range m.pfs {
		p := PF{Name: m.pfs[i].Name, Backend: BackendModel}
		for n := range m.pfs[i].VFs {
			p.VFs = append(p.VFs, m.vfs[modelAddress(i, n)].VF)
		}
		out = append(out, p)
	}
	return out, nil
}

// Prepare makes the VF's tap device, wires it to the PF's bridge and opens
// its queue. Repeating it is fine as long as nobody else has the queue open.
// It refuses a MAC that another prepared VF has.
func (m *Model) Prepare(_ context.Context, r Request) (*Prepared, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	vf, ok := m.vfs[r.Address]
	if !ok {
		return nil, fmt.Errorf("this node has no VF %s", r.Address)
	}
	if r.VLAN < 0 || r.VLAN > 4094 {
		return nil, fmt.Errorf("VF %s: VLAN %d, want 0 to 4094", r.Address, r.VLAN)
	}
	mac := strings.ToLower(r.MAC)
	if err := m.checkMAC(vf, mac); err != nil {
		return nil, err
	}
	bridge, err := netlink.LinkByName(vf.pf.Bridge)
	if err != nil {
		return nil, fmt.Errorf("VF %s: bridge %s of PF %s: %w", r.Address, vf.pf.Bridge, vf.pf.Name, err)
	}
	queue, err := openTap(vf.tap)
	if err != nil {
		return nil, fmt.Errorf("VF %s: %w", r.Address, err)
	}
	if err := wire(vf, mac, bridge); err != nil {
		queue.Close()
		return nil, fmt.Errorf("VF %s: tap device %s: %w", r.Address, vf.tap, err)
	}
	return &Prepared{PF: vf.pf.Name, VF: vf.VF, Backend: BackendModel, VLAN: r.VLAN, Trust: vf.pf.Traits.Trust,
		Model: vf.pf.Traits, Files: []*os.File{queue}}, nil
}

// Release removes what Prepare made, also under a device process that still
// has the queue open. It is fine to release what is not prepared.
func (m *Model) Release(_ context.Context, address string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	vf, ok := m.vfs[address]
	if !ok {
		return fmt.Errorf("this node has no VF %s", address)
	}
	link, err := netlink.LinkByName(vf.tap)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("VF %s: tap device %s: %w", address, vf.tap, err)
	}
	if _, tap := link.(*netlink.Tuntap); !tap {
		return fmt.Errorf("VF %s: %s is a %s device, not a tap device: somebody else made it", address, vf.tap, link.Type())
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("VF %s: removing tap device %s: %w", address, vf.tap, err)
	}
	return nil
}

// Held lists nothing: a tap device that outlives its pod is taken by the next
// one, or released with the pod's lease.
func (m *Model) Held(context.Context) ([]string, error) { return nil, nil }

// Settle has nothing to finish: Release leaves nothing.
func (m *Model) Settle(context.Context) error { return nil }

// Settings returns none: nobody administers a model's VFs.
func (m *Model) Settings(context.Context, string) (*Settings, error) { return nil, nil }

// Damage finds nothing: nobody else changes a model.
func (m *Model) Damage(context.Context) ([]Damage, error) { return nil, nil }

// Answer does nothing: a modelled VF answers while it is enabled, and never
// otherwise.
func (m *Model) Answer(context.Context, string, bool) error { return nil }

// Announce does nothing: modelled VFs announce themselves on their wire.
func (m *Model) Announce(context.Context, string, []byte) error { return nil }

// checkMAC scans the prepared VFs for this MAC.
func (m *Model) checkMAC(vf modelVF, mac string) error {
	if mac == "" {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("scanning for MAC %s: %w", mac, err)
	}
	for _, l := range links {
		a, other, ok := parseAlias(l.Attrs().Alias)
		if ok && other == mac && a != vf.Address {
			return fmt.Errorf("VF %s: MAC %s is in use by VF %s of this node: two VFs with one MAC would take each other's traffic; end the pod that holds %s", vf.Address, mac, a, a)
		}
	}
	return nil
}

// alias marks the tap device of a prepared VF.
func alias(address, mac string) string {
	return fmt.Sprintf("%s vf=%s mac=%s", aliasPrefix, address, mac)
}

func parseAlias(s string) (address, mac string, ok bool) {
	f := strings.Split(s, " ")
	if len(f) != 3 || f[0] != aliasPrefix {
		return "", "", false
	}
	address, ok1 := strings.CutPrefix(f[1], "vf=")
	mac, ok2 := strings.CutPrefix(f[2], "mac=")
	return address, mac, ok1 && ok2
}

// openTap opens the queue of the persistent tap device with this name, which
// it makes if there is none.
func openTap(name string) (*os.File, error) {
	// Non-blocking before NewFile, so that the runtime's poller takes it in.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("its queue is open in another process: %w", err)
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tap device %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func wire(vf modelVF, mac string, bridge netlink.Link) error {
	link, err := netlink.LinkByName(vf.tap)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetAlias(link, alias(vf.Address, mac)); err != nil {
		return fmt.Errorf("alias: %w", err)
	}
	if err := netlink.LinkSetMTU(link, vf.pf.MTU); err != nil {
		return fmt.Errorf("mtu %d: %w", vf.pf.MTU, err)
	}
	// The host must not speak into the VF's wire. A kernel without IPv6 has
	// nothing to silence.
	err = netlink.LinkSetIP6AddrGenMode(link, addrGenModeNone)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("address generation: %w", err)
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("bridge %s: %w", bridge.Attrs().Name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	return nil
}
