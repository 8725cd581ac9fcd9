package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"compsc.io/compsc/agent/host/journal"
	"compsc.io/compsc/agent/vfio"
)

// SRIOVOptions configure the real NICs of a node.
type SRIOVOptions struct {
	// Sysfs is where the kernel shows its devices; default /sys.
	Sysfs string
	// Journal is the directory in which the VFs' original state is kept;
	// required, and it must outlive the process.
	Journal string
	// Families names the register family of each vendor:device; VFs of others
	// are not looked at.
	Families map[string]string
	// PFs restricts the PFs by the names of their network interfaces; empty
	// for all.
	PFs []string
}

// SRIOV is a node with SR-IOV NICs. It works on the network namespace of the
// thread that calls it. What it changes of a VF it writes to its journal
// first, and undoes in Release. A VF's MAC is set on its PF only as long as
// Answer, or Prepare, has it so. It is safe for concurrent use.
type SRIOV struct {
	sys      sysfs
	families map[string]string
	only     []string
	journal  *journal.Journal
	links    links
	open     func(VF, sysfs) (api string, files []*os.File, err error)
	inUse    func(VF, sysfs) (bool, error)
	boot     string

	mu sync.Mutex
	// admin serialises looking at a PF's MACs and setting one, which takes
	// moments, beside mu, which what binds drivers holds for seconds.
	admin sync.Mutex
}

// NewSRIOV returns the node's real NICs.
func NewSRIOV(o SRIOVOptions) (*SRIOV, error) {
	if o.Sysfs == "" {
		o.Sysfs = "/sys"
	}
	if o.Journal == "" {
		return nil, errors.New("a directory for the journal of VFs is required")
	}
	j, err := journal.Open(o.Journal)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	if err != nil {
		return nil, fmt.Errorf("boot id: %w", err)
	}
	return &SRIOV{sys: newSysfs(o.Sysfs), families: o.Families, only: o.PFs, journal: j, links: rtnetlink{}, open: openVFIO, inUse: inUse, boot: boot}, nil
}

// openVFIO opens a VF that is bound to vfio-pci, by its cdev where the kernel
// has that.
func openVFIO(v VF, s sysfs) (string, []*os.File, error) {
	cdev, err := s.cdev(v.Address)
	if err != nil {
		return "", nil, err
	}
	if cdev != "" {
		// Without it there may be a group.
		err = s.makeIOMMU(vfio.IOMMUNode, unix.Mknod)
	}
	if cdev != "" && vfio.HasIOMMUFD() {
		files, err := vfio.OpenCdev(cdev)
		return string(vfio.IOMMUFD), files, err
	}
	files, noGroup := vfio.OpenGroup(v.IOMMUGroup, v.Address)
	if noGroup != nil {
		return "", nil, errors.Join(noGroup, err)
	}
	return string(vfio.Group), files, nil
}

// inUse tells whether a process uses a VF that is bound to vfio-pci, by way of
// whichever interface: the kernel lets nobody open its group then, and where
// it has no groups (CONFIG_VFIO_GROUP=n), nobody bind its cdev. An error says
// that it cannot be told.
func inUse(v VF, s sysfs) (bool, error) { return probeUse(v, s, vfio.OpenGroup, vfio.ProbeCdev) }

func probeUse(v VF, s sysfs, openGroup func(int, string) ([]*os.File, error), probeCdev func(string) error) (bool, error) {
	files, err := openGroup(v.IOMMUGroup, v.Address)
	(&Prepared{Files: files}).Close()
	if errors.Is(err, fs.ErrNotExist) {
		cdev, cerr := s.cdev(v.Address)
		switch {
		case cerr != nil:
			err = cerr
		case cdev == "":
			err = fmt.Errorf("%w, and it has no device cdev either", err)
		default:
			if err = s.makeIOMMU(vfio.IOMMUNode, unix.Mknod); err == nil {
				err = probeCdev(cdev)
			}
		}
	}
	if errors.Is(err, vfio.ErrBusy) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("whether a process uses it cannot be told: %w", err)
	}
	return false, nil
}

// Inventory returns the PFs that have VFs of the families.
func (h *SRIOV) Inventory(context.Context) ([]PF, error) {
	functions, err := h.sys.functions()
	if err != nil {
		return nil, fmt.Errorf("inventory: %w", err)
	}
	var out []PF
	for _, address := range functions {
		p, err := h.pf(address)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("inventory: PF %s: %w", address, err)
		}
		if len(p.VFs) > 0 && p.Name != "" && (len(h.only) == 0 || slices.Contains(h.only, p.Name)) {
			out = append(out, p)
		}
	}
	return out, nil
}

