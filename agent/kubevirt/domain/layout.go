package domain

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"libvirt.org/go/libvirtxml"
)

const qemuNamespace = "http://libvirt.org/schemas/domain/qemu/1.0"

// span is where an element is in a document.
type span struct{ start, end int64 }

// edit replaces a part of a document.
type edit struct {
	span
	with []byte
}

// network is an element interface.
type network struct {
	span
	alias string
	// slot is the guest's device number on PCI bus 0, if it names one.
	slot  uint64
	onBus bool
}

// layout is what a domain's XML says that matters here. The whole of libvirtxml's
// Domain is not used: what it takes to decode that stays in memory, about as much
// as the whole device process needs.
type layout struct {
	// memoryBacking and qemuCommandline are the elements that change, memory and
	// commandline where they are; empty, at the document's end, if it has none.
	memoryBacking       *libvirtxml.DomainMemoryBacking
	qemuCommandline     *libvirtxml.DomainQEMUCommandline
	memory, commandline span
	// devices is where more of them can be put.
	devices span
	// interfaces are the domain's.
	interfaces []network
	// kind is the domain's type, arch and machine those of its guest.
	kind, arch, machine string
	// users are the guest's devices by their device number on PCI bus 0, but
	// for the interfaces.
	users map[uint64]string
	// iommu tells whether the guest has one, encrypted whether its memory is.
	iommu, encrypted bool
	// private names a part of the guest's memory that is not shared.
	private string
}

// scan reads the document.
func scan(doc []byte) (*layout, error) {
	l := &layout{users: map[uint64]string{}, memoryBacking: &libvirtxml.DomainMemoryBacking{}, qemuCommandline: &libvirtxml.DomainQEMUCommandline{}}
	dec := xml.NewDecoder(bytes.NewReader(doc))
	var path []string
	for {
		at := dec.InputOffset()
		t, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		switch e := t.(type) {
		case xml.StartElement:
			var own any
			var where *span
			switch {
			case len(path) != 1:
			case e.Name.Local == "memoryBacking" && e.Name.Space == "":
				own, where = l.memoryBacking, &l.memory
			case e.Name.Local == "commandline" && e.Name.Space == qemuNamespace:
				own, where = l.qemuCommandline, &l.commandline
			}
			if own != nil {
				if *where != (span{}) {
					return nil, fmt.Errorf("two elements %s", e.Name.Local)
				}
				if err := dec.DecodeElement(own, &e); err != nil {
					return nil, err
				}
				*where = span{at, dec.InputOffset()}
				continue
			}
			path = append(path, e.Name.Local)
			if isInterface(path) {
				l.interfaces = append(l.interfaces, network{span: span{start: at}})
			}
			if err := l.element(path, e.Attr); err != nil {
				return nil, err
			}
		case xml.EndElement:
			switch {
			case isInterface(path):
				l.interfaces[len(l.interfaces)-1].end = dec.InputOffset()
			case len(path) == 2 && path[1] == "devices":
				if l.devices != (span{}) {
					return nil, errors.New("two elements devices")
				}
				// Of <devices/>, this is behind it.
				if at == dec.InputOffset() {
					return nil, errors.New("no devices")
				}
				l.devices = span{at, at}
			}
			if len(path) == 1 {
				end := span{at, at}
				if l.memory == (span{}) {
					l.memory = end
				}
				if l.commandline == (span{}) {
					l.commandline = end
				}
			}
			path = path[:len(path)-1]
		}
	}
	if l.memory == (span{}) {
		return nil, errors.New("no element domain")
	}
	if l.devices == (span{}) {
		return nil, errors.New("no element devices")
	}
	return l, nil
}

func isInterface(path []string) bool {
	return slices.Equal(path, []string{"domain", "devices", "interface"})
}

// element looks at one element.
func (l *layout) element(path []string, attrs []xml.Attr) error {
	get := func(name string) string {
		for _, a := range attrs {
			if a.Name.Local == name {
				return a.Value
			}
		}
		return ""
	}
	switch {
	case len(path) == 1 && path[0] != "domain":
		return fmt.Errorf("element %s, want domain", path[0])
	case len(path) == 1:
		l.kind = get("type")
	case slices.Equal(path, []string{"domain", "os", "type"}):
		l.arch, l.machine = get("arch"), get("machine")
	case slices.Equal(path, []string{"domain", "launchSecurity"}):
		l.encrypted = true
	case slices.Equal(path, []string{"domain", "devices", "iommu"}):
		l.iommu = true
	case slices.Equal(path, []string{"domain", "cpu", "numa", "cell"}) && get("memAccess") == "private":
		l.private = "cpu: NUMA cell " + get("id")
	case slices.Equal(path, []string{"domain", "devices", "memory"}) && get("access") == "private":
		l.private = "a memory device"
	case len(path) == 4 && isInterface(path[:3]) && path[3] == "alias":
		l.interfaces[len(l.interfaces)-1].alias = get("name")
	// The address of a device's source is the host's.
	case len(path) == 4 && path[1] == "devices" && path[3] == "address" && get("type") == "pci":
		domain, err1 := number(get("domain"))
		bus, err2 := number(get("bus"))
		slot, err3 := number(get("slot"))
		if err := errors.Join(err1, err2, err3); err != nil {
			return fmt.Errorf("PCI address of a %s: %w", path[2], err)
		}
		switch {
		case domain != 0 || bus != 0:
		case isInterface(path[:3]):
			i := &l.interfaces[len(l.interfaces)-1]
			i.slot, i.onBus = slot, true
		default:
			l.users[slot] = path[2]
		}
	}
	return nil
}

// number reads what libvirt takes for a number; absent is 0.
func number(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	return strconv.ParseUint(s, 0, 32)
}

// conflicts refuses VFs where the guest has something else, and devices where
// the nominal interfaces are to be, but for those with these aliases.
func (l *layout) conflicts(vfs []VF, nominal map[string]bool) error {
	users := maps.Clone(l.users)
	for _, i := range l.interfaces {
		if i.onBus && !nominal[i.alias] {
			users[i.slot] = "network interface"
		}
	}
	const why = "give the interface another pciAddress on bus 0, or remove the VMI's annotation kubevirt.io/placePCIDevicesOnRootComplex"
	for _, v := range vfs {
		if user, taken := users[uint64(v.Slot)]; taken {
			return fmt.Errorf("PCI address 0000:00:%02x.0 of the guest, where a VF is to be, is that of a %s: %s", v.Slot, user, why)
		}
		users[uint64(v.Slot)] = "VF"
	}
	for n := range vfs {
		slot, _ := nominalAddress(n)
		if user, taken := users[uint64(slot)]; taken {
			return fmt.Errorf("PCI address 0000:00:%02x.0 of the guest, which must stay empty, is that of a %s: %s", slot, user, why)
		}
	}
	return nil
}

// replace returns the document with these edits made, which do not overlap.
func replace(doc []byte, edits []edit) []byte {
	slices.SortStableFunc(edits, func(a, b edit) int { return cmp.Compare(a.start, b.start) })
	var out []byte
	var at int64
	for _, e := range edits {
		out = append(append(out, doc[at:e.start]...), e.with...)
		at = e.end
	}
	return append(out, doc[at:]...)
}
