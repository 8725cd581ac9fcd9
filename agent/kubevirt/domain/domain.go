// Package domain puts a VM's VFs into its libvirt domain, as virt-launcher is
// about to define it:
//
//   - guest RAM in a memfd that is shared, so that the device process can map it,
//     and allocated at once by QEMU: pages are charged to the container that
//     touches them first, and the sidecar, which may have a limit of 64 MB, is
//     not to pay for what its VF's DMA reaches or pins;
//   - one vfio-user-pci device for each VF, at its place on PCI bus 0, which
//     libvirt does not know and so leaves alone (QEMU 10.1 or later);
//   - the switchover gate: two block nodes without a device, NBD and qcow2 on
//     top of it (see package gate for why two);
//   - a second QMP monitor, for the device process;
//   - one <interface> for each VF by which KubeVirt knows it, and which the
//     guest cannot find (see nominal).
//
// Everything but these is left as it is, byte for byte. All paths must be the
// same on both nodes of a migration: the domain moves with the VM.
package domain

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"
)

// maxDocument bounds a domain's XML; KubeVirt's are a few dozen KiB.
const maxDocument = 4 << 20

// prefix marks QEMU's objects that are ours.
const prefix = "compsc-"

// VF is one VF of the VM.
type VF struct {
	// Name is that of the VMI's interface.
	Name string
	// MAC is what KubeVirt shows as the interface's address; empty to have
	// libvirt make one up.
	MAC string
	// Slot is its device number on bus 0 of the guest, 1 to 31.
	Slot int
	// Socket is its vfio-user socket as QEMU sees it.
	Socket string
}

// Config is what a VM gets. Paths are as QEMU sees them.
type Config struct {
	// VFs of the VM, at least one.
	VFs []VF
	// Gate is the socket of the switchover gate.
	Gate string
	// Monitor is where QEMU makes the socket of its second monitor.
	Monitor string
}

// Define returns the domain with what c says. Doing it again changes nothing.
// A domain that cannot work with a VF is refused, with an error that names the
// element and what to change in the VMI.
func Define(doc []byte, c Config) ([]byte, error) {
	if len(doc) > maxDocument {
		return nil, fmt.Errorf("domain XML of %d bytes, at most %d", len(doc), maxDocument)
	}
	if err := c.validate(); err != nil {
		return nil, err
	}
	l, err := scan(doc)
	if err != nil {
		return nil, fmt.Errorf("domain XML: %w", err)
	}
	if err := l.possible(); err != nil {
		return nil, err
	}
	own, known := nominal(c.VFs)
	if err := l.conflicts(c.VFs, known); err != nil {
		return nil, err
	}
	if err := l.shareMemory(); err != nil {
		return nil, err
	}
	args, err := c.args()
	if err != nil {
		return nil, err
	}
	passed := l.qemuCommandline
	passed.Args = foreign(passed.Args)
	for _, a := range args {
		passed.Args = append(passed.Args, libvirtxml.DomainQEMUCommandlineArg{Value: a})
	}
	memory, err := element(l.memoryBacking, "memoryBacking")
	if err != nil {
		return nil, err
	}
	commandline, err := element(passed, "")
	if err != nil {
		return nil, err
	}
	edits := []edit{{l.memory, memory}, {l.commandline, commandline}}
	for _, i := range l.interfaces {
		if known[i.alias] {
			edits = append(edits, edit{i.span, nil})
		}
	}
	var interfaces []byte
	for _, i := range own {
		b, err := element(i, "")
		if err != nil {
			return nil, err
		}
		interfaces = append(interfaces, b...)
	}
	return replace(doc, append(edits, edit{l.devices, interfaces})), nil
}

func (c Config) validate() error {
	if len(c.VFs) == 0 {
		return errors.New("no VF for the domain")
	}
	if len(c.VFs) > maxVFs {
		return fmt.Errorf("%d VFs for the domain, at most %d", len(c.VFs), maxVFs)
	}
	paths := []string{c.Gate, c.Monitor}
	slots, names := map[int]bool{}, map[string]bool{}
	for _, v := range c.VFs {
		if !interfaceName.MatchString(v.Name) || names[v.Name] {
			return fmt.Errorf("%.64q is not the name of an interface, or given twice", v.Name)
		}
		names[v.Name] = true
		if v.Slot < 1 || v.Slot > 31 || slots[v.Slot] {
			return fmt.Errorf("PCI slot %#x is not between 1 and 0x1f, or given twice", v.Slot)
		}
		slots[v.Slot] = true
		paths = append(paths, v.Socket)
	}
	for _, p := range paths {
		// QEMU splits the arguments of its monitor at commas; 107 bytes is what
		// a unix socket's address holds (unix(7)).
		if !strings.HasPrefix(p, "/") || strings.Contains(p, ",") || len(p) > 107 {
			return fmt.Errorf("%q is not an absolute path of at most 107 bytes without a comma", p)
		}
	}
	return nil
}