// pf reads one PF with those of its VFs that are of a known family.
func (h *SRIOV) pf(address string) (PF, error) {
	p := PF{Address: address, Backend: BackendVFIO}
	var err error
	if p.VFs, err = h.sys.vfs(address); err != nil {
		return p, err
	}
	p.VFs = slices.DeleteFunc(p.VFs, func(v VF) bool { return h.families[v.DeviceID] == "" })
	if len(p.VFs) == 0 {
		return p, nil
	}
	for i := range p.VFs {
		p.VFs[i].Family = h.families[p.VFs[i].DeviceID]
	}
	if p.Name, err = h.sys.netdev(address); err != nil || p.Name == "" {
		return p, err
	}
	if p.TotalVFs, err = h.sys.number(h.sys.device(address, "sriov_totalvfs"), 0); err != nil {
		return p, err
	}
	if p.NUMANode, err = h.sys.number(h.sys.device(address, "numa_node"), -1); err != nil {
		return p, err
	}
	if p.Driver, err = h.sys.link(h.sys.device(address, "driver")); err != nil {
		return p, err
	}
	// Informative: a PF whose driver does not tell is none the worse.
	if _, version, firmware, err := h.links.driver(p.Name); err == nil {
		p.DriverVersion, p.Firmware = version, firmware
	}
	return p, nil
}

// find returns a VF with its PF.
func (h *SRIOV) find(address string) (PF, VF, error) {
	if !pciAddress.MatchString(address) {
		return PF{}, VF{}, fmt.Errorf("VF %.32q: want a PCI address such as 0000:03:10.0", address)
	}
	pfAddress, err := h.sys.link(h.sys.device(address, "physfn"))
	if err != nil || pfAddress == "" {
		return PF{}, VF{}, fmt.Errorf("this node has no VF %s (%v)", address, err)
	}
	p, err := h.pf(pfAddress)
	if err != nil {
		return PF{}, VF{}, fmt.Errorf("PF %s of VF %s: %w", pfAddress, address, err)
	}
	i := slices.IndexFunc(p.VFs, func(v VF) bool { return v.Address == address })
	if i < 0 || p.Name == "" || len(h.only) > 0 && !slices.Contains(h.only, p.Name) {
		return PF{}, VF{}, fmt.Errorf("VF %s of PF %s %q is not one that compsc serves here", address, pfAddress, p.Name)
	}
	return p, p.VFs[i], nil
}

// Prepare writes down how the VF is, gives it the MAC and the VLAN, binds it
// to vfio-pci and opens it. It refuses a MAC that the PF or another of its VFs
// has. Repeating it is harmless, and while a process uses the VF it changes
// nothing and fails. If it fails the first time, everything is put back.
func (h *SRIOV) Prepare(ctx context.Context, r Request) (*Prepared, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.VLAN < 0 || r.VLAN > 4094 {
		return nil, fmt.Errorf("VF %s: VLAN %d, want 0 to 4094", r.Address, r.VLAN)
	}
	if _, err := net.ParseMAC(r.MAC); r.MAC != "" && err != nil {
		return nil, fmt.Errorf("VF %s: %w", r.Address, err)
	}
	p, v, err := h.find(r.Address)
	if err != nil {
		return nil, err
	}
	if v.Obstacle != "" {
		return nil, fmt.Errorf("VF %s: %s", v.Address, v.Obstacle)
	}
	l, err := h.links.get(p.Name)
	if err != nil {
		return nil, err
	}
	have, err := settingsOf(l, p.Name, v.Index)
	if err != nil {
		return nil, err
	}
	if !l.up {
		return nil, fmt.Errorf("VF %s: its PF %s is down: bring it up (ip link set %s up)", v.Address, p.Name, p.Name)
	}
	if err := checkUnique(l, p.Name, v.Address, v.Index, r.MAC); err != nil {
		return nil, err
	}
	if v.Driver == vfioPCI {
		// To open a device cdev is anybody's: only the second to bind it fails.
		used, err := h.inUse(v, h.sys)
		if err == nil && used {
			err = vfio.ErrBusy
		}
		if err != nil {
			return nil, fmt.Errorf("VF %s: %w", v.Address, err)
		}
	}
	first, err := h.record(p, v, have, r.MAC)
	if err != nil {
		return nil, err
	}
	out, err := h.prepare(ctx, p, v, r)
	if err == nil {
		return out, nil
	}
	if first {
		err = errors.Join(err, h.release(context.WithoutCancel(ctx), v.Address))
	}
	return nil, fmt.Errorf("VF %s: %w", v.Address, err)
}

