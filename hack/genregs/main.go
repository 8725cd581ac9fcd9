// Genregs writes the reference page of the registers of the ixgbevf family to
// the file named by its argument. The page comes from the same table as the
// capture, the restore and the model's masks, and so cannot differ from them.
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
		return fmt.Errorf("usage: genregs FILE")
	}
	rows, err := table()
	if err != nil {
		return err
	}
	var page strings.Builder
	write(&page, rows)
	if err := os.MkdirAll(filepath.Dir(args[0]), 0o755); err != nil {
		return err
	}
	return os.WriteFile(args[0], []byte(page.String()), 0o644)
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
func table() ([]*row, error) {
	rows := map[family.Register]*row{}
	for _, m := range ixgbevf.Members() {
		f, err := ixgbevf.ForDevice(ixgbevf.VendorID, m.Device, ixgbevf.MaxQueuePairs)
		if err != nil {
			return nil, err
		}
		for _, r := range f.Registers() {
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
			if !slices.Contains(at.members, m.Name) {
				at.members = append(at.members, m.Name)
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

func (r *row) name() string {
	if r.first < 0 {
		return r.Name
	}
	return r.Name + "(n)"
}

func (r *row) offset() string {
	if r.first < 0 {
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

func write(w io.Writer, rows []*row) {
	members := ixgbevf.Members()
	fmt.Fprint(w, `# Registers of the ixgbevf family

<!-- Written by hack/genregs from agent/family/ixgbevf; run 'make generate' after a change there. -->

Every register of BAR0 of a virtual function, as the engine, the restore and
the model know it. Offsets are in bytes, registers are 32 bits wide. Of the
elements of the queues' arrays a VF has as many as its PF gives it queue pairs.
What is not listed reads 0 and ignores writes.

## Devices

A VF moves only between devices with the same id.

| Device | Controller | Bounds the length of packets in VFRXDCTL | RSS of its own |
|---|---|---|---|
`)
	yes := map[bool]string{true: "yes", false: "no"}
	for _, m := range members {
		fmt.Fprintf(w, "| %04x:%04x | %s | %s | %s |\n", ixgbevf.VendorID, m.Device, m.Name, yes[m.PacketLength], yes[m.RSS])
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
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s |\n", r.offset(), r.name(), r.Access, r.Class, r.mask(), r.devices(len(members)), r.Why)
	}
}
