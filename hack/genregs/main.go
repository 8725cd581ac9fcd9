// Genregs writes the reference pages of the registers of the families of VFs,
// one for each, to the directory named by its argument. A page comes from the
// same table as the capture, the restore and the model's masks, and so cannot
// differ from them.
package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"compsc.io/compsc/agent/family"
	"compsc.io/compsc/agent/family/igbvf"
	"compsc.io/compsc/agent/family/ixgbevf"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "genregs:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: genregs DIRECTORY")
	}
	for _, describe := range []func() (page, error){ixgbevfPage, igbvfPage} {
		p, err := describe()
		if err != nil {
			return err
		}
		rows, err := table(p.members)
		if err != nil {
			return err
		}
		var text strings.Builder
		write(&text, p, rows)
		if err := os.MkdirAll(args[0], 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(args[0], p.family+"-registers.md"), []byte(text.String()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// page is what a family's page has besides the table of registers.
type page struct {
	family string
	// queues tells how many elements of the queues' arrays a VF has.
	queues string
	// columns are the headings of what members differ in.
	columns []string
	members []member
}

// member is a device of a family.
type member struct {
	id, name string
	// cells has a text for each column of the page.
	cells []string
	table family.Family
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

func ixgbevfPage() (page, error) {
	p := page{family: ixgbevf.Name, columns: []string{"Bounds the length of packets in VFRXDCTL", "RSS of its own"},
		queues: "Of the\nelements of the queues' arrays a VF has as many as its PF gives it queue pairs."}
	for _, m := range ixgbevf.Members() {
		f, err := ixgbevf.ForDevice(ixgbevf.VendorID, m.Device, ixgbevf.MaxQueuePairs)
		if err != nil {
			return page{}, err
		}
		p.members = append(p.members, member{fmt.Sprintf("%04x:%04x", ixgbevf.VendorID, m.Device), m.Name,
			[]string{yes(m.PacketLength), yes(m.RSS)}, f})
	}
	return p, nil
}

func igbvfPage() (page, error) {
	p := page{family: igbvf.Name, columns: []string{"Queue pairs", "Time stamps by SRRCTL"},
		queues: "Of the\nelements of the queues' arrays a VF has as many as it has queue pairs."}
	for _, m := range igbvf.Members() {
		f, err := igbvf.ForDevice(igbvf.VendorID, m.Device)
		if err != nil {
			return page{}, err
		}
		p.members = append(p.members, member{fmt.Sprintf("%04x:%04x", igbvf.VendorID, m.Device), m.Name,
			[]string{fmt.Sprint(m.QueuePairs), yes(m.Timestamp)}, f})
	}
	return p, nil
}

// row is one line of the table: a register, or all elements of an array that
// have the same properties.
type row struct {
	family.Register
	offsets []uint32
	first   int // index of the first element, -1 for no array
	members []string
}

// table gathers the registers of all members, by ascending offset.
func table(members []member) ([]*row, error) {
	rows := map[family.Register]*row{}
	for _, m := range members {
		for _, r := range m.table.Registers() {
			index := -1
			key := r
			if name, rest, array := strings.Cut(r.Name, "("); array {
				if _, err := fmt.Sscanf(rest, "%d)", &index); err != nil {
					return nil, fmt.Errorf("register %s: %w", r.Name, err)
				}
				key.Name = name
			}
			key.Offset = 0
			at := rows[key]
			if at == nil {
				at = &row{Register: key, first: index}
				rows[key] = at
			}
			if !slices.Contains(at.offsets, r.Offset) {
				at.offsets = append(at.offsets, r.Offset)
			}
			if !slices.Contains(at.members, m.name) {
				at.members = append(at.members, m.name)
			}
		}
	}
	var list []*row
	for _, r := range rows {
		if err := r.regular(); err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b *row) int {
		return cmp.Or(cmp.Compare(a.offsets[0], b.offsets[0]), -cmp.Compare(len(a.members), len(b.members)), cmp.Compare(a.Mask, b.Mask))
	})
	return list, nil
}

// stride is the distance between two elements of an array.
func (r *row) stride() uint32 {
	if len(r.offsets) < 2 {
		return 0
	}
	return r.offsets[1] - r.offsets[0]
}

// regular fails for an array that no formula describes.
func (r *row) regular() error {
	for i, off := range r.offsets {
		if off != r.offsets[0]+uint32(i)*r.stride() {
			return fmt.Errorf("the elements of %s are not at equal distances", r.Name)
		}
	}
	return nil
}

// name of a register; that of an array of one is its only element's.
func (r *row) name() string {
	switch {
	case r.first < 0:
		return r.Name
	case len(r.offsets) == 1:
		return fmt.Sprintf("%s(%d)", r.Name, r.first)
	}
	return r.Name + "(n)"
}

func (r *row) offset() string {
	if len(r.offsets) == 1 {
		return fmt.Sprintf("0x%04x", r.offsets[0])
	}
	return fmt.Sprintf("0x%04x + 0x%02x n, n = %d..%d", r.offsets[0], r.stride(), r.first, r.first+len(r.offsets)-1)
}

func (r *row) mask() string {
	switch {
	case r.Mask == 0:
		return "-"
	case r.Modifier != 0:
		return fmt.Sprintf("0x%08x, of which 0x%08x modifies the write", r.Mask, r.Modifier)
	}
	return fmt.Sprintf("0x%08x", r.Mask)
}

func (r *row) devices(all int) string {
	if len(r.members) == all {
		return "all"
	}
	return strings.Join(r.members, ", ")
}

func write(w io.Writer, p page, rows []*row) {
	fmt.Fprintf(w, `# Registers of the %s family

<!-- Written by hack/genregs from agent/family/%[1]s; run 'make generate' after a change there. -->

Every register of BAR0 of a virtual function, as the engine, the restore and
the model know it. Offsets are in bytes, registers are 32 bits wide. %s
What is not listed reads 0 and ignores writes.

## Devices

A VF moves only between devices with the same id.

| Device | Controller | %s |
|---|---|%s
`, p.family, p.queues, strings.Join(p.columns, " | "), strings.Repeat("---|", len(p.columns)))
	for _, m := range p.members {
		fmt.Fprintf(w, "| %s | %s | %s |\n", m.id, m.name, strings.Join(m.cells, " | "))
	}
	fmt.Fprint(w, `
## Classes

| Class | How the state behind a register moves |
|---|---|
| skip | the target's own value is right, or there is no state behind it |
| copy | read on the source, written on the target |
| replay | only operations reach it; they are recorded and done again |
| emulate | read-only for software; the guest is shown hardware plus offset |
| derive | recomputed on the target from memory or from other state |

## Registers

The mask has the bits that software can write, and that are copied.

| Offset | Register | Access | Class | Mask | Devices | Why |
|---|---|---|---|---|---|---|
`)
	for _, r := range rows {
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s |\n", r.offset(), r.name(), r.Access, r.Class, r.mask(), r.devices(len(p.members)), r.Why)
	}
}