// record writes down how the VF is, unless that is written down; first tells
// that it was not.
func (h *SRIOV) record(p PF, v VF, have journal.Settings, mac string) (first bool, err error) {
	node, err := h.sys.node(v.Address)
	if err != nil {
		return false, err
	}
	e, ok, err := h.journal.Load(v.Address)
	if err != nil {
		return false, err
	}
	if ok && h.current(e, node) {
		e.Released, e.PreparedMAC = false, mac
		return false, h.journal.Save(e)
	}
	override, err := h.sys.override(v.Address)
	if err != nil {
		return false, fmt.Errorf("VF %s: %w", v.Address, err)
	}
	n, err := h.sys.number(h.sys.device(p.Address, "sriov_numvfs"), 0)
	if err != nil {
		return false, err
	}
	return true, h.journal.Save(journal.Entry{VF: v.Address, PF: p.Address, Index: v.Index, Boot: h.boot, Node: node, VFs: n,
		Driver: v.Driver, Override: override, Settings: have, PreparedMAC: mac})
}

// current tells whether an entry is about the VF that is there now.
func (h *SRIOV) current(e journal.Entry, node uint64) bool { return e.Boot == h.boot && e.Node == node }

func (h *SRIOV) prepare(ctx context.Context, p PF, v VF, r Request) (*Prepared, error) {
	if err := h.sys.bind(ctx, v.Address, vfioPCI, vfioPCI); err != nil {
		return nil, err
	}
	want, err := h.administer(p.Name, v.Address, v.Index, func(s *journal.Settings) {
		switch {
		case r.Silent:
			s.MAC = noMAC
		case r.MAC != "":
			s.MAC = r.MAC
		}
		if r.VLAN != 0 && r.VLAN != s.VLAN {
			s.VLAN, s.QoS, s.Proto = r.VLAN, 0, 0
		}
	})
	if err != nil {
		return nil, err
	}
	v.Driver = vfioPCI
	api, files, err := h.open(v, h.sys)
	if err != nil {
		return nil, err
	}
	return &Prepared{PF: p.Name, VF: v, Backend: BackendVFIO, API: api, VLAN: want.VLAN, Trust: want.Trust, Files: files}, nil
}

// Release puts the VF back the way it was before Prepare: the PF's settings at
// once, but for the VM's own MAC, if a network plugin had set that before, for
// the VM may have it elsewhere; and the driver when no process uses the VF any
// more, which Settle then sees to. It is fine to release what is not prepared, or no longer there.
func (h *SRIOV) Release(ctx context.Context, address string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.release(ctx, address); err != nil {
		return fmt.Errorf("VF %s: %w", address, err)
	}
	return nil
}

func (h *SRIOV) release(ctx context.Context, address string) error {
	e, ok, err := h.journal.Load(address)
	if err != nil || !ok {
		return err
	}
	node, err := h.sys.node(address)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !h.current(e, node) {
		// The VF went, and all settings with it; one that came back in its
		// place is as its PF made it.
		return h.journal.Remove(address)
	}
	if err != nil {
		return err
	}
	if !e.Released {
		pf, err := h.sys.netdev(e.PF)
		if err == nil && pf == "" {
			err = fmt.Errorf("its PF %s has no network interface now: the settings are put back when it has one", e.PF)
		}
		if err != nil {
			return err
		}
		if _, err := h.administer(pf, "", e.Index, func(s *journal.Settings) { *s = original(e) }); err != nil {
			return err
		}
		e.Released = true
		if err := h.journal.Save(e); err != nil {
			return err
		}
	}
	return h.rebind(ctx, e)
}

// rebind gives the VF back to its driver, unless a process uses it.
func (h *SRIOV) rebind(ctx context.Context, e journal.Entry) error {
	driver, err := h.sys.link(h.sys.device(e.VF, "driver"))
	if err != nil {
		return err
	}
	if driver == vfioPCI && e.Driver != vfioPCI {
		// vfio-pci does not let go before the process has.
		group, _, err := h.sys.group(e.VF)
		if err != nil {
			return err
		}
		used, err := h.inUse(VF{Address: e.VF, IOMMUGroup: group}, h.sys)
		if err != nil || used {
			return err
		}
	}
	if err := h.sys.bind(ctx, e.VF, e.Driver, e.Override); err != nil {
		return err
	}
	return h.journal.Remove(e.VF)
}