// possible refuses what no VF can be given to.
func (l *layout) possible() error {
	if l.kind != "kvm" && l.kind != "qemu" {
		return fmt.Errorf("domain type %q: QEMU is needed", l.kind)
	}
	// While it prepares a migration's target, virt-launcher shows a domain that
	// tells no architecture (prepareMigrationTarget in KubeVirt 1.8).
	if (l.arch != "x86_64" && l.arch != "") || (l.machine != "q35" && !strings.HasPrefix(l.machine, "pc-q35-")) {
		return fmt.Errorf("machine %q of architecture %q: set spec.domain.machine.type to q35, on x86_64", l.machine, l.arch)
	}
	if l.encrypted {
		return errors.New("launchSecurity: a VF cannot reach encrypted memory; remove spec.domain.launchSecurity from the VMI")
	}
	if l.iommu {
		return errors.New("iommu: a VF behind an emulated IOMMU cannot be moved; remove the IOMMU from the VM")
	}
	return nil
}

// shareMemory asks for guest RAM that another process can map.
func (l *layout) shareMemory() error {
	const why = "a VF needs guest memory that is shared, in a memfd"
	m := l.memoryBacking
	if m.MemoryHugePages != nil && m.MemorySource == nil {
		return errors.New("memoryBacking: huge pages without a memfd: " + why +
			"; remove the annotation kubevirt.io/memfd: \"false\" from the VMI")
	}
	if m.MemorySource == nil {
		m.MemorySource = &libvirtxml.DomainMemorySource{Type: "memfd"}
	}
	if m.MemorySource.Type != "memfd" {
		return fmt.Errorf("memoryBacking: source of type %q: %s", m.MemorySource.Type, why)
	}
	if m.MemoryAccess == nil {
		m.MemoryAccess = &libvirtxml.DomainMemoryAccess{Mode: "shared"}
	}
	if m.MemoryAccess.Mode != "shared" {
		return fmt.Errorf("memoryBacking: access of mode %q: %s", m.MemoryAccess.Mode, why)
	}
	m.MemoryAllocation = allocate(m.MemoryAllocation)
	if l.private != "" {
		return fmt.Errorf("%s is private: %s", l.private, why)
	}
	return nil
}

func allocate(have *libvirtxml.DomainMemoryAllocation) *libvirtxml.DomainMemoryAllocation {
	if have == nil {
		have = &libvirtxml.DomainMemoryAllocation{}
	}
	have.Mode = "immediate"
	return have
}

// args are QEMU's arguments for c.
func (c Config) args() ([]string, error) {
	socket := func(path string) map[string]string { return map[string]string{"type": "unix", "path": path} }
	var out []string
	var err error
	add := func(flag string, v map[string]any) {
		b, jerr := json.Marshal(v)
		err = errors.Join(err, jerr)
		out = append(out, flag, string(b))
	}
	// With reconnect-delay, in seconds, the gate survives a restart of the
	// device process.
	add("-blockdev", map[string]any{"driver": "nbd", "node-name": prefix + "nbd", "export": "", "reconnect-delay": 3, "server": socket(c.Gate)})
	add("-blockdev", map[string]any{"driver": "qcow2", "node-name": prefix + "gate", "file": prefix + "nbd"})
	out = append(out,
		"-chardev", "socket,id="+prefix+"qmp,path="+c.Monitor+",server=on,wait=off",
		"-mon", "chardev="+prefix+"qmp,mode=control")
	for _, v := range c.VFs {
		add("-device", map[string]any{
			"driver": "vfio-user-pci", "id": fmt.Sprintf("%svf%02x", prefix, v.Slot), "bus": "pcie.0",
			"addr": fmt.Sprintf("%#x", v.Slot), "rombar": 0, "socket": socket(v.Socket),
			"x-msg-timeout": messageTimeout.Milliseconds(),
		})
	}
	return out, err
}

// messageTimeout is how long QEMU waits for an answer of the device process. Its
// own 5 s are too short for the first: the kernel locks all of the guest's RAM
// before it is given to a real VF, at a second for some GiB, as it does for a VF
// that QEMU has itself. A device process that ends is noticed at once.
const messageTimeout = 2 * time.Minute

// foreign returns the arguments that are not ours.
func foreign(args []libvirtxml.DomainQEMUCommandlineArg) []libvirtxml.DomainQEMUCommandlineArg {
	var out []libvirtxml.DomainQEMUCommandlineArg
	for i := 0; i < len(args); i++ {
		switch args[i].Value {
		case "-blockdev", "-chardev", "-mon", "-device":
			if i+1 < len(args) && isOwn(args[i+1].Value) {
				i++
				continue
			}
		}
		out = append(out, args[i])
	}
	return out
}

// isOwn tells whether the value of an argument defines or uses an object of
// ours.
func isOwn(value string) bool {
	var v struct {
		ID   string `json:"id"`
		Node string `json:"node-name"`
	}
	if json.Unmarshal([]byte(value), &v) == nil {
		return strings.HasPrefix(v.ID, prefix) || strings.HasPrefix(v.Node, prefix)
	}
	for part := range strings.SplitSeq(value, ",") {
		if k, v, _ := strings.Cut(part, "="); (k == "id" || k == "chardev") && strings.HasPrefix(v, prefix) {
			return true
		}
	}
	return false
}

func element(v any, name string) ([]byte, error) {
	var b strings.Builder
	e := xml.NewEncoder(&b)
	var err error
	if name == "" {
		err = e.Encode(v)
	} else {
		err = e.EncodeElement(v, xml.StartElement{Name: xml.Name{Local: name}})
	}
	return []byte(b.String()), errors.Join(err, e.Close())
}