// Settle finishes what Release had to leave because a process used the VF.
func (h *SRIOV) Settle(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	list, err := h.journal.List()
	if err != nil {
		return err
	}
	var errs []error
	for _, address := range list {
		e, ok, err := h.journal.Load(address)
		if err == nil && ok && e.Released {
			err = h.release(ctx, address)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("VF %s: %w", address, err))
		}
	}
	return errors.Join(errs...)
}

// Held lists the VFs that were prepared and not released, also by an agent
// before this one. An error names the entries of the journal that cannot be
// read; the list has all others.
func (h *SRIOV) Held(context.Context) ([]string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list, err := h.journal.List()
	if err != nil {
		return nil, err
	}
	var out []string
	var errs []error
	for _, address := range list {
		e, ok, err := h.journal.Load(address)
		if err != nil {
			errs = append(errs, err)
		} else if ok && !e.Released {
			out = append(out, address)
		}
	}
	return out, errors.Join(errs...)
}

// Damage says what has happened to prepared VFs behind compsc's back: VFs that
// are gone, PFs with another number of VFs, drivers and addresses that
// somebody changed, and what was written of them that cannot be read. Those
// VMs cannot be moved, and may have lost their network.
func (h *SRIOV) Damage(context.Context) ([]Damage, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	list, err := h.journal.List()
	if err != nil {
		return nil, err
	}
	var out []Damage
	for _, address := range list {
		e, ok, err := h.journal.Load(address)
		switch {
		case err != nil:
			out = append(out, Damage{address, err.Error()})
		case ok && !e.Released:
			out = append(out, h.damage(e)...)
		}
	}
	return out, nil
}

func (h *SRIOV) damage(e journal.Entry) (out []Damage) {
	say := func(format string, args ...any) {
		out = append(out, Damage{e.VF, fmt.Sprintf(format, args...)})
	}
	if node, err := h.sys.node(e.VF); errors.Is(err, fs.ErrNotExist) {
		say("it was removed while it was in use; restart the pod that holds it")
		return out
	} else if err != nil || !h.current(e, node) {
		say("it was removed while it was in use, and another is in its place; restart the pod that holds it")
		return out
	}
	if n, err := h.sys.number(h.sys.device(e.PF, "sriov_numvfs"), 0); err == nil && n != e.VFs {
		say("its PF %s had %d VFs when it was prepared, and has %d", e.PF, e.VFs, n)
	}
	if d, err := h.sys.link(h.sys.device(e.VF, "driver")); err == nil && d != vfioPCI {
		say("it was bound to %s and is bound to %q", vfioPCI, d)
	}
	pf, err := h.sys.netdev(e.PF)
	if err != nil || pf == "" {
		say("its PF %s has no network interface: its driver was unbound", e.PF)
		return out
	}
	l, err := h.links.get(pf)
	if err != nil {
		say("%v", err)
		return out
	}
	if !l.up {
		say("its PF %s is down", pf)
	}
	if s, err := settingsOf(l, pf, e.Index); err != nil {
		say("%v", err)
	} else if e.PreparedMAC != "" && s.MAC != noMAC && !strings.EqualFold(s.MAC, e.PreparedMAC) {
		say("PF %s has MAC %s for it, it was prepared with %s", pf, s.MAC, e.PreparedMAC)
	}
	return out
}

// Announce transmits a frame on the VF's network, in its port VLAN if it has
// one, so that switches learn where its sender is. It changes nothing, and
// waits for no VF that is being prepared or released: a VM that has just moved
// is out of reach until it is through.
func (h *SRIOV) Announce(_ context.Context, address string, frame []byte) error {
	if len(frame) < 14 || len(frame) > 1514 {
		return fmt.Errorf("VF %s: a frame of %d bytes to announce", address, len(frame))
	}
	p, v, err := h.find(address)
	if err != nil {
		return err
	}
	l, err := h.links.get(p.Name)
	if err != nil {
		return err
	}
	s, err := settingsOf(l, p.Name, v.Index)
	if err != nil {
		return err
	}
	if err := h.links.send(p.Name, tagged(frame, s.VLAN, s.QoS, s.Proto)); err != nil {
		return fmt.Errorf("VF %s: announcing through PF %s: %w", address, p.Name, err)
	}
	return nil
}
